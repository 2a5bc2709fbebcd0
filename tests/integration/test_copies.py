"""Copies of a delivery whose result Celery has stored before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import Celery, states, uuid
from celery.app.task import Context

from docket_celery.task.backends import is_stored, patient

pytestmark = [
    pytest.mark.integration,
    # Celery's backend calls what redis-py means to drop one day.
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),
]


@pytest.fixture
def app(broker_url: str, result_url: str) -> Celery:
    """An app on the real result backend."""
    return Celery("copies", broker=broker_url, backend=result_url)


def copy_of(task_id: str, **facts: Any) -> Any:
    """Return the request of a delivery, as Celery has it."""
    return Context(
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


@pytest.mark.parametrize("stored", ["SUCCESS", "STARTED"])
def test_the_error_of_a_copy_replaces_no_success(tmp_path: Path, stored: str) -> None:
    """A database takes any state for any task: a copy that fails after the original succeeded leaves its result."""
    app = Celery("copies", backend=f"db+sqlite:///{tmp_path / 'results.db'}")
    task_id = uuid()
    app.backend.store_result(task_id, "the result", stored)
    facts = {"delivery_info": {"redelivered": True}, "headers": {}, "chain": None, "errbacks": None}
    copy = copy_of(task_id, **facts)
    patient(app.backend).mark_as_failure(task_id, ValueError("the copy's"), request=copy)
    assert app.backend.get_state(task_id) == ("SUCCESS" if stored == "SUCCESS" else "FAILURE")
