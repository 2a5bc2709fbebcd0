"""Who asks for a run, how its delivery ended, and what that means for its row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from docket_celery.engine.step_scope import MakeScope
from docket_celery.errors import StepFailed
from docket_celery.observe.events import Listener
from docket_celery.plan.batch import ONE_FAILS, BatchPolicy
from docket_celery.store.records import (
    Chunk,
    Lanes,
    Lease,
    Progress,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Who asks for a run, and how.

    Attributes:
        job_digest: Taken where the job was submitted; None: taken here over the inputs.
        number: Delivery number when there is no lease to count them.
        waits_for_other: This submission waits for the outcome of a run that somebody else advances.
        requeues: How often it was sent again for that.
        ended_cleanly: The task's delivery before this one ended in order.
        celery_retry: Celery tries the task again, as `Runrequest.celery_retry`.
        max_concurrency: Most steps at once, or, of a plan that fans out, most items.
        policy: How a fan-out treats its items.
        waits: Wait here while another holder advances the run; False: end with `Busy`.
        may_help: The calling thread may run steps itself.
        park_s: Asked with an error and the lease: seconds until the run is delivered again, or None to end it.
        hands_back: After these another delivery shall go on: the run is left WAITING, as it is after whatever ends
            a process or a greenlet (SystemExit, KeyboardInterrupt, GreenletExit, a cancelled asyncio task).
        worker: Who runs it, for the record.
        refreshes: Compute GLOBAL outputs anew and replace those that are stored.
    """

    execution_id: str
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    job_digest: bytes | None = None
    timeout_s: float | None = None
    max_concurrency: int | None = None
    policy: BatchPolicy = ONE_FAILS
    number: int = 1
    task_name: str | None = None
    task_id: str | None = None
    retries: int = 0
    waits_for_other: bool = False
    requeues: int = 0
    ended_cleanly: bool = False
    celery_retry: bool = True
    waits: bool = True
    may_help: bool = True
    listeners: Sequence[Listener] = ()
    passthrough: tuple[type[BaseException], ...] = ()
    hands_back: tuple[type[BaseException], ...] = ()
    scopes: Sequence[MakeScope] = ()
    park_s: Callable[[BaseException, Lease | None], float | None] | None = None
    worker: str = ""
    refreshes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStage:
    """A stage of a batch that other tasks are to work on.

    Attributes:
        stage: Counted from 1.
        chunks: Those that are not done.
        total: Items of the whole stage.
        chunk_size: Items of each chunk of the stage but the last.
        lanes: How it is to be worked on, if there is a limit over all workers.
    """

    stage: int
    chunks: tuple[Chunk, ...]
    total: int
    chunk_size: int
    lanes: Lanes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How a delivery ended.

    Attributes:
        value: The target: a message, of a batch a list or a `BatchResult`; None where there is none.
        error: What ended it, or None.
        busy_s: Another holder advances the run; its lease expires in so many seconds.
        park_s: The run is parked; deliver it again in so many seconds.
        replayed: The run had ended before; nothing ran here.
        stored: The result as the run's row has it, if replayed. A newer worker may have written fields that this one
            does not know, and would encode in another order.
        held: This delivery had the run's lease.
        opened: The run waits for this stage.
        receipt: What a chunk's task tells of it, as JSON.
        progress: How far the stage is, once a chunk has ended or the stage was opened.
        failed: Why items of the batch failed, by index, where it succeeded all the same.
    """

    value: Any = None
    error: BaseException | None = None
    busy_s: float | None = None
    park_s: float | None = None
    replayed: bool = False
    stored: bytes | None = None
    held: bool = False
    opened: OpenStage | None = None
    receipt: Mapping[str, Any] | None = None
    progress: Progress | None = None
    failed: Mapping[int, StepFailed] = field(default_factory=dict[int, StepFailed])
