"""A job as the store names and measures it: its parts, its digest, its target."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import Message

from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.messages import (
    Value,
    value_bytes,
    value_digest,
    value_name,
)
from docket_celery.plan.plan import Plan
from docket_celery.store.identity import job_digest


def job_parts(given: Iterable[ValueKey], values: Iterable[Value]) -> list[tuple[str, bytes]]:
    """Return the name and the bytes of each value of a job: of its type, and of `Named` where types do not tell.

    Nothing of a job that lies in the store, whose *values* are none.
    """
    return [
        (key.label(value_name(value)), value_bytes(value)) for key, value in zip(given, values, strict=False)
    ]


def job_bytes(given: Iterable[ValueKey], values: Iterable[Value]) -> int:
    """Return how many bytes a job's messages and their names have as the store keeps them; a list counts nothing."""
    sizes = (
        16 + len(key.label(value_name(value)).encode()) + value.ByteSize()
        for key, value in zip(given, values, strict=False)
        if isinstance(value, Message)
    )
    return sum(sizes)


def digest_job(given: Iterable[ValueKey], values: Iterable[Value]) -> bytes:
    """Return the digest of a job; that of a batch is the same however its items come."""
    return job_digest(
        (key.label(value_name(value)), value_digest(value)) for key, value in zip(given, values, strict=False)
    )


def target_name(plan: Plan) -> str:
    """Return what a run of *plan* makes, as its row has it."""
    return f"list[{plan.target}]" if plan.collects else str(plan.target)
