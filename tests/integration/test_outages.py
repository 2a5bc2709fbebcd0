"""The database goes away under runs and comes back: nothing is lost, nothing saved is done again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest
from celery import Celery

from docket_celery import SQLStore, graph_task
from docket_celery.devserver.postgres import start_postgres
from docket_celery.devserver.processes import ServerProcess
from docket_celery.engine.process.state import process as resources
from docket_celery.store.records import Chunk, ChunkRequest, Lease, RunRequest
from docket_celery.task.sweeper import Schedule, Sweeper
from examples.movies.graph import movie_graph
from examples.movies.movies_pb2 import EnrichedMovie, Movie
from tests.conftest import StartWorker
from tests.infra import servers
from tests.infra.processes import wait_until
from tests.integration.apps.book import Book, RunFacts
from tests.integration.apps.lease_app import app, process
from tests.unit.protos.shop_pb2 import Order, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

APP = "tests.integration.apps.lease_app"
WITHIN_S = 60.0


class Database:
    """A Postgres of the test's own that stops and starts again at the same address.

    The book of the steps is kept elsewhere, in the test run's database: it must answer all the time.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server: ServerProcess | None = start_postgres(directory)
        self.url, self._port = self._server.url, self._server.port
        servers.migrate(self.url)

    def stop(self) -> None:
        """Shut the server down; sessions are ended."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def start(self) -> None:
        """Start it again with its data."""
        self._server = start_postgres(self._directory, port=self._port)

    def run(self, execution_id: str) -> RunFacts | None:
        """Return the run's row, or None."""
        return Book(self.url).run(execution_id)


@pytest.fixture
def database() -> Generator[Database]:
    """A migrated database on a server that may be stopped."""
    # Not below pytest's own folder: the server's account must be able to walk there.
    with tempfile.TemporaryDirectory(prefix="docket-outage-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)
        made = Database(Path(folder) / "pg")
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture
def book(connect_app: Callable[[Celery], Celery], database_url: str) -> Book:
    """The rows that steps write, in empty tables; the app is connected to the test's servers."""
    connect_app(app)
    made = Book(database_url)
    made.create()
    return made


def environment(database: Database, book: Book) -> dict[str, str]:
    """Return a worker's environment: its runs in *database*, its steps' book elsewhere."""
    return {"DOCKET_CELERY_DATABASE_URL": database.url, "LEASE_APP_BOOK_URL": book.url}


def test_a_database_restart_in_mid_run_repeats_nothing_saved(
    start_worker: StartWorker, book: Book, database: Database
) -> None:
    """The restart ends every session while a step runs; its save finds the server again."""
    start_worker("prefork", 1, app=APP, env=environment(database, book))
    result = process.apply_async(
        (Order(order_id="restart", stock={"reserve": 1500}),), execution_id="restart"
    )
    wait_until(lambda: bool(book.acts("restart", "reserve")), within_s=WITHIN_S, what="reserve begins")
    database.stop()
    database.start()
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    assert [act.step for act in book.acts("restart")] == ["charge", "reserve", "ship"]
    run = database.run("restart")
    assert run is not None
    assert (run.state, run.lost, run.failures) == ("SUCCEEDED", 0, 0)


def test_a_job_that_arrives_while_the_database_is_down_waits_for_it(
    start_worker: StartWorker, book: Book, database: Database
) -> None:
    """Its deliveries are parked with a growing wait; none of the task's own retries is used up."""
    worker = start_worker("prefork", 1, app=APP, env=environment(database, book))
    database.stop()
    result = process.apply_async((Order(order_id="down"),), execution_id="down")
    # More than the three retries that the task has.
    wait_until(lambda: worker.read_log().count("Retry in") >= 4, within_s=WITHIN_S, what="the task is parked")
    assert book.acts("down") == [], "no effect is started whose checkpoint could not be written"
    assert result.state == "RETRY"
    database.start()
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    run = database.run("down")
    assert run is not None
    assert (run.state, run.epoch, run.lost, run.failures) == ("SUCCEEDED", 1, 0, 0)


def test_a_run_whose_end_cannot_be_written_ends_when_the_database_is_back(
    start_worker: StartWorker, book: Book, database: Database
) -> None:
    """The database is gone for the rest of the delivery: the next one restores and goes on."""
    worker = start_worker("prefork", 1, app=APP, env=environment(database, book))
    result = process.apply_async((Order(order_id="late", stock={"ship": 1000}),), execution_id="late")
    wait_until(lambda: bool(book.acts("late", "ship")), within_s=WITHIN_S, what="ship begins")
    database.stop()
    wait_until(lambda: "Retry in" in worker.read_log(), within_s=WITHIN_S, what="the task is parked")
    database.start()
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    assert len(book.acts("late", "charge")) == len(book.acts("late", "reserve")) == 1
    run = database.run("late")
    assert run is not None
    assert (run.state, run.epoch, run.lost, run.failures) == ("SUCCEEDED", 2, 0, 0)


def test_a_look_after_an_outage_takes_no_chunk_for_lost(database: Database) -> None:
    """Its lease expired while nobody could extend it; the worker that held it is about to come back."""
    asked = Celery("outage-sweep", broker="memory://", backend="cache+memory://", set_as_current=False)
    asked.conf.update(docket_database_url=database.url, docket_lease_seconds=1)

    @graph_task(asked, movie_graph, name="outage.enrich", shared=False)
    def enrich(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    store = SQLStore(database.url)
    request = RunRequest(
        graph=movie_graph.name,
        execution_id="chunks",
        target="list",
        job=b"",
        job_digest=b"d" * 32,
        owner="opener",
        lease_s=1.0,
        max_deliveries=3,
        task_name=enrich.name,
        task_id="chunks",
    )
    lease = store.acquire(request)
    assert isinstance(lease, Lease)
    store.open_stage(lease, 1, [Chunk(1, 0, 2)], 0, message=b"{}")
    taking = ChunkRequest(
        graph=movie_graph.name,
        execution_id="chunks",
        stage=1,
        lo=0,
        owner="worker",
        lease_s=0.1,
        max_deliveries=3,
        task_id="chunk",
    )
    assert isinstance(store.lease_chunk(taking), Lease)
    database.stop()
    schedule = Schedule()
    sweeper = Sweeper(asked, schedule)
    assert sweeper.start()
    try:
        wait_until(lambda: schedule.away, within_s=WITHIN_S, what="the sweeper meets the outage")
        database.start()
        wait_until(lambda: not schedule.away, within_s=WITHIN_S, what="the sweeper finds the database again")
        # What it held when it could not write is no crash of it.
        back = store.lease_chunk(replace(taking, owner="worker-2", retries=1, ended_cleanly=True))
        assert isinstance(back, Lease)
        assert back.lost == 0
    finally:
        sweeper.stop()
        store.close()
        resources.close_stores()


def test_a_copy_that_cannot_reach_the_database_takes_no_lease_from_its_twin(
    start_worker: StartWorker, book: Book
) -> None:
    """Celery counts its outages as retries of the task; the healthy holder is not taken for dead because of them."""
    visible = {"LEASE_APP_VISIBILITY_S": "2"}
    start_worker("prefork", 2, app=APP, env=visible)
    order = Order(order_id="twin", stock={"reserve:gate": 1})
    result = process.apply_async((order,), execution_id="twin")
    wait_until(lambda: bool(book.acts("twin", "reserve")), within_s=WITHIN_S, what="reserve begins")
    nowhere = {"DOCKET_CELERY_DATABASE_URL": "postgresql://docket@127.0.0.1:1/nowhere"}
    cut_off = start_worker("prefork", 1, app=APP, env=visible | nowhere)
    wait_until(
        lambda: "Retry in" in cut_off.read_log(),
        within_s=WITHIN_S,
        what="a copy comes to the worker without a database",
    )
    book.open_gate("twin")
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    run = book.run("twin")
    assert run is not None
    assert (run.state, run.epoch, run.lost) == ("SUCCEEDED", 1, 0)
    assert [act.step for act in book.acts("twin")] == ["charge", "reserve", "ship"]


def test_outages_in_mid_step_are_no_crashes_of_the_worker(
    start_worker: StartWorker, book: Book, database: Database
) -> None:
    """The worker lives: it gives the run back as soon as it can, however often that happens."""
    short = {"DOCKET_CELERY_LEASE_SECONDS": "3", "DOCKET_CELERY_MAX_DELIVERIES": "3"}
    worker = start_worker("prefork", 1, app=APP, env=environment(database, book) | short)
    order = Order(order_id="outages", stock={"reserve:gate": 1})
    result = process.apply_async((order,), execution_id="outages")
    for begun in range(1, 4):
        wait_until(
            lambda begun=begun: len(book.acts("outages", "reserve")) == begun,  # type: ignore[misc]
            within_s=WITHIN_S,
            what=f"reserve begins, time {begun}",
        )
        parked = worker.read_log().count("Retry in")
        database.stop()
        # Once when the lease is no longer trusted; in the first outage also by deliveries that meet it.
        times = 3 if begun == 1 else 1
        wait_until(
            lambda parked=parked, times=times: worker.read_log().count("Retry in") >= parked + times,  # type: ignore[misc]
            within_s=WITHIN_S,
            what="the task is parked again and again",
        )
        database.start()
    wait_until(
        lambda: len(book.acts("outages", "reserve")) == 4, within_s=WITHIN_S, what="reserve begins again"
    )
    book.open_gate("outages")
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    run = database.run("outages")
    assert run is not None
    assert (run.state, run.lost, run.failures) == ("SUCCEEDED", 0, 0)
    assert len(book.acts("outages", "charge")) == 1
