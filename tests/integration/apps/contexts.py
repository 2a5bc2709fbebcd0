"""A GraphTask that answers with the context it got."""

from __future__ import annotations

import json

from celery import Celery

from docket_celery import Graph, StepContext, graph_task
from tests.unit.protos.shop_pb2 import Label, Order

app = Celery("tests.integration.apps.contexts")
telling = Graph("contexts")


@telling.step
def tell(order: Order, ctx: StepContext) -> Label:
    """Answer with the context as JSON."""
    return Label(text=json.dumps(dict(ctx.values)))


@graph_task(app, telling, name="contexts.tell")
def tell_context(order: Order) -> Label:
    """Answer with the context as JSON."""
    raise NotImplementedError
