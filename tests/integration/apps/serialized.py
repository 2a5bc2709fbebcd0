"""GraphTasks in an app whose settings name other serializers than JSON."""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery
from kombu.serialization import register

from docket_celery import Graph, StepContext, graph_task
from examples.movies.graph import movie_graph
from examples.movies.movies_pb2 import EnrichedMovie, Movie
from tests.integration.apps.journal import note
from tests.unit.protos.shop_pb2 import Charge, Order

# One of the app's own, which knows plain JSON values alone.
register("own", json.dumps, json.loads, content_type="application/x-own", content_encoding="utf-8")

app = Celery("tests.integration.apps.serialized")
app.conf.update(json.loads(os.environ.get("SERIALIZED_SETTINGS", "{}")))
app.conf.broker_connection_retry_on_startup = True

graph = Graph("serialized")


@graph.step
def charge(order: Order, ctx: StepContext) -> Charge:
    """Charge once."""
    note(f"charge/{ctx.execution_id}", order.order_id)
    return Charge(charge_id=order.order_id)


@graph_task(app, graph)
def pay(order: Order) -> Charge:
    """One message in, one out."""
    raise NotImplementedError


@graph_task(app, movie_graph, chunk_size=2)
def enrich(movies: list[Movie]) -> list[EnrichedMovie]:
    """A batch in chunks."""
    raise NotImplementedError


@app.task  # type: ignore[misc, unused-ignore] # celery's decorators are untyped
def echo(value: Any) -> Any:
    """Return what was sent: a plain task, which keeps the app's serializer."""
    return value
