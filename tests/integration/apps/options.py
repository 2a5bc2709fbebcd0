"""One GraphTask for each of Celery's options, over a step that fails, waits or tells where it runs."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Any

from celery import Celery, current_task

from docket_celery import FixedBackoff, Graph, RetryPolicy, Scope, StepContext, graph_task
from tests.integration.apps.journal import note
from tests.unit.protos.shop_pb2 import Label, Money, Order, Shipment

app = Celery("tests.integration.apps.options")
app.conf.broker_transport_options = {"priority_steps": [0, 3, 6, 9]}


class BusyError(Exception):
    """The other side may answer later."""


class BusierError(BusyError):
    """A kind of it."""


flaky = Graph("flaky")


def fail_at_first(ctx: StepContext) -> Shipment:
    """Fail as often as the caller wants, over all deliveries."""
    calls = note(ctx.values["journal"], f"{time.time()} {ctx.delivery}/{ctx.attempt}")
    if calls <= ctx.values["failures"]:
        raise BusierError(f"call {calls}")
    return Shipment(tracking_id=f"call {calls}")


@flaky.step
def call_once(order: Order, ctx: StepContext) -> Shipment:
    """One attempt in a delivery."""
    return fail_at_first(ctx)


narrow = Graph("narrow")


@narrow.step
def prepare(order: Order, ctx: StepContext) -> Label:
    """Not kept, and needed by what is kept alone."""
    note(ctx.values["journal"], f"{time.time()} prepare")
    return Label(text=order.order_id)


@narrow.step(persist=Scope.WORKFLOW)
def keep(label: Label, ctx: StepContext) -> Money:
    """Kept."""
    note(ctx.values["journal"], f"{time.time()} keep")
    return Money(cents=int(label.text))


@narrow.step
def finish(money: Money, ctx: StepContext) -> Shipment:
    """Fail in the first delivery."""
    note(ctx.values["journal"], f"{time.time()} finish")
    if ctx.delivery == 1:
        raise BusyError("not yet")
    return Shipment(tracking_id=str(money.cents))


split = Graph("split")
meeting = threading.Barrier(2)


@split.step
def break_one(order: Order) -> Label:
    """Fail on a thread, once the other one has begun."""
    meeting.wait(10)
    raise BusyError("one")


@split.step
async def break_two(order: Order) -> Money:
    """Fail on the loop, once the other one has begun."""
    await asyncio.to_thread(meeting.wait, 10)
    raise BusierError("two")


@split.step
def join(label: Label, money: Money) -> Shipment:
    """Never reached."""
    return Shipment()


@graph_task(app, split)
def both(order: Order) -> Shipment:
    """Two branches fail."""
    raise NotImplementedError


kept = Graph("flaky_kept")


@kept.step(persist=Scope.WORKFLOW)
def call_and_keep(order: Order, ctx: StepContext) -> Shipment:
    """The same, with a row for the run."""
    return fail_at_first(ctx)


patient = Graph("patient")


@patient.step(retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0), redeliver=True))
def call_twice(order: Order, ctx: StepContext) -> Shipment:
    """Two attempts, then another delivery."""
    return fail_at_first(ctx)


slow = Graph("slow")


@slow.step
def wait(order: Order, ctx: StepContext) -> Money:
    """Wait for ever, unless told to stop."""
    note(ctx.values["journal"], f"started in {os.getpid()}")
    stopped = ctx.cancelled.wait(60)
    note(ctx.values["journal"], "stopped" if stopped else "waited")
    return Money()


slow_kept = Graph("slow_kept")


@slow_kept.step(persist=Scope.WORKFLOW)
def wait_and_keep(order: Order, ctx: StepContext) -> Money:
    """The same, with a row for the run."""
    return wait(order, ctx)


where = Graph("where")


@where.step
def tell(order: Order, ctx: StepContext) -> Label:
    """Tell when it ran and what the request said."""
    if "journal" in ctx.values:
        note(ctx.values["journal"], time.time())
    request: Any = current_task.request
    info = request.delivery_info
    return Label(text=f"{info['routing_key']} {info['priority']}")


def declare(name: str, graph: Graph, kind: type[Any], **options: Any) -> Any:
    """Declare a task of *graph* with Celery's *options*."""

    def body(order: Any) -> Any: ...

    body.__name__ = name
    body.__annotations__ = {"order": Order, "return": kind}
    return graph_task(app, graph, name=f"options.{name}", **options)(body)


AT_ONCE = {"default_retry_delay": 0}
retried = declare("retried", flaky, Shipment, autoretry_for=(BusyError,), **AT_ONCE)
retried_kept = declare("retried_kept", kept, Shipment, autoretry_for=(BusyError,), max_retries=2, **AT_ONCE)
never = declare("never", flaky, Shipment)
excepted = declare(
    "excepted", flaky, Shipment, autoretry_for=(Exception,), dont_autoretry_for=(BusyError,), **AT_ONCE
)
expected = declare("expected", flaky, Shipment, throws=(BusyError,))
limited = declare("limited", flaky, Shipment, autoretry_for=(BusyError,), max_retries=2, **AT_ONCE)
limited_by_kwargs = declare(
    "limited_by_kwargs",
    flaky,
    Shipment,
    autoretry_for=(BusyError,),
    retry_kwargs={"max_retries": 1, "countdown": 0},
)
backed_off = declare(
    "backed_off", flaky, Shipment, autoretry_for=(BusyError,), retry_backoff=True, retry_jitter=False
)
narrowed = declare("narrowed", narrow, Shipment, autoretry_for=(BusyError,), **AT_ONCE)
unchanged = declare("unchanged", narrow, Order)
redelivered = declare("redelivered", patient, Shipment, max_retries=1, **AT_ONCE)
hard = declare("hard", slow, Money, time_limit=1)
soft = declare("soft", slow, Money, soft_time_limit=1)
soft_retried = declare(
    "soft_retried", slow, Money, soft_time_limit=1, autoretry_for=(Exception,), max_retries=1, **AT_ONCE
)
soft_retried_kept = declare(
    "soft_retried_kept",
    slow_kept,
    Money,
    soft_time_limit=1,
    autoretry_for=(Exception,),
    max_retries=1,
    **AT_ONCE,
)
unlimited = declare("unlimited", slow, Money)
routed = declare("routed", where, Label, queue="special")
rated = declare("rated", where, Label, rate_limit="2/s")
plain = declare("plain", where, Label)
silent = declare("silent", where, Label, ignore_result=True)
