"""What a store writes through its codec, and how it reads it back: job, outputs, result and error texts.

A stored value is `MARK` and what the codec made of (8 bytes of a hash, value). The mark tells values that went
through a codec from those that did not; the hash tells a value from what another key makes of it. No value that was
stored without a codec begins like the mark: no field of a message has the number 0, and a job begins with a length.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeVar, cast

from docket_celery.errors import CodecFailed, InvalidArguments, StoreUnavailable, to_record
from docket_celery.store.codec import Codec, find_fault
from docket_celery.store.identity import digest
from docket_celery.store.records import (
    Checkpoint,
    Chunk,
    ChunkEnd,
    ChunkRow,
    LostRun,
    RunEnd,
    RunRequest,
    RunRow,
    StepExecution,
)
from docket_celery.store.rows import clean_text, dump_json

MARK: Final = b"\x00docket\x01"
"""The first bytes of every value that went through a codec."""
_TEXT_MARK: Final = "docket-codec:"
_SEALED: Final = "sealed"
_CHECK_BYTES: Final = 8

V = TypeVar("V")
R = TypeVar(
    "R",
    bound=RunRequest | RunRow | RunEnd | Checkpoint | StepExecution | ChunkEnd | ChunkRow | LostRun | None,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value is stored: the codec is given *tag* and the values of *names*; errors show *text*."""

    tag: str
    names: tuple[str, ...]
    text: str

    def of(self, record: object, names: Mapping[str, object]) -> tuple[str, bytes]:
        """Return the text for errors and the identity for the codec: each part with its length in front."""
        parts = [names[name] if name in names else getattr(record, name) for name in self.names]
        framed = bytearray()
        for part in (self.tag, *parts):
            data = part if isinstance(part, bytes) else clean_text(_to_text(part)).encode()
            framed += len(data).to_bytes(8, "big") + data
        return self.text.format(*map(_to_text, parts), of=record), bytes(framed)


def _to_text(part: object) -> str:
    if isinstance(part, Chunk):
        return f"{part.stage}/{part.lo}"
    return part.hex() if isinstance(part, bytes) else str(part)


_RUN = ("graph", "execution_id")
JOB = Place("job", _RUN, "the job of run {1!r} of graph {0!r}")
MESSAGE = Place("message", _RUN, "the message of run {1!r}")
ERROR = Place("error", _RUN, "the error of run {1!r}")
_RESULT = Place("result", (*_RUN, "target"), "the result of run {1!r} of graph {0!r}")
_CHUNK = Place("chunk errors", (*_RUN, "chunk"), "the errors of a chunk of run {1!r}")
_OUTPUT = Place("output", ("key", "output_type"), "row cache_key={0} of docket_cache (step {of.step_name!r})")
_STEP = Place("step error", (*_RUN, "step_name", "item", "delivery"), "the error of step {2!r} of run {1!r}")
_PLACES: Mapping[type, tuple[tuple[str, Place], ...]] = {
    RunRequest: (("job", JOB),),
    RunRow: (("result", _RESULT), ("error", ERROR)),
    RunEnd: (("result", _RESULT), ("error", ERROR)),
    Checkpoint: (("output_data", _OUTPUT),),
    StepExecution: (("error_message", _STEP),),
    ChunkEnd: (("errors", _CHUNK),),
    ChunkRow: (("errors", _CHUNK),),
    LostRun: (("message", MESSAGE),),
}
"""The fields of each record that hold what is the user's."""
_NESTED = ("checkpoints", "executions")


class Seal:
    """Encodes what goes into a store and decodes what comes out; without a codec it only looks for the mark.

    The codec is user code: call these methods while no connection is held.
    """

    def __init__(self, codec: Codec | None) -> None:
        fault = None if codec is None else find_fault(codec)
        if fault is not None:
            raise InvalidArguments("codec", fault)
        self.codec = codec
        self._hash_key: bytes | None = getattr(codec, "hash_key", None)

    def hmac_digest(self, plain: bytes) -> bytes:
        """See `Store.hmac_digest`."""
        return plain if self._hash_key is None else hmac.digest(self._hash_key, plain, "sha256")

    def seal(self, record: R, **names: object) -> R:
        """Return *record* with all that is the user's encoded, and a checkpoint without its view for people.

        *names* are the parts of a value's place that *record* itself does not have, such as ``graph``. None stays.
        Raises `CodecFailed` if the codec failed on a job, an output or a result. A failure on an error's text is
        stored in place of that text: a run must be able to end.
        """
        if self.codec is None or record is None:
            return record
        changed: dict[str, Any] = {
            field: self.seal_value(getattr(record, field), place, record, **names)
            for field, place in _PLACES[type(record)]
        }
        for field in _NESTED:
            if hasattr(record, field):
                changed[field] = self.seal_all(getattr(record, field))
        if isinstance(record, RunEnd):
            changed["checkpoint"] = self.seal(record.checkpoint)
        if isinstance(record, Checkpoint):
            changed["output_json"] = None
        return replace(record, **changed)

    def seal_all(self, records: Iterable[R]) -> list[R]:
        """Return *records* as `seal` gives them."""
        return [self.seal(record) for record in records]

    def unseal(self, record: R, **names: object) -> R:
        """Return the stored *record* decoded; None stays.

        Raises `CodecFailed` if a value cannot be decoded, or was stored with another codec or none.
        """
        if record is None:
            return record
        changed: dict[str, Any] = {}
        for field, place in _PLACES[type(record)]:
            value = getattr(record, field)
            decoded = self.unseal_value(value, place, record, **names)
            if decoded is not value:
                changed[field] = decoded
        return replace(record, **changed) if changed else record

    def seal_value(self, value: V, place: Place, record: object = None, **names: object) -> V:
        """Return one *value* of the user's encoded: bytes, an error's text or record, or a mapping of such records.

        *record* has the parts of the place that *names* has not.
        """
        if self.codec is None or value is None:
            return value
        found: Any = value
        where = place.of(record, names)
        if isinstance(value, bytes):
            found = self._encode(*where, value)
        elif isinstance(value, Mapping) and place is _CHUNK:
            found = {key: self._encode_error(*where, one) for key, one in found.items()}
        else:
            found = self._encode_error(*where, found)
        return cast("V", found)

    def unseal_value(self, value: V, place: Place, record: object = None, **names: object) -> V:
        """Return one stored *value* decoded; see `unseal` and `seal_value`."""
        found: Any = value
        if isinstance(value, bytes):
            if self.codec is None and not value.startswith(MARK):
                return value
            found = self._decode(*place.of(record, names), value)
        elif isinstance(value, str):
            if value.startswith(_TEXT_MARK):
                data = _from_base64(value.removeprefix(_TEXT_MARK))
                found = self._decode(*place.of(record, names), data).decode()
        elif place is _CHUNK:
            decoded = {key: self._decode_record(one, place, record, names) for key, one in found.items()}
            found = decoded if any(decoded[key] is not found[key] for key in decoded) else found
        elif value is not None:
            found = self._decode_record(found, place, record, names)
        return cast("V", found)

    def _encode(self, name: str, identity: bytes, data: bytes) -> bytes:
        data = _check(data, identity) + data
        return MARK + self._call(name, "encode", data, identity, "nothing was stored")

    def _decode(self, name: str, identity: bytes, data: bytes) -> bytes:
        marked = data.startswith(MARK)
        if self.codec is None:
            if marked:
                raise CodecFailed(name, _NO_CODEC)
            return data
        if not marked:
            raise CodecFailed(name, _NOT_ENCODED)
        decoded = self._call(name, "decode", data[len(MARK) :], identity, _OTHER_KEY)
        check, value = decoded[:_CHECK_BYTES], decoded[_CHECK_BYTES:]
        if check != _check(value, identity):
            shown = type(self.codec).__name__
            raise CodecFailed(name, f"decode of {shown} returned other bytes than were encoded; {_OTHER_KEY}")
        return value

    def _call(
        self, name: str, method: Literal["encode", "decode"], data: bytes, identity: bytes, advice: str
    ) -> bytes:
        """Call the codec; its own error is named but not shown, since its text may hold what was to be hidden."""
        shown = f"{method} of {type(self.codec).__name__}"
        code: Callable[[bytes, bytes], object] = getattr(self.codec, method)
        try:
            found = code(data, identity)
        except StoreUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 -- user code; whatever it raises, the run must hear of it
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
            problem = f"{shown} raised {type(error).__name__} at {where}; {advice}"
        else:
            if isinstance(found, bytes):
                return found
            problem = f"{shown} returned a {type(found).__name__}, not bytes; {advice}"
        raise CodecFailed(name, problem)

    def _encode_error(self, name: str, identity: bytes, told: str | dict[str, Any]) -> str | dict[str, Any]:
        """Return an error's text encoded, or its record but for the code.

        If the codec fails, that is told in its place: a run must be able to end.
        """
        record = None if isinstance(told, str) else told
        if record is not None and record.get("code") == CodecFailed.code:
            # It holds nothing of the user's, and with the right key it must be readable.
            return record
        data = clean_text(told) if isinstance(told, str) else dump_json(told)
        try:
            text = base64.b64encode(self._encode(name, identity, data.encode())).decode("ascii")
        except CodecFailed as error:
            return str(error) if record is None else to_record(error)
        return _TEXT_MARK + text if record is None else {"code": record.get("code"), _SEALED: text}

    def _decode_record(
        self, error: dict[str, Any], place: Place, record: object, names: Mapping[str, object]
    ) -> dict[str, Any]:
        text = error.get(_SEALED)
        if not isinstance(text, str):
            return error
        opened: dict[str, Any] = json.loads(self._decode(*place.of(record, names), _from_base64(text)))
        return opened


_NO_CODEC: Final = (
    "it was stored through a codec, and this process has none; set docket_codec (or pass codec= to the store) as in "
    "the process that stored it"
)
_NOT_ENCODED: Final = (
    "it was stored without a codec, and this process has one; let what was stored without it end and be deleted, or "
    "use another database for what is stored with it"
)
_OTHER_KEY: Final = (
    "it was stored with another key or codec, or the row was damaged or moved; give the codec the key that it was "
    "stored with, or restore the row"
)


def _check(value: bytes, identity: bytes) -> bytes:
    return digest(b"docket.codec.1", identity, value)[:_CHECK_BYTES]


def _from_base64(text: str) -> bytes:
    """Return the bytes of *text*; damaged text gives bytes that no codec takes."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return MARK
