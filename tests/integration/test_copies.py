"""Copies of a delivery whose result Celery has stored before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, states, uuid

from docket_celery.task.retries import is_stored

pytestmark = [
    pytest.mark.integration,
    # Celery's backend calls what redis-py means to drop one day.
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),
]


@pytest.fixture
def app(broker_url: str, result_url: str) -> Celery:
    """An app on the real result backend."""
    return Celery("copies", broker=broker_url, backend=result_url)


def copy_of(task_id: str, **facts: Any) -> SimpleNamespace:
    """What Celery calls the request of a delivery, as far as it matters here."""
    return SimpleNamespace(
        **({"id": task_id, "ignore_result": False, "chord": None, "group": None, "group_index": None} | facts)
    )


def test_a_success_that_is_stored_is_known(app: Celery) -> None:
    """The copy then has nothing to do: links and chain were sent before."""
    task_id = uuid()
    assert not is_stored(app.backend, copy_of(task_id), 1)
    app.backend.store_result(task_id, 1, states.SUCCESS)
    assert is_stored(app.backend, copy_of(task_id), 1)
    assert not is_stored(app.backend, copy_of(task_id, ignore_result=True), 1)


def test_a_failure_that_is_stored_is_no_success(app: Celery) -> None:
    """Its error is raised again, as Celery itself would."""
    task_id = uuid()
    app.backend.store_result(task_id, ValueError("no"), states.FAILURE)
    assert not is_stored(app.backend, copy_of(task_id), 1)


def test_the_part_of_a_chord_that_was_never_counted_is_counted_once(app: Celery) -> None:
    """A worker that dies between storing its result and counting it would leave the chord waiting for ever."""
    backend: Any = app.backend
    task_id, group = uuid(), uuid()
    backend.set_chord_size(group, 2)
    backend.store_result(task_id, 1, states.SUCCESS)
    chord = app.signature("copies.body")
    copy = copy_of(task_id, chord=chord, group=group, group_index=0)
    assert is_stored(backend, copy, 1)
    assert is_stored(backend, copy, 1)
    assert backend.client.zcard(backend.get_key_for_group(group, ".j")) == 1
