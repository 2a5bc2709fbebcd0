"""Looking for lost batches: who looks when, and what a look does that goes wrong."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state

from docket_celery import SQLStore, graph_task
from docket_celery.defaults import process_defaults
from docket_celery.errors import StoreUnavailable
from docket_celery.sweep import Schedule, Sweeper
from examples.movies.graph import movie_graph
from examples.movies.movies_pb2 import EnrichedMovie, Movie


@pytest.fixture
def app(tmp_path: Path) -> Generator[Celery]:
    """An app with a batch task and a database; whichever app was current is so again."""
    state: Any = _state
    before = getattr(state._tls, "current_app", None)
    url = f"sqlite:///{tmp_path / 'store.db'}"
    store = SQLStore(url)
    store.migrate()
    store.close()
    made = Celery("sweeping", broker="memory://", backend="cache+memory://")
    made.conf.update(docket_database_url=url, docket_lease_seconds=1)

    @graph_task(made, movie_graph, shared=False)
    def enrich(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    yield made
    state._tls.current_app = before
    process_defaults.close()


def test_forked_processes_share_one_schedule() -> None:
    """What a child writes its parent reads, and the next child too."""
    schedule = Schedule()
    assert schedule.left_s() <= 0
    child = os.fork()
    if child == 0:
        schedule.set_next(time.monotonic() + 1000)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert 900 < schedule.left_s() <= 1000


def test_an_app_without_batches_is_not_swept() -> None:
    """No thread, no connection."""
    before = set(threading.enumerate())
    assert not Sweeper(Celery("nothing", set_as_current=False), Schedule()).start()
    assert set(threading.enumerate()) == before


def test_a_look_finds_nothing_where_nothing_is_lost(app: Celery) -> None:
    """And sends nothing."""
    assert Sweeper(app, Schedule()).sweep() == 0


def test_an_outage_is_told_once_and_looked_through(
    app: Celery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread goes on, one of two with the same schedule at a time, and stops when it is told to."""
    looks: list[int] = []
    enough = threading.Event()

    def fail(self: Sweeper) -> int:
        looks.append(threading.get_ident())
        if len(looks) == 3:
            enough.set()
        raise StoreUnavailable("look for lost runs", "the connection is refused")

    monkeypatch.setattr(Sweeper, "sweep", fail)
    schedule = Schedule()
    sweeper = Sweeper(app, schedule)
    known = set(threading.enumerate())
    assert sweeper.start()
    assert enough.wait(20)
    sweeper.stop()
    for thread in set(threading.enumerate()) - known:
        thread.join(20)
    told = [record for record in caplog.records if "lost batches cannot be looked for" in record.message]
    assert len(told) == 1
    assert schedule.left_s() > 0
