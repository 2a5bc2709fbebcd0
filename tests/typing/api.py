"""The public API as type checkers see it. Never executed: `test_typing.py` runs the checkers over it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import assert_type

from celery import Celery
from google.protobuf.message import Message

from docket_celery import (
    BatchResult,
    ExponentialBackoff,
    FixedBackoff,
    Graph,
    GraphResult,
    GraphTask,
    Plan,
    RetryPolicy,
    Scope,
    StartedRun,
    StepContext,
    StepFailed,
    StepOptions,
    configure,
    current_context,
    graph_task,
    settings,
    shared_graph_task,
)
from docket_celery.store import MemoryStore, SQLStore
from workers.orders_pb2 import ChargeResult, Order, Reservation, Shipment

app = Celery("shop")
checkout = Graph("checkout")
order = Order(order_id="17", amount_cents=1000)
billing = StepOptions(persist=Scope.WORKFLOW, retry=RetryPolicy(max_attempts=3, backoff=FixedBackoff(1)))

# --- steps keep their types ------------------------------------------------------------------------------------


@checkout.step
def reserve(order: Order, charge: ChargeResult) -> Reservation:
    """Plain decorator."""
    return Reservation(reservation_id=f"{order.order_id}/{charge.charge_id}")


@checkout.step(
    name="charge",
    persist=Scope.GLOBAL,
    ttl=timedelta(days=1),
    version="2",
    key=lambda order: order,
    retry=RetryPolicy(max_attempts=2, backoff=ExponentialBackoff(initial=0, maximum=timedelta(seconds=5))),
    timeout=2.5,
    retriable=(OSError, TimeoutError),
    renamed_from=("pay",),
    max_concurrent=4,
)
def charge(order: Order, ctx: StepContext) -> ChargeResult:
    """Every option."""
    assert_type(ctx.idempotency_key, str)
    assert_type(ctx.attempt, int)
    ctx.check()
    return ChargeResult(charge_id=ctx.idempotency_key, amount_cents=order.amount_cents)


@checkout.step(
    billing, timeout=30, retriable=lambda error: isinstance(error, OSError), on_input_change="error"
)
async def ship(charge: ChargeResult, reservation: Reservation) -> Shipment:
    """Preset with changes, coroutine."""
    return Shipment(tracking_number=charge.charge_id + reservation.reservation_id)


class Ship:
    """A step with state."""

    def compute(self, reservation: Reservation) -> Shipment:
        """Ship."""
        return Shipment(tracking_number=reservation.reservation_id)


other = Graph("other", store=MemoryStore())
other.register(Ship(), name="ship", retry=RetryPolicy())
other.register(Ship().compute, billing, timeout=1)


@contextmanager
def open_ship() -> Generator[Ship]:
    """A factory with clean-up."""
    yield Ship()


other.register(Ship, factory=Ship)
other.register(Ship, billing, factory=Ship, name="built", max_concurrent=2)
other.register(Ship, factory=open_ship, name="managed")

as_reserve: Callable[[Order, ChargeResult], Reservation] = reserve
as_charge: Callable[[Order, StepContext], ChargeResult] = charge
assert_type(reserve(order, charge(order, current_context())), Reservation)

# --- running in process ----------------------------------------------------------------------------------------

assert_type(checkout.execute(Shipment, order), Shipment)
assert_type(checkout.start(Shipment, order), StartedRun[Shipment])
assert_type(checkout.start(Shipment, order, timeout=2).result(1.5), Shipment)
assert_type(checkout.start(Shipment, order).cancel("why"), bool)


async def handler() -> None:
    """On an asyncio loop."""
    assert_type(await checkout.aexecute(Shipment, order, execution_id="order-17", timeout=2.5), Shipment)


assert_type(
    checkout.execute(
        Shipment,
        order,
        execution_id="order-17",
        context={"tenant": 7},
        max_concurrency=2,
        timeout=timedelta(minutes=1),
        store=SQLStore("sqlite:///:memory:"),
    ),
    Shipment,
)
assert_type(checkout.plan(Shipment, Order), Plan)
assert_type(checkout.plan(Shipment).levels, tuple[tuple[str, ...], ...])
assert_type(list(checkout.plan(Shipment)), list[str])
checkout.validate(Order)

# --- entries of a shared step ----------------------------------------------------------------------------------


@checkout.step(persist=Scope.GLOBAL, cache="carriers", ttl=timedelta(hours=1))
async def find_carrier(order: Order) -> Reservation:
    """An async step: a refresh returns what it makes, not the coroutine."""
    return Reservation()


assert_type(checkout.forget(find_carrier, order), bool)
assert_type(checkout.refresh(find_carrier, order, timeout=3), Reservation)
assert_type(checkout.refresh(charge, order), ChargeResult)
assert_type(checkout.refresh("find_carrier", order, context={"user": 7}), Message)

# --- tasks: three typed declarations ---------------------------------------------------------------------------


@graph_task(app, checkout, queue="orders", execution_id=lambda order: f"order-{order.order_id}")
def process_order(order: Order) -> Shipment:
    """On an app."""
    raise NotImplementedError


@graph_task(app, checkout, chunk_size=10)
def process_all(orders: list[Order]) -> list[Shipment]:
    """A batch."""
    raise NotImplementedError


class ProcessSome(GraphTask[[list[Order]], BatchResult[Shipment]]):
    """A batch whose items may fail, declared by its types."""

    graph = checkout


def batches(some: ProcessSome) -> None:
    """What comes back of batches."""
    assert_type(process_all.delay([order]), GraphResult[list[Shipment]])
    assert_type(process_all.delay([order]).get(), list[Shipment])
    assert_type(some.delay([order]).get(), BatchResult[Shipment])
    assert_type(process_all.submit_batch(iter([order])), GraphResult[list[Shipment]])
    for shipment in process_all.submit_batch([order], max_concurrency=3).stream(timeout=3):
        assert_type(shipment, Shipment)
    assert_type(list(some.submit_batch([order]).stream()), list[Shipment | None])
    assert_type(process_all.handle("orders-1").cancel("not needed"), bool)


@shared_graph_task(checkout, max_retries=5)
def process_shared(order: Order, charge: ChargeResult) -> Shipment:
    """On whichever app there is."""
    raise NotImplementedError


class ProcessOrder(GraphTask[[Order], Shipment]):
    """As a class."""

    graph = checkout


process_class = ProcessOrder()

assert_type(process_order(order), Shipment)
assert_type(process_order.delay(order), GraphResult[Shipment])
assert_type(process_order.delay(order).get(), Shipment)
assert_type(process_order.delay(order=order).get(timeout=3), Shipment)
process_order.delay_on_commit(order)
process_order.delay_on_commit(order=order)
assert_type(process_order.apply_async((order,), execution_id="order-17", context={"a": 1}).get(), Shipment)
assert_type(process_order.AsyncResult("id").get(), Shipment)

assert_type(process_shared(order, charge=ChargeResult()), Shipment)
assert_type(process_shared.delay(order, ChargeResult()).get(), Shipment)
assert_type(process_shared.apply_async((order, ChargeResult()), countdown=3).get(), Shipment)

assert_type(process_class(order), Shipment)
assert_type(process_class.delay(order).get(), Shipment)
assert_type(process_class.apply_async((order,)).get(), Shipment)

# --- around it -------------------------------------------------------------------------------------------------

changed = configure(app)
assert_type(changed[0].key, str)
assert_type(settings(threads=4).threads, int)
try:
    process_order.delay(order).get()
except StepFailed as failure:
    assert_type(failure.step, str)
    assert_type(failure.caused_by(OSError), bool)
