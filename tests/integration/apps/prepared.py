"""A task that persists, and tells what its prefork child had to do that its parent could have done for it."""

from __future__ import annotations

import json
import sys
from typing import Any

from celery import Celery, signals

from docket_celery import Graph, Scope, graph_task
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Reservation

app = Celery("tests.integration.apps.prepared")
books = Graph("prepared")
inherited: set[str] = set()
compiled: list[str] = []


@signals.worker_process_init.connect(weak=False)
def note(**_: Any) -> None:
    """Note what the child has of its parent, and from here on each statement that it compiles."""
    inherited.update(sys.modules)
    compiler: Any = sys.modules["sqlalchemy.sql.compiler"].SQLCompiler
    compile_it = compiler.__init__

    def compile_and_note(self: Any, dialect: Any, statement: Any, *args: Any, **options: Any) -> None:
        compile_it(self, dialect, statement, *args, **options)
        compiled.append(str(self)[:60])

    compiler.__init__ = compile_and_note


@books.step(persist=Scope.WORKFLOW)
def charge(order: Order) -> Charge:
    """Be saved."""
    return Charge(charge_id=order.order_id)


@books.step(persist=Scope.GLOBAL)
def reserve(charge: Charge) -> Reservation:
    """Be looked up and published."""
    return Reservation(reservation_id=charge.charge_id)


@books.step
def tell(order: Order, reservation: Reservation) -> Label:
    """Tell of the jobs so far; of this one up to here."""
    told = {"imported": sorted({*sys.modules} - inherited), "compiled": compiled}
    return Label(text=json.dumps(told))


@graph_task(app, books, name="prepared.tell")
def tell_all(order: Order) -> Label:
    """Tell what the child has done for itself."""
    raise NotImplementedError
