"""Orders: charge, reserve, ship. A crash anywhere resumes the order, and the card is charged once."""

from __future__ import annotations

from docket_celery import Graph, RetryPolicy, Scope, StepContext, graph_task
from workers import settings
from workers.celery import app
from workers.orders_pb2 import ChargeResult, Order, Reservation, Shipment
from workers.providers import PaymentDeclined, Payments, ProviderUnavailable, Warehouse

payments, warehouse = Payments(settings.PAYMENTS_DATABASE_URL), Warehouse()

checkout = Graph("orders")


@checkout.step(
    persist=Scope.WORKFLOW, retry=RetryPolicy(max_attempts=3), retriable=ProviderUnavailable, timeout=30
)
def charge_card(order: Order, ctx: StepContext) -> ChargeResult:
    """Charge the card. The result is kept; the key covers a crash before it could be."""
    charge_id = payments.charge(order.order_id, order.amount_cents, idempotency_key=ctx.idempotency_key)
    return ChargeResult(charge_id=charge_id, amount_cents=order.amount_cents)


@checkout.step(persist=Scope.WORKFLOW, retry=RetryPolicy(max_attempts=3))
def reserve_inventory(order: Order, charge: ChargeResult, ctx: StepContext) -> Reservation:  # noqa: ARG001 -- once paid
    """Set the goods aside; the key covers a crash before the reservation is kept."""
    reservation_id = warehouse.reserve(order.skus, idempotency_key=ctx.idempotency_key)
    return Reservation(reservation_id=reservation_id, skus=order.skus)


@checkout.step(persist=Scope.WORKFLOW, retry=RetryPolicy(max_attempts=5), timeout=30)
def ship(charge: ChargeResult, reservation: Reservation, ctx: StepContext) -> Shipment:  # noqa: ARG001 -- once paid
    """Send the goods."""
    tracking_number = warehouse.ship(
        reservation.reservation_id, idempotency_key=ctx.idempotency_key, sleep=ctx.sleep
    )
    return Shipment(tracking_number=tracking_number)


def name_order_run(order: Order) -> str:
    """Name the run by its order, so that an order submitted twice is one run."""
    return f"order-{order.order_id}"


# A declined payment is an answer, not a fault: Celery logs it without a traceback.
@graph_task(app, checkout, execution_id=name_order_run, throws=(PaymentDeclined,))
def process_order(order: Order) -> Shipment:
    """Take an order from payment to shipment."""
    raise NotImplementedError
