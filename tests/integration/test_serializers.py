"""GraphTasks speak JSON whatever the app's other tasks speak; a worker that could not hear them does not start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.movies.graph import MOVIES, movie_graph
from examples.movies.movies_pb2 import EnrichedMovie
from tests.integration.apps import serialized
from tests.integration.apps.serialized import app, echo, enrich, pay
from tests.integration.apps.serving import Urls, serving, unique
from tests.unit.protos.shop_pb2 import Charge, Order

pytestmark = pytest.mark.integration
WAIT_S = 20


@pytest.mark.parametrize("name", ["yaml", "own"])
def test_graph_tasks_speak_json_in_an_app_that_does_not(
    urls: Urls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A task, a batch with its chord, and a retry of each; the app's plain tasks keep its serializer."""
    settings = {"task_serializer": name, "accept_content": ["json", name], "result_accept_content": ["json"]}
    for key, value in settings.items():
        monkeypatch.setitem(app.conf, key, value)
    env = {"SERIALIZED_SETTINGS": json.dumps(settings)}
    with serving(app, urls, tmp_path, env=env):
        order = Order(order_id=unique(name))
        assert pay.delay(order).get(timeout=WAIT_S) == Charge(charge_id=order.order_id)
        assert enrich.delay(MOVIES).get(timeout=WAIT_S) == movie_graph.execute_batch(EnrichedMovie, MOVIES)
        told = echo.apply_async(("plain",), serializer=name).get(timeout=WAIT_S)
    assert told == "plain"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"result_serializer": "yaml"}, "setting result_serializer: 'yaml' cannot carry"),
    ({"result_serializer": "own"}, "setting result_serializer: 'own' cannot carry"),
    ({"accept_content": ["yaml"]}, "setting accept_content: 'json' is not in it"),
    ({"result_accept_content": ["yaml"]}, "setting result_accept_content: 'json' is not in it"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED)
def test_a_worker_whose_settings_keep_json_out_does_not_start(
    urls: Urls, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    """Before the first effect; the setting is named, with what to write."""
    env = {"SERIALIZED_SETTINGS": json.dumps(settings)}
    with (
        pytest.raises(RuntimeError, match=r"worker ended with status [1-9]") as caught,
        serving(app, urls, tmp_path, env=env),
    ):
        pass
    text = str(caught.value)
    assert "docket_celery refuses to start this worker" in text
    assert f"[DC102] {said}" in text
    assert serialized.graph.name not in text
