"""An app with one GraphTask for each way that a run can end; broker, results and database as in `app`."""

from __future__ import annotations

from pathlib import Path

from celery import Celery

from docket_celery import AbortError, Graph, Scope, StepContext, graph_task
from tests.unit.protos.shop_pb2 import Address, Charge, Label, Money, Nest, Order, Payment, Shipment

app = Celery("shop")
app.conf.broker_connection_retry_on_startup = True

SECRET = "4111-1111-1111-1111"
PHONE = "+49-30-555-0100"
BLOB_BYTES = 100_000

checkout = Graph("tests.checkout")


@checkout.step(persist=Scope.WORKFLOW)
def charge_card(payment: Payment, ctx: StepContext) -> Charge:
    """Keep what must not happen twice."""
    return Charge(charge_id=ctx.idempotency_key, amount_cents=len(payment.receipt))


@checkout.step
def deliver(payment: Payment, charge: Charge) -> Order:
    """Answer with secrets and with much."""
    return Order(
        order_id="17" * (BLOB_BYTES // 2),
        amount_cents=charge.amount_cents,
        ship_to=Address(street=payment.note[:20], phone=PHONE),
    )


@graph_task(app, checkout, name="shop.pay")
def pay(payment: Payment) -> Order:
    """Succeed."""
    raise NotImplementedError


packing = Graph("tests.packing")


@packing.step
def weigh(order: Order) -> Money:
    """Take what was ordered to the scales."""
    return Money(cents=order.amount_cents)


@packing.step(persist=Scope.WORKFLOW)
def charge_weight(money: Money, ctx: StepContext) -> Charge:
    """Keep what must not happen twice."""
    return Charge(charge_id=ctx.idempotency_key, amount_cents=money.cents)


@packing.step
def print_label(order: Order, charge: Charge) -> Label:
    """Print both."""
    return Label(text=f"{order.order_id}: {charge.amount_cents}")


@graph_task(app, packing, name="shop.pack")
def pack(order: Order) -> Label:
    """Succeed, after three steps of which one persists."""
    raise NotImplementedError


flaky = Graph("tests.flaky")


@flaky.step
def call_carrier(money: Money, ctx: StepContext) -> Shipment:
    """Fail in the first delivery."""
    if ctx.delivery == 1:
        raise ConnectionError("the carrier hung up")
    return Shipment(tracking_id=f"delivery {ctx.delivery} of {money.cents}")


@graph_task(app, flaky, name="shop.retry", autoretry_for=(ConnectionError,), retry_kwargs={"countdown": 0.2})
def retry(money: Money) -> Shipment:
    """Succeed in the second delivery."""
    raise NotImplementedError


failing = Graph("tests.failing")


@failing.step
def refuse(charge: Charge) -> Label:
    """Fail for good, or stop the graph."""
    if charge.amount_cents < 0:
        raise AbortError("the customer is gone")
    raise ValueError(f"charge {charge.charge_id} has no label")


@graph_task(app, failing, name="shop.fail")
def fail(charge: Charge) -> Label:
    """Fail."""
    raise NotImplementedError


waiting = Graph("tests.waiting")


@waiting.step
def wait_for_file(label: Label, ctx: StepContext) -> Nest:
    """Hold the worker until a file is there."""
    while not Path(label.text).exists():
        ctx.sleep(0.02)
    return Nest(text="waited")


@graph_task(app, waiting, name="shop.wait")
def wait(label: Label) -> Nest:
    """Hold the worker."""
    raise NotImplementedError


holding = Graph("tests.holding")


@holding.step
def hold_payment(payment: Payment, ctx: StepContext) -> Charge:
    """Wait for the file that the payment's note names."""
    while not Path(payment.note).exists():
        ctx.sleep(0.05)
    return Charge(charge_id=ctx.execution_id)


@graph_task(app, holding, name="shop.hold")
def hold(payment: Payment) -> Charge:
    """Take a secret and keep the worker."""
    raise NotImplementedError
