"""The values of ``context=``: one JSON text in a header of the task's message, bounded and plain.

A broker encodes headers in its own way: RabbitMQ has no NaN, no integers from 2^63 and no keys over 255 bytes, and
drops the connection at headers over some 130 KB; kombu's JSON takes objects with its own keys for encoded values. A
text means the same to all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from docket_celery.errors import DecodeFailed, InvalidArguments

MAX_CONTEXT_BYTES: Final = 16 * 1024
"""Most bytes of the JSON text; each message of a batch's parts has a copy of it."""
MAX_DEPTH: Final = 32
"""Most levels of lists and mappings."""
_MAX_INT_BITS: Final = 1024
"""Integers up to here are as large as any float, and far below what Python refuses to read as too long."""


def write_context(context: object) -> str:
    """Return the JSON text that carries *context*.

    Raises:
        InvalidArguments: It is no mapping of JSON values, or is too deep or too large to travel.
    """
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

    Raises:
        DecodeFailed: It is something else.
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
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int):
        if value.bit_length() > _MAX_INT_BITS:
            raise InvalidArguments(where, f"is an integer of {value.bit_length()} bits; send it as text")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidArguments(
                where, f"is {value!r}, which JSON does not have; leave it out or send None"
            )
        return value
    if not isinstance(value, Mapping | list | tuple):
        raise InvalidArguments(where, f"must hold JSON values only, not {type(value).__name__}")
    if not depth:
        raise InvalidArguments("context", f"is nested more than {MAX_DEPTH} levels deep; flatten it")
    if isinstance(value, Mapping):
        items = cast("Any", value).items()
        return {_key(key, where): _plain(each, f"{where}[{key!r:.60}]", depth - 1) for key, each in items}
    many = cast("Sequence[Any]", value)
    return [_plain(each, f"{where}[{index}]", depth - 1) for index, each in enumerate(many)]


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise InvalidArguments(where, f"has the key {key!r:.60}; keys must be text, as JSON has no others")
    return _text(key, where)


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArguments(where, "holds text with a lone surrogate, which is no Unicode text") from None
    return text
