"""A caller that declares one of the worker's tasks and not the other: ``python -m tests.integration.apps.stranger``.

Prints what its two promises gave, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from celery import Celery
from celery.result import AsyncResult, GroupResult

from docket_celery import Graph, UnknownMessageType, graph_task
from tests.unit.protos.shop_pb2 import Order, Shipment

app = Celery("stranger")
shop = Graph("stranger")


@shop.step
def ship(order: Order) -> Shipment:
    """Never runs here."""
    raise NotImplementedError


@graph_task(app, shop, name="wired.ship")
def ship_order(order: Order) -> Shipment:
    """Ship."""
    raise NotImplementedError


def main() -> int:
    """Submit both, then wait for both."""
    strange = app.send_task("wired.reserve", ({"orderId": "1"},))
    told: dict[str, Any] = {}
    known = [ship_order.delay(Order(order_id=str(number))) for number in range(3)]
    told["known"] = [promise.get(timeout=15).tracking_id for promise in known]
    try:
        ship_order.AsyncResult(strange.id).get(timeout=15)
    except UnknownMessageType as error:
        told |= {"strange": [error.type_name, str(error)]}
    plain: Any = AsyncResult(strange.id, app=app)
    told["plain"] = [plain.state, plain.successful()]
    for ask in (plain.get, lambda: plain.result, lambda: GroupResult("g", [plain]).join_native(timeout=15)):
        try:
            told["plain"].append(repr(ask()))
        except UnknownMessageType as error:
            told["plain"].append(error.type_name)
    told["after"] = [ship_order.delay(Order(order_id="9")).get(timeout=15).tracking_id]
    sys.stdout.write(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
