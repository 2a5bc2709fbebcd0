"""Protocol Buffers through Celery's default JSON: a type name and base64, never pickle.

The decoder never raises: an exception in it makes Celery acknowledge and lose the message while its caller waits
for ever, and a bad result would break `get()` of a bystander. It returns an `Undecodable` instead, and the task or
the caller that really needs the value fails with the typed error it carries.
"""

from __future__ import annotations

import base64
import binascii
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard, cast
from weakref import WeakKeyDictionary

from google.protobuf.message import Message
from kombu.utils.json import register_type

from docket_celery.engine.stored_items import StoredBatch
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
BATCH_MARKER: Final = "docket.batch"


class Stored:
    """Base of what stands in a task's message for a value in the store."""


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
    """A task's result on its way out: the message, with a text that is bounded and hides secrets.

    Celery writes the text of a result to its log and to events; a message's own text has every field.
    Attributes of the message can be read through it.
    """

    def __init__(self, message: Message) -> None:
        self.message = message

    def __json__(self) -> dict[str, Any]:
        return {"__type__": MARKER, "__value__": encode(self.message)}

    def __getattr__(self, name: str) -> Any:
        if name == "message":
            raise AttributeError(name)
        return getattr(self.message, name)

    def __eq__(self, other: object) -> bool:
        return self.message == (other.message if isinstance(other, Result) else other)

    __hash__ = None  # type: ignore[assignment]  # like the message, which can change

    def __repr__(self) -> str:
        return brief(self.message)


class Results:
    """Many results on their way out, with a text that is bounded.

    Attributes:
        value: A list of messages, a `BatchResult`, or a `StoredBatch`, of which only the place travels.
    """

    def __init__(self, value: list[Message] | BatchResult[Any] | StoredBatch) -> None:
        self.value = value

    def __json__(self) -> Any:
        if isinstance(self.value, list):
            return [Result(message).__json__() for message in self.value]
        return {"__type__": BATCH_MARKER, "__value__": _encode_batch(self.value)}

    def __eq__(self, other: object) -> bool:
        return self.value == (other.value if isinstance(other, Results) else other)

    __hash__ = None  # type: ignore[assignment]  # like the list

    def __repr__(self) -> str:
        items = self.value.items if isinstance(self.value, StoredBatch) else self.value
        failed = f", {len(self.value.errors)} failed" if isinstance(self.value, BatchResult) else ""
        return f"<{len(items)} results{failed}>"


@dataclass(frozen=True, kw_only=True)
class Reference(Stored):
    """A batch's result that lies in the store; the fields are those of `ItemPlace` and `StoredBatch`."""

    graph: str
    execution_id: str
    names: tuple[str, ...]
    type: str
    total: int
    collects: bool
    errors: Mapping[int, StepFailed]
    job_digest: bytes | None = None

    def __json__(self) -> dict[str, Any]:
        return {"__type__": BATCH_MARKER, "__value__": {"stored": _describe(self)}}


class Types:
    """The message types that may be decoded: those of declared tasks, and no others.

    Attributes:
        limit_bytes: Largest message that is decoded. The decoder is called without an app, so it is the largest of
            all apps' limits; each app checks its own again.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, type[Message]] = {}
        self._limits: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self.limit_bytes = 1024 * 1024

    def limit(self, app: object, limit_bytes: int) -> None:
        """Note the limit in force for *app*."""
        if self._limits.get(app) != limit_bytes:
            with self._lock:
                self._limits[app] = limit_bytes
                self.limit_bytes = max(self._limits.values())

    def after_fork(self) -> None:
        """Take a fresh lock: another thread of the parent may have held the old one at the fork."""
        self._lock = threading.Lock()

    def allow(self, kind: type[Message]) -> None:
        """Have messages of *kind* encoded and decoded in this process; others stay as kombu has them."""
        if self._kinds.get(type_name(kind)) is not kind:
            self._kinds[type_name(kind)] = kind
            # kombu's annotation wants the decoder to return a message; ours must not raise, hence the placeholder.
            register_type(kind, MARKER, encode, cast("Any", decode))

    def find(self, name: str) -> type[Message]:
        """Return the allowed type called *name*.

        Raises:
            UnknownMessageType: No declared task uses it.
        """
        kind = self._kinds.get(name)
        if kind is None:
            raise UnknownMessageType(name)
        return kind


types: Final = Types()
os.register_at_fork(after_in_child=types.after_fork)


def encode(message: Message) -> dict[str, str]:
    """Return the envelope's content for *message*."""
    return {"t": type_name(message), "b": base64.b64encode(to_bytes(message)).decode("ascii")}


def decode(value: object) -> Message | Undecodable:
    """Return the message in an envelope's content, or an `Undecodable`; never raises."""
    try:
        return _decode(value)
    except DocketError as error:
        return Undecodable(value, error)
    except Exception as error:  # noqa: BLE001 -- a decoder that raises loses the message and hangs its caller
        return Undecodable(value, DecodeFailed("unknown", f"{type(error).__name__}: {error}"))


def _decode(value: object) -> Message:
    if not _is_content(value):
        raise DecodeFailed("unknown", 'the envelope is not {"t": type name, "b": base64 text}')
    name, text = value["t"], value["b"]
    size = len(text) * 3 // 4
    if size > types.limit_bytes + 2:
        raise PayloadTooLarge(f"message of type {name[:200]!r}", size, types.limit_bytes)
    kind = types.find(name[:500])
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise DecodeFailed(name, f"its base64 is damaged ({error})") from error
    return from_bytes(kind, data)


def _is_content(value: object) -> TypeGuard[dict[str, str]]:
    return (
        isinstance(value, dict)
        and value.keys() == {"t", "b"}
        and isinstance(value["t"], str)
        and isinstance(value["b"], str)
    )


def _encode_batch(batch: BatchResult[Any] | StoredBatch) -> dict[str, Any]:
    if isinstance(batch, BatchResult):
        results = [None if each is None else Result(each).__json__() for each in batch.results]
        return {"results": results, "errors": _records(batch.errors)}
    place = batch.items.place
    reference = Reference(
        graph=place.graph,
        execution_id=place.execution_id,
        names=place.names,
        type=type_name(place.kind),
        total=place.total,
        collects=batch.collects,
        errors=batch.errors,
        job_digest=place.job_digest,
    )
    return {"stored": _describe(reference)}


def _describe(reference: Reference) -> dict[str, Any]:
    names = ("graph", "execution_id", "names", "type", "total", "collects")
    told = {name: getattr(reference, name) for name in names} | {"errors": _records(reference.errors)}
    digest = reference.job_digest
    return told if digest is None else told | {"digest": base64.b64encode(digest).decode("ascii")}


def _records(errors: Mapping[int, StepFailed]) -> dict[str, Any]:
    return {str(index): to_record(error) for index, error in errors.items()}


def decode_batch(value: object) -> BatchResult[Any] | Reference | Undecodable:
    """Return the batch in an envelope's content, or an `Undecodable`; never raises."""
    try:
        content = cast("dict[str, Any]", value)
        found = content.get("stored") or content
        errors = cast(
            "dict[int, StepFailed]", {int(k): from_record(record) for k, record in found["errors"].items()}
        )
        if "stored" not in content:
            return BatchResult(tuple(content["results"]), errors)
        return Reference(
            graph=str(found["graph"]),
            execution_id=str(found["execution_id"]),
            names=tuple(map(str, found["names"])),
            type=str(found["type"]),
            total=int(found["total"]),
            collects=bool(found["collects"]),
            errors=errors,
            # One that was stored by the version before has none, and is read unchecked.
            job_digest=base64.b64decode(found["digest"], validate=True) if "digest" in found else None,
        )
    except Exception as error:  # noqa: BLE001 -- a decoder that raises loses the message and hangs its caller
        problem = DecodeFailed("batch", f"{type(error).__name__}: {error}")
        return Undecodable(value, problem, BATCH_MARKER)


def wrap(value: Any) -> Any:
    """Return an argument as it is published: messages encode themselves, whatever encoder the app has for them."""
    if isinstance(value, Message):
        return Result(value)
    if isinstance(value, (list, tuple)):
        many = cast("list[Any]", value)
        return [wrap(each) for each in many]
    return value


def install() -> None:
    """Teach kombu's JSON to read our markers; messages of types that no task declares are none of our business."""
    register_type(Results, BATCH_MARKER, lambda results: results.__json__(), cast("Any", decode_batch))
    # Both encode themselves: the types are named for the decoders' sake.
    register_type(Undecodable, MARKER, Undecodable.__json__, cast("Any", decode))
