"""What a store must do: `Store` for runs and checkpoints, `BatchStore` also for the stages and chunks of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from docket_celery.store.codec import Codec
from docket_celery.store.records import (
    Checkpoint,
    Chunk,
    ChunkEnd,
    ChunkRefusal,
    ChunkRequest,
    ChunkRow,
    Halt,
    Lanes,
    Lease,
    LostRun,
    Progress,
    Purged,
    RunEnd,
    RunRequest,
    RunRow,
    StepExecution,
)


class Store(Protocol):
    """Where checkpoints and runs live. Every method may be called from any thread and blocks.

    Raises (all methods):
        StoreUnavailable: No answer, or a passing refusal; trying again is safe.
        SchemaMismatch: The tables are missing.
        CodecFailed: The store's codec failed, or what is stored went through another one or none.
        CorruptCheckpoint: What is stored does not match its checksum.
        LeaseLost: To a write under a lease: the run or the chunk is no longer that lease's, and nothing was written.
    """

    persistent: bool
    """Whether other processes see what is stored (False: memory)."""

    @property
    def codec(self) -> Codec | None:
        """What encodes jobs, outputs, results and error texts here, or None."""
        ...

    def hmac_digest(self, digest: bytes) -> bytes:
        """Return *digest*, taken over user bytes, as it is stored: itself, or its HMAC with the codec's ``hash_key``.

        What it was taken over cannot be guessed from the tables then.
        """
        ...

    def enqueue(self, request: RunRequest, keep_s: float) -> RunRow | None:
        """Write an unknown run as QUEUED, with its job, for a delivery to come.

        Purging may delete it *keep_s* seconds from now if no delivery has acquired it. A run of the same target and
        job digest stays as it is. If purging may delete it and its delivery will need it (QUEUED, FAILED, SUCCEEDED)
        it is kept for as long as a new one. The row of a run of another target or job digest is returned. Owner,
        lease and deliveries of *request* are not looked at.
        """
        ...

    def acquire(self, request: RunRequest) -> Lease | RunRow:
        """Take the run's lease, or return its row when it may not be taken.

        Taken: an unknown run; QUEUED; WAITING, unless an open stage keeps it for another task id
        (`BatchStore.open_stage`); FAILED when another task id (or none) submits it again unless
        ``request.waits_for_other``; RUNNING when the lease expired, when *owner* is the holder itself, or when the
        same task id comes with greater ``retries``. A RUNNING lease taken over counts as lost, unless the same task
        id comes with greater ``retries`` and ``request.ended_cleanly``; at ``max_deliveries`` the run becomes
        QUARANTINED instead and its row is returned. The ``retries`` of one task id only grow. The holder itself
        gets its lease again with the same epoch. Resuming FAILED starts ``failures`` from 0. Not taken: another
        live holder, an ended run, and a run of another target or job digest; the caller compares.
        """
        ...

    def acquire_and_restore(
        self, request: RunRequest, keys: Callable[[], Sequence[bytes]], *, items: bool = False
    ) -> tuple[Lease, Callable[[], list[Checkpoint]]] | RunRow:
        """Acquire the run, and return with its lease what returns its checkpoints, as `restore` does.

        Both take one round trip less than the two calls. A run that no delivery has advanced before has none, and
        nobody asks for its *keys*.
        """
        ...

    def restore(self, lease: Lease, keys: Sequence[bytes], *, items: bool = False) -> list[Checkpoint]:
        """Return the run's WORKFLOW checkpoints with item '' and any others stored under *keys*, verified.

        With *items*, those of the items of its fan-outs too.

        A checkpoint counts as long as its row exists: ``ttl`` of a WORKFLOW row only says when a purge may
        delete it after the run's end, and resuming the run takes that date back.
        """
        ...

    def save(self, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None) -> Checkpoint:
        """Store a WORKFLOW checkpoint under the lease's fence and return the one that counts.

        The first save wins, and gets *checkpoint* itself back. A second one gets the first one's, read in a new
        statement.
        """
        ...

    def lookup(
        self, key: bytes, owner: str, lease_s: float, hit: StepExecution | None = None
    ) -> Checkpoint | bool:
        """Return a live GLOBAL checkpoint, verified, or claim the right to compute it for *lease_s* seconds.

        True: *owner* now holds the claim; False: another live owner does. *owner* names one step call of one
        delivery; repeating a look-up with it is idempotent. With a checkpoint, the row *hit* is written.
        """
        ...

    def publish(
        self, checkpoint: Checkpoint, owner: str, execution: StepExecution | None, *, replace: bool = False
    ) -> Checkpoint:
        """Store a GLOBAL checkpoint, replace an expired one (with *replace* a live one too), drop *owner*'s claim.

        The checkpoint that counts is returned, verified: this one, or a live one that was there before.
        """
        ...

    def forget(self, key: bytes) -> bool:
        """Delete a GLOBAL checkpoint, whatever it holds, and tell whether there was a live one.

        A computation that has been claimed continues, and its result is stored.
        """
        ...

    def release_claim(self, key: bytes, owner: str) -> None:
        """Give up a claim without a result, so that another may compute."""
        ...

    def extend(
        self, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]] = ()
    ) -> dict[tuple[str | int, ...], Halt | None]:
        """Extend leases by their own ``lease_s`` from now, and claims (key, owner, seconds), in one go.

        Returned is `Lease.name` of each run or chunk still held under the given owner and epoch, with what its holder
        must know. `Halt.LOCKED`: this lease alone was not extended, since another transaction holds its row.
        """
        ...

    def end(self, lease: Lease, end: RunEnd) -> None:
        """Leave the run: close it or park it, and write what no save has written, in one statement.

        Those are step executions and, of a run that succeeds, the checkpoint of its target. Repeating it with the
        same lease and state does nothing, so that a lost answer can be asked for again. Parking with ``wake_in_s``
        counts the delivery to come as a retry: it is owed the run, not its lease, and waits where a copy of the task
        was quicker. Ending sets ``expires_at`` of the run's WORKFLOW checkpoints
        that have a ttl.
        """
        ...

    def cancel(
        self, graph: str, execution_id: str, error: dict[str, Any], retention_s: float
    ) -> RunRow | None:
        """Close a run that has not ended as CANCELLED: what its holder still saves is refused.

        *error* is `errors.to_record` of what others are told; purging may delete the run after *retention_s* seconds.
        The run is returned as it is now (another state: it had ended before), or None if there is none.
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

        Ended runs whose retention is over, and queued ones that were not acquired in time, each with its
        checkpoints and step executions: the run is unknown then, and submitting it again starts. Checkpoints
        whose ttl is over, but for those of runs that have not ended. Claims that have been dead for a minute.
        Any number of processes may do it side by side; what another one is deleting is left to it. A transaction
        deletes at most *limit* rows of a table, at least 1.
        """
        ...

    def migrate(self) -> int:
        """Create or upgrade the tables and return their version; safe to repeat and to run side by side."""
        ...

    def check_schema(self) -> None:
        """Check that the tables are of the version this release knows; raise `SchemaMismatch` if they are not."""
        ...

    def clone(self) -> Store:
        """Return a store over the same data with connections of its own (itself where there is but one).

        The heartbeat uses it: it must not queue behind steps for a connection.
        """
        ...

    def close(self) -> None:
        """Give back all connections."""
        ...


@runtime_checkable
class BatchStore(Store, Protocol):
    """A store over which several workers can share the items of a run."""

    def save_many(self, lease: Lease, checkpoints: Sequence[Checkpoint]) -> None:
        """Store checkpoints of a run under the lease's fence; those that are there already stay."""
        ...

    # --- items -------------------------------------------------------------------------------------------------

    def begin_upload(self, request: RunRequest, keep_s: float) -> Lease | RunRow:
        """Reserve an unknown run for the items that its submitter is about to store.

        The run is QUEUED with the job digest `UNFINISHED` (that of *request* is not looked at): no worker takes it,
        and purging may delete it *keep_s* seconds from now. Each `put_items` extends the lease. An upload that was
        given up is taken over, with nothing in it, once its lease is over. A run that may not be taken is returned.
        """
        ...

    def put_items(self, lease: Lease, items: Sequence[Checkpoint]) -> None:
        """Store items of a fan-out, replacing what is there: they do not count before `close_items`."""
        ...

    def close_items(self, lease: Lease, name: str, count: int, rows: Sequence[Checkpoint]) -> None:
        """Store *rows*, replacing what is there, and drop the items of fan-out *name* from index *count* on."""
        ...

    def finish_upload(self, lease: Lease, digest: bytes, keep_s: float) -> None:
        """Leave the run QUEUED for workers, under its real job digest. Repeating it does nothing."""
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
        """
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
        """Leave the run WAITING at *stage*, counted from 1, with *chunks* beside those that it has there.

        *allowed* items of the stage may fail. Repeating it with the same lease does nothing more. Where the stage is
        open already, what it was opened with stays; the lanes in which it is to be worked on are returned. The
        *message* is sent to continue the run if it is lost; with None nobody looks for it. With a message the stage
        keeps the run for the task that opened it: while a chunk is at work, and for `STAGE_PATIENCE` leases from the
        last sign of life, or `BODY_PATIENCE` where nothing more will be worked on.
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

        Returned is how far the stage is now, if its opener said where it stood; None when repeated.
        """
        ...

    # --- lost runs ---------------------------------------------------------------------------------------------

    def find_lost(
        self, task_names: Sequence[str], lease_s: float, max_deliveries: int, limit: int
    ) -> list[LostRun]:
        """Return the runs with an open stage that are lost, and look at each of them again later only.

        Lost is, by the database's clock: a run whose lease is over; a run with a chunk whose lease is over, which
        counts as a crash and puts the chunk back; a stage of which nothing more will be worked on, if it has not been
        continued for *lease_s*; and a stage with no chunk at work and none due to be tried again, if none has ended
        for `QUEUE_PATIENCE` times *lease_s*: messages may wait so long in a queue.

        The longer nothing has happened to a run, the later is the next look, after an hour at most: a long queue must
        not fill with copies. Any number of processes may look side by side, each at *limit* runs of the tasks
        *task_names* at most; *lease_s* and *max_deliveries* are those of new leases.
        """
        ...
