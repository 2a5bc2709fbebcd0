"""Every pool of Celery's runs graphs alike: prefork, threads, solo and gevent, each with a real worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery

from tests.conftest import StartWorker
from tests.integration.apps.book import Book
from tests.integration.apps.lease_app import app, fetch_all, look, meet_another, process
from tests.unit.protos.shop_pb2 import Order

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]

APP = "tests.integration.apps.lease_app"
POOLS = ["prefork", "threads", "solo", "gevent"]
STEPS = ["charge", "reserve", "ship"]
WITHIN_S = 30.0


@pytest.fixture
def book(connect_app: Callable[[Celery], Celery], database_url: str) -> Book:
    """The rows that steps write, in empty tables; the app is connected to the test's servers."""
    connect_app(app)
    made = Book(database_url)
    made.create()
    return made


def seen(result: Any) -> dict[str, Any]:
    """Return what the step of a `look` saw."""
    found: dict[str, Any] = json.loads(result.get(timeout=WITHIN_S).text)
    return found


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_of_any_pool_runs_persisted_and_parallel_graphs(
    start_worker: StartWorker, book: Book, pool: str, record_property: Callable[[str, object], None]
) -> None:
    """A persisted run is saved, three fetches overlap, and steps see Celery's task, logger and contextvars."""
    worker = start_worker(pool, 1 if pool == "prefork" else 2, app=APP)

    shipment = process.apply_async((Order(order_id="1"),), execution_id="one").get(timeout=WITHIN_S)
    assert [act.step for act in book.acts("one")] == STEPS
    assert book.rows("SELECT step_name FROM docket_cache ORDER BY 1") == [("charge",), ("reserve",)]
    assert process.apply_async((Order(order_id="1"),), execution_id="one").get(timeout=WITHIN_S) == shipment
    assert len(book.acts("one")) == len(STEPS), "a run that succeeded runs nothing again"

    spans: list[list[float]] = json.loads(fetch_all.delay(Order()).get(timeout=WITHIN_S).tracking_id)
    assert max(began for began, _ in spans) < min(ended for _, ended in spans), "the fetches do not overlap"
    best_ms = 1000 * min(_elapsed_s(fetch_all.delay(Order())) for _ in range(3))
    record_property(f"three_fetches_ms_{pool}", round(best_ms, 1))

    first = look.apply_async((Order(order_id="first"),))
    facts = seen(first)
    second = look.apply_async((Order(order_id="second"),))
    again = seen(second)
    assert facts["task"] == "lease.look"
    assert (facts["task_id"], again["task_id"]) == (first.id, second.id)
    assert facts["caller"] == f"task {first.id}", "the caller's contextvars are the step's"
    assert facts["execution_id"] == first.id
    assert facts["thread"].startswith("docket-step-"), "steps run on the pool, not on the task's thread"
    log = worker.read_log()
    assert f"lease.look[{first.id}]: order first looks around" in log, "the task logger names the task"
    # One process serves both jobs with the same pool and the same database session.
    same = ("pid", "pool", "backend")
    assert [facts[name] for name in same] == [again[name] for name in same]


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_async_steps_of_two_runs_see_their_own_task_while_they_take_turns(
    start_worker: StartWorker, book: Book, pool: str
) -> None:
    """On one loop of one worker process: `current_task`, its request, and the task logger; none between the turns."""
    worker = start_worker(pool, 2, app=APP)
    jobs = [meet_another.delay(Order(order_id=name)) for name in ("first", "second")]
    for job in jobs:
        present, *seen = json.loads(job.get(timeout=WITHIN_S).text)
        assert present == 2, "the steps did not run at the same time"
        assert seen == [f"{job.id} lease.meet"]
    log = worker.read_log()
    for name, job in zip(("first", "second"), jobs, strict=True):
        assert f"lease.meet[{job.id}]: order {name} has met" in log


def _elapsed_s(result: Any) -> float:
    spans: list[list[float]] = json.loads(result.get(timeout=WITHIN_S).tracking_id)
    return max(ended for _, ended in spans) - min(began for began, _ in spans)


def test_prefork_children_share_nothing_with_a_parent_that_runs_graphs_itself(
    start_worker: StartWorker, book: Book
) -> None:
    """The parent ran graphs and holds open sessions at each fork; each child has threads and sessions of its own."""
    worker = start_worker("prefork", 2, app=APP, env={"LEASE_APP_BUSY_PARENT": "1"})
    parent_runs = book.rows(
        "SELECT convert_from(substring(result FROM 3), 'UTF8') FROM docket_runs"
        " WHERE execution_id LIKE 'parent-%'"
    )
    parent = [json.loads(text[text.index("{") :]) for (text,) in parent_runs]
    assert {facts["pid"] for facts in parent} == {worker.pid}
    assert len(parent) >= 3, "once at import, once before each fork"

    # As long as all children are busy, each takes one.
    jobs = [look.delay(Order(order_id=f"{n}", stock={"tell": 400})) for n in range(4)]
    children = [seen(job) for job in jobs]
    pids = {facts["pid"] for facts in children}
    assert len(pids) == 2
    assert pids <= {child.pid for child in worker.children()}
    backends = {facts["pid"]: facts["backend"] for facts in children}
    assert len(set(backends.values())) == 2, "two children share a database session"
    assert not set(backends.values()) & {facts["backend"] for facts in parent}
    threads = {(facts["pid"], facts["thread_id"]) for facts in children}
    assert not {thread for _, thread in threads} & {facts["thread_id"] for facts in parent}
    # Runs of the children work to their end, lease and heartbeat included.
    orders = [process.delay(Order(order_id=f"order-{n}")) for n in range(4)]
    assert len({order.get(timeout=WITHIN_S).tracking_id for order in orders}) == 4
    assert {act.pid for act in book.acts(step="charge")} <= pids
