"""One graph as successive deploys have it: DEPLOY names the one, FAIL=1 keeps its last step from working."""

from __future__ import annotations

import os

from celery import Celery

from docket_celery import Graph, Scope, StepContext, graph_task
from docket_celery.observe.events import Event, EventKind
from tests.integration.apps.journal import note
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Shipment

DEPLOY = os.environ.get("DEPLOY", "first")
# The step's name in each deploy, and those that it says it had.
NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "first": ("charge", ()),
    "renamed": ("charge_card", ("charge",)),
    "renamed again": ("charge_payment", ("charge", "charge_card")),
    "gone": ("invoice", ()),
    "wider": ("charge", ()),
    "strict": ("charge", ()),
}

app = Celery("deploys")
app.conf.broker_connection_retry_on_startup = True
graph = Graph("deploys")
name, former = NAMES[DEPLOY]


def charge(order: Order, ctx: StepContext) -> Charge:
    """Charge, and tell by which key."""
    note("calls", f"charge {ctx.idempotency_key}")
    return Charge(charge_id=ctx.idempotency_key)


def charge_with_label(order: Order, label: Label, ctx: StepContext) -> Charge:
    """The same from one input more: a checkpoint of before was made from others."""
    return charge(order, ctx)


graph.register(
    charge_with_label if DEPLOY in {"wider", "strict"} else charge,
    name=name,
    persist=Scope.WORKFLOW,
    renamed_from=former,
    on_input_change="error" if DEPLOY == "strict" else "reuse",
)


@graph.step
def ship(charge: Charge) -> Shipment:
    """Ship, unless this deploy cannot."""
    note("calls", "ship")
    if os.environ.get("FAIL"):
        raise ConnectionError("no carrier")
    return Shipment(tracking_id=charge.charge_id)


def tell(event: Event) -> None:
    """Write down what is told of changed inputs."""
    if event.kind is EventKind.INPUTS_CHANGED:
        note("events", f"{event.step}: {event.detail}")


graph.listeners.append(tell)


@graph_task(app, graph, name="deploys.ship")
def ship_order(order: Order, label: Label) -> Shipment:
    """Charge and ship."""
    raise NotImplementedError


@graph_task(app, graph, name="deploys.charge")
def charge_order(order: Order, label: Label) -> Charge:
    """Only charge."""
    raise NotImplementedError
