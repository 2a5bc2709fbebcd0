"""The same task, declared in each way that there is."""

from __future__ import annotations

from typing import Any

from celery import Celery, shared_task

from docket_celery import Graph, GraphTask, StepContext, graph_task, shared_graph_task
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Shipment

app = Celery("tests.integration.apps.declared")
app.set_default()

shop = Graph("declared")


@shop.step
def charge(order: Order, ctx: StepContext) -> Charge:
    """Tell the run's name and the caller's context on."""
    return Charge(charge_id=f"{ctx.execution_id} {ctx.values.get('tenant')}", amount_cents=order.amount_cents)


@shop.step
def ship(order: Order, charge: Charge) -> Shipment:
    """Show all that came in."""
    return Shipment(tracking_id=f"{order.order_id} {charge.amount_cents} {charge.charge_id}")


@shop.step
def write_label(order: Order, shipment: Shipment) -> Label:
    """Show what a job of two messages holds."""
    return Label(text=f"{order.order_id} <- {shipment.tracking_id}")


@graph_task(app, shop, name="declared.by_decorator")
def by_decorator(order: Order) -> Shipment:
    """Ship an order."""
    raise NotImplementedError


@shared_graph_task(shop, name="declared.by_shared_decorator")
def by_shared_decorator(order: Order) -> Shipment:
    """Ship an order."""
    raise NotImplementedError


class ByClass(GraphTask[[Order], Shipment]):
    """Ship an order."""

    name = "declared.by_class"
    graph = shop


@app.task(base=GraphTask, graph=shop, name="declared.by_base")
def by_base(order: Order) -> Shipment:
    """Ship an order."""
    raise NotImplementedError


@shared_task(base=GraphTask, graph=shop, name="declared.by_shared_base")
def by_shared_base(order: Order) -> Shipment:
    """Ship an order."""
    raise NotImplementedError


by_class = app.register_task(ByClass())

NAMES = (
    "declared.by_decorator",
    "declared.by_shared_decorator",
    "declared.by_class",
    "declared.by_base",
    "declared.by_shared_base",
)


def name_run(order: Order) -> str:
    """Name a run by its order."""
    return f"order-{order.order_id}"


@graph_task(app, shop, name="declared.named", execution_id=name_run)
def named(order: Order) -> Shipment:
    """Name each run by its order."""
    raise NotImplementedError


@graph_task(app, shop, name="declared.labelled")
def labelled(order: Order, shipment: Shipment) -> Label:
    """Take two messages."""
    raise NotImplementedError


def task_of(name: str) -> Any:
    """Return the task as its caller has it."""
    return app.tasks[name]
