"""The graph: a rate that is looked up on a thread, a duty that is awaited on a loop, and an offer made of both.

Nothing here hands a trace from step to step. A step gets a copy of the caller's context variables, where
OpenTelemetry keeps the current span, so a span that is opened in a step finds its parent by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from contextlib import contextmanager

from opentelemetry import trace

from docket_celery import FixedBackoff, Graph, RetryPolicy, StepContext, current_context
from examples.tracing.tracing_pb2 import Duty, Offer, Parcel, Rate

offers = Graph("examples.tracing")
tracer = trace.get_tracer("examples.tracing")


@contextmanager
def span_of_step() -> Generator[None]:
    """Open a span around each attempt of each step: a hook, for ``docket_step_hooks``."""
    ctx = current_context()
    facts: dict[str, str | int] = {"docket.execution_id": ctx.execution_id, "docket.attempt": ctx.attempt}
    with tracer.start_as_current_span(ctx.step, attributes=facts):
        yield


@offers.step(retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0.01)))
def look_up_rate(parcel: Parcel, ctx: StepContext) -> Rate:
    """Ask the carrier; the first request gets no answer."""
    with tracer.start_as_current_span("GET carrier /rates") as span:
        span.set_attribute("parcel.weight_g", parcel.weight_g)
        time.sleep(0.02)
        if ctx.attempt == 1:
            raise TimeoutError("the carrier does not answer")
        return Rate(cents=500 + parcel.weight_g // 10)


@offers.step
async def assess_duty(parcel: Parcel) -> Duty:
    """Ask customs; the span stays open while the loop does other work."""
    with tracer.start_as_current_span("GET customs /duties") as span:
        span.set_attribute("parcel.country", parcel.country)
        await asyncio.sleep(0.03)
        return Duty(cents=250)


@offers.step
def make_offer(rate: Rate, duty: Duty) -> Offer:
    """Add up."""
    return Offer(total_cents=rate.cents + duty.cents)
