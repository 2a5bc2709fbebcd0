"""Tasks whose jobs and results may be too large for a message, in a graph that persists and in one that does not."""

from __future__ import annotations

import os
import signal
from typing import Any

from celery import Celery

from docket_celery import Graph, Scope, StepContext, StoredResult, graph_task
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Shipment

app = Celery("tests.integration.apps.bulky")
app.conf.broker_connection_retry_on_startup = True

bulky = Graph("bulky")


@bulky.step(persist=Scope.WORKFLOW)
def check_charge(charge: Charge) -> Order:
    """Keep something small, so that the run has a row."""
    return Order(order_id=charge.charge_id, amount_cents=charge.amount_cents)


@bulky.step
def print_label(order: Order) -> Label:
    """Make a text as long as the charge says."""
    return Label(text=order.order_id + "x" * order.amount_cents)


@bulky.step(persist=Scope.WORKFLOW)
def measure_label(label: Label, ctx: StepContext) -> Money:
    """Tell a text's length, in as many deliveries as it begins with."""
    failures = int(label.text[1:2]) if label.text.startswith(("f", "k")) else 0
    if ctx.delivery <= failures:
        if label.text.startswith("k"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise ConnectionError("the scale is in use")
    return Money(cents=len(label.text))


@bulky.step
def describe(label: Label, money: Money, ctx: StepContext) -> Shipment:
    """Tell in which delivery it was measured."""
    return Shipment(tracking_id=f"{money.cents} in delivery {ctx.delivery}")


@graph_task(app, bulky, name="bulky.write")
def write(charge: Charge) -> Label:
    """Small job, large result."""
    raise NotImplementedError


@graph_task(
    app, bulky, name="bulky.measure", autoretry_for=(ConnectionError,), retry_kwargs={"countdown": 0.1}
)
def measure(label: Label) -> Shipment:
    """Large job, small result."""
    raise NotImplementedError


@graph_task(app, bulky, name="bulky.named", execution_id=lambda label: f"label-{label.text[:8]}")
def named(label: Label) -> Shipment:
    """The same under a business key."""
    raise NotImplementedError


light = Graph("light")


@light.step
def weigh(label: Label) -> Money:
    """Tell a text's length."""
    return Money(cents=len(label.text))


@light.step
def grow(charge: Charge) -> Label:
    """Make a text as long as the charge says."""
    return Label(text="x" * charge.amount_cents)


@light.step
def address(label: Label, money: Money, charge: Charge) -> Shipment:
    """Take two messages."""
    return Shipment(tracking_id=f"{money.cents} for {charge.charge_id}")


@graph_task(app, light, name="bulky.weigh")
def weigh_label(label: Label) -> Money:
    """Persist nothing."""
    raise NotImplementedError


@graph_task(app, light, name="bulky.grow")
def grow_label(charge: Charge) -> Label:
    """Persist nothing, with a large result."""
    raise NotImplementedError


@graph_task(app, light, name="bulky.address")
def address_label(label: Label, charge: Charge) -> Shipment:
    """Take two messages, and persist nothing."""
    raise NotImplementedError


@app.task(name="bulky.collect")  # type: ignore[misc, unused-ignore] # celery's decorators are untyped
def collect(labels: list[Any]) -> list[int]:
    """Read what a chord's header made."""
    read: list[Any] = [label.read() if isinstance(label, StoredResult) else label for label in labels]
    return [len(label.text) for label in read]
