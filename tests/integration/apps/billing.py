"""A batch of orders that are charged, billed together and shipped, with a receiver that honours idempotency keys."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass

import redis
from celery import Celery

from docket_celery import Graph, Scope, StepContext, graph_task
from tests.integration.apps.journal import RESULTS
from tests.unit.protos.shop_pb2 import Charge, Money, Order, Shipment

app = Celery("tests.integration.apps.billing")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1

BILLING_S = 0.1
"""How long the aggregate takes before its effect, and after it."""
ITEM_S = 0.004

billing = Graph("billing")


@functools.cache
def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, decode_responses=True)


def ask(ctx: StepContext) -> None:
    """Ask for the step's effect under its key; the receiver does it once for each key and counts the calls."""
    client = _client(os.environ[RESULTS])
    client.hincrby(f"asked:{ctx.execution_id}:{ctx.step}", f"{ctx.item} {ctx.idempotency_key}", 1)


@dataclass(frozen=True, slots=True)
class Receiver:
    """What the receiver was asked for."""

    url: str

    def effects(self, execution_id: str, step: str) -> int:
        """Return how many effects there are so far: one for each key."""
        with redis.Redis.from_url(self.url) as client:
            return int(client.hlen(f"asked:{execution_id}:{step}"))  # type: ignore[arg-type, unused-ignore]

    def calls(self, execution_id: str, step: str) -> dict[tuple[str, str], int]:
        """Return how often it was asked, by item and key."""
        with redis.Redis.from_url(self.url, decode_responses=True) as client:
            found: dict[str, str] = client.hgetall(f"asked:{execution_id}:{step}")  # type: ignore[assignment, unused-ignore]
        places = {name: name.partition(" ") for name in found}
        return {(places[name][0], places[name][2]): int(count) for name, count in found.items()}

    def biller(self, execution_id: str) -> int | None:
        """Return the process that began to bill last, or None."""
        with redis.Redis.from_url(self.url) as client:
            found = client.get(f"biller:{execution_id}")
        return None if found is None else int(found)  # type: ignore[arg-type, unused-ignore]


@billing.step
def charge(order: Order, ctx: StepContext) -> Charge:
    """The first stage: stored with its chunk."""
    ask(ctx)
    ctx.sleep(ITEM_S)
    return Charge(charge_id=order.order_id, amount_cents=2 * order.amount_cents)


@billing.aggregate(persist=Scope.WORKFLOW)
def bill(charges: Iterable[Charge], ctx: StepContext) -> Money:
    """One bill for all."""
    _client(os.environ[RESULTS]).set(f"biller:{ctx.execution_id}", os.getpid())
    cents = sum(each.amount_cents for each in charges)
    ctx.sleep(BILLING_S)
    ask(ctx)
    ctx.sleep(BILLING_S)
    return Money(cents=cents)


@billing.step(persist=Scope.WORKFLOW)
def ship(charge: Charge, bill: Money, ctx: StepContext) -> Shipment:
    """The second stage: each item is saved by itself."""
    ask(ctx)
    ctx.sleep(ITEM_S)
    return Shipment(tracking_id=f"{charge.charge_id} {charge.amount_cents} of {bill.cents}")


@graph_task(app, billing, name="billing.ship_all")
def ship_all(orders: list[Order]) -> list[Shipment]:
    """Charge, bill, ship."""
    raise NotImplementedError
