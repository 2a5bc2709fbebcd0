"""What is stored and how it is named: identities, records, leases, and the `Store` protocol.

A run is named by (graph, execution_id). A checkpoint's identity is 32 bytes: SHA-256 over a domain tag and
length-prefixed parts, so that no two different lists of parts give the same input to the hash.
"""

from __future__ import annotations

import enum
import hashlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from docket_celery.codec import Codec
from docket_celery.errors import CorruptCheckpoint, InvalidArguments

MAX_EXECUTION_ID = 255
_KEY_NAMESPACE = uuid.UUID("5f0c1f2e-6f5d-5b0a-9a53-6d1c0d0b6c11")


def digest(tag: bytes, *parts: bytes) -> bytes:
    """Return SHA-256 over *tag* and *parts*, each prefixed with its length as 8 bytes."""
    sha = hashlib.sha256()
    for part in (tag, *parts):
        sha.update(len(part).to_bytes(8, "big"))
        sha.update(part)
    return sha.digest()


def workflow_key(graph: str, execution_id: str, step: str, item: str = "") -> bytes:
    """Name the checkpoint of *step* in one run. No input bytes: changed inputs must not repeat an effect."""
    return digest(b"docket.workflow.1", graph.encode(), execution_id.encode(), step.encode(), item.encode())


def item_key(graph: str, execution_id: str, fan_out: str, item: str) -> bytes:
    """Name what is stored of a run's items: of the fan-out of step *fan_out*, '' for the batch itself."""
    return digest(b"docket.item.1", graph.encode(), execution_id.encode(), fan_out.encode(), item.encode())


def global_key(graph: str, step: str, version: str, inputs: Iterable[tuple[str, bytes]]) -> bytes:
    """Name the checkpoint of *step* for these inputs, each a type name with its deterministic bytes."""
    parts = [part for name, data in inputs for part in (name.encode(), data)]
    return digest(b"docket.global.1", graph.encode(), step.encode(), version.encode(), *parts)


def cache_key(cache: str, version: str, inputs: Iterable[tuple[str, bytes]]) -> bytes:
    """Name an entry of the cache called *cache*, which steps of several graphs may share; else as `global_key`."""
    parts = [part for name, data in inputs for part in (name.encode(), data)]
    return digest(b"docket.cache.1", cache.encode(), version.encode(), *parts)


def input_digest(inputs: Iterable[tuple[str, bytes]]) -> str:
    """Return the hex digest of a step's inputs, kept beside its checkpoint as a check."""
    return digest(
        b"docket.inputs.1", *(part for name, data in inputs for part in (name.encode(), data))
    ).hex()


def job_digest(inputs: Iterable[tuple[str, bytes]]) -> bytes:
    """Return the digest of a run's job, taken once over the submitted bytes; inputs in any order, `Named` in name."""
    return digest(b"docket.job.1", *(part for name, data in sorted(inputs) for part in (name.encode(), data)))


def idempotency_key(graph: str, execution_id: str, step: str, item: str = "") -> str:
    """Return the UUID that names this step of this run to the outside world, the same on every attempt."""
    return str(uuid.uuid5(_KEY_NAMESPACE, workflow_key(graph, execution_id, step, item).hex()))


def check_execution_id(value: object) -> str:
    """Return *value* if it can name a run.

    Raises:
        InvalidArguments: It is not text of 1 to 255 printable characters.
    """
    if not isinstance(value, str):
        raise InvalidArguments("execution_id", f"must be a str, not {type(value).__name__}")
    if not 1 <= len(value) <= MAX_EXECUTION_ID:
        raise InvalidArguments(
            "execution_id", f"must have 1 to {MAX_EXECUTION_ID} characters, has {len(value)}"
        )
    if not value.isprintable():
        raise InvalidArguments("execution_id", f"must be printable, got {value!r}")
    return value


class RunState(enum.StrEnum):
    """Where a run stands. RUNNING is leased; WAITING is not: a parked retry or an open join."""

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
        output_type: Full Protocol Buffers name of *output_data*'s type.
        output_json: JSON view for people, or None.
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
        )

    def verify(self, checksum: bytes) -> Checkpoint:
        """Return this checkpoint if it matches the stored *checksum*.

        Raises:
            CorruptCheckpoint: It does not.
        """
        if self.checksum() != checksum:
            raise CorruptCheckpoint("docket_cache", f"cache_key={self.key.hex()}", "checksum mismatch")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExecution:
    """One row of ``docket_executions``: what became of a step in one delivery.

    Attributes:
        attempts: Calls made; 0 when the output was restored.
        cached: Whether the output came from a checkpoint.
        status: 'SUCCEEDED', 'FAILED', 'TIMED_OUT' or 'CANCELLED'.
        started_at: Time zone aware.
        duration_ms: From the first call to the last return, waits included.
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
    """What somebody who wants to advance a run says of itself.

    Attributes:
        target: Full Protocol Buffers name of the result's type.
        job: The submitted inputs, framed by the caller; kept for people and later tools.
        job_digest: `job_digest` over the submitted bytes.
        owner: Random text, new for each delivery; repeating an acquire with it is idempotent.
        lease_s: Seconds until others may take over unless the lease is extended.
        max_deliveries: Takeovers of never released leases at which the run is quarantined.
        task_name, task_id, retries: Celery's own; None and 0 in process.
        attached: This submission met the live run before and waits for its outcome: it does not resume a
            FAILED run.
        released: The delivery before this one of the same task ended in order, so its lease is no crash.
        retried: Celery itself tries the task again. Only then does a greater count of ``retries`` mean that the
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
    attached: bool = False
    released: bool = False
    retried: bool = True


@dataclass(frozen=True, slots=True, order=True)
class Chunk:
    """Items of one stage that one task handles.

    Attributes:
        stage: Counted from 1.
        lo: Index of the first item.
        hi: Index after the last item.
    """

    stage: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The time-limited right to advance a run, or one chunk of it.

    Attributes:
        target: `RunRequest.target`; the checksum of the run's result covers it.
        epoch: The fencing token; grows with each owner. Also the number of the delivery, from 1.
        lost: Takeovers of leases that were never released: crashes.
        failures: Ordinary Celery retries so far.
        chunk: What of the run it is for; None: the run itself.
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

    Attributes:
        result: Deterministic bytes of the target message, once SUCCEEDED.
        error: `error_records.to_record` of what ended it.
        lease_left_s: Seconds until the lease expires, by the database's clock; not positive: expired.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """How a delivery leaves its run.

    Attributes:
        state: An ended state, or WAITING: parked for another delivery.
        result: The target's bytes when SUCCEEDED.
        error: `error_records.to_record` of what ended or parked it.
        failed_once: Count an ordinary retry (``failures + 1``).
        wake_in_s: WAITING only: when the next delivery is due, in seconds from now.
        executions: Rows not yet written with a save.
        retention_s: Seconds until purging may delete the run; counted from its end.
    """

    state: RunState
    result: bytes | None = None
    error: dict[str, Any] | None = None
    failed_once: bool = False
    wake_in_s: float | None = None
    executions: Sequence[StepExecution] = field(default=())
    retention_s: float | None = None


class Halt(enum.StrEnum):
    """What the holder of a chunk is told about the rest of its stage.

    FAILING: more items failed than may, so nothing new shall start. STOPPED: something ended the whole batch.
    """

    FAILING = "FAILING"
    STOPPED = "STOPPED"


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
        return Purged(
            runs=self.runs + other.runs,
            checkpoints=self.checkpoints + other.checkpoints,
            executions=self.executions + other.executions,
            chunks=self.chunks + other.chunks,
            claims=self.claims + other.claims,
        )


class Store(Protocol):
    """Where checkpoints and runs live. Every method may be called from any thread and blocks.

    Raises (all methods):
        StoreUnavailable: No answer, or a passing refusal; trying again is safe.
        SchemaMismatch: The tables are missing.
        CodecFailed: The store's codec failed, or what is stored went through another one or none.
    """

    persistent: bool
    """Whether other processes see what is stored (False: memory)."""

    @property
    def codec(self) -> Codec | None:
        """What encodes jobs, outputs, results and error texts here, or None."""
        ...

    def keyed(self, digest: bytes) -> bytes:
        """Return *digest*, taken over user bytes, as it is stored: itself, or its HMAC with the codec's ``hash_key``.

        What it was taken over cannot be guessed from the tables then.
        """
        ...

    def enqueue(self, request: RunRequest, keep_s: float) -> RunRow | None:
        """Write an unknown run as QUEUED, with its job, for a delivery to come.

        A run of the same target and job digest stays as it is. If purging may delete it and its delivery will need
        it (QUEUED, FAILED, SUCCEEDED) it is kept for as long as a new one. Owner, lease and deliveries of *request*
        are not looked at.

        Args:
            request: What the delivery will ask for.
            keep_s: Seconds from now after which purging may delete a run that nobody has acquired.

        Returns:
            None; or the run as it stands, which is of another target or job digest.
        """
        ...

    def acquire(self, request: RunRequest) -> Lease | RunRow:
        """Take the run's lease, or return the run as it stands when it may not be taken.

        Taken: an unknown run; QUEUED; WAITING, unless an open stage keeps it for another task id
        (`BatchStore.open_stage`); FAILED when another task id (or none) submits it again unless
        ``request.attached``; RUNNING when the lease expired, when *owner* is the holder itself, or when the same
        task id comes with greater ``retries``. A RUNNING lease taken over counts as lost, unless the same task id
        comes with greater ``retries`` and ``request.released``; at ``max_deliveries`` the run becomes QUARANTINED
        instead and its row is returned. The ``retries`` of one task id only grow. The holder itself
        gets its lease again with the same epoch. Resuming FAILED starts ``failures`` from 0. Not taken: another
        live holder, an ended run, and a run of another target or job digest; the caller compares.
        """
        ...

    def restore(self, lease: Lease, keys: Sequence[bytes], *, items: bool = False) -> list[Checkpoint]:
        """Return the run's WORKFLOW checkpoints with item '' and any others stored under *keys*, verified.

        With *items*, those of the items of its fan-outs too.

        A checkpoint counts as long as its row exists: ``ttl`` of a WORKFLOW row only says when a purge may
        delete it after the run's end, and resuming the run takes that date back.

        Raises:
            CorruptCheckpoint: A row fails its checksum.
        """
        ...

    def save(self, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None) -> Checkpoint:
        """Store a WORKFLOW checkpoint under the lease's fence and return the one that counts.

        Whoever saved first wins: a second saver gets the first one's checkpoint back, read in a new
        statement.

        Raises:
            LeaseLost: The lease's epoch is no longer the run's, or the run is not RUNNING.
            CorruptCheckpoint: The winner's row fails its checksum.
        """
        ...

    def lookup(
        self, key: bytes, owner: str, lease_s: float, within_s: float | None = None
    ) -> Checkpoint | bool:
        """Return a live GLOBAL checkpoint, or claim the right to compute it.

        Args:
            key: `global_key` or `cache_key`.
            owner: Names one step call of one delivery; repeating a look-up with it is idempotent.
            lease_s: Seconds until others may take the claim over unless it is extended.
            within_s: Only a checkpoint counts whose computation began less than so many seconds ago; None: any.

        Returns:
            The verified checkpoint; True if *owner* now holds the claim; False if another live owner does.
        """
        ...

    def publish(
        self,
        checkpoint: Checkpoint,
        owner: str,
        execution: StepExecution | None,
        *,
        asked_s: float | None = None,
    ) -> Checkpoint:
        """Store a GLOBAL checkpoint, replace an expired one, drop *owner*'s claim.

        Args:
            checkpoint: What was computed.
            owner: Who claimed it.
            execution: The step's row, or None.
            asked_s: Seconds since a refresh asked for it. It replaces a live one too, unless that was begun after
                *owner* claimed, or, where that claim is gone, after the refresh; None: a live one stays.

        Returns:
            The checkpoint that counts, verified: this one, or a live one that was there before.
        """
        ...

    def forget(self, key: bytes) -> bool:
        """Delete a GLOBAL checkpoint, whatever it holds, and tell whether there was a live one.

        A computation that has been claimed goes on, and its result is stored.
        """
        ...

    def disclaim(self, key: bytes, owner: str) -> None:
        """Give up a claim without a result, so that another may compute."""
        ...

    def extend(
        self, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]] = ()
    ) -> dict[tuple[str | int, ...], Halt | None]:
        """Extend leases by their own ``lease_s`` from now, and claims (key, owner, seconds), in one go.

        Returns:
            `Lease.name` of each run or chunk still held under the given owner and epoch; for a chunk with what has
            become of its stage.
        """
        ...

    def end(self, lease: Lease, end: RunEnd) -> None:
        """Leave the run: close it or park it, and write the remaining step executions, in one statement.

        Repeating it with the same lease and state does nothing, so that a lost answer can be asked for again.
        Parking with ``wake_in_s`` counts the delivery to come as a retry: it is owed the run, not its lease, and
        waits where a copy of the task was quicker. Ending sets ``expires_at`` of the run's WORKFLOW checkpoints
        that have a ttl.

        Raises:
            LeaseLost: The run is no longer this lease's; nothing was written.
        """
        ...

    def cancel(
        self, graph: str, execution_id: str, error: dict[str, Any], retention_s: float
    ) -> RunRow | None:
        """Close a run that has not ended as CANCELLED, whoever holds it: all that they still save is refused.

        Args:
            graph: With *execution_id* the name of the run.
            execution_id: See *graph*.
            error: `error_records.to_record` of what others are told.
            retention_s: Seconds until purging may delete the run.

        Returns:
            The run as it is now (another state than CANCELLED: it had ended before), or None if there is none.
        """
        ...

    def find_run(self, graph: str, execution_id: str) -> RunRow | None:
        """Return the run, or None."""
        ...

    def find_job(self, graph: str, execution_id: str) -> bytes | None:
        """Return the job of a run as `RunRequest.job` had it, or None if there is no such run."""
        ...

    def purge(self, limit: int) -> Purged:
        """Delete rows that are past their date, in a few short transactions; nothing is left once it is empty.

        Ended runs whose retention is over, and queued ones that nobody has acquired in time, each with its
        checkpoints and step executions: the run is unknown then, and submitting it again starts. Checkpoints
        whose ttl is over, but for those of runs that have not ended. Claims that have been dead for a minute.
        Any number of processes may do it side by side; what another one is deleting is left to it.

        Args:
            limit: Most rows of a table that go in one transaction; at least 1.
        """
        ...

    def migrate(self) -> int:
        """Create or upgrade the tables and return their version; safe to repeat and to run side by side."""
        ...

    def check_schema(self) -> None:
        """Check that the tables are of the version this release knows.

        Raises:
            SchemaMismatch: They are not.
        """
        ...

    def twin(self) -> Store:
        """Return a store over the same data with connections of its own (itself where there is but one).

        The heartbeat uses it: it must not queue behind steps for a connection.
        """
        ...

    def close(self) -> None:
        """Give back all connections."""
        ...
