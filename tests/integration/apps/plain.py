"""Plain tasks, in an app that PLAIN_APP makes: ``bare``, ``declares`` GraphTasks, or ``configured`` too.

``python -m tests.integration.apps.plain`` prints the app's settings and the plain tasks' attributes as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from celery import Celery

from tests.integration.apps.journal import note

app = Celery("tests.integration.apps.plain")
MODE = os.environ.get("PLAIN_APP", "bare")


def die_once(journal: str) -> str:
    """Kill this process the first time, and tell of each start."""
    if note(journal, os.getpid()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


@app.task(name="plain.early")
def early(journal: str) -> str:
    """Acknowledged when it starts, as Celery does by default."""
    return die_once(journal)


@app.task(name="plain.late", acks_late=True)
def late(journal: str) -> str:
    """Acknowledged when it ends."""
    return die_once(journal)


@app.task(name="plain.rejecting", acks_late=True, reject_on_worker_lost=True)
def rejecting(journal: str) -> str:
    """Given back when its process is lost."""
    return die_once(journal)


@app.task(name="plain.failing", autoretry_for=(ValueError,), max_retries=1, default_retry_delay=0)
def failing(journal: str) -> str:
    """Retried by Celery itself."""
    if note(journal, os.getpid()) == 1:
        raise ValueError(journal)
    return "retried"


@app.task(name="plain.echo")
def echo(value: Any) -> Any:
    """Return plain JSON as it came."""
    return value


if MODE != "bare":
    from docket_celery import Graph, GraphTask, Scope, configure, graph_task
    from tests.unit.protos.shop_pb2 import Order, Shipment

    shop = Graph("beside_plain")

    @shop.step(persist=Scope.WORKFLOW)
    def ship(order: Order) -> Shipment:
        """Ship."""
        return Shipment(tracking_id=order.order_id)

    @graph_task(app, shop, name="plain.graph", queue="graphs", max_retries=7)
    def ship_order(order: Order) -> Shipment:
        """A GraphTask beside them."""
        raise NotImplementedError

    class ShipOrder(GraphTask[[Order], Shipment]):
        """Another."""

        name = "plain.graph_class"
        graph = shop

    app.register_task(ShipOrder())
    if MODE == "configured":
        configure(app)


ATTRIBUTES = (
    *("acks_late", "acks_on_failure", "acks_on_timeout", "acks_on_failure_or_timeout", "default_retry_delay"),
    *("ignore_result", "max_retries", "priority", "rate_limit", "reject_on_worker_lost"),
    *("retry_on_worker_lost", "serializer", "soft_time_limit", "store_errors_even_if_ignored", "time_limit"),
    *("track_started", "trail", "throws", "expires", "typing"),
)
PLAIN = ("plain.early", "plain.late", "plain.rejecting", "plain.failing", "plain.echo", "celery.chord")


def describe() -> dict[str, Any]:
    """Return the settings and the attributes as text."""
    app.finalize()
    tasks = {name: {key: repr(getattr(app.tasks[name], key)) for key in ATTRIBUTES} for name in PLAIN}
    keys = sorted(app.conf, key=str)
    return {
        "conf": {str(key): repr(app.conf[key]) for key in keys},
        "tasks": tasks,
        "docket": sorted(name for name in sys.modules if name.startswith("docket_celery")),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe()))
