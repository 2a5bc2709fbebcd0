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
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Literal

from docket_celery.errors import CodecFailed, InvalidArguments, StoreUnavailable, to_record
from docket_celery.store.codec import Codec, find_fault, hash_key_of
from docket_celery.store.identity import digest
from docket_celery.store.records import (
    Checkpoint,
    Chunk,
    ChunkEnd,
    ChunkRow,
    Lease,
    RunEnd,
    RunRequest,
    RunRow,
    StepExecution,
)
from docket_celery.store.rows import clean_text, dump_json

MARK: Final = b"\x00docket\x01"
"""How every value begins that went through a codec."""
_TEXT_MARK: Final = "docket-codec:"
_SEALED: Final = "sealed"
_CHECK_BYTES: Final = 8


class Seal:
    """Encodes what goes into a store and decodes what comes out; without a codec it only looks for the mark.

    The codec is user code: call these methods while no connection is held.

    Args:
        codec: The codec, or None.

    Raises:
        InvalidArguments: *codec* is none.
    """

    def __init__(self, codec: Codec | None) -> None:
        fault = None if codec is None else find_fault(codec)
        if fault is not None:
            raise InvalidArguments("codec", fault)
        self.codec = codec
        self._hash_key = None if codec is None else hash_key_of(codec)

    def keyed(self, plain: bytes) -> bytes:
        """See `Store.keyed`."""
        return plain if self._hash_key is None else hmac.digest(self._hash_key, plain, "sha256")

    # --- writing -----------------------------------------------------------------------------------------------

    def close_request(self, request: RunRequest) -> RunRequest:
        """Return *request* with its job encoded.

        Raises:
            CodecFailed: The codec failed.
        """
        if self.codec is None:
            return request
        run = request.graph, request.execution_id
        return replace(request, job=self._encode(_job_name(*run), request.job, _place("job", *run)))

    def close_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return *checkpoint* with its output encoded and without the view for people.

        Raises:
            CodecFailed: The codec failed.
        """
        if self.codec is None:
            return checkpoint
        data = self._encode(_row_name(checkpoint), checkpoint.output_data, _checkpoint_place(checkpoint))
        return replace(checkpoint, output_data=data, output_json=None)

    def close_execution(self, execution: StepExecution | None) -> StepExecution | None:
        """Return *execution* with its error's text encoded."""
        if self.codec is None or execution is None or execution.error_message is None:
            return execution
        name = f"the error of step {execution.step_name!r} of run {execution.execution_id!r}"
        return replace(
            execution,
            error_message=self._encode_text(name, execution.error_message, _execution_place(execution)),
        )

    def close_end(self, lease: Lease, end: RunEnd) -> RunEnd:
        """Return *end* with result and error texts encoded.

        Raises:
            CodecFailed: The codec failed on the result.
        """
        if self.codec is None:
            return end
        run = lease.graph, lease.execution_id
        result, error = end.result, end.error
        if result is not None:
            result = self._encode(_result_name(*run), result, _place("result", *run, lease.target))
        if error is not None:
            error = self.close_error(*run, error)
        executions = [one for row in end.executions if (one := self.close_execution(row)) is not None]
        return replace(end, result=result, error=error, executions=executions)

    def close_error(self, graph: str, execution_id: str, error: dict[str, Any]) -> dict[str, Any]:
        """Return the record of a run's *error* encoded."""
        if self.codec is None:
            return error
        place = _place("error", graph, execution_id)
        return self._encode_record(f"the error of run {execution_id!r}", error, place)

    def close_message(self, graph: str, execution_id: str, message: bytes) -> bytes:
        """Return *message*, with which a lost run goes on, encoded: it holds the caller's context.

        Raises:
            CodecFailed: The codec failed.
        """
        if self.codec is None:
            return message
        return self._encode(_message_name(execution_id), message, _place("message", graph, execution_id))

    def close_chunk(self, lease: Lease, end: ChunkEnd) -> ChunkEnd:
        """Return *end* with outputs and error texts encoded.

        Raises:
            CodecFailed: The codec failed on an output.
        """
        if self.codec is None:
            return end
        name = f"the errors of a chunk of run {lease.execution_id!r}"
        place = _chunk_place(lease.graph, lease.execution_id, lease.chunk)
        return replace(
            end,
            checkpoints=[self.close_checkpoint(checkpoint) for checkpoint in end.checkpoints],
            executions=[one for row in end.executions if (one := self.close_execution(row)) is not None],
            errors={key: self._encode_record(name, error, place) for key, error in end.errors.items()},
        )

    # --- reading -----------------------------------------------------------------------------------------------

    def open_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return a stored *checkpoint* with its output decoded.

        Raises:
            CodecFailed: It cannot be decoded, or was stored with another codec or none.
        """
        name = _row_name(checkpoint)
        data = self._decode(name, checkpoint.output_data, _checkpoint_place(checkpoint))
        return checkpoint if data is checkpoint.output_data else replace(checkpoint, output_data=data)

    def open_saved(self, stored: Checkpoint, closed: Checkpoint, ours: Checkpoint) -> Checkpoint:
        """Return what counts after a save: *ours*, whose encoded form is *closed*, or another one decoded.

        Raises:
            CodecFailed: The other one cannot be decoded, or was stored with another codec or none.
        """
        if stored.output_data == closed.output_data:
            return replace(stored, output_data=ours.output_data)
        return self.open_checkpoint(stored)

    def open_run(self, row: RunRow) -> RunRow:
        """Return a stored *row* with result and error decoded.

        Raises:
            CodecFailed: One of them cannot be decoded, or was stored with another codec or none.
        """
        run = row.graph, row.execution_id
        result, error = row.result, row.error
        if result is not None:
            result = self._decode(_result_name(*run), result, _place("result", *run, row.target))
        if error is not None:
            error = self._decode_record(
                f"the error of run {row.execution_id!r}", error, _place("error", *run)
            )
        if result is row.result and error is row.error:
            return row
        return replace(row, result=result, error=error)

    def open_job(self, graph: str, execution_id: str, job: bytes) -> bytes:
        """Return a run's stored *job* decoded.

        Raises:
            CodecFailed: It cannot be decoded, or was stored with another codec or none.
        """
        return self._decode(_job_name(graph, execution_id), job, _place("job", graph, execution_id))

    def open_message(self, graph: str, execution_id: str, message: bytes) -> bytes:
        """Return a stored *message* decoded.

        Raises:
            CodecFailed: It cannot be decoded, or was stored with another codec or none.
        """
        return self._decode(_message_name(execution_id), message, _place("message", graph, execution_id))

    def open_chunk(self, graph: str, execution_id: str, row: ChunkRow) -> ChunkRow:
        """Return a stored chunk's *row* with its error texts decoded.

        Raises:
            CodecFailed: They cannot be decoded, or were stored with another codec or none.
        """
        name = f"the errors of a chunk of run {execution_id!r}"
        place = _chunk_place(graph, execution_id, row.chunk)
        errors = {key: self._decode_record(name, error, place) for key, error in row.errors.items()}
        return replace(row, errors=errors)

    def open_execution(self, execution: StepExecution) -> StepExecution:
        """Return a stored *execution* with its error's text decoded.

        Raises:
            CodecFailed: It cannot be decoded.
        """
        text = execution.error_message
        if text is None or not text.startswith(_TEXT_MARK):
            return execution
        name = f"the error of step {execution.step_name!r} of run {execution.execution_id!r}"
        data = self._decode(name, _from_base64(text.removeprefix(_TEXT_MARK)), _execution_place(execution))
        return replace(execution, error_message=data.decode())

    # --- values ------------------------------------------------------------------------------------------------

    def _encode(self, name: str, data: bytes, place: bytes) -> bytes:
        codec = self.codec
        assert codec is not None
        encoded = self._call(name, "encode", _check(data, place) + data, place, "nothing was stored")
        return MARK + encoded

    def _decode(self, name: str, data: bytes, place: bytes) -> bytes:
        marked = data.startswith(MARK)
        if self.codec is None:
            if marked:
                raise CodecFailed(name, _NO_CODEC)
            return data
        if not marked:
            raise CodecFailed(name, _NOT_ENCODED)
        decoded = self._call(name, "decode", data[len(MARK) :], place, _OTHER_KEY)
        check, value = decoded[:_CHECK_BYTES], decoded[_CHECK_BYTES:]
        if check != _check(value, place):
            shown = type(self.codec).__name__
            raise CodecFailed(name, f"decode of {shown} returned other bytes than were encoded; {_OTHER_KEY}")
        return value

    def _call(
        self, name: str, method: Literal["encode", "decode"], data: bytes, place: bytes, advice: str
    ) -> bytes:
        """Call the codec; its own error is named but not shown, since its text may hold what was to be hidden."""
        shown = f"{method} of {type(self.codec).__name__}"
        code: Callable[[bytes, bytes], object] = getattr(self.codec, method)
        try:
            found = code(data, place)
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

    def _encode_text(self, name: str, text: str, place: bytes) -> str:
        """Return *text* encoded; if the codec fails, that is told in its place: a run must be able to end."""
        try:
            data = self._encode(name, clean_text(text).encode(), place)
        except CodecFailed as error:
            return str(error)
        return _TEXT_MARK + base64.b64encode(data).decode("ascii")

    def _encode_record(self, name: str, record: dict[str, Any], place: bytes) -> dict[str, Any]:
        """Return an error's *record* encoded but for its code; told as in `_encode_text` if that fails."""
        if record.get("code") == CodecFailed.code:
            # It holds nothing of the user's, and whoever has the right key must be able to read it.
            return record
        try:
            data = self._encode(name, dump_json(record).encode(), place)
        except CodecFailed as error:
            return to_record(error)
        return {"code": record.get("code"), _SEALED: base64.b64encode(data).decode("ascii")}

    def _decode_record(self, name: str, record: dict[str, Any], place: bytes) -> dict[str, Any]:
        text = record.get(_SEALED)
        if not isinstance(text, str):
            return record
        opened: dict[str, Any] = json.loads(self._decode(name, _from_base64(text), place))
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


def _check(value: bytes, place: bytes) -> bytes:
    return digest(b"docket.codec.1", place, value)[:_CHECK_BYTES]


def _place(*parts: str | bytes) -> bytes:
    """Return the identity of a place: its parts, each with its length in front."""
    framed = bytearray()
    for part in parts:
        data = part if isinstance(part, bytes) else clean_text(part).encode()
        framed += len(data).to_bytes(8, "big") + data
    return bytes(framed)


def _checkpoint_place(checkpoint: Checkpoint) -> bytes:
    return _place("output", checkpoint.key, checkpoint.output_type)


def _chunk_place(graph: str, execution_id: str, chunk: Chunk | None) -> bytes:
    shown = "" if chunk is None else f"{chunk.stage}/{chunk.lo}"
    return _place("chunk errors", graph, execution_id, shown)


def _execution_place(execution: StepExecution) -> bytes:
    run = execution.graph, execution.execution_id
    return _place("step error", *run, execution.step_name, execution.item, str(execution.delivery))


def _row_name(checkpoint: Checkpoint) -> str:
    return f"row cache_key={checkpoint.key.hex()} of docket_cache (step {checkpoint.step_name!r})"


def _job_name(graph: str, execution_id: str) -> str:
    return f"the job of run {execution_id!r} of graph {graph!r}"


def _message_name(execution_id: str) -> str:
    return f"the message of run {execution_id!r}"


def _result_name(graph: str, execution_id: str) -> str:
    return f"the result of run {execution_id!r} of graph {graph!r}"


def _from_base64(text: str) -> bytes:
    """Return the bytes of *text*; damaged text gives bytes that no codec takes."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return MARK
