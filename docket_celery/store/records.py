"""What is stored and how it is named: rows, leases, and what asks for them.

A run is named by (graph, execution_id). A checkpoint's identity is 32 bytes: SHA-256 over a domain tag and
length-prefixed parts, so that no two different lists of parts give the same input to the hash.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from docket_celery.errors import CorruptCheckpoint
from docket_celery.store.identity import digest


class RunState(enum.StrEnum):
    """The state of a run. RUNNING is leased; WAITING is not: a parked retry or an open join."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    WAITING = "WAITING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    QUARANTINED = "QUARANTINED"

    @property
    def ended(self) -> bool:
        """Whether nothing advances the run any more by itself."""
        return self in _ENDED


_ENDED = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.QUARANTINED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One row of ``docket_cache``: a step's output and what it was made from.

    Attributes:
        key: `workflow_key`, `global_key` or `cache_key`.
        execution_id: None for a GLOBAL checkpoint.
        item: Text path of the item in a batch: '', '7', '7/3'.
        input_hash: `input_digest` in hex.
        output_json: JSON view of *output_data* for people, as `plan.messages.to_view` renders it: jsonb takes it.
        output_shape: `plan.messages.message_shape` of the type as it was then; None: not known.
        ttl_s: Seconds to live: from now (GLOBAL), from the run's end (WORKFLOW), or None: for ever.
    """

    key: bytes
    graph: str
    execution_id: str | None
    step_name: str
    step_version: str = ""
    item: str = ""
    item_index: int | None = None
    input_hash: str
    output_type: str
    output_data: bytes
    output_json: str | None = None
    output_shape: str | None = None
    ttl_s: float | None = None

    def checksum(self) -> bytes:
        """Return the checksum of all that gives the row its meaning; stored beside it."""
        return digest(
            b"docket.checkpoint.1",
            self.key,
            self.graph.encode(),
            b"\0" if self.execution_id is None else b"\1" + self.execution_id.encode(),
            self.step_name.encode(),
            self.step_version.encode(),
            self.item.encode(),
            str(self.item_index).encode(),
            self.input_hash.encode(),
            self.output_type.encode(),
            self.output_data,
            *([] if self.output_shape is None else [self.output_shape.encode()]),
        )

    def verify(self, checksum: bytes) -> Checkpoint:
        """Return this checkpoint if it matches the stored *checksum*; else raise `CorruptCheckpoint`."""
        if self.checksum() != checksum:
            raise CorruptCheckpoint("docket_cache", f"cache_key={self.key.hex()}", "checksum mismatch")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExecution:
    """One row of ``docket_executions``: how a step ended in one delivery.

    ``attempts`` are the calls made, 0 when the output was restored (``cached``); ``duration_ms`` goes from the first
    call to the last return, waits included. ``status`` is SUCCEEDED, FAILED, TIMED_OUT or CANCELLED.
    """

    graph: str
    execution_id: str
    step_name: str
    item: str = ""
    delivery: int
    attempts: int
    cached: bool
    status: str
    started_at: datetime
    duration_ms: float
    error_code: str | None = None
    error_message: str | None = None
    worker: str = ""
    task_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What a delivery that wants to advance a run says of itself.

    Attributes:
        target: Full Protocol Buffers name of the result's type.
        job: The submitted inputs, framed by the caller.
        owner: Random text, new for each delivery; repeating an acquire with it is idempotent.
        lease_s: Seconds until others may take over unless the lease is extended.
        max_deliveries: Takeovers of never released leases at which the run is quarantined.
        task_name, task_id, retries: Celery's own; None and 0 in process.
        waits_for_other: This submission met the live run before and waits for its outcome: it does not resume a
            FAILED run.
        ended_cleanly: The delivery before this one of the same task ended in order, so its lease is no crash.
        celery_retry: Celery itself tries the task again. Only then does a greater count of ``retries`` mean that the
            holder of a live lease has died; the body of a second chord has one too.
    """

    graph: str
    execution_id: str
    target: str
    job: bytes
    job_digest: bytes
    owner: str
    lease_s: float
    max_deliveries: int
    task_name: str | None = None
    task_id: str | None = None
    retries: int = 0
    waits_for_other: bool = False
    ended_cleanly: bool = False
    celery_retry: bool = True


@dataclass(frozen=True, slots=True, order=True)
class Chunk:
    """Items *lo* to before *hi* of one stage, counted from 1, that one task handles."""

    stage: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The time-limited right to advance a run, or one chunk of it.

    ``epoch`` is the fencing token; it grows with each owner, and is the number of the delivery, from 1. ``lost``
    counts takeovers of leases that were never released (crashes), ``failures`` ordinary Celery retries.
    """

    graph: str
    execution_id: str
    target: str
    owner: str
    epoch: int
    lease_s: float
    lost: int = 0
    failures: int = 0
    chunk: Chunk | None = None

    @property
    def name(self) -> tuple[str | int, ...]:
        """What is leased: (graph, execution_id), of a chunk with its stage and first index."""
        run = (self.graph, self.execution_id)
        return run if self.chunk is None else (*run, self.chunk.stage, self.chunk.lo)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A run as ``docket_runs`` has it.

    ``error`` is `errors.to_record` of what ended it, ``progress`` that of the open stage of a batch or of its last
    one. ``lease_left_s`` are the seconds until its lease expires, by the database's clock; not positive: expired.
    """

    graph: str
    execution_id: str
    target: str
    job_digest: bytes
    state: RunState
    epoch: int
    lost: int
    failures: int
    retries: int
    task_name: str | None
    task_id: str | None
    result: bytes | None = None
    error: dict[str, Any] | None = None
    lease_left_s: float | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """How a delivery leaves its run.

    Attributes:
        state: An ended state, or WAITING: parked for another delivery.
        error: `errors.to_record` of what ended or parked it.
        failed_once: Count an ordinary retry (``failures + 1``).
        wake_in_s: WAITING only: when the next delivery is due, in seconds from now.
        executions: Rows not yet written with a save.
        checkpoint: SUCCEEDED only: that of the target, if it is kept; there is none under its key.
        retention_s: Seconds until purging may delete the run; counted from its end.
        items_failed: SUCCEEDED only: how many items of the batch failed, if any.
    """

    state: RunState
    result: bytes | None = None
    error: dict[str, Any] | None = None
    failed_once: bool = False
    wake_in_s: float | None = None
    executions: Sequence[StepExecution] = field(default=())
    checkpoint: Checkpoint | None = None
    retention_s: float | None = None
    items_failed: int | None = None


class Halt(enum.StrEnum):
    """What the holder of a lease is told when it extends it.

    FAILING: more items of the chunk's stage failed than may, so nothing new may start. STOPPED: something ended the
    whole batch. LOCKED: another transaction holds the row, so the lease was not extended; it is neither lost.
    """

    FAILING = "FAILING"
    STOPPED = "STOPPED"
    LOCKED = "LOCKED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Purged:
    """How many rows a purge deleted."""

    runs: int = 0
    checkpoints: int = 0
    executions: int = 0
    chunks: int = 0
    claims: int = 0

    def __bool__(self) -> bool:
        """Tell whether anything was deleted."""
        return self != Purged()

    def __add__(self, other: Purged) -> Purged:
        return Purged(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


UNFINISHED = b"\0" * 32
"""The job digest of a run whose items are not all there yet; no hash is that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the open stage of a batch is.

    Attributes:
        done: Items of the stage whose chunks have ended.
        total: Items of the stage.
        stage: Which of the plan's stages, counted from 1.
        stages: How many there are.
    """

    done: int
    total: int
    stage: int = 1
    stages: int = 1


@dataclass(frozen=True, slots=True)
class Lanes:
    """A limit over all workers: *most* items under way at once, in *count* <= *most* lanes.

    Chunks of one lane are worked on one after the other.
    """

    most: int
    count: int

    def shares(self) -> list[int]:
        """Return how many items each lane may have under way at once."""
        return [self.most // self.count + (lane < self.most % self.count) for lane in range(self.count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LostRun:
    """A run that no worker seems to advance.

    ``retries`` is the greatest count of its task's deliveries that took it, ``stage`` the one that was opened last,
    ``message`` what `BatchStore.open_stage` was given for this case.
    """

    graph: str
    execution_id: str
    task_name: str
    retries: int
    stage: int
    message: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRow:
    """A row of ``docket_chunks``.

    SUCCEEDED: each item was worked on, and ``failed`` of them failed; FAILED: stopped before. ``errors`` has
    `errors.to_record` of failed items by index, and under 'fatal' of what stopped the chunk.
    """

    chunk: Chunk
    state: RunState
    failed: int = 0
    errors: Mapping[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRequest:
    """What a delivery that wants to work on a chunk says of itself; the fields are those of `RunRequest`."""

    graph: str
    execution_id: str
    stage: int
    lo: int
    owner: str
    lease_s: float
    max_deliveries: int
    task_id: str | None = None
    retries: int = 0
    ended_cleanly: bool = False


class ChunkStop(enum.StrEnum):
    """Why a chunk is not to be worked on.

    DONE: it has ended. STALE: the run is not at this stage any more, or there is no such chunk. FAILING: more items
    of the stage failed than may. QUARANTINED: its workers died too often. BUSY: another one has it.
    """

    DONE = "DONE"
    STALE = "STALE"
    FAILING = "FAILING"
    QUARANTINED = "QUARANTINED"
    BUSY = "BUSY"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRefusal:
    """A chunk that may not be taken; BUSY: for as many seconds as another one's lease has left."""

    reason: ChunkStop
    lease_left_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkEnd:
    """How a delivery leaves its chunk: SUCCEEDED, FAILED, or QUEUED for another delivery in ``wake_in_s`` seconds.

    Checkpoints and executions are those not yet saved, errors as in `ChunkRow`. ``stops``: nothing of the stage may
    start any more.
    """

    state: RunState
    checkpoints: Sequence[Checkpoint] = ()
    executions: Sequence[StepExecution] = ()
    errors: Mapping[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    stops: bool = False
    wake_in_s: float = 0.0

    @property
    def failed(self) -> int:
        """How many items failed."""
        return sum(key != "fatal" for key in self.errors)
