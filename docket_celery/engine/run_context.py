"""What carries a run: a `Submission` in, a `RunContext` inside the engine, a `RunOutcome` out."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from docket_celery.engine.process.heartbeat import Heartbeat, HeldLease
from docket_celery.engine.process.hooks import MakeContext
from docket_celery.engine.process.runtime import Runtime
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.errors import StepFailed
from docket_celery.observe.events import Event, EventKind, Listener, emit
from docket_celery.plan.batch import ONE_FAILS, BatchPolicy
from docket_celery.plan.context import Cancellation
from docket_celery.store.contract import Store
from docket_celery.store.records import Checkpoint, Chunk, Lanes, Lease, Progress, StepExecution

if TYPE_CHECKING:
    from docket_celery.engine.process.loops import StepLoop

Restored = Mapping[tuple[str, str], Checkpoint]
"""A run's checkpoints by step name and path of the item."""
OnEnd = Callable[[Sequence[Any], BaseException | None], None]
"""Called once with the values of the outputs, or with none and an error, on the thread that ended the execution."""


@dataclass(slots=True, kw_only=True)
class Submission:
    """Who asks for a run, and how; not changed once it is made.

    Attributes:
        job_digest: Taken where the job was submitted; None: taken here over the inputs.
        number: Delivery number when there is no lease to count them.
        waits_for_other: An earlier delivery met another holder: this one waits for the outcome of that run.
        requeues: How often it was sent again for that.
        ended_cleanly: The task's delivery before this one ended in order.
        celery_retry: Celery tries the task again, as `RunRequest.celery_retry`.
        max_concurrency: Most steps at once, or, of a plan that fans out, most items; None: as many as there are
            threads.
        policy: How a fan-out treats its items.
        waits: Wait here while another holder advances the run; False: end with ``busy_s``.
        may_help: The calling thread may run steps itself.
        park_s: Asked with an error and the lease: seconds until the run is delivered again, or None to end it.
        hands_back: After these errors another delivery continues: the run is left WAITING, as it is after what ends
            a process or a greenlet (SystemExit, KeyboardInterrupt, GreenletExit, a cancelled asyncio task).
        passthrough: Exceptions of a step that stop the run and reach the caller as they are.
        scopes: Context managers of the host, entered around each stretch of a step on a thread.
        worker: Where it runs, for the record.
        has_row: The run has a row that holds its job: it takes a lease whatever its steps keep.
        refreshes: Compute GLOBAL outputs although they are stored, and replace them.
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
    scopes: Sequence[MakeContext] = ()
    park_s: Callable[[BaseException, Lease | None], float | None] | None = None
    worker: str = ""
    has_row: bool = False
    refreshes: bool = False


@dataclass(slots=True, kw_only=True)
class RunContext:
    """What everything in one delivery of a run shares, or one item of it: *item* is its path, or ''.

    The caller's contextvars are *base*; each call of a step gets a copy. Without a *store* nothing is persisted.
    *owner* holds the lease, *held* once it is acquired, and claims; *beats* keeps them alive, or None: none has been
    asked for yet. *number* is that of the delivery, from 1; the lease counts them.

    *stored* has the run's checkpoints that were restored, *rows* the step executions that no save has carried yet.
    The checkpoint of the step called *closing* is not saved but kept as *last*, for the run's end.
    The outputs of the steps in *keeps* are needed by others, whatever their ``persist`` says: *kept* has those that
    are not yet saved. *failed* tells why items of the batch failed, by index, once it succeeded all the same.

    *loop* runs ``async def`` steps; None: the loop thread of the process. The *hooks* are entered once around each
    call of a step.
    """

    graph: str
    submission: Submission
    settings: Settings
    runtime: Runtime
    cancellation: Cancellation = field(default_factory=Cancellation)
    base: contextvars.Context = field(default_factory=contextvars.copy_context)
    store: Store | None = None
    owner: str = ""
    beats: Heartbeat | None = None
    held: HeldLease | None = None
    number: int = 1
    stored: Restored = field(default_factory=dict[tuple[str, str], Checkpoint])
    item: str = ""
    loop: StepLoop | None = None
    hooks: Sequence[MakeContext] = ()
    rows: list[StepExecution] = field(default_factory=list)
    closing: str = ""
    last: Checkpoint | None = None
    keeps: frozenset[str] = frozenset()
    kept: list[Checkpoint] = field(default_factory=list)
    failed: Mapping[int, StepFailed] = field(default_factory=dict[int, StepFailed])

    @property
    def execution_id(self) -> str:
        """The name of the run."""
        return self.submission.execution_id

    @property
    def max_concurrency(self) -> int | None:
        """Most steps at once, or, of a plan that fans out, most items; None: as many as there are threads."""
        return 1 if self.runtime.inline else self.submission.max_concurrency

    @property
    def most_items(self) -> int:
        """Most items of a fan-out at once."""
        return self.max_concurrency or max(1, self.settings.threads)

    def heartbeat(self) -> Heartbeat:
        """Return what keeps the lease and claims of this delivery alive."""
        assert self.store is not None
        if self.beats is None:
            self.beats = process.heartbeat(self.store)
        return self.beats

    def tell(self, kind: EventKind, step: str = "", attempt: int = 0, **facts: Any) -> None:
        """Tell the listeners."""
        if listeners := self.submission.listeners:
            event = Event(
                kind=kind,
                graph=self.graph,
                execution_id=self.execution_id,
                step=step,
                item=self.item,
                attempt=attempt,
                delivery=self.number,
                at=self.cancellation.now(),
                **facts,
            )
            emit(listeners, event)


class Ending:
    """What a plan, a plan with fan-outs and a group of items have in common: each ends once.

    Then *on_end* is called with the values or the error. An abort raises *cancellation*; None: its owner does.

    The `lock` guards `closed` (nothing begins and nothing counts any more), `failing` (nothing new begins; what is
    running finishes and is saved) and the state of subclasses.
    """

    def __init__(self, cancellation: Cancellation | None, on_end: OnEnd) -> None:
        self.lock = threading.Lock()
        self.closed = False
        self.failing = False
        self._flag, self._on_end = cancellation, on_end

    def start(self) -> None:
        """Begin what is ready; it may end here."""
        raise NotImplementedError

    def hold(self) -> None:
        """Start nothing more; what is running finishes and is saved, then the execution ends."""
        raise NotImplementedError

    def abort(self, error: BaseException) -> None:
        """End at once with *error*: nothing new starts, contexts are cancelled, late results are discarded."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self._seize()
        if self._flag is not None:
            self._flag.cancel(error)
        self._let_go(error)
        self._on_end((), error)

    def end(self, values: Sequence[Any] = (), error: BaseException | None = None) -> None:
        """End with *values* or *error*, unless it has ended."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
        self._on_end(values, error)

    def _seize(self) -> None:
        """Do what an abort needs done under the lock."""

    def _let_go(self, error: BaseException) -> None:
        """Stop what an aborted execution has started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStage:
    """A stage of a batch for other tasks to work on, counted from 1, with those of its *chunks* that are not done.

    All its chunks but the last have *chunk_size* of its items. *progress* is how far it is as it is opened,
    and *lanes* how it is to be worked on, if there is a limit over all workers.
    """

    stage: int
    chunks: tuple[Chunk, ...]
    chunk_size: int
    progress: Progress
    lanes: Lanes | None = None


@dataclass(slots=True, kw_only=True)
class RunOutcome:
    """How a delivery ended, not changed once it is told: with the target as *value*, or with an *error*.

    Of a batch the value is a list or a `BatchResult`.

    Or another holder advances the run, and its lease expires in *busy_s* seconds; or it is parked, to be delivered
    again in *park_s*; or it waits for the stage that it has *opened*. A *replayed* run had ended before and nothing
    ran here. Then *stored* is the result as its row has it: a newer worker may have written fields that this one
    does not know, and would encode in another order.

    This delivery *held* the run's lease. A *receipt* is what a chunk's task tells of it, as JSON. *failed* tells
    why items of the batch failed, by index, where it succeeded all the same.
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
    failed: Mapping[int, StepFailed] = field(default_factory=dict[int, StepFailed])
