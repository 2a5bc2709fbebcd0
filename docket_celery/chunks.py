"""A stage's work in chunks: how it is stored, leased and ended, and the `BatchStore` protocol."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from docket_celery.checkpoint import (
    Checkpoint,
    Chunk,
    Lease,
    RunRequest,
    RunRow,
    RunState,
    StepExecution,
    Store,
)

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
    """A limit over all workers: chunks of one lane are worked on one after the other.

    Attributes:
        most: Items under way at once.
        count: How many lanes there are, no more than *most*.
    """

    most: int
    count: int

    def shares(self) -> list[int]:
        """Return how many items each lane may have under way at once."""
        return [self.most // self.count + (lane < self.most % self.count) for lane in range(self.count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LostRun:
    """A run that nobody seems to advance.

    Attributes:
        retries: The greatest count of its task's deliveries that took it.
        stage: The part that was opened last.
        message: What `BatchStore.open_stage` was given for this case.
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

    Attributes:
        state: QUEUED, RUNNING, SUCCEEDED (each item was worked on), FAILED (stopped before), CANCELLED,
            QUARANTINED.
        failed: How many of its items failed.
        errors: `error_records.to_record` of failed items by index, and under 'fatal' of what stopped the chunk.
    """

    chunk: Chunk
    state: RunState
    failed: int = 0
    errors: Mapping[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRequest:
    """What somebody who wants to work on a chunk says of itself; the fields are those of `RunRequest`."""

    graph: str
    execution_id: str
    stage: int
    lo: int
    owner: str
    lease_s: float
    max_deliveries: int
    task_id: str | None = None
    retries: int = 0
    released: bool = False


class ChunkStop(enum.StrEnum):
    """Why a chunk is not to be worked on."""

    DONE = "DONE"
    STALE = "STALE"
    FAILING = "FAILING"
    QUARANTINED = "QUARANTINED"
    BUSY = "BUSY"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRefusal:
    """A chunk that may not be taken.

    Attributes:
        reason: DONE: it has ended. STALE: the run is not at this stage any more, or there is no such chunk.
            FAILING: more items of the stage failed than may. QUARANTINED: its workers died too often. BUSY:
            another one has it.
        lease_left_s: BUSY only: seconds until that one's lease expires.
    """

    reason: ChunkStop
    lease_left_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkEnd:
    """How a delivery leaves its chunk.

    Attributes:
        state: SUCCEEDED, FAILED, or QUEUED: for another delivery.
        checkpoints: Outputs not yet saved.
        executions: Rows not yet written with a save.
        errors: As in `ChunkRow`.
        stops: Nothing of the stage shall start any more.
        wake_in_s: QUEUED only: seconds until the other delivery is due.
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


@runtime_checkable
class BatchStore(Store, Protocol):
    """A store over which several workers can share the items of a run. Raises as `Store` does."""

    def save_many(self, lease: Lease, checkpoints: Sequence[Checkpoint]) -> None:
        """Store checkpoints of a run under the lease's fence; those that are there already stay.

        Raises:
            LeaseLost: The lease is no longer the run's, or the chunk's.
        """
        ...

    # --- items -------------------------------------------------------------------------------------------------

    def begin_upload(self, request: RunRequest, keep_s: float) -> Lease | RunRow:
        """Reserve an unknown run for the items that its submitter is about to store.

        The run is QUEUED with the job digest `UNFINISHED`: no worker takes it. Each `put_items` extends the lease. An
        upload that was given up is taken over, with nothing in it, once its lease is over.

        Args:
            request: What the delivery will ask for; its digest is not looked at.
            keep_s: Seconds from now after which purging may delete the run if nobody acquires it.

        Returns:
            The right to store its items; or the run as it stands.
        """
        ...

    def put_items(self, lease: Lease, items: Sequence[Checkpoint]) -> None:
        """Store items of a fan-out, replacing what is there: they do not count before `close_items`.

        Raises:
            LeaseLost: The lease is no longer the run's.
        """
        ...

    def close_items(self, lease: Lease, name: str, count: int, rows: Sequence[Checkpoint]) -> None:
        """Store *rows*, replacing what is there, and drop the items of fan-out *name* from index *count* on.

        Raises:
            LeaseLost: The lease is no longer the run's.
        """
        ...

    def finish_upload(self, lease: Lease, digest: bytes, keep_s: float) -> None:
        """Leave the run QUEUED for workers, under its real job digest. Repeating it does nothing.

        Raises:
            LeaseLost: The lease is no longer the run's.
        """
        ...

    def read_items(
        self,
        graph: str,
        execution_id: str,
        names: Sequence[str],
        lo: int,
        hi: int,
        keys: Sequence[bytes] = (),
        *,
        job_digest: bytes | None = None,
    ) -> list[Checkpoint]:
        """Return what is stored of steps *names* for the items from *lo* to before *hi*, and what is under *keys*.

        Verified, the items in their order. With *job_digest* nothing where the run is gone or has another one.

        Raises:
            CorruptCheckpoint: A row fails its checksum.
        """
        ...

    def measure_items(self, graph: str, execution_id: str, name: str) -> tuple[int, int]:
        """Return how many items of step *name* are stored, and their bytes together."""
        ...

    def find_names(self, graph: str, execution_id: str) -> set[str]:
        """Return the names of all steps and fan-outs of which something is stored for the run."""
        ...

    # --- stages ------------------------------------------------------------------------------------------------

    def open_stage(
        self,
        lease: Lease,
        stage: int,
        chunks: Sequence[Chunk],
        allowed: int,
        executions: Sequence[StepExecution] = (),
        *,
        progress: Progress | None = None,
        lanes: Lanes | None = None,
        message: bytes | None = None,
    ) -> Lanes | None:
        """Leave the run WAITING at *stage*, with *chunks* to be worked on beside those that it has there.

        Repeating it with the same lease does nothing more. Where the stage is open already, what it was opened with
        stays. With a *message* the stage keeps the run for the task that opened it: while a chunk is at work, and for
        `STAGE_PATIENCE` leases from the last sign of life, or `BODY_PATIENCE` where nothing more will be worked on.

        Args:
            lease: The run's.
            stage: Counted from 1.
            chunks: New ones; those that are there already stay.
            allowed: How many items of the stage may fail.
            executions: Rows not yet written.
            progress: Where the stage stands now.
            lanes: How it is to be worked on; kept with *progress*.
            message: What whoever finds the run lost needs to go on with it; None: nobody looks for it.

        Returns:
            The lanes in which the stage is to be worked on.

        Raises:
            LeaseLost: The run is no longer this lease's; nothing was written.
        """
        ...

    def find_chunks(self, graph: str, execution_id: str) -> list[ChunkRow]:
        """Return the chunks of all stages of a run, in order."""
        ...

    def find_failed(self, graph: str, execution_id: str, lo: int, hi: int) -> list[ChunkRow]:
        """Return the chunks with failed items that have to do with the items from *lo* to before *hi*, in order."""
        ...

    def lease_chunk(self, request: ChunkRequest) -> Lease | ChunkRefusal:
        """Take a chunk's lease, or tell why not.

        Taken: QUEUED; RUNNING when the lease expired, when *owner* is the holder itself, or when the same task id
        comes with greater ``retries``. Taking over a lease that was never released counts as lost; at
        ``max_deliveries`` the chunk becomes QUARANTINED instead, and nothing of its stage starts any more.
        """
        ...

    def end_chunk(self, lease: Lease, end: ChunkEnd) -> Progress | None:
        """Leave the chunk: outputs, rows, errors and state in one statement. Repeating it does nothing.

        Returns:
            How far the stage is now, if its opener said where it stood; None when repeated.

        Raises:
            LeaseLost: The chunk is no longer this lease's; nothing was written.
        """
        ...

    # --- runs that nobody advances -----------------------------------------------------------------------------

    def find_lost(
        self, task_names: Sequence[str], lease_s: float, max_deliveries: int, limit: int
    ) -> list[LostRun]:
        """Return runs with an open stage that nobody advances, and look at each of them again later only.

        A chunk whose lease is over counts as lost, as if it had been taken over, and is to be worked on again: its
        run is found for it once, however long its messages lie in a queue then.

        Lost is, by the database's clock: a run, or a chunk of the stage, whose lease is over; a stage of which
        nothing more will be worked on, for *lease_s* without anybody having gone on; and one with no chunk at work,
        where none has ended for ten times that long and none is due to be tried again: messages may well wait so
        long in a queue. The next look is as
        far away as the last sign of life, an hour at most, so that a long queue is not filled with copies. Any number
        of processes may look side by side.

        Args:
            task_names: Whose runs.
            lease_s: As for new leases.
            max_deliveries: As for new leases.
            limit: Most runs to look at.
        """
        ...
