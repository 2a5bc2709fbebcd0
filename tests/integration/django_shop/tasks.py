"""Graphs whose steps use the ORM."""

from __future__ import annotations

import threading
from typing import Any

from asgiref.sync import sync_to_async
from django.db import DatabaseError, connection

from docket_celery import Graph, GraphTask, RetryPolicy, StepContext, shared_graph_task
from tests.integration.django_shop.celery_app import app
from tests.integration.django_shop.hooks import SITE
from tests.integration.django_shop.models import Line
from tests.unit.protos.shop_pb2 import Address, Charge, Label, Order, Reservation, Shipment

orders = Graph("django-orders")


def facts(order: Order, ctx: StepContext) -> dict[str, Any]:
    """Return a line's columns."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (session,) = cursor.fetchone()
    thread = threading.current_thread().name
    return {
        "order": order.order_id,
        "step": ctx.step,
        "site": SITE.get(),
        "session": session,
        "thread": thread,
    }


@orders.step
def charge(order: Order, ctx: StepContext) -> Charge:
    """The first of four that may run at once."""
    return Charge(charge_id=str(Line.objects.create(**facts(order, ctx)).pk))


@orders.step
def reserve(order: Order, ctx: StepContext) -> Reservation:
    """The second."""
    return Reservation(reservation_id=str(Line.objects.create(**facts(order, ctx)).pk))


@orders.step
def find_address(order: Order, ctx: StepContext) -> Address:
    """The third."""
    return Address(street=str(Line.objects.create(**facts(order, ctx)).pk))


@orders.step
def write_label(order: Order, ctx: StepContext) -> Label:
    """The fourth."""
    return Label(text=str(Line.objects.create(**facts(order, ctx)).pk))


@orders.step
def ship(order: Order, charge: Charge, reservation: Reservation, address: Address, label: Label) -> Shipment:
    """Count what all of them wrote, and what the caller had written before."""
    return Shipment(tracking_id=str(Line.objects.filter(order=order.order_id).count()))


@shared_graph_task(orders, name="shop.process")
def process(order: Order) -> Shipment:
    """Write four lines and count them."""
    raise NotImplementedError


class ProcessByClass(GraphTask[[Order], Shipment]):
    """The same, declared as a class."""

    name = "shop.process_by_class"
    graph = orders


process_by_class = app.register_task(ProcessByClass())

waiting = Graph("django-waiting")


@waiting.step
async def count(order: Order, ctx: StepContext) -> Label:
    """Write with the ORM's asynchronous methods."""

    def write() -> Line:
        return Line(**facts(order, ctx))

    line = await sync_to_async(write)()
    await line.asave()
    return Label(text=str(await Line.objects.filter(order=order.order_id).acount()))


@shared_graph_task(waiting, name="shop.process_waiting")
def process_waiting(order: Order) -> Label:
    """Write one line."""
    raise NotImplementedError


fragile = Graph("django-fragile")


@fragile.step(retry=RetryPolicy(max_attempts=2), retriable=DatabaseError)
def look_up(order: Order, ctx: StepContext) -> Label:
    """Read; the server may have ended the session since the last time."""
    return Label(text=f"attempt {ctx.attempt}: {Line.objects.filter(order=order.order_id).count()}")


@shared_graph_task(fragile, name="shop.look_up")
def process_fragile(order: Order) -> Label:
    """Count lines."""
    raise NotImplementedError


@app.task(name="shop.plain")  # type: ignore[misc, unused-ignore] # celery's decorators are untyped
def plain(order: str) -> str:
    """A task of Celery's own, of the class that it picks for Django."""
    return order
