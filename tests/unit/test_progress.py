"""How far a batch is, in a result backend: never in place of how its task ended, never backwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import Celery, states

from docket_celery.store.records import Progress
from docket_celery.task.progress import PROGRESS, tell_progress

TASK = "t1"


@pytest.fixture
def backend(tmp_path: Path) -> Any:
    """A result backend in a database that knows the task as started."""
    app = Celery("progress", backend=f"db+sqlite:///{tmp_path / 'results.db'}", set_as_current=False)
    made: Any = app.backend
    made.store_result(TASK, {"pid": 1}, states.STARTED)
    return made


def at(done: int, stage: int = 1) -> Progress:
    """Return a progress of two stages of nine items."""
    return Progress(done=done, total=9, stage=stage, stages=2)


def test_a_started_task_tells_how_far_it_is(backend: Any) -> None:
    """As the info of a state of its own."""
    tell_progress(backend, TASK, at(3))
    meta = backend.get_task_meta(TASK, cache=False)
    assert (meta["status"], meta["result"]) == (
        PROGRESS,
        {"done": 3, "total": 9, "stage": 1, "stages": 2},
    )


def test_it_only_grows(backend: Any) -> None:
    """A chunk that comes late with its news does not take it back; the next stage begins at 0 again."""
    for progress in (at(5), at(3), at(0, stage=2)):
        tell_progress(backend, TASK, progress)
        last = backend.get_task_meta(TASK, cache=False)["result"]
        assert (last["stage"], last["done"]) == ((2, 0) if progress.stage == 2 else (1, 5))


@pytest.mark.parametrize("state", [states.SUCCESS, states.FAILURE, states.REVOKED])
def test_a_task_that_has_ended_stays_so(backend: Any, state: str) -> None:
    """Whoever waits for it would wait for ever."""
    result = ValueError("sold out") if state == states.FAILURE else None
    backend.store_result(TASK, result, state)
    tell_progress(backend, TASK, at(9))
    assert backend.get_task_meta(TASK, cache=False)["status"] == state


def test_nobody_is_told_of_what_nobody_asks_for(backend: Any) -> None:
    """A task without a result, a batch that does not say, a task that the database does not know."""
    tell_progress(backend, None, at(1))
    tell_progress(backend, TASK, None)
    tell_progress(backend, "unknown", at(1))
    assert backend.get_task_meta(TASK, cache=False)["status"] == states.STARTED
    assert backend.get_task_meta("unknown", cache=False)["status"] == states.PENDING


def test_a_backend_that_fails_does_not_fail_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the batch goes on."""

    class Broken:
        def ResultSession(self) -> Any:  # noqa: N802 -- Celery's name
            raise ConnectionError("the database is away")

    tell_progress(Broken(), TASK, at(1))
    assert "the progress of task t1 could not be stored: the database is away" in caplog.text
