"""Looking for lost batches: who looks when, and what a look does that goes wrong."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state, signals
from celery.contrib.testing.worker import start_worker
from kombu.utils.json import dumps
from sqlalchemy import text

from docket_celery import SQLStore, graph_task
from docket_celery.engine.process.state import process
from docket_celery.errors import StoreUnavailable
from docket_celery.store.records import Chunk, Lease, RunRequest
from docket_celery.task import checks, worker
from docket_celery.task.headers import EXECUTION_ID
from docket_celery.task.sweeper import Schedule, Sweeper
from docket_celery.testing.workers import forget_connections
from examples.movies.graph import movie_graph
from examples.movies.movies_pb2 import EnrichedMovie, Movie
from tests.infra.processes import wait_until


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
    made.conf.update(docket_database_url=url, docket_lease_seconds=1, task_default_queue=tmp_path.name)

    @graph_task(made, movie_graph, shared=False)
    def enrich(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    yield made
    state._tls.current_app = before
    process.close_stores()


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


def lose(app: Celery, execution_id: str, message: bytes | None = None) -> None:
    """Leave a run that nobody advances."""
    store = SQLStore(app.conf.docket_database_url)
    task: Any = app.tasks["tests.unit.test_sweep.enrich"]
    again = task.signature(args=([],), headers={EXECUTION_ID: execution_id})
    request = RunRequest(
        graph=movie_graph.name,
        execution_id=execution_id,
        target="list",
        job=b"",
        job_digest=b"d" * 32,
        owner="gone",
        lease_s=1.0,
        max_deliveries=3,
        task_name=task.name,
        task_id=execution_id,
    )
    lease = store.acquire(request)
    assert isinstance(lease, Lease)
    store.open_stage(lease, 1, [Chunk(1, 0, 2)], 0, message=message or dumps(again).encode())
    store.close()
    make_due(app)


def make_due(app: Celery) -> None:
    """Have every run be looked at next, and be found lost."""
    store = SQLStore(app.conf.docket_database_url)
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE docket_runs SET wake_at = '2000-01-01', updated_at = '2000-01-01'"))
    store.close()


def test_what_cannot_be_sent_is_kept(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    """The store tells of a lost run once, then not for long: an outage of the broker must not take that time."""
    for name in ("one", "two"):
        lose(app, name)
    app.conf.update(broker_url="redis://127.0.0.1:1/0", broker_transport_options={"max_retries": 0})
    app.conf.task_publish_retry = False
    sweeper = Sweeper(app, Schedule())
    assert sweeper.sweep() == 0
    assert len([one for one in caplog.records if "the broker cannot be reached" in one.message]) == 1
    app.conf.update(broker_url="memory://")
    forget_connections(app)
    try:
        assert sweeper.sweep() == 2
        assert sweeper.sweep() == 0
        with (
            app.connection_for_read() as connection,
            connection.SimpleQueue(app.conf.task_default_queue) as queue,
        ):
            sent = {queue.get(timeout=5).headers[EXECUTION_ID] for _ in range(2)}
    finally:
        forget_connections(app)
    assert sent == {"one", "two"}


def test_a_message_that_can_never_be_sent_keeps_nobody_waiting(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried for a while, then left to the store; the others of the look are sent at once."""
    lose(app, "broken", b"no message")
    lose(app, "fine")
    sweeper = Sweeper(app, Schedule())
    assert sweeper.sweep() == 1
    for _ in range(30):
        assert sweeper.sweep() == 0
    told = [one for one in caplog.records if "the task of run 'broken' could not be sent" in one.message]
    assert len(told) == 20
    forget_connections(app)


def test_a_run_that_is_found_again_is_sent_once(app: Celery) -> None:
    """The broker is away for long, the store tells of the run more than once: one copy is enough."""
    lose(app, "one")
    app.conf.update(broker_url="redis://127.0.0.1:1/0", broker_transport_options={"max_retries": 0})
    app.conf.task_publish_retry = False
    sweeper = Sweeper(app, Schedule())
    for _ in range(3):
        assert sweeper.sweep() == 0
        make_due(app)
    app.conf.update(broker_url="memory://")
    forget_connections(app)
    try:
        assert sweeper.sweep() == 1
    finally:
        forget_connections(app)


def test_a_worker_that_starts_after_another_in_one_process_leaves_no_sweeper(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of tests end without Celery's shutdown signal; nothing of them stays."""
    # Celery shares each app's tasks with all others: those of other tests' modules are not this one's concern.
    own = [
        task
        for task in checks.graph_tasks(app)
        if task.name.endswith(".enrich") and task.graph is movie_graph
    ]
    for module in (checks, worker):
        monkeypatch.setattr(module, "graph_tasks", lambda _: iter(own))
    # A receiver of this signal keeps Celery from configuring the process's logging.
    signals.setup_logging.connect(leave_logging)
    for _ in range(3):
        with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=20):
            assert len(sweepers()) == 1
        wait_until(lambda: not sweepers(), within_s=10.0, what="the sweeper of the worker ends")
    signals.setup_logging.disconnect(leave_logging)


def leave_logging(**_: object) -> None:
    """Do nothing."""


def sweepers() -> list[threading.Thread]:
    """Return the threads that sweep in this process."""
    return [each for each in threading.enumerate() if each.name == "docket-sweep"]
