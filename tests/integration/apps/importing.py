"""A task that persists, and tells what its prefork child has imported since the fork."""

from __future__ import annotations

import sys
from typing import Any

from celery import Celery, signals

from docket_celery import Graph, Scope, StepContext, graph_task
from tests.unit.protos.shop_pb2 import Charge, Label, Order

app = Celery("tests.integration.apps.importing")
books = Graph("importing")
inherited: set[str] = set()


@signals.worker_process_init.connect(weak=False)
def note(**_: Any) -> None:
    """Note what the child has of its parent."""
    inherited.update(sys.modules)


@books.step(persist=Scope.WORKFLOW)
def charge(order: Order) -> Charge:
    """A checkpoint of it has been stored before the next step runs."""
    return Charge(charge_id=order.order_id)


@books.step
def tell(charge: Charge, ctx: StepContext) -> Label:
    """Name the modules, imported during this job or one before."""
    return Label(text=f"{ctx.execution_id}: {' '.join(sorted({*sys.modules} - inherited))}")


@graph_task(app, books, name="importing.tell")
def tell_imports(order: Order) -> Label:
    """Name the modules that the child has imported for itself."""
    raise NotImplementedError
