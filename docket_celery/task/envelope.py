"""Protocol Buffers through Celery's default JSON: a type name and base64, never pickle.

The decoder never raises: an exception in it makes Celery acknowledge and lose the message while its caller waits
for ever, and a bad result would break `get()` of a bystander. It returns an `Undecodable` instead, and the task or
the caller that really needs the value fails with the typed error it carries.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from celery.backends.base import Backend
from google.protobuf.message import Message
from kombu.utils.json import dumps, object_hook, register_type

from docket_celery.engine.process.settings import Settings
from docket_celery.errors import (
    DecodeFailed,
    DocketError,
    PayloadTooLarge,
    StepFailed,
    UnknownMessageType,
    from_record,
    to_record,
)
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.messages import brief, from_bytes, to_bytes, type_name

MARKER: Final = "docket.pb"
STORED: Final = "docket_celery.result"
"""The one key of a result as backends keep it. Its JSON is a text there: kombu raises at a marker without a decoder,
and a process without this library could not even read the task's state."""


class Undecodable:
    """Stands for a message that cannot be read; encodes to what it was read from.

    Attributes:
        raw: The envelope's content as it came.
        error: What is wrong with it.
    """

    def __init__(self, raw: Any, error: DocketError, marker: str = MARKER) -> None:
        self.raw, self.error, self._marker = raw, error, marker

    def __json__(self) -> dict[str, Any]:
        return {"__type__": self._marker, "__value__": self.raw}

    def __repr__(self) -> str:
        return f"<Undecodable: {self.error}>"


class Result:
    """A task's argument or result on its way out, with a text that is bounded and hides secrets.

    Celery writes the text of a result to its log and to events; a message's own text has every field.
    Attributes of the value can be read through it.

    Attributes:
        value: A message, a list of messages, or a `BatchResult`.
    """

    def __init__(self, value: Message | Sequence[Message] | BatchResult[Any]) -> None:
        self.value = value

    def __json__(self) -> Any:
        value = self.value
        if isinstance(value, Message):
            return {"__type__": MARKER, "__value__": encode(value)}
        if isinstance(value, BatchResult):
            results = [None if each is None else Result(each) for each in value.results]
            errors = {str(index): to_record(error) for index, error in value.errors.items()}
            return {"__type__": MARKER, "__value__": {"results": results, "errors": errors}}
        return [wrap(each) for each in value]

    def __getattr__(self, name: str) -> Any:
        if name == "value":
            raise AttributeError(name)
        return getattr(self.value, name)

    def __eq__(self, other: object) -> bool:
        return self.value == (other.value if isinstance(other, Result) else other)

    __hash__ = None  # type: ignore[assignment]  # like the message, which can change

    def __repr__(self) -> str:
        if isinstance(self.value, Message):
            return brief(self.value)
        if isinstance(self.value, BatchResult):
            return f"<{len(self.value)} results, {len(self.value.errors)} failed>"
        return f"<{len(self.value)} messages>"


class Types:
    """The message types that may be decoded: those of declared tasks, and no others.

    Attributes:
        limits: Most bytes of a message, as each app has them. The decoder is called without an app and goes by the
            largest; each app checks its own again.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, type[Message]] = {}
        self.limits = {Settings().max_message_bytes}

    def allow(self, kind: type[Message]) -> None:
        """Encode and decode messages of *kind* in this process; others stay as kombu has them."""
        if self._kinds.get(type_name(kind)) is not kind:
            self._kinds[type_name(kind)] = kind
            # kombu's annotation wants the decoder to return a message; ours must not raise, hence the placeholder.
            register_type(kind, MARKER, encode, cast("Any", decode))

    def find(self, name: str) -> type[Message]:
        """Return the type called *name*; raises UnknownMessageType if no declared task uses it."""
        kind = self._kinds.get(name)
        if kind is None:
            raise UnknownMessageType(name)
        return kind


types: Final = Types()
_read_text: Final = json.JSONDecoder(object_hook=object_hook).decode
"""What kombu's ``loads`` does, which makes a decoder for each text."""


def encode(message: Message) -> dict[str, str]:
    """Return the envelope's content for *message*."""
    return {"t": type_name(message), "b": base64.b64encode(to_bytes(message)).decode("ascii")}


def decode(value: object) -> Message | BatchResult[Any] | Undecodable:
    """Return the message, or the results of a batch, in an envelope's content; or an `Undecodable`: never raises."""
    try:
        return _decode(value)
    except DocketError as error:
        return Undecodable(value, error)
    except Exception as error:  # noqa: BLE001 -- a decoder that raises loses the message and hangs its caller
        return Undecodable(value, DecodeFailed("unknown", f"{type(error).__name__}: {error}"))


def _decode(value: object) -> Message | BatchResult[Any]:
    content: Any = value
    if _has_keys(content, {"results", "errors"}):
        errors = {int(index): from_record(record) for index, record in content["errors"].items()}
        return BatchResult(tuple(content["results"]), cast("dict[int, StepFailed]", errors))
    if not (
        _has_keys(content, {"t", "b"}) and isinstance(content["t"], str) and isinstance(content["b"], str)
    ):
        raise DecodeFailed("unknown", 'the envelope is not {"t": type name, "b": base64 text}')
    name, text = content["t"], content["b"]
    size, limit = len(text) * 3 // 4, max(types.limits)
    if size > limit + 2:
        raise PayloadTooLarge(f"message of type {name[:200]!r}", size, limit)
    kind = types.find(name[:500])
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise DecodeFailed(name, f"its base64 is damaged ({error})") from error
    return from_bytes(kind, data)


def _has_keys(content: Any, names: set[str]) -> bool:
    return isinstance(content, dict) and content.keys() == names


class _Unreadable(dict[str, Any]):
    """What a backend keeps of a task whose result cannot be read here: its state can, its result raises."""

    def __init__(self, meta: dict[str, Any], error: DocketError) -> None:
        super().__init__(meta)
        self._error = error

    def __getitem__(self, name: str) -> Any:
        if name == "result":
            raise self._error.with_traceback(None)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return what is kept as *name*; like ``[]``, this raises for the result."""
        return self[name] if name == "result" else super().get(name, default)


def find_fault(value: Any) -> DocketError | None:
    """Return why a result, or one of a batch, cannot be read; None: it can."""
    found = cast("BatchResult[Message]", value).results if isinstance(value, BatchResult) else value
    many = cast("Sequence[Any]", found) if isinstance(found, (list, tuple)) else (found,)
    return next((one.error for one in many if isinstance(one, Undecodable)), None)


def to_stored(result: Any) -> dict[str, str]:
    """Return a result as backends keep it."""
    return {STORED: dumps(result)}


def read_stored(meta: dict[str, Any]) -> dict[str, Any]:
    """Return what a backend keeps of a task, with its result read; see `to_stored`."""
    if isinstance(meta, _Unreadable):
        return meta
    result: Any = meta.get("result")
    if _has_keys(result, {STORED}):
        try:
            result = meta["result"] = _read_text(result[STORED])
        except (TypeError, ValueError) as error:
            return _Unreadable(meta, DecodeFailed("result", f"it is damaged: {error}"))
    fault = find_fault(result)
    return meta if fault is None else _Unreadable(meta, fault)


def wrap(value: Any) -> Any:
    """Return an argument as it is published: messages encode themselves, whatever encoder the app has for them."""
    return Result(cast("Any", value)) if isinstance(value, (Message, list, tuple)) else value


def is_large(value: object, settings: Settings) -> bool:
    """Tell whether a value is a message over the limit of one that travels."""
    return isinstance(value, Message) and value.ByteSize() > settings.max_message_bytes


# It encodes itself: the type is named for the decoder's sake. Types that no task declares stay as kombu has them.
register_type(Undecodable, MARKER, Undecodable.__json__, cast("Any", decode))

_backend: Any = Backend
_decoded: Callable[[Any, Any], Any] = _backend.meta_from_decoded


def _meta_from_decoded(self: Any, meta: Any) -> Any:
    """Read results where all backends and promises pass: no plain AsyncResult returns what stands for a message."""
    return read_stored(_decoded(self, meta))


_backend.meta_from_decoded = _meta_from_decoded
