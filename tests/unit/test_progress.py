"""How far a batch is, in a result backend: the state PROGRESS, by Celery's own means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, states

from docket_celery import Graph, Progress, graph_task
from docket_celery.task.chords import show_progress
from examples.movies.movies_pb2 import EnrichedMovie, Movie

AT_3 = Progress(done=3, total=9, stage=1, stages=2)
Called = Callable[..., Any]


@pytest.fixture
def called(tmp_path: Path) -> Called:
    """A function that gives the task of a batch as a worker has it, with a database as its result backend."""
    app = Celery("progress", broker="memory://", set_as_current=False)
    graph = Graph("progress")

    @graph.step
    def look(movie: Movie) -> EnrichedMovie:
        return EnrichedMovie(original=movie)

    @graph_task(app, graph, name="progress.look_at_all", shared=False)
    def look_at_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    def called(directory: str = ".", *, ignore_result: bool = False) -> Any:
        app.conf.update(result_backend=f"db+sqlite:///{tmp_path / directory / 'results.db'}")
        task: Any = look_at_all
        task.push_request(id="t1", ignore_result=ignore_result)
        return task

    return called


def test_a_stage_that_was_opened_is_the_info_of_its_task(called: Called) -> None:
    """With a state of its own, beside Celery's."""
    task = called()
    show_progress(task, AT_3)
    found = task.AsyncResult("t1")
    assert (found.state, found.info) == ("PROGRESS", {"done": 3, "total": 9, "stage": 1, "stages": 2})


def test_nothing_is_stored_of_a_task_without_a_result(called: Called) -> None:
    """Nobody can ask for it, and nothing would take it away."""
    task = called(ignore_result=True)
    show_progress(task, AT_3)
    assert task.AsyncResult("t1").state == states.PENDING


def test_a_backend_that_fails_does_not_fail_the_batch(
    called: Called, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the batch goes on."""
    show_progress(called("missing"), AT_3)
    assert "the progress of task t1 could not be stored" in caplog.text
    assert "unable to open database file" in caplog.text
