"""Who may take a run, and what a store tells its holder: decided in one place for all stores."""

from __future__ import annotations

from docket_celery.store.records import (
    ChunkRefusal,
    ChunkRequest,
    ChunkStop,
    Halt,
    RunRequest,
    RunState,
)

QUEUE_PATIENCE = 10
"""So many leases long may all chunks of a stage lie in a queue before they are taken for lost."""


STAGE_PATIENCE, BODY_PATIENCE = QUEUE_PATIENCE + 2, 3
"""So many leases from the last sign of life does an open stage keep its run to its own task, and one of which nothing
more will be worked on: whoever looks for lost ones has looked by then."""

CANCEL_LOOK_S = 5
"""So many seconds after a batch was cancelled its task is sent once more: its own messages may be lost."""


LONGEST_LOOK_S = 3600
"""Most seconds between two looks at a run that seems lost: a long queue looks alike."""


KEPT_FOR_DELIVERY = (RunState.QUEUED, RunState.FAILED, RunState.SUCCEEDED)
"""What a delivery can use: queueing the run again keeps it until then. The others' names become free in time."""


def may_take(
    request: RunRequest,
    *,
    target: str,
    job_digest: bytes,
    state: str,
    owner: str | None,
    task_id: str | None,
    retries: int,
    expired: bool,
    kept: bool = False,
) -> bool:
    """Tell whether *request* may take the run that stands so, *kept* for its task by an open stage or not.

    Postgres decides the same in SQL.
    """
    if target != request.target or job_digest != request.job_digest:
        return False
    if state == RunState.RUNNING:
        newer = request.task_id is not None and task_id == request.task_id and request.retries > retries
        return expired or owner == request.owner or (newer and request.celery_retry)
    if state == RunState.FAILED:
        return not request.waits_for_other and (request.task_id is None or task_id != request.task_id)
    if state == RunState.WAITING:
        # An open stage belongs to its task; a second one would open it beside.
        same = request.task_id is not None and task_id == request.task_id
        return same or not kept
    return state == RunState.QUEUED


def is_crash(
    request: RunRequest | ChunkRequest, *, state: str, owner: str | None, task_id: str | None, retries: int
) -> bool:
    """Tell whether taking the run that stands so means that its holder died. Postgres decides the same in SQL."""
    # A delivery that comes again after it took the lease itself died with it, whatever came before it.
    newer = request.task_id is not None and task_id == request.task_id and request.retries > retries
    return state == RunState.RUNNING and owner != request.owner and not (request.ended_cleanly and newer)


def known_retries(request: RunRequest, *, task_id: str | None, retries: int) -> int:
    """Return the retries to record: an older copy of a task must not make its next retry look new."""
    same = request.task_id is not None and task_id == request.task_id
    return max(retries, request.retries) if same else request.retries


def refusal(
    state: str | None, *, is_open: bool | None, failing: bool | None, lease_left_s: object
) -> ChunkRefusal:
    """Return why a chunk that stands so was not taken."""
    if state is None or not is_open:
        return ChunkRefusal(reason=ChunkStop.STALE)
    if state == RunState.QUARANTINED:
        return ChunkRefusal(reason=ChunkStop.QUARANTINED)
    if state == RunState.SUCCEEDED:
        return ChunkRefusal(reason=ChunkStop.DONE)
    if state in {RunState.FAILED, RunState.CANCELLED}:
        return ChunkRefusal(reason=ChunkStop.FAILING)
    if failing:
        return ChunkRefusal(reason=ChunkStop.FAILING)
    left_s = 0.0 if lease_left_s is None else max(0.0, float(str(lease_left_s)))
    return ChunkRefusal(reason=ChunkStop.BUSY, lease_left_s=left_s)


def halt(*, failing: object, stopped: object) -> Halt | None:
    """Return what the holder of a chunk is told, whose stage stands so."""
    if stopped:
        return Halt.STOPPED
    return Halt.FAILING if failing else None


def is_lost(*, state: str, is_busy: bool, is_queued: bool, idle_s: float, lease_s: float) -> bool:
    """Tell whether nobody advances a run that is to be looked at.

    Args:
        state: The run's.
        is_busy: Whether a chunk of its stage is worked on, or is to be tried again later.
        is_queued: Whether chunks wait in a queue and may still start.
        idle_s: Seconds since the stage was opened, or the last of its chunks ended or was found dead.
        lease_s: As for new leases.
    """
    if state != RunState.WAITING:
        return True  # its lease is over, or its task must hear that it was cancelled
    return not is_busy and idle_s >= (QUEUE_PATIENCE * lease_s if is_queued else lease_s)


def next_look_s(*, lost: bool, idle_s: float, lease_s: float) -> float:
    """Return the seconds until the next look: the longer nothing helps, the rarer a run is sent again."""
    return min(LONGEST_LOOK_S, max(lease_s, idle_s)) if lost else lease_s
