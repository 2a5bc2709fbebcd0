"""Counts the calls of functions that a run takes: ``python -m tests.unit.counted`` prints them as JSON.

In a process of its own, since an app that another test has made current is asked for the settings of every run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import docket_celery
from docket_celery import Graph
from docket_celery.engine.process.state import process
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Reservation, Shipment

OWN = os.path.dirname(docket_celery.__file__)
ORDER = Order(order_id="17")
RUNS = 25
"""Of these the median counts: a thread that waits for another may wake a few times more or less."""

chain, fan = Graph("counted_chain"), Graph("counted_fan")


@chain.step
def charge(order: Order) -> Charge:
    """Do nothing."""
    return Charge()


@chain.step
def reserve(charge: Charge) -> Reservation:
    """Do nothing."""
    return Reservation()


@chain.step
def ship(reservation: Reservation) -> Shipment:
    """Do nothing."""
    return Shipment()


@fan.step
def left(order: Order) -> Charge:
    """Do nothing."""
    return Charge()


@fan.step
def middle(order: Order) -> Reservation:
    """Do nothing."""
    return Reservation()


@fan.step
def right(order: Order) -> Label:
    """Do nothing."""
    return Label()


@fan.step
def join(charge: Charge, reservation: Reservation, label: Label) -> Shipment:
    """Do nothing."""
    return Shipment()


def count(call: Callable[[Any], object], prepare: Callable[[], Any] = lambda: None) -> dict[str, int]:
    """Return how many functions *call* calls, on all threads, once all is warm: this package's own, and all.

    What *prepare* returns is given to it, and is not counted. Python's comprehensions are functions in some releases
    and not in others, so they are none of ours.
    """
    calls: list[bool] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            calls.append(code.co_filename.startswith(OWN) and not code.co_name.startswith("<"))
        elif event == "c_call":
            calls.append(False)

    found: list[tuple[int, int]] = []
    # Only threads that begin from here on are watched.
    process.close_runtimes()
    threading.setprofile(note)
    call(prepare())
    for _ in range(RUNS):
        given = prepare()
        calls.clear()
        sys.setprofile(note)
        call(given)
        sys.setprofile(None)
        found.append((sum(calls), len(calls)))
    threading.setprofile(None)
    own, total = (int(statistics.median(each)) for each in zip(*found, strict=True))
    return {"own": own, "all": total}


def count_runs() -> dict[str, dict[str, int]]:
    """Count what a run in process calls, without Celery."""
    assert "celery" not in sys.modules
    return {
        "chain of three": count(lambda _: chain.execute(Shipment, ORDER)),
        "fan of three and join": count(lambda _: fan.execute(Shipment, ORDER)),
    }


def count_task() -> dict[str, dict[str, int]]:
    """Count what the chain calls as a task: from a worker's request on, and to be submitted to a broker in memory."""
    from celery import Celery
    from kombu.utils.imports import symbol_by_name

    from docket_celery import graph_task

    app = Celery("counted", broker="memory://", backend="cache+memory://")

    @graph_task(app, chain, name="counted.ship_order")
    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    @app.task(name="counted.plain")
    def plain(order_id: str) -> str:
        return order_id

    def next_request() -> Any:
        ship_order.delay(ORDER)
        with app.connection_for_read() as connection, connection.SimpleQueue("celery") as queue:
            message = queue.get_nowait()
        return symbol_by_name(ship_order.Request)(message, app=app, task=app.tasks[ship_order.name])

    return {
        "delivery of the chain": count(lambda request: request.execute(), next_request),
        "submitting it": count(lambda _: ship_order.delay(ORDER)),
        "submitting a plain task": count(lambda _: plain.delay(ORDER.order_id)),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(count_runs() | count_task()))
