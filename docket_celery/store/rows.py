"""What every store does alike: clean text, turn records into rows and back, stamp and check checksums."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from datetime import UTC
from functools import cache
from operator import attrgetter
from typing import Any, Protocol

from docket_celery.errors import CorruptCheckpoint
from docket_celery.store.identity import digest
from docket_celery.store.records import (
    Checkpoint,
    Chunk,
    ChunkRequest,
    ChunkRow,
    Lease,
    Progress,
    RunEnd,
    RunRequest,
    RunRow,
    RunState,
    StepExecution,
)

SCHEMA_VERSION = 7
"""The version of the tables and rules that this release reads and writes."""

_RENAMED = {"key": "cache_key", "ttl_s": "ttl"}
_CHECKPOINT_FIELDS = {
    f.name: _RENAMED.get(f.name, f.name) for f in fields(Checkpoint) if f.name != "output_json"
}
CHECKPOINT_COLUMNS = (*_CHECKPOINT_FIELDS.values(), "checksum")
"""What is read back of a checkpoint; ``output_json`` is for people only."""

EXECUTION_COLUMNS = tuple(f.name for f in fields(StepExecution))
"""The columns of ``docket_executions`` but its number; they are named as the fields are."""

_CHECKPOINT_TEXTS = tuple(f.name for f in fields(Checkpoint) if f.type in {"str", "str | None"})
_READ_TEXTS, _READ_CHECKPOINT = attrgetter(*_CHECKPOINT_TEXTS), attrgetter(*_CHECKPOINT_FIELDS)


class Row(Protocol):
    """A row by column names; SQLAlchemy's `RowMapping` without SQLAlchemy."""

    def __getitem__(self, key: str, /) -> Any: ...


def clean_text(value: str) -> str:
    """Return *value* as both databases can keep it: without U+0000, lone surrogates replaced."""
    if value.isascii():
        return value.replace("\0", "")
    return value.replace("\0", "").encode("utf-8", "replace").decode()


def _clean_texts(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return *values* with every text among them cleaned."""
    texts = "".join([value for value in values if isinstance(value, str)])
    if texts.isascii() and "\0" not in texts:
        return values  # mostly; found in two calls for all of them
    return tuple(clean_text(value) if isinstance(value, str) else value for value in values)


def clean_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Return *checkpoint* with every text cleaned, as its checksum must see it."""
    values = _READ_TEXTS(checkpoint)
    cleaned = _clean_texts(values)
    if cleaned is values:
        return checkpoint
    return replace(checkpoint, **dict(zip(_CHECKPOINT_TEXTS, cleaned, strict=True)))


def dump_json(value: Any) -> str:
    """Return *value* as JSON text that jsonb takes; what of it is no JSON value is written as its text."""
    return json.dumps(_clean_value(value), ensure_ascii=False, allow_nan=False)


def _clean_value(value: Any) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {clean_text(str(key)): _clean_value(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list | tuple):
        return [_clean_value(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    is_json = value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_json else clean_text(str(value))


def checkpoint_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the columns of a cleaned *checkpoint*, its checksum among them; times are the statement's."""
    values = dict(zip(_CHECKPOINT_FIELDS.values(), _READ_CHECKPOINT(checkpoint), strict=True))
    values["output_json"], values["checksum"] = checkpoint.output_json, checkpoint.checksum()
    return values


def cleaned_values(record: object, names: tuple[str, ...]) -> dict[str, Any]:
    """Return these fields of *record* with every text cleaned."""
    return dict(zip(names, _clean_texts(_reader(names)(record)), strict=True))


@cache
def _reader(names: tuple[str, ...]) -> Callable[[object], tuple[Any, ...]]:
    """Return what reads these fields, at least two, of a record at once."""
    return attrgetter(*names)


def execution_values(execution: StepExecution) -> dict[str, Any]:
    """Return the columns of *execution* with every text cleaned, its time in UTC."""
    values = cleaned_values(execution, EXECUTION_COLUMNS)
    # SQLite keeps the hour of the day as it is given.
    values["started_at"] = execution.started_at.astimezone(UTC)
    return values


_OF_RUN = ("graph", "execution_id")
_REQUEST_COLUMNS = (*_OF_RUN, "task_name", "task_id", "retries", "target", "job", "job_digest", "owner")


def request_values(request: RunRequest) -> dict[str, Any]:
    """Return what of *request* goes into ``docket_runs``, every text cleaned."""
    return cleaned_values(request, _REQUEST_COLUMNS)


def fence_values(lease: Lease) -> dict[str, Any]:
    """Return what a statement compares to tell whether *lease* still holds its run, or its chunk."""
    values = cleaned_values(lease, (*_OF_RUN, "epoch", "owner"))
    if lease.chunk is not None:
        values |= {"stage": lease.chunk.stage, "lo": lease.chunk.lo}
    return values


def lease_from(request: RunRequest | ChunkRequest, target: str, **granted: Any) -> Lease:
    """Return the lease that *request* got: epoch, losses, failures and chunk are *granted*."""
    asked = {name: getattr(request, name) for name in (*_OF_RUN, "owner", "lease_s")}
    return Lease(**asked, target=target, **granted)


def end_values(lease: Lease, end: RunEnd) -> dict[str, Any]:
    """Return what *end* writes into the run: cleaned, with the result's checksum."""
    fence = fence_values(lease)
    checksum = None
    if end.result is not None:
        target = clean_text(lease.target)
        checksum = result_checksum(fence["graph"], fence["execution_id"], target, end.result)
    return {
        **fence,
        "lease_s": lease.lease_s,
        "state": end.state.value,
        "failed": int(end.failed_once),
        "result": end.result,
        "result_checksum": checksum,
        "error": None if end.error is None else dump_json(end.error),
        "items_failed": end.items_failed,
        "wake_in_s": end.wake_in_s,
        "owed": int(end.wake_in_s is not None),
        "retention_s": end.retention_s,
    }


def read_checkpoint(row: Row, graph: str, execution_id: str | None) -> Checkpoint:
    """Return the checkpoint in *row*, or raise `CorruptCheckpoint`: its checksum differs, or it is of another run."""
    values = {field: row[column] for field, column in _CHECKPOINT_FIELDS.items()}
    return check_owner(Checkpoint(**values).verify(row["checksum"]), graph, execution_id)


def check_owner(checkpoint: Checkpoint, graph: str, execution_id: str | None) -> Checkpoint:
    """Return *checkpoint* if it belongs to that run (for GLOBAL: to none); else its key cannot be right."""
    if checkpoint.execution_id != execution_id or (execution_id is not None and checkpoint.graph != graph):
        whose = "no run" if checkpoint.execution_id is None else f"run {checkpoint.execution_id!r}"
        problem = f"it belongs to {whose} of graph {checkpoint.graph!r}"
        raise CorruptCheckpoint("docket_cache", f"cache_key={checkpoint.key.hex()}", problem)
    return checkpoint


def result_checksum(graph: str, execution_id: str, target: str, result: bytes) -> bytes:
    """Return the checksum that is stored beside a run's result."""
    return digest(b"docket.result.1", graph.encode(), execution_id.encode(), target.encode(), result)


def read_run(row: Row) -> RunRow:
    """Return the run in *row*, its result verified; a column with what is never written is as corrupt."""
    name = f"graph={row['graph']!r}, execution_id={row['execution_id']!r}"
    values = {f.name: row[f.name] for f in fields(RunRow)}
    result, left_s, expected = values["result"], values["lease_left_s"], None
    if result is not None:
        expected = result_checksum(row["graph"], row["execution_id"], row["target"], result)
    if expected != row["result_checksum"]:
        raise CorruptCheckpoint("docket_runs", name, "the result does not match its checksum")
    try:
        values["state"] = RunState(row["state"])
        values["error"] = None if row["error"] is None else json.loads(row["error"])
        values["progress"] = read_progress(row["progress"])
    except ValueError as problem:
        raise CorruptCheckpoint("docket_runs", name, str(problem)) from problem
    values["lease_left_s"] = None if left_s is None else float(left_s)
    return RunRow(**values)


def read_in_order(rows: Iterable[Row], graph: str, execution_id: str) -> list[Checkpoint]:
    """Return the checkpoints of a run in *rows* as `read_checkpoint` does, its items in their order."""
    found = [read_checkpoint(row, graph, execution_id) for row in rows]
    return sorted(found, key=lambda one: -1 if one.item_index is None else one.item_index)


def read_chunk(row: Row) -> ChunkRow:
    """Return the chunk in *row*, or raise `CorruptCheckpoint`: a column holds what is never written."""
    try:
        return ChunkRow(
            chunk=Chunk(row["stage"], row["lo"], row["hi"]),
            state=RunState(row["state"]),
            failed=row["failed"],
            errors=json.loads(row["errors"] or "{}"),
        )
    except ValueError as problem:
        name = f"stage={row['stage']}, lo={row['lo']}"
        raise CorruptCheckpoint("docket_chunks", name, str(problem)) from problem


def read_progress(text: str | None) -> Progress | None:
    """Return the progress of which ``docket_runs`` has the JSON object *text*."""
    if text is None:
        return None
    found = json.loads(text)
    return Progress(**{field.name: found[field.name] for field in fields(Progress)})
