"""Runs that take as long as their order says, and die where it says: for tests of leases and deliveries.

An order's ``stock`` gives each step's milliseconds (``reserve``) and what shall happen in it (``reserve:kill``).
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import signal
import threading
import time
from typing import Any

from celery import Celery, current_task, signals
from celery.utils.log import get_task_logger

from docket_celery import (
    AbortError,
    FixedBackoff,
    Graph,
    RetryPolicy,
    Scope,
    StepContext,
    configure,
    graph_task,
)
from docket_celery.engine.process import state
from docket_celery.store import SQLStore
from tests.integration.apps import book
from tests.unit.protos.shop_pb2 import Address, Charge, Label, Money, Order, Reservation, Shipment

app = Celery("lease_app")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1
app.conf.worker_soft_shutdown_timeout = float(os.environ.get("LEASE_APP_SOFT_SHUTDOWN_S", "0"))
if "LEASE_APP_VISIBILITY_S" in os.environ:
    app.conf.broker_transport_options = {
        "visibility_timeout": int(os.environ["LEASE_APP_VISIBILITY_S"]),
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }

if "LEASE_APP_CONFIGURED" in os.environ:
    configure(app)

logger = get_task_logger(__name__)
caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="nobody")


def do(ctx: StepContext, order: Order) -> None:
    """Spend the step's time, in the way the order asks for."""
    spend_s = order.stock.get(ctx.step, 0) / 1000
    with book.act(ctx):
        if order.stock.get(f"{ctx.step}:kill", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if order.stock.get(f"{ctx.step}:fail", 0):
            raise ConnectionError("the warehouse is closed")
        if order.stock.get(f"{ctx.step}:abort", 0):
            raise AbortError("sold out")
        if order.stock.get(f"{ctx.step}:gate", 0):
            book.await_gate(ctx)
        if order.stock.get(f"{ctx.step}:hog", 0):
            hog(spend_s)
        else:
            time.sleep(spend_s)


def hog(seconds: float) -> None:
    """Use the CPU without ever giving way to other greenlets."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(1000))


checkout = Graph("lease-checkout")


@checkout.step(persist=Scope.WORKFLOW)
def charge(order: Order, ctx: StepContext) -> Charge:
    """Charge the card at a provider that honours idempotency keys."""
    book.charge(ctx, order.order_id)
    do(ctx, order)
    return Charge(charge_id=ctx.idempotency_key, amount_cents=order.amount_cents)


@checkout.step(persist=Scope.WORKFLOW)
def reserve(order: Order, charge: Charge, ctx: StepContext) -> Reservation:
    """Reserve once paid."""
    do(ctx, order)
    return Reservation(reservation_id=f"{charge.charge_id}/{ctx.delivery}")


@checkout.step
def ship(order: Order, reservation: Reservation, ctx: StepContext) -> Shipment:
    """Ship what is reserved."""
    do(ctx, order)
    return Shipment(tracking_id=reservation.reservation_id)


@graph_task(app, checkout, name="lease.process")
def process(order: Order) -> Shipment:
    """Take an order from payment to shipment."""
    raise NotImplementedError


@graph_task(app, checkout, name="lease.process_again", autoretry_for=(ConnectionError,), max_retries=2)
def process_again(order: Order) -> Shipment:
    """The same, with Celery's own retries."""
    raise NotImplementedError


@app.task(name="lease.note")  # type: ignore[misc, unused-ignore] # celery's decorators are untyped
def note(shipment: object) -> str:
    """Write down that the task linked to a run was sent; return what it was given, as text."""
    with book.open_database() as connection:
        connection.execute(
            "INSERT INTO test_acts (execution_id, step, delivery, pid) VALUES ('link', 'note', 1, 0)"
        )
    return str(type(shipment).__name__)


@app.task(name="lease.collect")  # type: ignore[misc, unused-ignore] # celery's decorators are untyped
def collect(shipments: list[Any]) -> int:
    """Say how many shipments the chord's header made, and write down that the body ran."""
    with book.open_database() as connection:
        connection.execute(
            "INSERT INTO test_acts (execution_id, step, delivery, pid) VALUES ('chord', 'collect', 1, 0)"
        )
    return len(shipments)


patient = Graph("lease-patient")


@patient.step(persist=Scope.WORKFLOW)
def pay(order: Order, ctx: StepContext) -> Charge:
    """Charge the card."""
    do(ctx, order)
    return Charge(charge_id=order.order_id)


@patient.step(timeout=0.5, retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0)), persist=Scope.WORKFLOW)
def stock(order: Order, charge: Charge, ctx: StepContext) -> Reservation:
    """Hang as long as the first attempt may take, where the order says so; then answer at once."""
    with book.act(ctx):
        if ctx.attempt == 1 and order.stock.get("stock:hang", 0):
            ctx.cancelled.wait(60)
            return Reservation(reservation_id="late")
    return Reservation(reservation_id=f"attempt {ctx.attempt}")


@patient.step(timeout=0.5, retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0)))
async def send(order: Order, reservation: Reservation, ctx: StepContext) -> Shipment:
    """The same, on the loop."""
    if ctx.attempt == 1 and order.stock.get("send:hang", 0):
        await asyncio.sleep(60)
    return Shipment(tracking_id=f"{reservation.reservation_id}, sent at attempt {ctx.attempt}")


@graph_task(app, patient, name="lease.process_patiently")
def process_patiently(order: Order) -> Shipment:
    """Steps with deadlines of their own."""
    raise NotImplementedError


fetching = Graph("lease-fetching")


def fetch(order: Order) -> str:
    """Take 100 ms or what the order says; return from when to when."""
    began = time.monotonic()
    time.sleep(order.stock.get("fetch", 100) / 1000)
    return json.dumps([began, time.monotonic()])


@fetching.step
def fetch_profile(order: Order) -> Label:
    """The first of three services."""
    return Label(text=fetch(order))


@fetching.step
def fetch_address(order: Order) -> Address:
    """The second."""
    return Address(street=fetch(order))


@fetching.step
def fetch_charge(order: Order) -> Charge:
    """The third."""
    return Charge(charge_id=fetch(order))


@fetching.step
def combine(profile: Label, address: Address, charge: Charge) -> Shipment:
    """Return when each ran."""
    return Shipment(tracking_id=f"[{profile.text}, {address.street}, {charge.charge_id}]")


@graph_task(app, fetching, name="lease.fetch_all")
def fetch_all(order: Order) -> Shipment:
    """Ask three services at once."""
    raise NotImplementedError


facts = Graph("lease-facts")


@facts.step(persist=Scope.WORKFLOW)
def tell_facts(order: Order, ctx: StepContext) -> Label:
    """Return what a step sees of its surroundings."""
    logger.info("order %s looks around", order.order_id)
    store = state.process.store(os.environ["DOCKET_CELERY_DATABASE_URL"])
    request = getattr(current_task, "request", None)  # nobody's in the worker's main process
    seen = {
        "task": getattr(request, "task", None),
        "task_id": getattr(request, "id", None),
        "caller": caller.get(),
        "pid": os.getpid(),
        "thread": threading.current_thread().name,
        "pool": id(getattr(threading.current_thread(), "pool", None)),
        "thread_id": threading.get_native_id(),
        "backend": backend_pid(store),
        "execution_id": ctx.execution_id,
    }
    time.sleep(order.stock.get("tell", 0) / 1000)
    return Label(text=json.dumps(seen))


@graph_task(app, facts, name="lease.look")
def look(order: Order) -> Label:
    """Look around in a step."""
    raise NotImplementedError


meeting = Graph("lease-meeting")
present: set[str] = set()


@meeting.step
async def meet(order: Order, ctx: StepContext) -> Label:
    """Take turns with the step of another run until both have seen the other; return whose tasks were current."""
    seen: set[str] = set()
    between: list[str] = []
    for _ in range(1000):
        present.add(ctx.execution_id)
        seen.add(f"{current_task.request.id} {current_task.name}")
        asyncio.get_running_loop().call_soon(lambda: between.append(str(getattr(current_task, "name", None))))
        await asyncio.sleep(0.002)
        seen.add(f"{current_task.request.id} {current_task.name}")
        if len(present) > 1:
            break
    seen.update(f"between: {name}" for name in between if name != "None")
    logger.info("order %s has met", order.order_id)
    return Label(text=json.dumps([len(present), *sorted(seen)]))


@graph_task(app, meeting, name="lease.meet")
def meet_another(order: Order) -> Label:
    """Run at the same time as another one, in one process."""
    raise NotImplementedError


def backend_pid(store: object) -> int:
    """Return the process id of the Postgres backend behind the next connection of *store*."""
    assert isinstance(store, SQLStore)
    with store.engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())


@signals.task_prerun.connect  # type: ignore[misc, unused-ignore] # signals are untyped
def _name_caller(task_id: str = "", **_: object) -> None:
    caller.set(f"task {task_id}")


def run_graphs_here(**_: object) -> None:
    """Run graphs in this process, with the store and its heartbeat, and keep all connections open."""
    fetching.execute(Shipment, Order(stock={"fetch": 1}))
    number = f"parent-{time.monotonic_ns()}"
    facts.execute(Label, Order(order_id="parent"), execution_id=number)


if "LEASE_APP_BUSY_PARENT" in os.environ:
    run_graphs_here()
    # Again before each fork: what the worker's start closed is open once more.
    signals.worker_before_create_process.connect(run_graphs_here, weak=False)

__all__ = ["Money", "app", "collect", "fetch_all", "look", "meet_another", "process", "process_again"]
