"""GraphTasks and plain tasks to build canvas from."""

from __future__ import annotations

from typing import Any

from celery import Celery

from docket_celery import DocketError, Graph, StepContext, graph_task
from tests.integration.apps.journal import note
from tests.unit.protos.shop_pb2 import Charge, Order, Shipment

app = Celery("tests.integration.apps.canvas")
shop = Graph("canvas")


class CardRefusedError(Exception):
    """The payment provider said no."""


@shop.step
def charge(order: Order) -> Charge:
    """Charge an order, unless it is free."""
    if order.amount_cents == 0:
        raise CardRefusedError(f"order {order.order_id} costs nothing")
    return Charge(charge_id=f"C-{order.order_id}", amount_cents=order.amount_cents)


@shop.step
def ship(charge: Charge, ctx: StepContext) -> Shipment:
    """Ship what was charged."""
    return Shipment(tracking_id=f"{charge.charge_id} {charge.amount_cents} {ctx.values.get('tenant')}")


@graph_task(app, shop, name="canvas.charge")
def charge_order(order: Order) -> Charge:
    """Charge."""
    raise NotImplementedError


@graph_task(app, shop, name="canvas.ship")
def ship_charge(charge: Charge) -> Shipment:
    """Ship."""
    raise NotImplementedError


@app.task(name="canvas.read_order")
def read_order(number: int, field: str = "amountCents") -> dict[str, Any]:
    """A plain task that knows no protobuf: the JSON form of an Order."""
    return {"orderId": str(number), field: str(number * 100)}


@app.task(name="canvas.describe")
def describe(shipment: Shipment) -> str:
    """A plain task that gets a message."""
    return f"{type(shipment).__name__} {shipment.tracking_id}"


@app.task(name="canvas.total")
def total(charges: list[Charge]) -> int:
    """A chord's body that gets messages."""
    return sum(charge.amount_cents for charge in charges)


@app.task(name="canvas.remember")
def remember(shipment: Shipment, journal: str) -> None:
    """Note what a link got."""
    note(journal, shipment.tracking_id)


@app.task(name="canvas.on_error")
def on_error(request: Any, error: BaseException, traceback: Any, journal: str) -> None:
    """Note what an errback got."""
    shown = error.args if isinstance(error, DocketError) else error
    note(journal, f"{type(error).__name__} {shown}")
