"""Tasks whose messages and results are damaged on their way."""

from __future__ import annotations

from celery import Celery

from docket_celery import Graph, graph_task
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Reservation, Shipment

LIMIT_BYTES = 2 * 1024 * 1024  # over the default

app = Celery("tests.integration.apps.wired")
app.conf.docket_max_message_bytes = LIMIT_BYTES

shop = Graph("wired")


@shop.step
def ship(order: Order) -> Shipment:
    """Show the order's name."""
    return Shipment(tracking_id=f"T-{order.order_id}")


@shop.step
def reserve(order: Order) -> Reservation:
    """Make what a stranger cannot read."""
    return Reservation(reservation_id=f"R-{order.order_id}")


@shop.step
def write_label(charge: Charge) -> Label:
    """Make a text as long as the charge says."""
    return Label(text="x" * charge.amount_cents)


@shop.step
def measure(label: Label) -> Money:
    """Tell a text's length."""
    return Money(cents=len(label.text))


@graph_task(app, shop, name="wired.ship")
def ship_order(order: Order) -> Shipment:
    """Ship."""
    raise NotImplementedError


@graph_task(app, shop, name="wired.reserve")
def reserve_order(order: Order) -> Reservation:
    """Reserve."""
    raise NotImplementedError


@graph_task(app, shop, name="wired.label")
def make_label(charge: Charge) -> Label:
    """Make a label."""
    raise NotImplementedError


@graph_task(app, shop, name="wired.measure")
def measure_label(label: Label) -> Money:
    """Measure a label."""
    raise NotImplementedError
