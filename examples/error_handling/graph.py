"""The graph: one step that calls a service, with everything that decides what its failures mean."""

from __future__ import annotations

from docket_celery import AbortError, ExponentialBackoff, Graph, RetryPolicy
from examples.error_handling.error_handling_pb2 import FetchedData, LetterTotal, Query
from examples.error_handling.faults import NetworkError, PoolExhausted, ValidationError, is_transient

UNREACHABLE = "unreachable"
CRITICAL = "critical"

fetching = Graph("examples.error_handling")


@fetching.step(
    retry=RetryPolicy(
        max_attempts=3,
        # Without jitter the waits can be compared with what was asked for; a service keeps it on.
        backoff=ExponentialBackoff(initial=0.1, factor=2.0, maximum=1.0, jitter=False),
    ),
    timeout=5,
    retriable=is_transient,
)
def fetch_data(query: Query) -> FetchedData:
    """Ask the service; some queries make it fail."""
    if not query.value:
        raise ValidationError("value", "cannot be empty")
    if query.value == UNREACHABLE:
        raise NetworkError("fetch_data", "connection timeout")
    if query.value == CRITICAL:
        raise AbortError("database unavailable", PoolExhausted("connection pool exhausted"))
    return FetchedData(value=query.value)


@fetching.step
def count_letters(data: FetchedData) -> LetterTotal:
    """Count what came back."""
    return LetterTotal(count=len(data.value))
