"""``python -m examples.tracing``: one request, and the trace that the spans in its steps make.

Needs the package opentelemetry-sdk. The spans are kept in memory to be printed; a service sends them to its collector
by another exporter, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from docket_celery import settings
from examples.tracing.graph import offers, span_of_step, tracer
from examples.tracing.tracing_pb2 import Offer, Parcel


def collect_spans() -> InMemorySpanExporter:
    """Have OpenTelemetry keep all spans of this process, and return where."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def draw(spans: Sequence[ReadableSpan], parent_id: int | None = None, indent: str = "  ") -> Iterator[str]:
    """Yield a line for each span below the span *parent_id*, in the order of their beginning."""
    children = [span for span in spans if (span.parent.span_id if span.parent else None) == parent_id]
    for span in sorted(children, key=lambda span: span.start_time or 0):
        took_ms = ((span.end_time or 0) - (span.start_time or 0)) / 1e6
        attempt = (span.attributes or {}).get("docket.attempt")
        shown = "" if attempt is None else f" (attempt {attempt!r})"
        failed = "" if span.status.is_ok else f"  failed: {span.status.description}"
        yield f"{indent}{span.name}{shown}, {took_ms:.0f} ms{failed}"
        yield from draw(spans, name_of(span).span_id, indent + "  ")


def name_of(span: ReadableSpan) -> trace.SpanContext:
    """Return the ids of *span* and of its trace."""
    found = span.get_span_context()
    assert found is not None
    return found


def main() -> None:
    """Handle one request and print its trace."""
    exporter = collect_spans()
    settings(step_hooks=[span_of_step])
    with tracer.start_as_current_span("POST /offers"):
        offer = offers.execute(
            Offer, Parcel(parcel_id="p-1", weight_g=1200, country="CH"), execution_id="p-1"
        )
    print(f"Offer: {offer.total_cents} cents")
    spans = exporter.get_finished_spans()
    traces = {name_of(span).trace_id for span in spans}
    print(f"{len(spans)} spans in {len(traces)} trace:")
    print("\n".join(draw(spans)))


if __name__ == "__main__":
    main()
