"""One delivery of one run in this process: lease, restore, execute, close.

The thread that waits for the outcome runs no SQL and no step of a run that has a lease: it sits in short
`queue.SimpleQueue` waits, where a signal may interrupt it without leaving a lock or a transaction behind.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace

from google.protobuf.message import Message

from docket_celery.checkpoint import (
    Checkpoint,
    Lease,
    RunRequest,
    RunRow,
    Store,
    job_digest,
    workflow_key,
)
from docket_celery.configuration import Settings
from docket_celery.context import Cancellation
from docket_celery.delivery import Delivery
from docket_celery.engine import Execution, Outcome
from docket_celery.errors import (
    GraphChanged,
    LeaseLost,
    RunConflict,
    RunTimedOut,
    StoreUnavailable,
    TooManyAbandoned,
)
from docket_celery.events import EventKind
from docket_celery.heartbeat import HeldLease, process_heartbeat
from docket_celery.messages import to_bytes, type_name
from docket_celery.outcome import RunOutcome, Submission, frame_job, read_outcome, run_end
from docket_celery.plan import Plan
from docket_celery.policy import Scope
from docket_celery.runtime import Runtime, Worker, process_runtime

_logger = logging.getLogger("docket_celery.run")
_SLICE_S = 0.5
_LEAVE_S = 5.0
_END_TRIES = 4
_LOST_BUSY_S = 1.0


class Run:
    """Drives one delivery; `outcome` starts it and waits for it."""

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Message],
        submission: Submission,
        settings: Settings,
        store: Store | None,
    ) -> None:
        self._plan, self._inputs, self._submission = plan, inputs, submission
        self._settings, self._store = settings, store if plan.persists else None
        self._runtime: Runtime = process_runtime(settings.threads)
        self._queue: queue.SimpleQueue[RunOutcome] = queue.SimpleQueue()
        self._base = contextvars.copy_context()
        self._cancellation = Cancellation()
        self._held: HeldLease | None = None
        self._execution: Execution | None = None
        self._began = time.monotonic()
        self._owner = str(uuid.uuid4()) if self._store is not None else ""
        self._attached = submission.attached
        self._delivery = self._new_delivery(submission.number)

    def outcome(self) -> RunOutcome:
        """Run to the end and return how it ended.

        Raises:
            BaseException: Whatever interrupted the waiting thread (a soft time limit, SystemExit, Ctrl-C); the run
                was cancelled and its lease given up before.
            TooManyAbandoned: Too many threads are held by timed-out steps.
        """
        self._check_abandoned()
        try:
            self._delivery.tell(EventKind.RUN_STARTED)
            if self._store is None:
                self._begin_here()
            else:
                self._runtime.pool.submit(self._open)
            thread = threading.current_thread()
            if isinstance(thread, Worker) and thread.pool is self._runtime.pool:
                # A step that executes a graph: its thread waits for work of the pool that it belongs to.
                with thread.pool.blocking():
                    return self._wait()
            return self._wait()
        except BaseException as interruption:
            self._stop(interruption)
            parked = self._leave(interruption)
            if parked is not None:
                return parked
            raise
        finally:
            # The execution knows this run as the one to tell: without this both would wait for the collector.
            self._execution = None

    # --- the waiting thread ------------------------------------------------------------------------------------

    def _begin_here(self) -> None:
        execution = self._begin({})
        if execution is not None:
            helps = self._submission.may_help and self._submission.timeout_s is None
            (execution.help if helps else execution.dispatch)()

    def _wait(self) -> RunOutcome:
        timeout_s = self._submission.timeout_s
        until = None if timeout_s is None else self._began + timeout_s
        while True:
            slice_s = _SLICE_S if until is None else max(0.0, min(_SLICE_S, until - time.monotonic()))
            try:
                return self._queue.get(timeout=slice_s)
            except queue.Empty:
                pass
            if until is not None and time.monotonic() >= until:
                until = None
                self._stop(RunTimedOut(self._submission.execution_id, timeout_s or 0.0))
            elif self._held is not None and not self._held.trusted():
                lease = self._held.lease
                self._stop(LeaseLost(lease.graph, lease.execution_id, lease.epoch))

    def _leave(self, interruption: BaseException) -> RunOutcome | None:
        """Give the pool a moment to hand back the lease; an expired lease is the fallback.

        Returns:
            The outcome, where the host decided that this interruption has the run delivered again; else None.
        """
        if self._store is None:
            outcome = self._parked_or_failed(interruption, None)
        else:
            try:
                outcome = self._queue.get(timeout=_LEAVE_S)
            except queue.Empty:
                _logger.warning("run %r: its lease was not given back in time", self._submission.execution_id)
                return None
        # A process that is told to end ends: only what fails the run can be cured by another delivery.
        parks = isinstance(interruption, Exception) and outcome.error is interruption
        return outcome if parks and outcome.park_s is not None else None

    def _stop(self, error: BaseException) -> None:
        self._cancellation.cancel(error)
        if self._execution is not None:
            self._execution.abort(error)

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
        assert self._store is not None
        if self._cancellation.error is not None:
            self._conclude(RunOutcome(error=self._cancellation.error))
            return None
        asked_at = time.monotonic()
        request = self._request()
        found = self._store.acquire(request)
        if isinstance(found, RunRow):
            self._meet(found, request)
            return None
        self._held = HeldLease(found, asked_at, self._settings.trust_margin_s)
        process_heartbeat(self._store).watch(self._held)
        return found

    def _advance(self, lease: Lease) -> None:
        self._delivery = self._new_delivery(lease.epoch)
        try:
            checkpoints = self._restore(lease) if self._plan.keeps_run else {}
            execution = self._begin(checkpoints)
            if execution is not None:
                execution.dispatch()
        except Exception as error:  # noqa: BLE001 -- the lease is held: the run must end in order
            self._end(Outcome(error=error))

    def _begin(self, checkpoints: dict[int, Checkpoint]) -> Execution | None:
        """Make and start the execution; None if it ended (or was stopped) while starting."""
        ended = self._end if self._store is None else self._end_on_pool
        execution = Execution(
            self._plan,
            self._inputs,
            self._delivery,
            ended,
            checkpoints=checkpoints,
            max_concurrency=self._submission.max_concurrency,
        )
        execution.start()
        self._execution = execution
        # A stop that came before the assignment found no execution to abort.
        if self._cancellation.error is not None:
            execution.abort(self._cancellation.error)
        return None if execution.closed else execution

    def _end_on_pool(self, outcome: Outcome) -> None:
        self._runtime.pool.submit(functools.partial(self._end, outcome))

    def _end(self, outcome: Outcome) -> None:
        """Close or park the run, then report."""
        result = RunOutcome(value=outcome.value)
        if outcome.error is not None:
            lease = self._held.lease if self._held is not None else None
            result = self._parked_or_failed(outcome.error, lease)
        if self._held is None or self._store is None:
            self._conclude(result)
        else:
            self._write_end(result, self._held, tries=1)

    def _write_end(self, result: RunOutcome, held: HeldLease, tries: int) -> None:
        assert self._store is not None
        try:
            if not isinstance(result.error, LeaseLost):
                self._store.end(
                    held.lease, run_end(result, self._submission, self._delivery.rows, self._settings)
                )
        except StoreUnavailable as error:
            if tries < _END_TRIES and held.trusted():
                again = functools.partial(self._write_end, result, held, tries + 1)
                self._runtime.timer.after(0.2 * 2**tries, lambda: self._runtime.pool.submit(again))
                return
            # What is saved stays saved; the next delivery restores it and writes the end.
            result = self._parked_or_failed(error, held.lease)
        except Exception as error:  # noqa: BLE001 -- whoever waits must hear of it
            result = RunOutcome(error=error)
        process_heartbeat(self._store).unwatch(held)
        self._conclude(result)

    def _conclude(self, outcome: RunOutcome) -> None:
        """Report how it ended; the run's row tells the same by now."""
        if isinstance(outcome.error, LeaseLost) and not self._submission.waits:
            # Soon, as the new holder may have ended the run by now; the next look tells how long its lease is.
            outcome = RunOutcome(error=outcome.error, busy_s=min(_LOST_BUSY_S, self._settings.lease_seconds))
        outcome = replace(outcome, held=self._held is not None)
        elapsed = time.monotonic() - self._began
        detail = "" if outcome.error is None else type(outcome.error).__name__
        try:
            self._delivery.tell(EventKind.RUN_ENDED, elapsed_s=elapsed, detail=detail)
        finally:
            self._queue.put(outcome)

    # --- deciding ----------------------------------------------------------------------------------------------

    def _meet(self, row: RunRow, request: RunRequest) -> None:
        """Decide what a run means that could not be taken."""
        if row.target != request.target or row.job_digest != request.job_digest:
            what = "target" if row.target != request.target else "job"
            self._conclude(RunOutcome(error=RunConflict(row.graph, row.execution_id, what)))
        elif row.state.ended:
            self._conclude(read_outcome(row, self._plan))
        elif not self._submission.waits:
            self._conclude(RunOutcome(busy_s=max(0.0, row.lease_left_s or 0.0)))
        else:
            self._attached = True
            self._runtime.timer.after(0.1, lambda: self._runtime.pool.submit(self._open))

    def _restore(self, lease: Lease) -> dict[int, Checkpoint]:
        """Read the run's checkpoints, by plan index.

        Raises:
            GraphChanged: One is of a step that the graph no longer has.
        """
        assert self._store is not None
        names: dict[bytes, int] = {}
        for planned in self._plan.steps:
            if planned.step.persist is Scope.WORKFLOW:
                for name in (*planned.step.options.renamed_from, planned.step.name):
                    names.setdefault(workflow_key(lease.graph, lease.execution_id, name), planned.index)
        found: dict[int, Checkpoint] = {}
        gone: list[str] = []
        for checkpoint in self._store.restore(lease, list(names)):
            index = names.get(checkpoint.key)
            if index is not None:
                found.setdefault(index, checkpoint)
            elif checkpoint.step_name not in self._plan.known_names:
                gone.append(checkpoint.step_name)
        if gone:
            raise GraphChanged(lease.graph, lease.execution_id, sorted(set(gone)))
        return found

    def _parked_or_failed(self, error: BaseException, lease: Lease | None) -> RunOutcome:
        park = self._submission.park_s
        try:
            return RunOutcome(error=error, park_s=park(error, lease) if park is not None else None)
        except Exception as broken:  # noqa: BLE001 -- the host's own code; whoever waits must hear of it
            return RunOutcome(error=broken)

    # --- building ----------------------------------------------------------------------------------------------

    def _request(self) -> RunRequest:
        submission = self._submission
        job = [(type_name(value), to_bytes(value)) for value in self._inputs]
        return RunRequest(
            graph=self._plan.graph,
            execution_id=submission.execution_id,
            target=str(self._plan.target),
            job=frame_job(job),
            job_digest=submission.job_digest or job_digest(job),
            owner=self._owner,
            lease_s=self._settings.lease_seconds,
            max_deliveries=self._settings.max_deliveries,
            task_name=submission.task_name,
            task_id=submission.task_id,
            retries=submission.retries,
            attached=self._attached,
            released=submission.released,
        )

    def _new_delivery(self, number: int) -> Delivery:
        submission = self._submission
        return Delivery(
            graph=self._plan.graph,
            execution_id=submission.execution_id,
            runtime=self._runtime,
            cancellation=self._cancellation,
            base=self._base,
            number=number,
            values=submission.values,
            store=self._store,
            held=self._held,
            lease_s=self._settings.lease_seconds,
            owner=self._owner,
            listeners=submission.listeners,
            passthrough=submission.passthrough,
            scopes=submission.scopes,
            worker=submission.worker,
            task_id=submission.task_id,
        )

    def _check_abandoned(self) -> None:
        held = self._runtime.pool.abandoned()
        limit = 2 * self._settings.threads
        if len(held) >= limit:
            raise TooManyAbandoned(len(held), limit, sorted(set(held)))
