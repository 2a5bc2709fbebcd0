"""The child that runs an order is killed at a random moment, again and again; no order is lost or paid twice."""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import pytest
from celery import Celery

from docket_celery.task.result import GraphResult
from tests.conftest import StartWorker
from tests.integration.apps.book import Book
from tests.integration.apps.lease_app import app, process
from tests.unit.protos.shop_pb2 import Order, Shipment

pytestmark = [pytest.mark.integration]

APP = "tests.integration.apps.lease_app"
LANES = 2
WITHIN_S = 60.0
# Longer than any run here: only the retry of the same task may bring an order on, not an expired lease.
ENV = {"DOCKET_CELERY_LEASE_SECONDS": "120"}


@pytest.fixture
def book(connect_app: Callable[[Celery], Celery], database_url: str) -> Book:
    """The rows that steps write, in empty tables; the app is connected to the test's servers."""
    connect_app(app)
    made = Book(database_url)
    made.create()
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One order whose child was killed.

    Attributes:
        aimed_s: From the run's first step to the kill, as drawn.
        running: Whether the run had not ended; else only Celery's result was missing.
        recovery_s: From the kill to the caller's result.
    """

    order_id: str
    aimed_s: float
    running: bool
    recovery_s: float
    shipment: Shipment


def draw_orders(count: int, seed: int) -> list[tuple[Order, float]]:
    """Return orders whose steps take 50 to 150 ms, each with the moment of its kill."""
    chosen = random.Random(seed)
    orders: list[tuple[Order, float]] = []
    for number in range(count):
        stock = {step: chosen.randint(50, 150) for step in ("charge", "reserve", "ship")}
        # Anywhere from the first step's begin up to the storing of Celery's result.
        moment_s = chosen.uniform(0.0, sum(stock.values()) / 1000 + 0.2)
        orders.append((Order(order_id=f"order-{number}", stock=stock), moment_s))
    return orders


def kill_during(book: Book, order: Order, moment_s: float) -> Kill:
    """Submit *order*, kill the child that runs it *moment_s* after its first step began, await the result.

    A run that was quicker than the killer is submitted as another order, so that each kill hits one.
    """
    number = 0
    while True:
        number += 1
        name = f"{order.order_id}-{number}"
        copy = Order(order_id=name, stock=order.stock)
        result = process.apply_async((copy,), execution_id=name)
        pid = _runner(book, name)
        time.sleep(moment_s)  # the moment itself is what is being tested
        if (running := _kill_runner(book, name, pid, result)) is not None:
            break
        assert isinstance(result.get(timeout=WITHIN_S), Shipment)
        moment_s *= 0.9  # or an order that is always quicker would be tried for ever
    killed_at = time.monotonic()
    shipment = result.get(timeout=WITHIN_S)
    recovery_s = time.monotonic() - killed_at
    return Kill(order_id=name, aimed_s=moment_s, running=running, recovery_s=recovery_s, shipment=shipment)


def _runner(book: Book, execution_id: str) -> int:
    deadline = time.monotonic() + WITHIN_S
    while not (acts := book.acts(execution_id)):
        assert time.monotonic() < deadline, f"{execution_id} did not begin"
        time.sleep(0.005)
    return acts[0].pid


def _kill_runner(book: Book, execution_id: str, pid: int, result: GraphResult[Shipment]) -> bool | None:
    """Kill *pid* if it still has the order, and tell whether the run was going on; None if it was too late."""
    child = psutil.Process(pid)
    child.suspend()  # so that what is true now is still true when the signal arrives
    if result.ready():
        child.resume()
        return None
    run = book.run(execution_id)
    child.kill()
    return run is not None and run.state == "RUNNING"


def kill_many(book: Book, count: int, seed: int) -> list[Kill]:
    """Kill *count* children, `LANES` orders at a time."""
    orders = draw_orders(count, seed)
    with ThreadPoolExecutor(LANES) as lanes:
        return list(lanes.map(lambda drawn: kill_during(book, *drawn), orders))


def check(book: Book, kills: Sequence[Kill], seed: int) -> dict[str, object]:
    """Check every promise about the orders, and return the figures."""
    hint = f"seed {seed}"
    names = {kill.order_id for kill in kills}
    ended = dict(book.rows("SELECT execution_id, state FROM docket_runs"))
    assert set(ended.values()) == {"SUCCEEDED"}, hint
    assert names <= set(ended), hint
    charged = book.charges()
    assert set(charged) == set(ended), hint
    assert set(charged.values()) == {1}, (hint, charged)
    lost = book.rows("SELECT count(*) FROM docket_runs WHERE lost > 0")[0][0]
    running = sum(kill.running for kill in kills)
    assert lost == running, (hint, "a kill did not hit the child that ran the order")
    assert running > len(kills) / 2, hint
    # One checkpoint for each run and step, whoever was killed between doing and saving.
    saved = book.rows("SELECT execution_id, count(*) FROM docket_cache GROUP BY 1 HAVING count(*) <> 2")
    assert saved == [], (hint, saved)
    recoveries = sorted(kill.recovery_s for kill in kills)
    assert recoveries[-1] < 30, (hint, recoveries)
    calls = book.rows("SELECT sum(calls) FROM test_ledger")[0][0]
    return {
        "seed": seed,
        "kills": len(kills),
        "in_mid_run": running,
        "p50_s": round(statistics.median(recoveries), 2),
        "max_s": round(recoveries[-1], 2),
        "calls_at_the_provider": int(calls),
        "charges": len(charged),
        "load": round(os.getloadavg()[0], 1),
    }


@pytest.mark.timeout(180)
def test_ten_kills_at_random_moments_lose_and_repeat_nothing(start_worker: StartWorker, book: Book) -> None:
    """Every order ends SUCCESS with one charge, seconds after its child was killed."""
    seed = int(os.environ.get("DOCKET_TEST_SEED", random.SystemRandom().randrange(10**6)))
    start_worker("prefork", LANES, app=APP, env=ENV)
    sys.stdout.write(f"{check(book, kill_many(book, 10, seed), seed)}\n")


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_hundred_kills_at_random_moments_lose_and_repeat_nothing(
    start_worker: StartWorker, book: Book
) -> None:
    """The same, a hundred times; the figures are printed."""
    seed = int(os.environ.get("DOCKET_TEST_SEED", random.SystemRandom().randrange(10**6)))
    start_worker("prefork", LANES, app=APP, env=ENV)
    sys.stdout.write(f"{check(book, kill_many(book, 100, seed), seed)}\n")
