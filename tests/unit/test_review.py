"""What a whole reading of the Celery side found, each held by a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Reject, SoftTimeLimitExceeded
from celery.signals import before_task_publish, worker_init

from docket_celery import (
    Graph,
    GraphTask,
    InvalidArguments,
    InvalidDeclaration,
    MemoryStore,
    RunState,
    Scope,
    StepContext,
    graph_task,
)
from docket_celery.engine.process import heartbeat
from docket_celery.engine.process.state import process
from docket_celery.task import app_settings, checks, worker
from tests.unit.protos.shop_pb2 import Order, Shipment


class BusyError(Exception):
    """A step's own failure."""


@dataclass(frozen=True)
class Starting:
    """What the checks at a worker's start look at."""

    app: Celery
    pool_cls: str = "solo"


def make_app(broker: str = "memory://") -> Celery:
    """Return an app of its own."""
    return Celery("review", broker=broker, set_as_current=False)


def make_graph(name: str, persist: Scope | None = None, store: MemoryStore | None = None) -> Graph:
    """Return a graph of one step, which fails for order "bad" and waits for its end for order "slow"."""
    graph = Graph(name, store=store)

    @graph.step(persist=persist)
    def ship(order: Order, ctx: StepContext) -> Shipment:
        if order.order_id == "bad":
            raise BusyError(order.order_id)
        if order.order_id == "slow":
            ctx.sleep(60)
        return Shipment(tracking_id=threading.current_thread().name)

    return graph


def declare(app: Celery, graph: Graph, **options: Any) -> Any:
    """Declare a task over *graph*."""

    @graph_task(app, graph, name=f"review.{graph.name}", shared=False, **options)
    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    app.finalize()
    return app.tasks[f"review.{graph.name}"]


def name_run(order: Order) -> str:
    """Name a run by its order."""
    return f"order-{order.order_id}"


@contextmanager
def delivered(task: Any, order: Order, **facts: Any) -> Generator[None]:
    """Let *task* see the request of a delivery."""
    facts = {"headers": {}, "retries": 0, "delivery_info": {}, **facts}
    task.push_request(id="T1", args=(order,), kwargs={}, called_directly=False, hostname="here", **facts)
    try:
        yield
    finally:
        task.pop_request()


def published(task: Any, **options: Any) -> dict[str, Any]:
    """Submit a job and return the headers of its message."""
    seen: list[dict[str, Any]] = []

    def note(headers: dict[str, Any] | None = None, **_: Any) -> None:
        seen.append(dict(headers or {}))

    before_task_publish.connect(note, sender=task.name)
    try:
        task.apply_async((Order(order_id="1"),), **options)
    finally:
        before_task_publish.disconnect(note, sender=task.name)
    return seen[0]


def test_a_retry_that_cannot_be_published_stays_with_the_broker() -> None:
    """Celery would reject the message for good, and the run would be lost."""
    task = declare(make_app("nosuch://"), make_graph("unpublished"), autoretry_for=(BusyError,))
    order = Order(order_id="bad")
    with delivered(task, order), pytest.raises(Reject) as caught:
        task.run(order)
    rejected: Any = caught.value
    assert rejected.requeue is True


def test_headers_passed_on_from_a_running_task_name_no_other_job() -> None:
    """Those that speak of one delivery are made anew; others, such as a trace's, travel on."""
    task = declare(make_app(), make_graph("forwarded", Scope.WORKFLOW, MemoryStore()))
    plain = published(task)
    taken = {
        "docket_job_digest": "AAAA",
        "docket_attached": True,
        "docket_released": 1,
        "docket_skipped": 3,
        "traceparent": "00-1",
    }
    found = published(task, headers=taken)
    assert found["docket_job_digest"] == plain["docket_job_digest"]
    assert found["traceparent"] == "00-1"
    assert not {"docket_attached", "docket_released", "docket_skipped"} & found.keys()
    assert "docket_job_digest" not in published(
        declare(make_app(), make_graph("kept-nowhere")), headers=taken
    )
    with pytest.raises(InvalidArguments, match="must be a"):
        task.apply_async((Shipment(),), headers=taken)
    with pytest.raises(InvalidArguments):
        task.apply_async((Order(),), headers={"docket_execution_id": "x" * 256})


def test_the_row_bounds_retries_of_tasks_declared_after_the_app_was_finalized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker looks at all tasks when it starts."""
    monkeypatch.setattr(app_settings.this_worker, "pool", None)
    app = make_app()
    app.finalize()
    task = declare(app, make_graph("late", Scope.WORKFLOW, MemoryStore()))
    # Celery shares each app's tasks with all others: those of other tests' modules are not this one's concern.
    for module in (checks, worker):
        monkeypatch.setattr(module, "graph_tasks", lambda _: iter([task]))
    assert task.max_retries == 3
    worker_init.send(sender=Starting(app))
    assert (task.max_retries, task.declared_max_retries) == (None, 3)


@pytest.mark.parametrize("where", ["task", "app"])
def test_a_message_without_limits_has_those_of_its_task(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in prefork, where Celery looks at the message, then the task, then the app."""
    monkeypatch.setattr(app_settings.this_worker, "pool", "threads")
    app = make_app()
    if where == "app":
        app.conf.task_soft_time_limit = 0.1
    options = {"soft_time_limit": 0.1} if where == "task" else {}
    task = declare(app, make_graph(f"limited_{where}"), **options)
    order = Order(order_id="slow")
    with delivered(task, order), pytest.raises(SoftTimeLimitExceeded):
        task.run(order)
    pool = process.runtime(app_settings.app_settings(app).threads).pool
    deadline = time.monotonic() + 10
    while pool.abandoned() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["execute", "call"])
def test_the_thread_of_a_plain_task_runs_no_step(how: str) -> None:
    """Celery raises its soft limit there, and a step would be blamed and retried."""
    app = make_app()
    graph = make_graph(f"inside_{how}")
    task = declare(app, graph)

    @app.task(name=f"review.plain_{how}", shared=False)
    def plain() -> str:
        order = Order(order_id="1")
        made = graph.execute(Shipment, order) if how == "execute" else task(order)
        return str(made.tracking_id)

    here = threading.current_thread().name
    assert plain.apply().result not in (here, None)
    assert graph.execute(Shipment, Order(order_id="1")).tracking_id == here


def test_a_task_declared_without_a_graph_is_refused() -> None:
    """Its body would run, which is what GraphTask promises not to do."""
    app, wanted = make_app(), make_graph("inherited")

    class ShipOrder(GraphTask[[Order], Shipment]):
        graph = wanted

    for base in (GraphTask, ShipOrder):
        with pytest.raises(InvalidDeclaration, match="pass graph="):

            @app.task(base=base, name="review.bare", lazy=False, shared=False)
            def bare(order: Order) -> Shipment:
                raise NotImplementedError


def test_a_base_class_may_name_the_runs() -> None:
    """Its function takes the messages alone, as that of a class with a graph does."""
    app, wanted = make_app(), make_graph("named")

    class Named(GraphTask[[Order], Shipment]):
        execution_id = name_run

    class ShipOrder(Named, GraphTask[[Order], Shipment]):
        graph = wanted
        name = "review.named"

    assert published(app.register_task(ShipOrder()))["docket_execution_id"] == "order-1"


def test_a_lease_that_no_heartbeat_can_keep_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a later run's heartbeat would keep it alive with nobody advancing its run."""

    def refuse(target: object) -> None:
        raise RuntimeError("can't start new thread")

    store = MemoryStore()
    graph = make_graph("unkept", Scope.WORKFLOW, store)
    with monkeypatch.context() as patched:
        patched.setattr(heartbeat, "_start_native", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            graph.execute(Shipment, Order(order_id="1"), execution_id="R1")
    row = store.find_run("unkept", "R1")
    assert row is not None
    assert row.state is RunState.FAILED
    assert not process.heartbeat(store)._held
    assert graph.execute(Shipment, Order(order_id="1"), execution_id="R1").tracking_id


def test_the_text_of_an_unreadable_job_is_bounded() -> None:
    """It travels through the result backend and every log."""
    task = declare(make_app(), make_graph("bounded"))
    with pytest.raises(InvalidArguments) as caught:
        task.apply_async(({"x" * 100_000: 1},))
    assert len(str(caught.value)) < 5000
