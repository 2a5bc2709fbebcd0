"""``docket_threads = 0`` at depth: eager tasks, stores, and several callers at once, each on its own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from typing import Annotated, Any

import pytest
from celery import Celery, current_task

from docket_celery import GraphTask, Named, SQLStore, graph_task
from docket_celery.errors import StepFailed
from docket_celery.graph import Graph
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import FixedBackoff, RetryPolicy, Scope
from docket_celery.store import MemoryStore
from tests.unit.graphs import WAIT_S, reached, start
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Shipment


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKET_CELERY_THREADS", "0")


@pytest.fixture
def memory_store() -> Generator[SQLStore]:
    """SQLite in memory, which is one connection: of another thread it could not even be used."""
    store = SQLStore("sqlite://")
    store.migrate()
    yield store
    store.close()


def eager_task(graph: Graph, **options: Any) -> GraphTask[[Order], Shipment]:
    """Return a task of an eager app that makes a Shipment."""
    app = Celery("inline", set_as_current=False)
    app.conf.task_always_eager = True

    @graph_task(app, graph, name="inline.ship", shared=False, **options)
    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    return ship_order


def test_an_eager_task_keeps_its_steps_in_sqlite_in_memory(memory_store: SQLStore) -> None:
    """The second submission goes on where the first one failed; the third finds the run ended."""
    graph, called = Graph("inline", store=memory_store), list[str]()

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order, ctx: StepContext) -> Charge:
        called.append(f"charge {threading.get_ident()}")
        return Charge(charge_id=ctx.idempotency_key)

    @graph.step(persist=Scope.GLOBAL)
    async def label(order: Order) -> Label:
        await asyncio.sleep(0)
        called.append(f"label {threading.get_ident()}")
        return Label(text=order.order_id)

    @graph.step
    def ship(charge: Charge, label: Label) -> Shipment:
        called.append(f"ship {threading.get_ident()}")
        if len(called) == 3:
            raise ConnectionError("no carrier")
        return Shipment(tracking_id=f"{charge.charge_id} {label.text}")

    task, order = eager_task(graph), Order(order_id="7")
    with pytest.raises(StepFailed, match="no carrier"):
        task.apply_async((order,), execution_id="o-7").get()
    here = threading.get_ident()
    assert called == [f"charge {here}", f"label {here}", f"ship {here}"]
    # A failed run is over for this id: submitting it again starts it anew, with what it had saved.
    shipped = task.apply_async((order,), execution_id="o-7").get()
    assert called[3:] == [f"ship {here}"]
    assert task.apply_async((order,), execution_id="o-7").get() == shipped
    assert len(called) == 4
    # Another run shares the GLOBAL step alone.
    task.apply_async((order,), execution_id="o-8").get()
    assert [name.partition(" ")[0] for name in called[4:]] == ["charge", "ship"]


def test_an_eager_task_is_retried_on_the_calling_thread() -> None:
    """Celery's own retries of an eager task, after the step's own are used up."""
    graph, seen = Graph("inline"), list[tuple[int, str, int]]()

    @graph.step(retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0)))
    def ship(order: Order, ctx: StepContext) -> Shipment:
        seen.append((ctx.attempt, str(current_task.request.id), threading.get_ident()))
        if len(seen) < 4:
            raise ConnectionError("no carrier")
        return Shipment(tracking_id=current_task.name)

    task = eager_task(graph, autoretry_for=(ConnectionError,), max_retries=3)
    shipped = task.apply_async((Order(),), task_id="t-1").get()
    assert shipped == Shipment(tracking_id="inline.ship")
    here = threading.get_ident()
    assert seen == [(1, "t-1", here), (2, "t-1", here), (1, "t-1", here), (2, "t-1", here)]


def test_callers_on_several_threads_do_not_meet() -> None:
    """Each drives its own run, though both are inside a step at the same time."""
    graph, meet = Graph("inline"), threading.Barrier(2)

    @graph.step
    def charge(order: Order) -> Charge:
        meet.wait(WAIT_S)
        return Charge(charge_id=str(threading.get_ident()))

    @graph.step
    async def ship(charge: Charge) -> Shipment:
        await asyncio.sleep(0.001)
        return Shipment(tracking_id=f"{charge.charge_id} {threading.get_ident()}")

    def call() -> tuple[Shipment, int]:
        return graph.execute(Shipment, Order()), threading.get_ident()

    for future in [start(call), start(call)]:
        shipped, here = future.result(WAIT_S)
        assert shipped == Shipment(tracking_id=f"{here} {here}")


def test_two_callers_compute_a_shared_step_once() -> None:
    """The second one waits on its own thread until the first one's checkpoint is there."""
    graph, computed = Graph("inline", store=MemoryStore()), list[int]()
    inside, go_on = threading.Event(), threading.Event()

    @graph.step(persist=Scope.GLOBAL)
    def charge(order: Order) -> Charge:
        computed.append(threading.get_ident())
        inside.set()
        reached(go_on)
        return Charge(charge_id="once")

    first = start(lambda: graph.execute(Charge, Order(order_id="1")))
    reached(inside)
    second = start(lambda: graph.execute(Charge, Order(order_id="1")))
    with pytest.raises(TimeoutError):
        second.result(0.2)
    go_on.set()
    assert first.result(WAIT_S) == second.result(WAIT_S) == Charge(charge_id="once")
    assert len(computed) == 1


def test_two_callers_of_one_run_get_one_outcome() -> None:
    """The second one attaches: it waits on its own thread while the first one has the lease."""
    graph, called = Graph("inline", store=MemoryStore()), list[str]()
    inside, go_on = threading.Event(), threading.Event()

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        called.append("charge")
        inside.set()
        reached(go_on)
        return Charge(charge_id="once")

    first = start(lambda: graph.execute(Charge, Order(), execution_id="r"))
    reached(inside)
    second = start(lambda: graph.execute(Charge, Order(), execution_id="r"))
    with pytest.raises(TimeoutError):
        second.result(0.2)
    go_on.set()
    assert first.result(WAIT_S) == second.result(WAIT_S) == Charge(charge_id="once")
    assert called == ["charge"]


def test_equal_items_and_steps_with_one_cache_wait_for_no_thread() -> None:
    """Where the first one fails and waits for its retry, the others look again until it has ended."""
    graph, calls = Graph("inline", store=MemoryStore()), list[str]()
    retry = RetryPolicy(backoff=FixedBackoff(0.2))

    def compute(order: Order) -> Charge:
        calls.append(order.order_id)
        if len(calls) == 1:
            raise ConnectionError("again")
        return Charge(charge_id=f"{len(calls)}")

    @graph.step(persist=Scope.GLOBAL, cache="twins", retry=retry)
    def first(order: Order) -> Annotated[Charge, Named("first")]:
        return compute(order)

    @graph.step(persist=Scope.GLOBAL, cache="twins", retry=retry)
    def second(order: Order) -> Annotated[Charge, Named("second")]:
        return compute(order)

    @graph.step
    def ship(one: Annotated[Charge, Named("first")], other: Annotated[Charge, Named("second")]) -> Shipment:
        return Shipment(tracking_id=f"{one.charge_id}, {other.charge_id}")

    made = start(lambda: graph.execute_batch(Shipment, [Order(order_id="1")] * 3)).result(WAIT_S)
    assert made == [Shipment(tracking_id="2, 2")] * 3
    assert calls == ["1", "1"]
