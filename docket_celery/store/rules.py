"""Which request may take a run, and what a store tells its holder, for all stores."""

from __future__ import annotations

from typing import Any

from docket_celery.store.records import ChunkRefusal, ChunkStop, Halt, RunRequest, RunState
from docket_celery.store.rows import Row

QUEUE_PATIENCE = 10
"""For this many lease lengths all chunks of a stage may wait in a queue before they are taken for lost."""

STAGE_PATIENCE, BODY_PATIENCE = QUEUE_PATIENCE + 2, 3
"""For this many lease lengths after the last activity only its own task may take the run of an open stage, and of one
of which nothing more will be worked on: the sweep has looked for lost runs by then."""

CANCEL_LOOK_S = 5
"""Seconds after which the task of a cancelled batch is sent once more: its own messages may be lost."""

LONGEST_LOOK_S = 3600
"""Most seconds between two looks at a run that seems lost: a long queue looks alike."""

KEPT_FOR_DELIVERY = (RunState.QUEUED, RunState.FAILED, RunState.SUCCEEDED)
"""What a delivery can use: queueing the run again keeps it until then. The names of others become free in time."""


def take(request: RunRequest, run: Row) -> dict[str, Any] | None:
    """Return what changes in a run that *request* takes, by column; None: it may not take the run.

    Beside its columns the row of the run says whether its lease is over (``expired``) and whether an open stage keeps
    it for its task (``kept``).
    """
    if (run["target"], bytes(run["job_digest"])) != (request.target, request.job_digest):
        return None
    state, retries = run["state"], run["retries"]
    is_holder = state == RunState.RUNNING and run["owner"] == request.owner
    same_task = request.task_id is not None and run["task_id"] == request.task_id
    newer = same_task and request.retries > retries
    allowed = {
        RunState.QUEUED: True,
        RunState.RUNNING: run["expired"] or is_holder or (newer and request.celery_retry),
        # An open stage belongs to its task; a second one would open it beside.
        RunState.WAITING: same_task or not run["kept"],
        RunState.FAILED: not request.waits_for_other and not same_task,
    }
    if not allowed.get(state, False):
        return None
    # A delivery that comes again after it took the lease itself died with it, whatever came before it.
    crashed = state == RunState.RUNNING and not is_holder and not (request.ended_cleanly and newer)
    lost = run["lost"] + crashed
    if crashed and lost >= request.max_deliveries:
        return {"state": RunState.QUARANTINED, "lost": lost}
    return {
        "state": RunState.RUNNING,
        "lost": lost,
        "epoch": run["epoch"] + (not is_holder),
        "failures": 0 if state == RunState.FAILED else run["failures"],
        # An older copy of a task must not make its next retry look new.
        "retries": max(retries, request.retries) if same_task else request.retries,
    }


_REFUSED = {
    RunState.SUCCEEDED: ChunkStop.DONE,
    RunState.FAILED: ChunkStop.FAILING,
    RunState.CANCELLED: ChunkStop.FAILING,
    RunState.QUARANTINED: ChunkStop.QUARANTINED,
}


def refusal(state: str, *, is_open: bool, failing: bool | None, lease_left_s: float | None) -> ChunkRefusal:
    """Return why a chunk was not taken."""
    if not is_open:
        return ChunkRefusal(reason=ChunkStop.STALE)
    reason = _REFUSED.get(RunState(state), ChunkStop.FAILING if failing else ChunkStop.BUSY)
    left_s = float(lease_left_s or 0.0) if reason is ChunkStop.BUSY else 0.0
    return ChunkRefusal(reason=reason, lease_left_s=max(0.0, left_s))


def halt(*, failing: object, stopped: object) -> Halt | None:
    """Return what the holder of a chunk is told of its stage."""
    if stopped:
        return Halt.STOPPED
    return Halt.FAILING if failing else None


def is_lost(*, state: str, is_busy: bool, is_queued: bool, idle_s: float, lease_s: float) -> bool:
    """Tell whether a run that is looked at is lost: no worker advances it.

    A chunk of its stage is worked on or is to be tried again later (*is_busy*), or chunks wait in a queue and may
    still start (*is_queued*). *idle_s* seconds ago the stage was opened, or the last of its chunks ended or was found
    dead.
    """
    if state != RunState.WAITING:
        return True  # its lease is over, or its task must hear that it was cancelled
    return not is_busy and idle_s >= (QUEUE_PATIENCE * lease_s if is_queued else lease_s)
