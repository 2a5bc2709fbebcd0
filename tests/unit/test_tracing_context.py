"""Spans that users open in steps, by OpenTelemetry's SDK: children of what was current around the call."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import pytest
from celery import Celery
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, Tracer, get_current_span

from docket_celery import graph_task
from docket_celery.graph import Graph
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import FixedBackoff, RetryPolicy
from tests.unit.graphs import WAIT_S
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Shipment

_Instrumentor: Any = CeleryInstrumentor  # it has no annotations
provider = TracerProvider()
tracer: Tracer = provider.get_tracer("tests")


@pytest.fixture(scope="module")
def _exporter() -> Generator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield exporter
    provider.shutdown()


@pytest.fixture
def spans(_exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    """The spans that the test finishes."""
    _exporter.clear()
    return _exporter


def traced() -> Graph:
    """Return a graph whose steps open a span each: one on a thread fails once, one waits, one joins."""
    graph = Graph("traced")

    @graph.step(retry=RetryPolicy(backoff=FixedBackoff(0)), timeout=WAIT_S)
    def charge(order: Order, ctx: StepContext) -> Charge:
        with tracer.start_as_current_span(f"charge {ctx.attempt}"):
            if ctx.attempt == 1:
                raise ConnectionError("again")
        return Charge()

    @graph.step
    async def label(order: Order) -> Label:
        with tracer.start_as_current_span("label"):
            await asyncio.sleep(0.001)
            with tracer.start_as_current_span("print"):
                await asyncio.sleep(0.001)
        return Label()

    @graph.step
    def ship(charge: Charge, label: Label) -> Shipment:
        with tracer.start_as_current_span("ship"):
            return Shipment()

    return graph


def context(span: ReadableSpan) -> SpanContext:
    """Return what names *span*."""
    found = span.get_span_context()
    assert found is not None
    return found


def tree(spans: InMemorySpanExporter) -> dict[str, str | None]:
    """Return the name of each span's parent; all must be of one trace."""
    finished = spans.get_finished_spans()
    assert len({context(span).trace_id for span in finished}) == 1
    names = {context(span).span_id: span.name for span in finished}
    return {span.name: None if span.parent is None else names[span.parent.span_id] for span in finished}


def under(root: str) -> dict[str, str | None]:
    """Return the tree that `traced` makes below the span *root*."""
    return {
        **dict.fromkeys(["charge 1", "charge 2", "label", "ship"], root),
        "print": "label",
        root: None,
    }


@pytest.mark.parametrize("threads", ["0", "1", "4"])
def test_spans_in_steps_are_children_of_the_span_around_execute(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    """On pool threads, on the loop, on the calling thread; and nothing is current any more afterwards."""
    monkeypatch.setenv("DOCKET_CELERY_THREADS", threads)
    with tracer.start_as_current_span("request") as request:
        traced().execute(Shipment, Order())
        assert get_current_span() is request
    assert tree(spans) == under("request")


def test_spans_in_steps_are_children_of_the_span_around_aexecute(spans: InMemorySpanExporter) -> None:
    """Two handlers on one loop: each run belongs to its own trace."""

    async def handle(name: str) -> None:
        with tracer.start_as_current_span(name):
            await traced().aexecute(Shipment, Order())

    async def serve() -> None:
        await asyncio.gather(handle("first"), handle("second"))

    asyncio.run(serve())
    finished = spans.get_finished_spans()
    traces: dict[int, set[str]] = {}
    for span in finished:
        traces.setdefault(context(span).trace_id, set()).add(span.name)
    assert sorted(traces.values(), key=sorted) == [set(under("first")), set(under("second"))]


def test_spans_in_steps_are_children_of_the_span_around_start(spans: InMemorySpanExporter) -> None:
    """The span in force where the run was started, though it is over by the time that steps run."""
    with tracer.start_as_current_span("request"):
        started = traced().start(Shipment, Order())
    started.result(WAIT_S)
    assert tree(spans) == under("request")


def test_spans_in_steps_of_a_task_are_children_of_what_its_instrumentation_opened(
    spans: InMemorySpanExporter,
) -> None:
    """OpenTelemetry's own instrumentation of Celery, with an eager task; the worker has a test of its own."""
    app = Celery("traced", set_as_current=False)
    app.conf.task_always_eager = True

    @graph_task(app, traced(), name="traced.ship", shared=False)
    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    instrumentor = _Instrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        ship_order.delay(Order()).get()
    finally:
        instrumentor.uninstrument()
    assert tree(spans) == under("run/traced.ship")
