"""Protocol Buffers messages: names, stable bytes, and bounded views that hide what is marked as secret."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard, TypeVar, cast

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, EncodeError, Message
from google.protobuf.message_factory import GetMessageClass

from docket_celery.errors import DecodeFailed, InvalidArguments, PayloadTooLarge, safe_text

M = TypeVar("M", bound=Message)
Value = Message | Sequence[Message]
"""What a step takes or returns: a message, or all messages of a fan-out."""

STORED_BYTES = "docket_max_stored_bytes"
"""The setting that `check_size` names for what is stored."""
MAX_JSON_BYTES = 16 * 1024
"""Above this a message gets no ``output_json`` view: the view is for reading, not a second copy of the data."""
_MAX_FIELD_CHARS = 60
_SHOWN_FIELDS = 8
_REDACTED = "***"
_UNREADABLE = (
    json_format.ParseError,
    AttributeError,
    RecursionError,
    TypeError,
    ValueError,  # lone surrogates
    OverflowError,  # an enum's Infinity
)
_ANY = "google.protobuf.Any"
_MAX_DEPTH = 100
"""Levels of nesting that Protocol Buffers reads by default, in every language; it writes more than that."""


def is_message_type(kind: object) -> TypeGuard[type[Message]]:
    """Tell whether *kind* is a generated message class."""
    return (
        isinstance(kind, type) and issubclass(kind, Message) and getattr(kind, "DESCRIPTOR", None) is not None
    )


def type_name(kind: type[Message] | Message) -> str:
    """Return the full Protocol Buffers name, such as ``shop.Order``."""
    name: str = kind.DESCRIPTOR.full_name
    return name


def to_bytes(message: Message) -> bytes:
    """Return the deterministic encoding: equal messages give equal bytes within one library version."""
    return message.SerializeToString(deterministic=True)


def copy_message(message: M) -> M:
    """Return a message of its own that equals *message*."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def from_bytes(kind: type[M], data: bytes) -> M:
    """Read *data* as a *kind*; DecodeFailed: the bytes are not a valid message of that type."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise DecodeFailed(type_name(kind), str(error)) from error


def may_not_encode(kind: type[Message]) -> bool:
    """Tell whether there can be messages of this type that `encoding_fault` finds something wrong with."""
    return any(_encoding_risks(kind.DESCRIPTOR))


def encoding_fault(message: Message) -> str | None:
    """Return why *message* could not be written, or not be read back once it is written; None: it can.

    Of a type that can neither nest without bound nor lack a required field this is one look-up; else the message is
    encoded, and read back if it can be too deep.
    """
    nests, requires = _encoding_risks(message.DESCRIPTOR)
    if not nests and not requires:
        return None
    try:
        data = to_bytes(message)
    except EncodeError:
        missing: list[str] = cast("Any", message).FindInitializationErrors()  # the stubs leave it out
        shown = ", ".join(missing[:_SHOWN_FIELDS]) + (", …" if len(missing) > _SHOWN_FIELDS else "")
        return f"required fields are not set: {shown}" if missing else "it cannot be encoded"
    if not nests:
        return None
    try:
        type(message).FromString(data)
    except DecodeError:
        return (
            f"it is nested more than {_MAX_DEPTH} levels deep, which Protocol Buffers writes and does not read back "
            f"(one level of a google.protobuf.Struct counts as three); flatten it"
        )
    return None


@functools.cache
def _types_within(top: Descriptor) -> tuple[Descriptor, ...]:
    """Return a type and all that its fields hold, at any depth."""
    types = {top.full_name: top}
    todo = [top]
    while todo:
        for field in todo.pop().fields:
            inner = field.message_type
            if inner is not None and inner.full_name not in types:
                types[inner.full_name] = inner
                todo.append(inner)
    return tuple(types.values())


@functools.cache
def _encoding_risks(descriptor: Descriptor) -> tuple[bool, bool]:
    """Return whether messages of a type can nest too deep, and whether they can lack a required field."""
    types = _types_within(descriptor)
    requires = any(field.is_required for each in types for field in each.fields)
    # An extension may hold any type.
    extends = any(each.is_extendable for each in types)
    inner = {
        each.full_name: {
            field.message_type.full_name for field in each.fields if field.message_type is not None
        }
        for each in types
    }
    for _ in range(_MAX_DEPTH):
        inner = {name: held for name, held in inner.items() if held & inner.keys()}
    return bool(inner) or extends, requires or extends


def value_name(value: Value) -> str:
    """Return the type name of a message; 'list' for many."""
    return type_name(value) if isinstance(value, Message) else "list"


def value_digest(value: Value) -> bytes:
    """Return what stands for a value in the digest of a job: its bytes, or the digest of a list, however long."""
    if isinstance(value, Message):
        return to_bytes(value)
    digest = hashlib.sha256()
    for message in value:
        digest.update(frame((type_name(message).encode(), to_bytes(message))))
    return digest.digest()


def value_bytes(value: Value) -> bytes:
    """Return the deterministic encoding of a message, or of many: then each with its type name and both lengths."""
    if isinstance(value, Message):
        return to_bytes(value)
    return frame(part for message in value for part in (type_name(message).encode(), to_bytes(message)))


def frame(parts: Iterable[bytes]) -> bytes:
    """Return *parts* as one value, each after its length as 8 bytes."""
    framed = bytearray()
    for part in parts:
        framed += len(part).to_bytes(8, "big") + part
    return bytes(framed)


def unframe(data: bytes) -> list[bytes]:
    """Return the parts that `frame` joined; DecodeFailed: one is cut off."""
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        start = at + 8
        at = start + int.from_bytes(data[at:start], "big")
        if start > len(data) or at > len(data):
            raise DecodeFailed("list", "a part is cut off")
        parts.append(data[start:at])
    return parts


def many_from_bytes(kind: type[M], data: bytes) -> list[M]:
    """Read the messages that `value_bytes` wrote, all of them of *kind*; DecodeFailed: the bytes are no such list."""
    parts = unframe(data)
    names = parts[::2]
    expected = type_name(kind).encode()
    if len(parts) % 2 or any(name != expected for name in names):
        raise DecodeFailed(f"list[{type_name(kind)}]", "it holds messages of another type")
    return [from_bytes(kind, part) for part in parts[1::2]]


def is_json_form(kind: type[Message], value: object) -> bool:
    """Tell whether *value* is meant as the JSON form of a *kind*: of some well-known types that is no object."""
    if isinstance(value, dict):
        return True
    plain = value is None or isinstance(value, str | int | float | list)
    return plain and _is_well_known(kind)


def _is_well_known(kind: type[Message]) -> bool:
    return type_name(kind).startswith("google.protobuf.")


def from_json_object(kind: type[M], value: Any) -> M:
    """Read the JSON form of Protocol Buffers, as beat, ``celery call`` and Flower send it.

    Raises:
        InvalidArguments: A field is unknown or has a wrong value; the field is named. What is or may be marked
            ``debug_redact`` is not quoted.
    """
    what = f"JSON form of {type_name(kind)}"
    try:
        return json_format.ParseDict(value, kind())
    except _UNREADABLE as error:
        if not _holds_secrets(kind.DESCRIPTOR):
            raise InvalidArguments(what, _find_unknown(kind, value) or safe_text(error)) from error
    raise InvalidArguments(what, _find_unknown(kind, value) or _find_json_fault(kind, value))


def _find_unknown(kind: type[Message], value: object) -> str | None:
    """Return which name in the JSON form of a message is none of its fields, with the nearest that is."""
    known = sorted({n for field in kind.DESCRIPTOR.fields for n in (field.json_name, field.name)})
    names = cast("dict[Any, object]", value) if isinstance(value, dict) else ()
    strange = next((str(name)[:60] for name in names if name not in known), None)
    if strange is None or _is_well_known(kind):
        return None  # those have forms of their own
    hint = did_you_mean(strange, known)
    return f"there is no field {strange!r} in {type_name(kind)}; known: {', '.join(known)}{hint}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint at the nearest of the *known* names, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _find_json_fault(kind: type[Message], value: object) -> str:
    """Return what is wrong with the JSON form of a message that holds secrets; the parser's text may quote them."""
    fields: dict[str, Any] = {
        n: field for field in kind.DESCRIPTOR.fields for n in (field.json_name, field.name)
    }
    hidden = "it may hold what is marked debug_redact, so it is not shown"
    for name, item in cast("dict[Any, object]", value).items() if isinstance(value, dict) else ():
        try:
            json_format.ParseDict({name: item}, kind())
        except _UNREADABLE as error:
            field = fields.get(name) if isinstance(name, str) else None
            if field is None:
                return _find_unknown(kind, {name: item}) or hidden
            if _is_secret(field):
                return f"field {name} does not fit its type; it is marked debug_redact, so its value is not shown"
            inner = field.message_type
            if inner is None or not _holds_secrets(inner):
                return safe_text(error)
            if not field.is_repeated and inner.full_name != _ANY:
                return f"in field {name}: {_find_json_fault(GetMessageClass(inner), item)}"
            return f"field {name} does not fit its type; {hidden}"
    return f"it is no {type_name(kind)}; {hidden}"


def check_size(
    what: str, size_bytes: int, limit_bytes: int, setting: str = "docket_max_message_bytes"
) -> None:
    """Refuse what is over the limit, which is called *setting*, with PayloadTooLarge."""
    if size_bytes > limit_bytes:
        raise PayloadTooLarge(what, size_bytes, limit_bytes, setting)


def to_view(message: Value) -> str | None:
    """Return the JSON view for people who read the database, or None if there is none to be had.

    Fields marked ``debug_redact`` are left out. A view is a convenience: it is None above `MAX_JSON_BYTES`, when
    it cannot be rendered (an Any of an unknown type, say) and when it holds U+0000, which jsonb cannot store. A view
    that jsonb refuses would fail the save of the data itself; stores do not look at it again.
    """
    if not isinstance(message, Message):
        views = [to_view(each) for each in message[: MAX_JSON_BYTES // 2]]
        known = [view for view in views if view is not None]
        joined = f"[{', '.join(known)}]"
        return joined if len(known) == len(message) and len(joined) <= MAX_JSON_BYTES else None
    if message.ByteSize() > MAX_JSON_BYTES:
        return None
    try:
        shown = message
        if _holds_secrets(message.DESCRIPTOR):
            shown = copy_message(message)
            _clear_secrets(shown)
        view = json.dumps(json_format.MessageToDict(shown, preserving_proto_field_name=True), allow_nan=False)
    except (KeyError, TypeError, ValueError, RecursionError, DecodeError, json_format.Error):
        return None
    return None if len(view) > MAX_JSON_BYTES or "\\u0000" in view else view


def brief(message: Message, limit: int = 200) -> str:
    """Return a one-line text for logs, Flower and events: at most *limit* characters, without the secrets."""
    return _cut(_brief(message, depth=2), limit)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _brief(message: Message, depth: int) -> str:
    fields = message.ListFields()
    shown = [f"{field.name}={_brief_field(field, value, depth)}" for field, value in fields[:_SHOWN_FIELDS]]
    more = ["…"] if len(fields) >= _SHOWN_FIELDS else []
    return f"{message.DESCRIPTOR.name}({', '.join([*shown, *more])})"


def _brief_field(field: FieldDescriptor, value: Any, depth: int) -> str:
    if _is_secret(field):
        return _REDACTED
    if field.is_repeated:
        return f"[{len(value)}]"
    if isinstance(value, Message):
        return _brief(value, depth - 1) if depth else f"{value.DESCRIPTOR.name}(…)"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, str):
        return repr(_cut(value, _MAX_FIELD_CHARS))
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else str(value)
    return repr(value)


@functools.cache
def _is_secret(field: FieldDescriptor) -> bool:
    """Tell whether *field* is marked ``debug_redact``; its options are made again by each call that asks for them."""
    return bool(field.GetOptions().debug_redact)


@functools.cache
def _holds_secrets(descriptor: Descriptor) -> bool:
    return any(
        each.full_name == _ANY or any(map(_is_secret, each.fields)) for each in _types_within(descriptor)
    )


def _clear_secrets(message: Message) -> None:
    if message.DESCRIPTOR.full_name == _ANY:
        _clear_packed(message)
        return
    for field, value in message.ListFields():
        if _is_secret(field):
            message.ClearField(field.name)
        elif field.message_type is None:
            continue
        elif field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                for key in value:
                    _clear_secrets(value[key])
        elif field.is_repeated:
            for item in value:
                _clear_secrets(item)
        else:
            _clear_secrets(value)


def _clear_packed(packed: Any) -> None:
    """Clear what an Any holds: the view would show it unpacked. A type that is not known here raises KeyError."""
    name = packed.type_url.rpartition("/")[2]
    if name:
        inner = GetMessageClass(packed.DESCRIPTOR.file.pool.FindMessageTypeByName(name)).FromString(
            packed.value
        )
        _clear_secrets(inner)
        packed.value = inner.SerializeToString()
