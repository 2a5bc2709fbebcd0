"""The graph: what each step needs says in which order they run; its options say what a failure means."""

from __future__ import annotations

from docket_celery import ExponentialBackoff, Graph, RetryPolicy, Scope, StepContext
from examples.order.order_pb2 import ChargeResult, Order, Reservation, Shipment
from examples.order.services import Carrier, CarrierDown, Inventory, Payments

payments, inventory, carrier = Payments(), Inventory(), Carrier()

checkout = Graph("examples.order")


# Each step has an effect outside: its result is kept for the run, so that a resumed run does not repeat it.
@checkout.step(persist=Scope.WORKFLOW, retry=RetryPolicy(max_attempts=3))
def charge_card(order: Order, ctx: StepContext) -> ChargeResult:
    """Charge the customer; the key makes a repeated call harmless on the provider's side too."""
    charge_id = payments.charge(order.amount_cents, ctx.idempotency_key)
    return ChargeResult(charge_id=charge_id, amount_cents=order.amount_cents)


@checkout.step(persist=Scope.WORKFLOW, retry=RetryPolicy(max_attempts=3))
def reserve_inventory(order: Order, charge: ChargeResult, ctx: StepContext) -> Reservation:  # noqa: ARG001 -- once paid
    """Set the goods aside; taking *charge* is what makes this wait for the payment."""
    return Reservation(reservation_id=inventory.reserve(ctx.idempotency_key), skus=order.skus)


@checkout.step(
    persist=Scope.WORKFLOW,
    retry=RetryPolicy(max_attempts=3, backoff=ExponentialBackoff(initial=0.05)),
    retriable=CarrierDown,
    timeout=30,
)
def ship(charge: ChargeResult, reservation: Reservation, ctx: StepContext) -> Shipment:  # noqa: ARG001 -- once paid
    """Send the goods."""
    return Shipment(tracking_number=carrier.ship(reservation.reservation_id, ctx.idempotency_key))
