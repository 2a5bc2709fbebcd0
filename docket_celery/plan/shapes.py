"""The shape of a message type: the kind of each field number, by which stored bytes are read.

Bytes outlive the ``.proto`` that they were written with. A field whose kind changed is skipped when they are read,
and its value is lost without an error. So the kinds are stored beside the bytes, and compared when they are read.
"""

from __future__ import annotations

import functools
import json

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from docket_celery.errors import DecodeFailed

_MOST_CHARS = 4096
_KINDS = {
    getattr(FieldDescriptor, f"TYPE_{name}"): kind
    for kind, names in {
        "varint": ("INT32", "INT64", "UINT32", "UINT64", "BOOL", "ENUM"),
        "zigzag": ("SINT32", "SINT64"),
        "fixed32": ("FIXED32", "SFIXED32"),
        "fixed64": ("FIXED64", "SFIXED64"),
        "float": ("FLOAT",),
        "double": ("DOUBLE",),
        "text": ("STRING", "BYTES"),
        "group": ("GROUP",),
    }.items()
    for name in names
}
"""Types of one kind are read as each other, as the documentation of Protocol Buffers says under "Updating"."""

Shape = list[dict[str, str | int]]


def message_shape(kind: type[Message]) -> str:
    """Return the kind of each field of *kind* and of the types that it holds, as JSON of at most 4,096 characters.

    A list of types, *kind* first; each a map of field number to kind, or to the place of a message type in the list.
    A repeated field has a ``*`` behind its number. What is too long is cut at the end of the list.
    """
    return _describe(kind.DESCRIPTOR)


@functools.lru_cache(maxsize=4096)
def _describe(top: Descriptor) -> str:
    types, shape, size = [top], Shape(), 2
    for held in types:  # grows while it is read: breadth first, so that a cut takes what is deepest
        fields: dict[str, str | int] = {}
        for field in held.fields:
            number = f"{field.number}{'*' if field.is_repeated else ''}"
            inner = field.message_type
            if inner is None or field.type == FieldDescriptor.TYPE_GROUP:
                fields[number] = _KINDS[field.type]
                continue
            if inner not in types:
                types.append(inner)
            fields[number] = types.index(inner)
        size += len(json.dumps(fields)) + 2
        if size > _MOST_CHARS:
            break
        shape.append(fields)
    return json.dumps(shape)


def check_shape(kind: type[Message], stored: str | None) -> None:
    """Check that bytes written when a type had the shape *stored* are read as *kind* without losing a field.

    Fields that were added or removed are no difference.

    Raises:
        DecodeFailed: A field number has another kind now.
    """
    if stored is None or stored == (present := message_shape(kind)):
        return
    name = kind.DESCRIPTOR.full_name
    try:
        before: Shape = json.loads(stored)
        change = _find_change(before, json.loads(present))
    except (ValueError, AttributeError, TypeError) as error:
        raise DecodeFailed(name, "its stored shape cannot be read") from error
    if change is not None:
        raise DecodeFailed(name, f"{change}; take the change back, or give the field a new number")


def _find_change(before: Shape, now: Shape) -> str | None:
    """Return the first field that is of another kind now, or None."""
    pairs = [(0, 0)]
    for old, new in pairs:
        if old >= len(before) or new >= len(now):
            continue
        for number, was in before[old].items():
            plain = number.rstrip("*")
            # One value is read as a list of one; a list of numbers is not read as one value.
            found = now[new].get(number, now[new].get(f"{plain}*"))
            became = now[new].get(plain) if found is None else found
            if became is None:
                continue
            if found is not None and isinstance(was, int) and isinstance(became, int):
                if (was, became) not in pairs:
                    pairs.append((was, became))
            elif was != became or found is None:
                return f"field {plain} was {_say(was, number)} when it was stored, and is {_say(became, plain)} now"
    return None


def _say(kind: str | int, number: str) -> str:
    shown = "a message" if isinstance(kind, int) else kind
    return f"repeated {shown}" if number.endswith("*") else shown
