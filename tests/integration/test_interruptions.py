"""What stops a run from outside on real workers: revocation, limits, shutdowns, dead machines."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError

from tests.conftest import StartWorker
from tests.infra.processes import wait_until
from tests.integration.apps.book import Book, RunFacts
from tests.integration.apps.lease_app import app, process
from tests.unit.protos.shop_pb2 import Order, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]

APP = "tests.integration.apps.lease_app"
WITHIN_S = 40.0
LONG_LEASE = {"DOCKET_CELERY_LEASE_SECONDS": "60"}


@pytest.fixture
def book(connect_app: Callable[[Celery], Celery], database_url: str) -> Book:
    """The rows that steps write, in empty tables; the app is connected to the test's servers."""
    connect_app(app)
    made = Book(database_url)
    made.create()
    return made


def wait_for_step(book: Book, execution_id: str, step: str) -> int:
    """Wait until *step* runs; return the process that runs it."""
    wait_until(
        lambda: bool(book.acts(execution_id, step)),
        within_s=WITHIN_S,
        what=f"step {step} of {execution_id} begins",
    )
    return book.acts(execution_id, step)[0].pid


def wait_for_state(book: Book, execution_id: str, state: str, *, within_s: float) -> RunFacts:
    """Wait until the run's row is in *state* and return it."""

    def reached() -> bool:
        run = book.run(execution_id)
        return run is not None and run.state == state

    wait_until(reached, within_s=within_s, what=f"run {execution_id} is {state}: {book.run(execution_id)}")
    run = book.run(execution_id)
    assert run is not None
    return run


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_a_revoked_run_gives_its_lease_back_and_goes_on_when_submitted_again(
    start_worker: StartWorker, book: Book, pool: str
) -> None:
    """The revoked task ends REVOKED at once; another submission needs no lease to expire."""
    start_worker(pool, 2, app=APP, env=LONG_LEASE)
    order = Order(order_id="revoked", stock={"reserve": 3000})
    result = process.apply_async((order,), execution_id="revoked")
    wait_for_step(book, "revoked", "reserve")
    began = time.monotonic()
    result.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=WITHIN_S)
    assert time.monotonic() - began < 3
    run = wait_for_state(book, "revoked", "WAITING", within_s=5)
    assert (run.lost, run.failures) == (0, 0)

    again = process.apply_async((order,), execution_id="revoked")
    assert isinstance(again.get(timeout=WITHIN_S), Shipment)
    run = wait_for_state(book, "revoked", "SUCCEEDED", within_s=5)
    assert (run.epoch, run.lost) == (2, 0)
    assert [act.step for act in book.acts("revoked")] == ["charge", "reserve", "reserve", "ship"]


def test_a_revoke_that_celery_cannot_carry_out_leaves_the_run_alone(
    start_worker: StartWorker, book: Book
) -> None:
    """Celery's threads cannot be terminated: the run goes on to its end, and its lease stays its own."""
    worker = start_worker("threads", 2, app=APP, env=LONG_LEASE)
    result = process.apply_async((Order(order_id="kept", stock={"reserve": 1500}),), execution_id="kept")
    wait_for_step(book, "kept", "reserve")
    result.revoke(terminate=True)
    wait_until(
        lambda: "does not implement kill_job" in worker.read_log(), within_s=WITHIN_S, what="Celery refuses"
    )
    run = wait_for_state(book, "kept", "SUCCEEDED", within_s=WITHIN_S)
    assert (run.epoch, run.lost) == (1, 0)
    assert [act.step for act in book.acts("kept")] == ["charge", "reserve", "ship"]


def test_a_warm_shutdown_finishes_the_run(start_worker: StartWorker, book: Book) -> None:
    """SIGTERM lets the worker end what it has begun."""
    worker = start_worker("prefork", 1, app=APP)
    result = process.apply_async((Order(order_id="warm", stock={"reserve": 1500}),), execution_id="warm")
    wait_for_step(book, "warm", "reserve")
    worker.send_signal(signal.SIGTERM)
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    assert worker.wait(20) == 0
    run = book.run("warm")
    assert run is not None
    assert (run.state, run.epoch) == ("SUCCEEDED", 1)


@pytest.mark.parametrize(
    ("sent", "remapped"), [(signal.SIGQUIT, {}), (signal.SIGTERM, {"REMAP_SIGTERM": "SIGQUIT"})]
)
def test_a_cold_shutdown_releases_the_lease_and_the_next_worker_goes_on(
    start_worker: StartWorker, book: Book, sent: signal.Signals, remapped: dict[str, str]
) -> None:
    """SIGQUIT stops the run in order: no crash is counted, and the message waits for the next worker."""
    worker = start_worker("prefork", 1, app=APP, env=LONG_LEASE | remapped)
    result = process.apply_async((Order(order_id="cold", stock={"reserve": 2000}),), execution_id="cold")
    wait_for_step(book, "cold", "reserve")
    worker.send_signal(sent)
    worker.wait(20)
    run = wait_for_state(book, "cold", "WAITING", within_s=5)
    assert run.lost == 0
    worker.restart()
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    run = wait_for_state(book, "cold", "SUCCEEDED", within_s=5)
    assert (run.epoch, run.lost) == (2, 0)
    assert len(book.acts("cold", "charge")) == 1


def test_a_worker_that_dies_whole_is_replaced_after_the_visibility_timeout(
    start_worker: StartWorker, book: Book
) -> None:
    """As in a power cut: Redis delivers the message to another worker, which waits for the dead lease."""
    env = {"LEASE_APP_VISIBILITY_S": "3", "DOCKET_CELERY_LEASE_SECONDS": "3"}
    worker = start_worker("prefork", 1, app=APP, env=env)
    result = process.apply_async((Order(order_id="dead", stock={"reserve": 1000}),), execution_id="dead")
    wait_for_step(book, "dead", "reserve")
    worker.kill()
    killed_at = time.monotonic()
    worker.restart()
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    assert time.monotonic() - killed_at < 20
    run = book.run("dead")
    assert run is not None
    assert (run.state, run.epoch, run.lost) == ("SUCCEEDED", 2, 1)
    assert len(book.acts("dead", "charge")) == 1
    assert book.charges() == {"dead": 1}
