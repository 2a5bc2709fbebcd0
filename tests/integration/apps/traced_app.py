"""A worker that OpenTelemetry's own instrumentation of Celery watches; its spans go to a file."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from celery import Celery, signals
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from docket_celery import Graph, Scope, graph_task
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Shipment

app = Celery("traced_app")
app.conf.broker_connection_retry_on_startup = True
tracer = trace.get_tracer("traced_app")


@signals.worker_process_init.connect  # type: ignore[misc, unused-ignore] # signals are untyped
def _trace(**_: object) -> None:
    provider = TracerProvider()
    file = open(os.environ["TRACED_APP_SPANS"], "a", buffering=1)  # noqa: SIM115 -- for the process's life
    exporter = ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\n")
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    instrumentor: Any = CeleryInstrumentor  # it has no annotations
    instrumentor().instrument()


graph = Graph("traced")


@graph.step(persist=Scope.WORKFLOW)
def charge(order: Order) -> Charge:
    """Open a span on a thread of the pool."""
    with tracer.start_as_current_span("charge"):
        return Charge(charge_id=order.order_id)


@graph.step
async def label(order: Order) -> Label:
    """Open a span on the loop, and leave it open over a wait."""
    with tracer.start_as_current_span(f"label {order.order_id}"):
        await asyncio.sleep(0.01)
        with tracer.start_as_current_span("print"):
            return Label()


@graph.step
def ship(charge: Charge, label: Label) -> Shipment:
    """Open a span once both are there."""
    with tracer.start_as_current_span("ship"):
        return Shipment(tracking_id=charge.charge_id)


@graph_task(app, graph, name="traced.process")
def process(order: Order) -> Shipment:
    """Make three spans, one of which has a child."""
    raise NotImplementedError
