"""An app that a worker must refuse, in the way that FAULT names."""

from __future__ import annotations

import os

from celery import Celery

from docket_celery import Graph, MemoryStore, Scope, graph_task
from tests.unit.protos.shop_pb2 import Charge, Money, Order, Reservation, Shipment

FAULT = os.environ.get("FAULT", "")

app = Celery("tests.integration.apps.faulty")
shop = Graph("faulty", store=MemoryStore() if FAULT == "memory" else None)


@shop.step(persist=None if FAULT == "wiring" else Scope.WORKFLOW)
def ship(order: Order) -> Shipment:
    """Ship."""
    return Shipment(tracking_id=order.order_id)


@graph_task(app, shop, name="faulty.ship")
def ship_order(order: Order) -> Shipment:
    """Ship."""
    raise NotImplementedError


if FAULT == "setting":
    app.conf.docket_lease_secods = 10
if FAULT == "value":
    app.conf.docket_threads = "many"
if FAULT == "namespace":

    class Django:
        """Settings as Django projects keep them."""

        CELERY_BROKER_URL = os.environ["CELERY_BROKER_URL"]
        CELERY_DOCKET_DATABSE_URL = "postgresql+psycopg://"

    app.config_from_object(Django, namespace="CELERY")
if FAULT == "django":

    class WorkingDjango:
        """Settings as Django projects keep them."""

        CELERY_BROKER_URL = os.environ["CELERY_BROKER_URL"]
        CELERY_DOCKET_DATABASE_URL = os.environ["DJANGO_DATABASE_URL"]

    app.config_from_object(WorkingDjango, namespace="CELERY")
if FAULT == "wiring":
    broken = Graph("broken")

    @broken.step
    def charge(money: Money) -> Charge:
        """Needs what nobody makes."""
        return Charge(amount_cents=money.cents)

    @broken.step
    def reserve(charge: Charge) -> Reservation:
        """Reserve."""
        return Reservation(reservation_id=charge.charge_id)

    @graph_task(app, broken, name="faulty.reserve")
    def reserve_order(order: Order) -> Reservation:
        """Cannot work: an Order leads nowhere."""
        raise NotImplementedError
