"""OpenTelemetry's own instrumentation of Celery around a GraphTask in a real worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider

from tests.conftest import StartWorker
from tests.infra.processes import wait_until
from tests.integration.apps.traced_app import app, process
from tests.unit.protos.shop_pb2 import Order

_Instrumentor: Any = CeleryInstrumentor  # it has no annotations
pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]


def test_spans_in_steps_belong_to_the_trace_of_whoever_submitted_the_job(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery], tmp_path: Path
) -> None:
    """From the caller's span over the message's headers and the task's span to the user's spans in steps."""
    file = tmp_path / "spans.jsonl"
    start_worker("prefork", 1, app="tests.integration.apps.traced_app", env={"TRACED_APP_SPANS": str(file)})
    connect_app(app)
    provider, instrumentor = TracerProvider(), _Instrumentor()
    tracer = provider.get_tracer("client")
    instrumentor.instrument(tracer_provider=provider)
    traces: dict[str, str] = {}
    try:
        jobs = []
        for name in ("first", "second"):
            with tracer.start_as_current_span("request") as request:
                jobs.append(process.delay(Order(order_id=name)))
                traces[name] = f"0x{request.get_span_context().trace_id:032x}"
        assert [job.get(timeout=30).tracking_id for job in jobs] == ["first", "second"]
    finally:
        instrumentor.uninstrument()
        provider.shutdown()
    wait_until(lambda: len(read(file)) == 10, within_s=10.0, what="the spans of two runs")
    for name, trace_id in traces.items():
        spans = [span for span in read(file) if span["context"]["trace_id"] == trace_id]
        names = {span["context"]["span_id"]: span["name"] for span in spans}
        assert {span["name"]: names.get(span["parent_id"]) for span in spans} == {
            "run/traced.process": None,  # its parent is the span of the caller, in another process
            "charge": "run/traced.process",
            f"label {name}": "run/traced.process",
            "print": f"label {name}",
            "ship": "run/traced.process",
        }


def read(file: Path) -> list[dict[str, Any]]:
    """Return the spans that the worker has exported."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
