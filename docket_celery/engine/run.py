"""One delivery of one run in this process: lease, restore, execute, close."""

from __future__ import annotations

import contextvars
import functools
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from docket_celery.engine.checkpointing import read_checkpoints
from docket_celery.engine.delivery import Delivery
from docket_celery.engine.ending import Ending, Outcome
from docket_celery.engine.execution import Scheduler
from docket_celery.engine.fan_out import StagedScheduler, Stored, make_execution
from docket_celery.engine.outcome import RunOutcome, Submission
from docket_celery.engine.process.heartbeat import Heartbeat, HeldLease
from docket_celery.engine.process.hooks import django_hooks, load_hooks
from docket_celery.engine.process.inline import InlineCancellation, InlineRuntime
from docket_celery.engine.process.loops import StepLoop
from docket_celery.engine.process.runtime import Runtime
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.process.timer import Clock, system_clock
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
from docket_celery.store.records import Lease, RunRequest, RunRow, RunState

_logger = logging.getLogger("docket_celery.run")
_SLICE_S = 0.5
_END_TRIES = 4
_LOST_BUSY_S = 1.0
_MOST_SHOWN, _MOST_CHARS = 3, 300


class Run:
    """Drives one delivery and never waits for it: `waiting` has the ways to wait.

    Args:
        plan: What to do.
        inputs: The given values, in the order of ``plan.given``.
        submission: Who asks for it.
        settings: Those in force.
        store: Where to persist, if the plan does.
        loop: Runs ``async def`` steps; None: the loop thread of the process.
        clock: The time of a run on the calling thread; None: the machine's.

    Attributes:
        pool: The threads that the steps run on.
        inline: What to drive with the calling thread until `concluded`; None: the run goes on by itself.
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
        self.submission, self.store = submission, store
        self._plan, self._inputs, self._settings, self._loop = plan, inputs, settings, loop
        self.inline = InlineRuntime(clock or system_clock) if settings.threads == 0 else None
        self._runtime: Runtime = self.inline or process.runtime(settings.threads)
        self.pool = self._runtime.pool
        self._report: Callable[[RunOutcome], None] | None = None
        self._base = contextvars.copy_context()
        self._hooks = (*django_hooks(), *load_hooks(settings.step_hooks))
        self._cancellation = Cancellation() if self.inline is None else InlineCancellation(self.inline)
        self._beats: Heartbeat | None = None
        if self.inline is not None and self.store is not None:
            self._beats = Heartbeat(self.store, self.inline.clock)
        self._held: HeldLease | None = None
        self._execution: Ending | None = None
        self.concluded = False
        self._began = self._cancellation.now()
        self._until = None if submission.timeout_s is None else self._began + submission.timeout_s
        self._owner = str(uuid.uuid4()) if self.store is not None else ""
        self._waits_for_other, self._requeues = submission.waits_for_other, 0
        self._delivery = self._new_delivery(submission.number)

    # --- whoever waits -----------------------------------------------------------------------------------------

    def start(self, report: Callable[[RunOutcome], None]) -> None:
        """Begin; *report* is called once, on any thread, with the outcome.

        The calling thread runs steps here if the submission allows it; whoever waits calls `poll`, or `watch`
        once.
        """
        self._report = report
        self._delivery.tell(EventKind.RUN_STARTED)
        if self.store is not None:
            self._runtime.pool.submit(self._open)
            return
        execution = self._begin({})
        if execution is not None:
            helps = self.submission.may_help and self._until is None and self.inline is None
            (execution.help if helps else execution.dispatch)()

    def poll(self) -> float:
        """Stop the run if its deadline has passed or its lease is lost; return in how many seconds to look again."""
        if self._beats is not None:
            self._beats.beat_if_due()
        if self._until is not None and self._cancellation.now() >= self._until:
            self._until = None
            self.stop(RunTimedOut(self.submission.execution_id, self.submission.timeout_s or 0.0))
        elif self._held is not None and not self._held.trusted():
            self.stop(self._held.fault())
        return (
            _SLICE_S
            if self._until is None
            else max(0.0, min(_SLICE_S, self._until - self._cancellation.now()))
        )

    def watch(self) -> None:
        """Have the timer look after the run until it ends: nobody's thread does."""
        if not self.concluded and (self._until is not None or self.store is not None):
            self._runtime.timer.after(self.poll(), self.watch)

    def stop(self, error: BaseException) -> None:
        """End the run with *error* unless it has ended: contexts are cancelled, late results discarded."""
        self._cancellation.cancel(error)
        execution = self._execution
        if execution is not None:
            execution.abort(error)

    def parked_or_failed(self, error: BaseException, lease: Lease | None = None) -> RunOutcome:
        """Return the outcome that *error* means; the host may want the run delivered again."""
        park = self.submission.park_s
        try:
            return RunOutcome(error=error, park_s=park(error, lease) if park is not None else None)
        except Exception as broken:  # noqa: BLE001 -- the host's own code; whoever waits must hear of it
            return RunOutcome(error=broken)

    # --- the pool's threads ------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Take the lease and restore, or find out why not."""
        try:
            found = self._acquire()
        except Exception as error:  # noqa: BLE001 -- whoever waits must hear of it
            if self._held is not None or isinstance(error, StoreUnavailable):
                # Held: there was no thread for a heartbeat, and a later run's would keep this lease for ever.
                self._end(Outcome(error=error))
            else:
                self._conclude(RunOutcome(error=error))
        else:
            if found is not None:
                self._advance(found)

    def _acquire(self) -> Lease | None:
        assert self.store is not None
        if self._cancellation.error is not None:
            self._conclude(RunOutcome(error=self._cancellation.error))
            return None
        if (
            self._waits_for_other
            and (row := find_holder(self.store, self._plan.graph, self.submission)) is not None
        ):
            self._wait_for(row)
            return None
        asked_at = self._cancellation.now()
        request = self._request(self.store)
        found = self.store.acquire(request)
        if isinstance(found, RunRow):
            self._meet(found, request)
            return None
        self._held = HeldLease(found, asked_at, self._settings.trust_margin_s, self._cancellation.now)
        self._delivery.heartbeat().watch(self._held)
        return found

    def _request(self, store: Store) -> RunRequest:
        return run_request(
            self._plan,
            self._inputs,
            self.submission,
            self._settings,
            store,
            owner=self._owner,
            waits_for_other=self._waits_for_other,
        )

    def _advance(self, lease: Lease) -> None:
        assert self.store is not None
        self._delivery = self._new_delivery(lease.epoch)
        try:
            stored = read_checkpoints(self._plan, self.store, lease)
            execution = self._begin(stored)
            if execution is not None:
                execution.dispatch()
        except Exception as error:  # noqa: BLE001 -- the lease is held: the run must end in order
            self._end(Outcome(error=error))

    def _begin(self, stored: Stored) -> Scheduler | StagedScheduler | None:
        """Make and start the execution; None if it ended (or was stopped) while starting."""
        ended = self._end if self.store is None else self._end_on_pool
        execution = make_execution(
            self._plan,
            self._inputs,
            self._delivery,
            ended,
            stored=stored,
            policy=self.submission.policy,
            max_concurrency=self.submission.max_concurrency,
            threads=self._settings.threads,
        )
        execution.start()
        self._execution = execution
        if execution.closed:
            self._execution = None
            return None
        # A stop that came before the assignment found no execution to abort.
        if self._cancellation.error is not None:
            execution.abort(self._cancellation.error)
        return None if execution.closed else execution

    def _end_on_pool(self, outcome: Outcome) -> None:
        self._runtime.submit_or_retry(functools.partial(self._end, outcome))

    def _end(self, outcome: Outcome) -> None:
        """Close or park the run, then report."""
        result = RunOutcome(value=outcome.values[0] if outcome.values else None, failed=outcome.failed)
        if outcome.error is not None:
            lease = self._held.lease if self._held is not None else None
            result = self.parked_or_failed(outcome.error, lease)
        if self._held is None or self.store is None:
            self._conclude(result)
        else:
            self._write_end(result, self._held, tries=1)

    def _write_end(self, result: RunOutcome, held: HeldLease, tries: int) -> None:
        assert self.store is not None
        try:
            if not isinstance(result.error, LeaseLost):
                self._write(result, held.lease)
        except StoreUnavailable as error:
            if tries < _END_TRIES and held.trusted():
                again = functools.partial(self._write_end, result, held, tries + 1)
                self._runtime.timer.after(0.2 * 2**tries, lambda: self._runtime.submit_or_retry(again))
                return
            # What is saved stays saved; the next delivery restores it and writes the end.
            result = self.parked_or_failed(error, held.lease)
        except (CodecFailed, PayloadTooLarge) as error:
            if result.error is None:
                # The result cannot be stored as it must be; the run ends all the same, with that as its error.
                self._write_end(self.parked_or_failed(error, held.lease), held, tries)
                return
            result = RunOutcome(error=error)
        except Exception as error:  # noqa: BLE001 -- whoever waits must hear of it
            result = RunOutcome(error=error)
        self._delivery.heartbeat().unwatch(held)
        self._conclude(result)

    def _write(self, result: RunOutcome, lease: Lease) -> None:
        assert self.store is not None
        self.store.end(lease, run_end(result, self.submission, self._delivery.rows, self._settings))

    def _conclude(self, outcome: RunOutcome) -> None:
        """Report how it ended; the run's row tells the same by now."""
        if isinstance(outcome.error, LeaseLost) and not self.submission.waits:
            # Soon, as the new holder may have ended the run by now; the next look tells how long its lease is.
            outcome = RunOutcome(error=outcome.error, busy_s=min(_LOST_BUSY_S, self._settings.lease_seconds))
        outcome = replace(outcome, held=self._held is not None)
        _warn_of(outcome.failed, self._plan, self.submission.execution_id)
        elapsed = self._cancellation.now() - self._began
        detail = "" if outcome.error is None else type(outcome.error).__name__
        try:
            self._delivery.tell(EventKind.RUN_ENDED, elapsed_s=elapsed, detail=detail)
        finally:
            self.concluded = True
            # The execution knows this run as the one to tell: without this both would wait for the collector.
            self._execution = None
            if self._report is not None:
                self._report(outcome)

    # --- deciding ----------------------------------------------------------------------------------------------

    def _meet(self, row: RunRow, request: RunRequest) -> None:
        """Decide what a run means that could not be taken.

        Raises:
            CodecFailed: The run's row went through another codec, or none.
        """
        assert self.store is not None
        if row.target != request.target or row.job_digest != request.job_digest:
            what = "target" if row.target != request.target else "job"
            # Another codec keeps another digest of the same job; reading it tells the two cases apart.
            self.store.find_job(row.graph, row.execution_id)
            self._conclude(RunOutcome(error=RunConflict(row.graph, row.execution_id, what)))
        elif row.state.ended:
            self._conclude(read_outcome(row, self._plan, self.store))
        else:
            self._wait_for(row)

    def _wait_for(self, row: RunRow) -> None:
        if not self.submission.waits:
            self._conclude(RunOutcome(busy_s=find_busy_s(row, self.submission.requeues)))
        else:
            self._waits_for_other = True
            # The end of a run that is held may be near; an open stage has others to wait for.
            wait_s = find_busy_s(row, self._requeues) / 10 if row.state is RunState.WAITING else 0.1
            self._requeues += 1
            self._runtime.timer.after(wait_s, lambda: self._runtime.submit_or_retry(self._open))

    # --- building ----------------------------------------------------------------------------------------------

    def _new_delivery(self, number: int) -> Delivery:
        submission = self.submission
        return Delivery(
            graph=self._plan.graph,
            execution_id=submission.execution_id,
            runtime=self._runtime,
            cancellation=self._cancellation,
            base=self._base,
            number=number,
            values=submission.values,
            store=self.store,
            held=self._held,
            lease_s=self._settings.lease_seconds,
            max_stored_bytes=self._settings.max_stored_bytes,
            owner=self._owner,
            listeners=submission.listeners,
            passthrough=submission.passthrough,
            scopes=submission.scopes,
            hooks=self._hooks,
            worker=submission.worker,
            refreshes=submission.refreshes,
            task_id=submission.task_id,
            loop=self._loop,
            beats=self._beats,
        )


def _warn_of(failed: Mapping[int, StepFailed], plan: Plan, execution_id: str) -> None:
    """Log which items a result is made without, unless it says so itself: the task's state does not."""
    if not failed or plan.collects:
        return
    errors = [" ".join(str(failed[index]).split())[:_MOST_CHARS] for index in sorted(failed)[:_MOST_SHOWN]]
    first = "; ".join(errors) + ("; ..." if len(failed) > _MOST_SHOWN else "")
    text = "run %r of graph %r succeeded, failed items left out: %d (%s)"
    _logger.warning(text, execution_id, plan.graph, len(failed), first)
