"""One delivery of one run in this process: lease, restore, execute, close."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from docket_celery.engine.checkpointing import find_keys, take_checkpoints
from docket_celery.engine.execution import Help, Scheduler
from docket_celery.engine.process.heartbeat import Heartbeat, HeldLease
from docket_celery.engine.process.hooks import django_hooks, load_hook
from docket_celery.engine.process.inline import InlineCancellation, InlineRuntime
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.process.timer import Clock, system_clock
from docket_celery.engine.run_context import Ending, RunContext, RunOutcome, Submission
from docket_celery.engine.run_row import find_busy_s, find_holder, read_outcome, run_end, run_request
from docket_celery.errors import (
    CodecFailed,
    LeaseLost,
    PayloadTooLarge,
    RunConflict,
    RunTimedOut,
    StepFailed,
    StoreUnavailable,
)
from docket_celery.observe.events import EventKind
from docket_celery.plan.context import Cancellation
from docket_celery.plan.messages import Value
from docket_celery.plan.plan import Plan
from docket_celery.store.contract import Store
from docket_celery.store.identity import new_name
from docket_celery.store.records import Checkpoint, Lease, RunRequest, RunRow, RunState

if TYPE_CHECKING:
    from docket_celery.engine.process.loops import StepLoop

_logger = logging.getLogger("docket_celery.run")
_SLICE_S = 0.5
_END_TRIES = 5  # as a save has: with the end goes the checkpoint of the target
_LOST_BUSY_S = 1.0
_MOST_SHOWN, _MOST_CHARS = 3, 300


class Run:
    """Drives one delivery and never waits for it: `waiting` has the ways to wait.

    *inputs* are the given values, in the order of ``plan.given``. Without *loop*, ``async def`` steps run on the
    loop thread of the process; *clock* is the time of a run on the calling thread. Where there is `inline`, the
    calling thread is to drive it until the run has `concluded`; else the run advances by itself.

    A run of which something is kept has a row and takes its lease before anything else. Without WORKFLOW steps it
    only takes it at its end, and only if its result is too large for a message and is to be read from the row.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Value],
        submission: Submission,
        settings: Settings,
        store: Store | None,
        loop: StepLoop | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._plan, self._inputs = plan, inputs
        self.inline = inline = InlineRuntime(clock or system_clock) if settings.threads == 0 else None
        self.context = RunContext(
            graph=plan.graph,
            submission=submission,
            settings=settings,
            runtime=inline or process.runtime(settings.threads),
            cancellation=Cancellation() if inline is None else InlineCancellation(inline),
            store=store,
            owner=new_name() if store is not None else "",
            beats=None if inline is None or store is None else Heartbeat(store, inline.clock),
            number=submission.number,
            loop=loop,
            hooks=(*django_hooks(), *map(load_hook, settings.step_hooks)),
        )
        self.pool = self.context.runtime.pool
        self.concluded = False
        self._leases = store is not None and (plan.keeps_run or submission.has_row)
        self._made: RunOutcome | None = None
        self._restore: Callable[[], Sequence[Checkpoint]] = tuple
        self._report: Callable[[RunOutcome], None] | None = None
        self._execution: Ending | None = None
        self._began = self.context.cancellation.now()
        self._until = None if submission.timeout_s is None else self._began + submission.timeout_s
        self._waits_for_other, self._asked = submission.waits_for_other, 0

    # --- the waiting side --------------------------------------------------------------------------------------

    def start(self, report: Callable[[RunOutcome], None]) -> None:
        """Begin; *report* is called once, on any thread, with the outcome.

        The caller then calls `poll` while it waits, or `watch` once.
        """
        self._report = report
        self.context.tell(EventKind.RUN_STARTED)
        if self._leases:
            self.pool.submit(self._open)
        else:
            self._begin(self._make())

    def poll(self) -> float:
        """Stop the run if its deadline has passed or its lease is lost; return in how many seconds to look again."""
        context = self.context
        if self.inline is not None and context.beats is not None:
            context.beats.beat_if_due()
        if self._until is not None and context.cancellation.now() >= self._until:
            self._until = None
            self.stop(RunTimedOut(context.execution_id, context.submission.timeout_s or 0.0))
        elif context.held is not None and not context.held.trusted():
            self.stop(context.held.fault())
        if self._until is None:
            return _SLICE_S
        return max(0.0, min(_SLICE_S, self._until - context.cancellation.now()))

    def watch(self) -> None:
        """Poll from the timer until the run ends: no thread waits for it."""
        beats = self.context.beats is not None  # by the thread that runs the steps, of claims too
        if not self.concluded and (self._until is not None or self._leases or beats):
            self.context.runtime.timer.after(self.poll(), self.watch)

    def stop(self, error: BaseException) -> None:
        """End the run with *error* unless it has ended: contexts are cancelled, late results discarded."""
        self.context.cancellation.cancel(error)
        execution = self._execution
        if execution is not None:
            execution.abort(error)

    def parked_or_failed(self, error: BaseException, lease: Lease | None = None) -> RunOutcome:
        """Return the outcome that *error* means; the host may want the run delivered again."""
        park = self.context.submission.park_s
        try:
            return RunOutcome(error=error, park_s=park(error, lease) if park is not None else None)
        except Exception as broken:  # noqa: BLE001 -- the host's own code; the waiting side must learn of it
            return RunOutcome(error=broken)

    # --- the pool's threads ------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Take the lease, restore and begin, or find out why not."""
        context = self.context
        try:
            if context.cancellation.error is not None:
                self._conclude(RunOutcome(error=context.cancellation.error))
            elif (held := self._acquire(context.cancellation.now())) is not None:
                context.held, context.number = held, held.lease.epoch
                context.heartbeat().watch(held)
                self._advance(held.lease)
        except Exception as error:  # noqa: BLE001 -- the waiting side must learn of it
            if context.held is not None or isinstance(error, StoreUnavailable):
                # A lease that is held must be given back: the heartbeat of a later run would keep it for ever.
                self._end((), error)
            else:
                self._conclude(RunOutcome(error=error))

    def _acquire(self, asked_at: float) -> HeldLease | None:
        """Return the lease; None: the run has concluded, or is asked for again later."""
        context, store = self.context, self._store
        if self._waits_for_other:
            row = find_holder(store, context.graph, context.submission)
            if row is not None:
                self._wait_for(row)
                return None
        request = self._request()
        found = self._ask(request)
        if isinstance(found, RunRow):
            self._meet(found, request)
            return None
        return self._hold(found, asked_at)

    def _ask(self, request: RunRequest) -> Lease | RunRow:
        """Ask for the lease, and for what earlier deliveries have kept."""
        plan = self._plan
        keys = functools.partial(find_keys, plan, request.execution_id)
        found = self._store.acquire_and_restore(request, keys, items=bool(plan.stages))
        if isinstance(found, RunRow):
            return found
        lease, self._restore = found
        return lease

    def _hold(self, lease: Lease, asked_at: float) -> HeldLease:
        context = self.context
        return HeldLease(lease, asked_at, context.settings.trust_margin_s, context.cancellation.now)

    def _request(self) -> RunRequest:
        waits = self._waits_for_other
        return run_request(self._plan, self._inputs, self.context, self._store, waits_for_other=waits)

    def _advance(self, lease: Lease) -> None:
        """Restore and begin; the lease is held, and what is raised here ends the run in order."""
        if self._made is not None:
            assert self.context.held is not None
            self._write_end(self._made, self.context.held, tries=1)
            return
        self.context.stored = take_checkpoints(self._plan, lease, self._restore())
        self.context.closing = self._plan.closing
        self._begin(self._make())

    def _make(self) -> Ending:
        """Return what executes the plan."""
        plan, context = self._plan, self.context
        end = self._end_on_pool if self._leases else self._end
        if plan.stages:
            # Imported here: a run of a plan without stages does not need it.
            from docket_celery.engine.fan_out import StagedScheduler

            return StagedScheduler(plan, self._inputs, context, end)
        return Scheduler(plan, self._inputs, context, end, helps=self._find_help())

    def _find_help(self) -> Help:
        """Return which steps the thread that starts the execution may run."""
        if self._leases:
            return Help.ALL  # it has opened the run, on the pool
        helps = self.inline is None and self._until is None and self.context.submission.may_help
        return Help.SIMPLE if helps else Help.NONE

    def _begin(self, execution: Ending) -> None:
        """Start *execution*, unless the run has been stopped before a stop could find it."""
        self._execution = execution
        if self.context.cancellation.error is not None:
            execution.abort(self.context.cancellation.error)
        else:
            execution.start()

    def _end_on_pool(self, values: Sequence[Any], error: BaseException | None) -> None:
        """End the run on the thread that has finished its last step, or on another where that may run no SQL."""
        if self.context.cancellation.error is None and self.pool.has_thread():
            self._end(values, error)
            return
        # Something stops the run: Celery's thread, the timer, a loop, a step that cancels its own run.
        self.context.runtime.submit_or_retry(functools.partial(self._end, values, error))

    def _end(self, values: Sequence[Any], error: BaseException | None, /) -> None:
        """Close or park the run, then report."""
        context, held = self.context, self.context.held
        if error is not None:
            result = self.parked_or_failed(error, None if held is None else held.lease)
        else:
            result = RunOutcome(value=values[0] if values else None, failed=context.failed)
        if held is not None:
            self._write_end(result, held, tries=1)
        elif context.store is not None and self._made is None and _is_referred_to(result, context):
            self._made = result
            context.runtime.submit_or_retry(self._open)
        else:
            self._conclude(result)

    def _write_end(self, result: RunOutcome, held: HeldLease, tries: int) -> None:
        runtime = self.context.runtime
        try:
            if not isinstance(result.error, LeaseLost):
                self._write(result, held.lease)
        except StoreUnavailable as error:
            if tries < _END_TRIES and held.trusted():
                again = functools.partial(self._write_end, result, held, tries + 1)
                runtime.timer.after(0.2 * 2**tries, functools.partial(runtime.submit_or_retry, again))
                return
            # What is saved stays saved: the next delivery restores it, makes the rest and writes the end.
            result = self.parked_or_failed(error, held.lease)
        except (CodecFailed, PayloadTooLarge) as error:
            if result.error is None:
                # The result cannot be stored as it must be; the run ends all the same, with that as its error.
                self._write_end(self.parked_or_failed(error, held.lease), held, tries)
                return
            result = RunOutcome(error=error)
        except Exception as error:  # noqa: BLE001 -- the waiting side must learn of it
            result = RunOutcome(error=error)
        # None: it could not be made, which is what the run ends with.
        if self.context.beats is not None:
            self.context.beats.unwatch(held)
        self._conclude(result)

    def _write(self, result: RunOutcome, lease: Lease) -> None:
        self._store.end(lease, run_end(result, self.context))

    def _conclude(self, outcome: RunOutcome) -> None:
        """Report how it ended; the run's row tells the same by now."""
        context = self.context
        if isinstance(outcome.error, LeaseLost) and not context.submission.waits:
            # Soon, as the new holder may have ended the run by now; the next look tells how long its lease is.
            outcome = RunOutcome(
                error=outcome.error, busy_s=min(_LOST_BUSY_S, context.settings.lease_seconds)
            )
        if context.held is not None:
            outcome = replace(outcome, held=True)
        elapsed_s = context.cancellation.now() - self._began
        detail = "" if outcome.error is None else type(outcome.error).__name__
        if outcome.busy_s is not None:
            detail = detail or "another delivery advances the run"
        try:
            if outcome.failed and not self._plan.collects:
                _warn_of(outcome.failed, self._plan, context)
            context.tell(EventKind.RUN_ENDED, elapsed_s=elapsed_s, detail=detail)
        finally:
            self.concluded = True
            # The execution refers to this run: without this both would wait for the collector.
            self._execution = None
            if self._report is not None:
                self._report(outcome)

    # --- deciding ----------------------------------------------------------------------------------------------

    def _meet(self, row: RunRow, request: RunRequest) -> None:
        """Decide what a run means that could not be taken."""
        store = self._store
        if row.target != request.target or row.job_digest != request.job_digest:
            what = "target" if row.target != request.target else "job"
            # Another codec keeps another digest of the same job; reading it tells the two cases apart.
            store.find_job(row.graph, row.execution_id)
            self._conclude(RunOutcome(error=RunConflict(row.graph, row.execution_id, what)))
        elif row.state.ended:
            self._conclude(read_outcome(row, self._plan, store))
        else:
            self._wait_for(row)

    def _wait_for(self, row: RunRow) -> None:
        submission, runtime = self.context.submission, self.context.runtime
        if not submission.waits:
            self._conclude(RunOutcome(busy_s=find_busy_s(row, submission.requeues)))
        else:
            self._waits_for_other = True
            # The end of a run that is held may be near; an open stage has others to wait for.
            wait_s = find_busy_s(row, self._asked) / 10 if row.state is RunState.WAITING else 0.1
            self._asked += 1
            runtime.timer.after(wait_s, functools.partial(runtime.submit_or_retry, self._open))

    @property
    def _store(self) -> Store:
        assert self.context.store is not None
        return self.context.store


def _is_referred_to(result: RunOutcome, context: RunContext) -> bool:
    """Tell whether a task returns a reference to the result in the run's row, as it is too large for a message."""
    value, limit = result.value, context.settings.max_message_bytes
    is_task = context.submission.task_id is not None
    return is_task and isinstance(value, Message) and value.ByteSize() > limit


def _warn_of(failed: Mapping[int, StepFailed], plan: Plan, context: RunContext) -> None:
    """Log which items a result is made without: neither it nor the task's state says so."""
    # What a codec hides in the database is not shown in a log either.
    hides = context.store is not None and context.store.codec is not None
    shown = sorted(failed)[:_MOST_SHOWN]
    texts = [f"item {index}: {failed[index].code}" if hides else str(failed[index]) for index in shown]
    errors = [" ".join(text.split())[:_MOST_CHARS] for text in texts]
    first = "; ".join(errors) + ("; ..." if len(failed) > _MOST_SHOWN else "")
    text = "run %r of graph %r succeeded, failed items left out: %d (%s)"
    _logger.warning(text, context.execution_id, plan.graph, len(failed), first)
