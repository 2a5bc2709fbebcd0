"""The headers of a GraphTask's message. They survive retries and redeliveries; the wire names stay as they are.

The values of ``context=`` travel as one JSON text. A broker encodes headers in its own way: RabbitMQ has no NaN, no
integers from 2^63 and no keys over 255 bytes, and drops the connection at headers over some 130 KB; kombu's JSON
takes objects with its own keys for encoded values. A text means the same to all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from docket_celery.errors import DecodeFailed, InvalidArguments

EXECUTION_ID: Final = "docket_execution_id"
"""Names the run."""
CONTEXT: Final = "docket_context"
"""The caller's ``context=``."""
DIGEST: Final = "docket_job_digest"
"""Digest of the job, base64."""
BATCH: Final = "docket_batch"
"""How the submission wants its batch to be worked on."""

# Of one delivery: a new submission never has them.
PART: Final = "docket_part"
"""Which part of a batch the delivery works on."""
WAITS_FOR_OTHER: Final = "docket_attached"
"""The delivery waits for the outcome of a run that another one advances; how often it was sent again for that."""
ENDED_CLEANLY: Final = "docket_released"
"""Number of the retry whose preceding delivery gave its lease back."""
OUTAGES: Final = "docket_skipped"
"""How many deliveries of the task did not reach the database."""
CELERY_RETRIES: Final = "docket_retries"
"""Retries counted before the part of a batch was published as a task of its own."""
UNTOLD: Final = "docket_untold"
"""How many deliveries could not tell Celery the outcome of their run."""
OF_ONE_DELIVERY: Final = (WAITS_FOR_OTHER, ENDED_CLEANLY, OUTAGES, PART, CELERY_RETRIES, UNTOLD)

PREPARED: Final = "docket_again"
"""No header, but an option of `apply_async`: the job has been prepared, its headers are ours."""

MAX_CONTEXT_BYTES: Final = 16 * 1024
"""Most bytes of the JSON text; each message of a batch's parts has a copy of it."""
MAX_DEPTH: Final = 32
"""Most levels of lists and mappings."""
_MAX_INT_BITS: Final = 1024
"""Integers up to here are as large as any float, and far below what Python refuses to read as too long."""


def write_context(context: object) -> str:
    """Return the JSON text that carries *context*; raises InvalidArguments."""
    if not isinstance(context, Mapping):
        raise InvalidArguments("context", f"must be a mapping of JSON values, not {type(context).__name__}")
    values = _plain(cast("Any", context), "context", MAX_DEPTH)
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    size = len(text.encode())
    if size > MAX_CONTEXT_BYTES:
        problem = f"has {size} bytes as JSON, over the limit of {MAX_CONTEXT_BYTES}; store the data and send its key"
        raise InvalidArguments("context", problem)
    return text


def read_context(header: object) -> Mapping[str, Any]:
    """Return the values that a header holds: a text of `write_context`, or the mapping that older versions sent.

    Anything else raises DecodeFailed.
    """
    if not header:
        return {}
    values = header
    if isinstance(header, str):
        try:
            values = json.loads(header) if len(header) <= MAX_CONTEXT_BYTES else None
        except (ValueError, RecursionError) as error:
            raise DecodeFailed("context", f"the header is no JSON text ({error})") from None
    if not isinstance(values, Mapping):
        raise DecodeFailed("context", "the header holds no mapping of JSON values")
    return cast("Mapping[str, Any]", values)


def _plain(value: Any, where: str, depth: int) -> Any:
    """Return *value* in the types that JSON has; *where* it is, for errors."""
    if not isinstance(value, Mapping | list | tuple):
        _check(where, _find_fault(value))
        return value
    if not depth:
        raise InvalidArguments("context", f"is nested more than {MAX_DEPTH} levels deep; flatten it")
    if not isinstance(value, Mapping):
        many = enumerate(cast("Sequence[Any]", value))
        return [_plain(each, f"{where}[{index}]", depth - 1) for index, each in many]
    found: dict[str, Any] = {}
    for key, each in cast("Any", value).items():
        no_text = f"has the key {key!r:.60}; keys must be text, as JSON has no others"
        _check(where, _find_fault(key) if isinstance(key, str) else no_text)
        found[key] = _plain(each, f"{where}[{key!r:.60}]", depth - 1)
    return found


def _find_fault(value: object) -> str | None:
    """Return why a value that is no list or mapping cannot travel."""
    if isinstance(value, str):
        lone = any("\ud800" <= character <= "\udfff" for character in value)
        return "holds text with a lone surrogate, which is no Unicode text" if lone else None
    if isinstance(value, int):
        bits = value.bit_length()
        return f"is an integer of {bits} bits; send it as text" if bits > _MAX_INT_BITS else None
    if isinstance(value, float):
        shown = f"is {value!r}, which JSON does not have; leave it out or send None"
        return None if math.isfinite(value) else shown
    return None if value is None else f"must hold JSON values only, not {type(value).__name__}"


def _check(where: str, fault: str | None) -> None:
    if fault is not None:
        raise InvalidArguments(where, fault)
