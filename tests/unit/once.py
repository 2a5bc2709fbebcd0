"""Prints how often a job has done what it should do once: ``python -m tests.unit.once``.

A worker in the process of a test would change its logging and start the tasks of other tests.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from typing import Any

from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.result import AsyncResult

from docket_celery import Graph, graph_task
from docket_celery.engine.process.pool import Pool
from docket_celery.task import app_settings, backends, envelope
from tests.unit.protos.shop_pb2 import Label, Order

WAIT_S = 30.0
app = Celery("once", broker="memory://", backend="cache+memory://")
graph = Graph("tests.once")


@graph.step
def print_label(order: Order) -> Label:
    """Tell that a step has run."""
    return Label(text=order.order_id)


@graph_task(app, graph, name="once.print", shared=False)
def print_one(order: Order) -> Label:
    """Print a label."""
    raise NotImplementedError


def count(owner: Any, name: str) -> Counter[str]:
    """Count from now on the calls of a function by the side that makes them."""
    calls, real = Counter[str](), getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        here = threading.current_thread() is threading.main_thread()
        calls["submitting" if here else "running"] += 1
        return real(*args, **kwargs)

    setattr(owner, name, call)
    return calls


def main() -> None:
    """Work off a job, whose result is read as a process without the library does."""
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=WAIT_S):
        counted = {
            "settings": count(app_settings, "app_settings"),
            "hops": count(Pool, "submit"),
            "questions": count(backends, "is_stored"),
            "encodings": count(envelope, "encode"),
        }
        promise: AsyncResult[Any] = AsyncResult(print_one.delay(Order(order_id="17")).id, app=app)
        text = promise.get(timeout=WAIT_S).text
    sys.stdout.write(json.dumps({"text": text, **counted}))


if __name__ == "__main__":
    main()
