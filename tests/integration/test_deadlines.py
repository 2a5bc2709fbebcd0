"""Deadlines hold on every pool of Celery's: of a step's attempt, and of the run, where Celery itself has none."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from tests.conftest import StartWorker
from tests.infra.processes import wait_until
from tests.integration.apps.book import Book
from tests.integration.apps.lease_app import app, process, process_patiently
from tests.unit.protos.shop_pb2 import Order, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]

APP = "tests.integration.apps.lease_app"
POOLS = ["prefork", "threads", "solo", "gevent"]
WITHIN_S = 40.0
LONG_LEASE = {"DOCKET_CELERY_LEASE_SECONDS": "60"}


@pytest.fixture
def book(connect_app: Callable[[Celery], Celery], database_url: str) -> Book:
    """The rows that steps write, in empty tables; the app is connected to the test's servers."""
    connect_app(app)
    made = Book(database_url)
    made.create()
    return made


def wait_for_step(book: Book, execution_id: str, step: str) -> None:
    """Wait until *step* runs."""
    wait_until(
        lambda: bool(book.acts(execution_id, step)),
        within_s=WITHIN_S,
        what=f"step {step} of {execution_id} begins",
    )


def state(book: Book, execution_id: str) -> tuple[str, int, int]:
    """Return state, epoch and crashes of the run's row."""
    run = book.run(execution_id)
    assert run is not None
    return run.state, run.epoch, run.lost


@pytest.mark.parametrize("pool", POOLS)
def test_an_attempt_ends_at_its_timeout_on_any_pool(start_worker: StartWorker, book: Book, pool: str) -> None:
    """A thread is let go, a coroutine cancelled; the next attempts count, and no late result is saved."""
    worker = start_worker(pool, 2, app=APP)
    order = Order(order_id="patient", stock={"stock:hang": 1, "send:hang": 1})
    shipment = process_patiently.apply_async((order,), execution_id="patient").get(timeout=WITHIN_S)
    assert shipment == Shipment(tracking_id="attempt 2, sent at attempt 2")
    rows = book.rows(
        "SELECT step_name, attempts, status FROM docket_executions WHERE execution_id = 'patient' ORDER BY 1"
    )
    assert rows == [("pay", 1, "SUCCEEDED"), ("send", 2, "SUCCEEDED"), ("stock", 2, "SUCCEEDED")]
    saved = book.rows("SELECT output_json->>'reservation_id' FROM docket_cache WHERE step_name = 'stock'")
    assert saved == [("attempt 2",)]
    assert "its thread continues until the step returns" in worker.read_log()


@pytest.mark.parametrize("pool", POOLS)
def test_a_run_ends_at_the_tasks_soft_limit_on_any_pool(
    start_worker: StartWorker, book: Book, pool: str
) -> None:
    """Row and task agree that it failed, at once; a new submission goes on from what was saved."""
    start_worker(pool, 1 if pool == "prefork" else 2, app=APP, env=LONG_LEASE)
    order = Order(order_id="soft", stock={"reserve": 2500})
    result = process.apply_async((order,), execution_id="soft", soft_time_limit=1)
    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=WITHIN_S)
    assert result.state == "FAILURE"
    assert state(book, "soft") == ("FAILED", 1, 0)
    assert book.rows("SELECT step_name FROM docket_cache") == [("charge",)]

    again = process.apply_async((order,), execution_id="soft")
    assert isinstance(again.get(timeout=WITHIN_S), Shipment)
    assert state(book, "soft") == ("SUCCEEDED", 2, 0)
    assert len(book.acts("soft", "charge")) == 1
    # The step of the first delivery slept on: what it returned then is not what was saved.
    assert book.rows(
        "SELECT output_json->>'reservation_id' LIKE '%/2' FROM docket_cache WHERE step_name = 'reserve'"
    ) == [(True,)]


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_a_warm_shutdown_of_any_pool_finishes_the_run(
    start_worker: StartWorker, book: Book, pool: str
) -> None:
    """SIGTERM lets the worker end what it has begun."""
    worker = start_worker(pool, 2, app=APP)
    result = process.apply_async((Order(order_id="warm", stock={"reserve": 1500}),), execution_id="warm")
    wait_for_step(book, "warm", "reserve")
    worker.send_signal(signal.SIGTERM)
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    assert worker.wait(20) == 0
    assert state(book, "warm") == ("SUCCEEDED", 1, 0)


def test_a_soft_shutdown_finishes_what_ends_in_its_time(start_worker: StartWorker, book: Book) -> None:
    """SIGQUIT with ``worker_soft_shutdown_timeout`` waits that long before it stops anything."""
    worker = start_worker("prefork", 1, app=APP, env={"LEASE_APP_SOFT_SHUTDOWN_S": "5"})
    result = process.apply_async((Order(order_id="quick", stock={"reserve": 1000}),), execution_id="quick")
    wait_for_step(book, "quick", "reserve")
    worker.send_signal(signal.SIGQUIT)
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    worker.wait(30)
    assert state(book, "quick") == ("SUCCEEDED", 1, 0)


@pytest.mark.slow
def test_a_soft_shutdown_hands_over_what_does_not(start_worker: StartWorker, book: Book) -> None:
    """After its time the run is stopped in order: no crash is counted, and the next worker goes on with it."""
    env = {**LONG_LEASE, "LEASE_APP_SOFT_SHUTDOWN_S": "1"}
    worker = start_worker("prefork", 1, app=APP, env=env)
    result = process.apply_async((Order(order_id="long", stock={"reserve": 5000}),), execution_id="long")
    wait_for_step(book, "long", "reserve")
    began = time.monotonic()
    worker.send_signal(signal.SIGQUIT)
    worker.wait(30)
    assert time.monotonic() - began < 5, "the shutdown waited for the step, not for its own time"
    assert state(book, "long") == ("WAITING", 1, 0)
    worker.restart()
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    assert state(book, "long") == ("SUCCEEDED", 2, 0)
    assert len(book.acts("long", "charge")) == 1
