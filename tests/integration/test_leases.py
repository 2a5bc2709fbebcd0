"""Runs under leases on real workers: duplicates wait, dead holders are replaced, stale ones write nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest
import redis
from celery import Celery, chord

from docket_celery import RunQuarantined, StepFailed
from tests.conftest import StartWorker
from tests.infra.processes import wait_until
from tests.integration.apps.book import Act, Book
from tests.integration.apps.lease_app import app, collect, process, process_again
from tests.unit.protos.shop_pb2 import Order, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]

APP = "tests.integration.apps.lease_app"
STEPS = ["charge", "reserve", "ship"]
WITHIN_S = 40.0


@pytest.fixture
def book(connect_app: Callable[[Celery], Celery], database_url: str) -> Book:
    """The rows that steps write, in empty tables; the app is connected to the test's servers."""
    connect_app(app)
    made = Book(database_url)
    made.create()
    return made


def messages(broker_url: str) -> int:
    """Return how many messages Redis holds: queued, or delivered and not acknowledged."""
    with redis.Redis.from_url(broker_url) as client:
        return int(client.llen("celery")) + int(client.hlen("unacked"))


def wait_for_step(book: Book, execution_id: str, step: str, *, times: int = 1) -> int:
    """Wait until *step* runs for the *times*-th time; return the process that runs it."""
    wait_until(
        lambda: len(book.acts(execution_id, step)) >= times,
        within_s=WITHIN_S,
        what=f"step {step} of {execution_id} begins",
    )
    return book.acts(execution_id, step)[times - 1].pid


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_run_longer_than_the_visibility_timeout_runs_once(
    start_worker: StartWorker, book: Book, broker_url: str, pool: str
) -> None:
    """Redis delivers it again and again while it runs; every copy waits, and all submissions get the outcome."""
    worker = start_worker(pool, 3, app=APP, env={"LEASE_APP_VISIBILITY_S": "2"})
    order = Order(order_id="long", stock={"reserve": 5500})
    first = process.apply_async((order,), execution_id="long")
    wait_for_step(book, "long", "reserve")
    # A worker takes it up in time; that it then waits for longer than that does not expire it.
    second = process.apply_async((order,), execution_id="long", expires=3)

    counts: list[int] = []
    while not (first.ready() and second.ready()):
        counts.append(messages(broker_url))
        assert len(counts) < WITHIN_S / 0.1, "no outcome in time"
        time.sleep(0.1)
    ready_at = time.time()

    assert first.get(timeout=1) == second.get(timeout=1)
    acts = book.acts("long")
    assert [act.step for act in acts] == STEPS
    ended = acts[-1].ended_at
    assert ended is not None
    assert ready_at - ended.timestamp() < 5
    run = book.run("long")
    assert run is not None
    assert (run.state, run.epoch, run.lost, run.failures, run.retries) == ("SUCCEEDED", 1, 0, 0, 0)
    log = worker.read_log()
    assert log.count(f"[{first.id}] received") >= 2, "the run was not delivered again while it ran"
    assert "Retry in" not in log
    # Two submissions; for a moment a copy and the delivery that it stands for.
    assert max(counts) <= 4, counts
    wait_until(lambda: messages(broker_url) == 0, within_s=10, what="Redis holds no message any more")


def test_a_chord_over_a_redelivered_run_calls_its_body_once(
    start_worker: StartWorker, book: Book, broker_url: str
) -> None:
    """Waiting copies of a header's task count for no part of the chord."""
    worker = start_worker("prefork", 3, app=APP, env={"LEASE_APP_VISIBILITY_S": "2"})
    slow = Order(order_id="slow", stock={"reserve": 3500})
    header = [process.s(slow), process.s(Order(order_id="quick"))]
    result = chord(header)(collect.s())
    assert result.get(timeout=WITHIN_S) == 2
    assert worker.read_log().count("lease.process") > 2
    slow_id = book.rows("SELECT DISTINCT task_id FROM docket_executions WHERE duration_ms > 3000")[0][0]
    assert worker.read_log().count(f"[{slow_id}] received") >= 2
    assert [act.step for act in book.acts(slow_id)] == STEPS
    # Copies may still be on their way; each ends without starting the body once more.
    wait_until(lambda: messages(broker_url) == 0, within_s=10, what="Redis holds no message any more")
    assert len(book.acts(step="collect")) == 1


def test_a_frozen_holder_is_replaced_and_cannot_write_when_it_thaws(
    start_worker: StartWorker, book: Book
) -> None:
    """After its lease another delivery takes over; the stale owner saves nothing and overrules no state."""
    start_worker("prefork", 2, app=APP, env={"DOCKET_CELERY_LEASE_SECONDS": "2"})
    order = Order(order_id="frozen", stock={"reserve": 1500})
    first = process.apply_async((order,), execution_id="frozen")
    holder = psutil.Process(wait_for_step(book, "frozen", "reserve"))
    holder.suspend()
    try:
        second = process.apply_async((order,), execution_id="frozen")
        shipment = second.get(timeout=WITHIN_S)
    finally:
        holder.resume()
    assert shipment.tracking_id.endswith("/2"), "the reservation is the second delivery's"
    assert first.get(timeout=WITHIN_S) == shipment

    run = book.run("frozen")
    assert run is not None
    assert (run.state, run.epoch, run.lost, run.task_id) == ("SUCCEEDED", 2, 1, second.id)
    wrote = book.rows(
        "SELECT step_name, delivery, cached FROM docket_executions WHERE execution_id = 'frozen' ORDER BY 1, 2"
    )
    # A line from the stale delivery after its charge would show here.
    assert wrote == [("charge", 1, False), ("charge", 2, True), ("reserve", 2, False), ("ship", 2, False)]
    assert book.rows("SELECT count(*) FROM docket_cache") == [(2,)]
    assert [act.step for act in book.acts("frozen")] == ["charge", "reserve", "reserve", "ship"]
    assert book.charges() == {"frozen": 1}
    assert (first.state, second.state) == ("SUCCESS", "SUCCESS")


def test_a_killed_child_is_replaced_within_seconds_not_after_its_lease(
    start_worker: StartWorker, book: Book
) -> None:
    """Celery saw the holder die: its retry of the same task takes the live lease at once and counts it as lost."""
    worker = start_worker("prefork", 2, app=APP, env={"DOCKET_CELERY_LEASE_SECONDS": "60"})
    result = process.apply_async((Order(order_id="killed", stock={"reserve": 800}),), execution_id="killed")
    worker.kill_child(wait_for_step(book, "killed", "reserve"))
    killed_at = time.monotonic()
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    assert time.monotonic() - killed_at < 15
    run = book.run("killed")
    assert run is not None
    assert (run.state, run.epoch, run.lost, run.failures) == ("SUCCEEDED", 2, 1, 0)
    assert [act.step for act in book.acts("killed")] == ["charge", "reserve", "reserve", "ship"]


def test_a_job_that_kills_its_worker_is_quarantined_and_neighbours_finish(
    start_worker: StartWorker, book: Book
) -> None:
    """User code starts exactly `docket_max_deliveries` times; then the caller hears why."""
    start_worker("prefork", 2, app=APP, env={"DOCKET_CELERY_MAX_DELIVERIES": "3"})
    poison = process.apply_async(
        (Order(order_id="poison", stock={"reserve:kill": 1}),), execution_id="poison"
    )
    neighbours = [
        process.apply_async((Order(order_id=f"n{n}", stock={"reserve": 200}),), execution_id=f"n{n}")
        for n in range(6)
    ]
    with pytest.raises(RunQuarantined) as caught:
        poison.get(timeout=WITHIN_S)
    assert caught.value.execution_id == "poison"
    for neighbour in neighbours:
        assert isinstance(neighbour.get(timeout=WITHIN_S), Shipment)
    run = book.run("poison")
    assert run is not None
    assert (run.state, run.lost, run.epoch) == ("QUARANTINED", 3, 3)
    assert [act.delivery for act in book.acts("poison", "reserve")] == [1, 2, 3]
    assert len(book.acts("poison", "charge")) == 1
    # Asked again, it still does not start.
    again = process.apply_async((Order(order_id="poison", stock={"reserve:kill": 1}),), execution_id="poison")
    with pytest.raises(RunQuarantined):
        again.get(timeout=WITHIN_S)
    assert len(book.acts("poison", "reserve")) == 3


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_a_step_longer_than_the_lease_keeps_it(start_worker: StartWorker, book: Book, pool: str) -> None:
    """The heartbeat extends the lease of 1.5 s for as long as the step takes, in every pool."""
    start_worker(pool, 2, app=APP, env={"DOCKET_CELERY_LEASE_SECONDS": "1.5"})
    hog = {"reserve:hog": 1} if pool == "gevent" else {}
    result = process.apply_async(
        (Order(order_id="slow", stock={"reserve": 3500, **hog}),), execution_id="slow"
    )
    assert isinstance(result.get(timeout=WITHIN_S), Shipment)
    run = book.run("slow")
    assert run is not None
    assert (run.state, run.epoch, run.lost) == ("SUCCEEDED", 1, 0)
    assert [act.step for act in book.acts("slow")] == STEPS


def test_retries_are_counted_once_for_all_submissions_of_a_run(start_worker: StartWorker, book: Book) -> None:
    """A second submission joins the attempts that the first one has; nobody's retry starts them anew."""
    start_worker("prefork", 2, app=APP)
    order = Order(order_id="closed", stock={"reserve": 300, "reserve:fail": 1})
    first = process_again.apply_async((order,), execution_id="closed")
    wait_for_step(book, "closed", "reserve")
    second = process_again.apply_async((order,), execution_id="closed")
    for result in (first, second):
        with pytest.raises(StepFailed) as caught:
            result.get(timeout=WITHIN_S)
        assert caught.value.step == "reserve"
    # One delivery and max_retries=2 more of them, whoever made them.
    assert len(book.acts("closed", "reserve")) == 3
    run = book.run("closed")
    assert run is not None
    assert (run.state, run.lost, run.failures) == ("FAILED", 0, 2)
    assert not _overlap(book.acts("closed"))


def _overlap(acts: list[Act]) -> bool:
    """Tell whether any act began before an earlier delivery's ended."""
    return any(
        earlier.delivery < later.delivery and (earlier.ended_at is None or later.began_at < earlier.ended_at)
        for earlier in acts
        for later in acts
    )
