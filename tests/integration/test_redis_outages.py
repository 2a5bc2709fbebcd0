"""Redis goes away under runs and comes back with its data: callers hear how their runs really ended."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from docket_celery.devserver.processes import ServerProcess
from docket_celery.devserver.redis import start_redis
from docket_celery.testing.workers import Servers, pointed_at
from tests.conftest import StartWorker
from tests.infra.processes import wait_until
from tests.integration.apps.book import Book
from tests.integration.apps.lease_app import app, note, process
from tests.unit.protos.shop_pb2 import Order, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

APP = "tests.integration.apps.lease_app"
WITHIN_S = 60.0


class Redis:
    """A Redis of the test's own that keeps its data in an append-only file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server: ServerProcess | None = start_redis(directory, durable=True)
        self.url, self._port = self._server.url, self._server.port

    def stop(self) -> None:
        """Shut the server down, its data written."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def start(self) -> None:
        """Start it again with its data, at the same address."""
        self._server = start_redis(self._directory, durable=True, port=self._port)


@pytest.fixture
def redis() -> Generator[Redis]:
    """A Redis that may be stopped."""
    # Not below pytest's own folder: the server's account must be able to walk there.
    with tempfile.TemporaryDirectory(prefix="docket-outage-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)
        made = Redis(Path(folder) / "redis")
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture
def book(_celery_connections: None, database_url: str) -> Book:
    """The rows that steps write, in empty tables."""
    made = Book(database_url)
    made.create()
    return made


def environment(servers: Servers) -> dict[str, str]:
    """Return a worker's environment: these servers, the settings of `configure`, short waits for the broker."""
    return {
        "CELERY_BROKER_URL": servers.broker_url,
        "CELERY_RESULT_BACKEND": servers.result_url,
        "LEASE_APP_CONFIGURED": "1",
    }


@pytest.mark.parametrize("pool", ["prefork", "threads"])
@pytest.mark.parametrize("ends", ["afterwards", "meanwhile"])
def test_a_cut_from_redis_neither_revokes_a_run_nor_hides_its_result(
    start_worker: StartWorker, book: Book, redis: Redis, pool: str, ends: str
) -> None:
    """One Redis holds broker and results; the run goes on without it and its caller gets the message."""
    servers = Servers(broker_url=redis.url, result_url=redis.url, database_url=book.url)
    worker = start_worker(pool, 1, app=APP, env=environment(servers))
    with pointed_at(app, servers):
        result = process.apply_async((Order(order_id="cut", stock={"reserve:gate": 1}),), execution_id="cut")
        wait_until(lambda: bool(book.acts("cut", "reserve")), within_s=WITHIN_S, what="reserve begins")
        redis.stop()
        wait_until(
            lambda: "Connection to broker lost" in worker.read_log(),
            within_s=WITHIN_S,
            what="the cut is seen",
        )
        if ends == "meanwhile":
            book.open_gate("cut")
            wait_until(lambda: state_of(book, "cut") == "SUCCEEDED", within_s=WITHIN_S, what="the run ends")
            wait_until(
                lambda: "Connection" in worker.read_log().rpartition("lost")[2],
                within_s=WITHIN_S,
                what="the worker tries to connect",
            )
        redis.start()
        if ends == "afterwards":
            book.open_gate("cut")
        assert isinstance(result.get(timeout=WITHIN_S), Shipment)
        assert result.state == "SUCCESS"
    assert state_of(book, "cut") == "SUCCEEDED"
    assert len(book.acts("cut", "charge")) == len(book.acts("cut", "reserve")) == 1


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_run_whose_link_cannot_be_sent_is_not_told_as_failed(
    start_worker: StartWorker, book: Book, redis: Redis, result_url: str, pool: str
) -> None:
    """The broker alone is away when the run ends: the caller hears SUCCESS, and the linked task runs later."""
    servers = Servers(broker_url=redis.url, result_url=result_url, database_url=book.url)
    worker = start_worker(pool, 1, app=APP, env=environment(servers))
    with pointed_at(app, servers):
        order = Order(order_id="link", stock={"ship:gate": 1})
        result = process.apply_async((order,), execution_id="linked", link=note.s())
        wait_until(lambda: bool(book.acts("linked", "ship")), within_s=WITHIN_S, what="ship begins")
        redis.stop()
        wait_until(
            lambda: "Connection to broker lost" in worker.read_log(),
            within_s=WITHIN_S,
            what="the cut is seen",
        )
        book.open_gate("linked")
        wait_until(
            lambda: state_of(book, "linked") == "SUCCEEDED" and "OperationalError" in worker.read_log(),
            within_s=WITHIN_S,
            what="the link cannot be sent",
        )
        redis.start()
        assert isinstance(result.get(timeout=WITHIN_S), Shipment)
        wait_until(lambda: bool(book.acts("link", "note")), within_s=WITHIN_S, what="the linked task runs")
    assert len(book.acts("linked", "charge")) == 1


def state_of(book: Book, execution_id: str) -> str | None:
    """Return the state of a run, or None."""
    run = book.run(execution_id)
    return None if run is None else run.state
