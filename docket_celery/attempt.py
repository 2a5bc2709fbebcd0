"""One step of one delivery: restore, call, classify, save, report."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, cast

from google.protobuf.message import Message

from docket_celery.checkpoint import Checkpoint, StepExecution, idempotency_key
from docket_celery.context import Cancellation, StepContext, bind_context
from docket_celery.delivery import Delivery
from docket_celery.errors import (
    AbortError,
    DocketError,
    LeaseLost,
    StepFailed,
    StepTimedOut,
    StoreUnavailable,
    WrongResult,
    safe_text,
)
from docket_celery.events import EventKind
from docket_celery.messages import type_name
from docket_celery.plan import PlannedStep
from docket_celery.policy import Scope, to_seconds
from docket_celery.record import StepRecord, read_value
from docket_celery.runtime import Alarm, Worker
from docket_celery.step import Step

_logger = logging.getLogger("docket_celery.attempt")
_SAVE_TRIES = 5
_SAVE_DELAY_S = 0.2
_ONE_ATTEMPT = (
    "A step without retry= has one attempt; retry=RetryPolicy(max_attempts=3) gives it up to three."
)
_POLL_FIRST_S, _POLL_MOST_S = 0.05, 1.0


class Steps(Protocol):
    """What a step call needs of the execution it belongs to."""

    lock: threading.Lock
    closed: bool
    failing: bool

    def inputs_of(self, planned: PlannedStep) -> list[Message]: ...
    def complete(self, call: StepCall, value: Message) -> None: ...
    def fail(self, call: StepCall, error: StepFailed) -> None: ...
    def withdraw(self, call: StepCall) -> None: ...
    def abort(self, error: BaseException) -> None: ...
    def pause(self, call: StepCall, delay_s: float, error: StepFailed) -> None: ...
    def carry_on(self, work: Callable[[], None], call: StepCall | None = None) -> None: ...


class StepCall:
    """A step on its way to a value, through restores, attempts, waits and the save. Never waits on a thread.

    The number of the attempt in progress is a gate: who closes it first (the return or the timeout) decides, and
    everything later is discarded.
    """

    __slots__ = (
        "_alarm",
        "_attempt_no",
        "_delivery",
        "_future",
        "_open",
        "_record",
        "_steps",
        "_unlink",
        "_values",
        "planned",
        "worker",
    )

    def __init__(self, planned: PlannedStep, steps: Steps, delivery: Delivery) -> None:
        self.planned, self._steps, self._delivery = planned, steps, delivery
        self._attempt_no = 0
        self._open = 0
        self._alarm: Alarm | None = None
        self._unlink: Callable[[], None] | None = None
        self._future: Future[Any] | None = None
        self._record = StepRecord(planned.step, delivery)
        self._values: list[Message] = []
        self.worker: Worker | None = None

    @property
    def in_flight(self) -> bool:
        """Whether user code of this step runs now."""
        return self._open > 0

    @property
    def claims(self) -> bool:
        """Whether others wait for this step to compute a GLOBAL checkpoint."""
        return self._record.claims

    def start(self) -> None:
        """Begin the step on this thread; it ends by `complete`, `fail`, `withdraw` or `abort` of its execution."""
        self._values = self._steps.inputs_of(self.planned)
        self._record.begin(self._values)
        if self.planned.step.persist is Scope.GLOBAL:
            self._look_up(_POLL_FIRST_S)
        else:
            self.attempt()

    def attempt(self) -> None:
        """Call the user's code once."""
        step, delivery = self.planned.step, self._delivery
        if delivery.held is not None and not delivery.held.trusted():
            lease = delivery.held.lease
            self._steps.abort(LeaseLost(lease.graph, lease.execution_id, lease.epoch))
            return
        self._attempt_no += 1
        number = self._attempt_no
        context = step_context(step, delivery, number)
        with self._steps.lock:
            begun = not self._steps.closed
            if begun:
                self._open = number
                thread = threading.current_thread()
                self.worker = thread if isinstance(thread, Worker) and not step.is_async else None
                if step.timeout_s is not None:
                    ring = functools.partial(self._ring, number, context.cancelled)
                    self._alarm = delivery.runtime.timer.after(step.timeout_s, ring)
                    self._unlink = functools.partial(delivery.cancellation.forget, context.cancelled.cancel)
        if not begun:
            self.drop_claim()
            return
        delivery.tell(EventKind.STEP_STARTED, step.name, number)
        if step.is_async:
            self._spawn(number, context)
            return
        try:
            value = delivery.base.copy().run(self._invoke, context)
        except BaseException as error:  # noqa: BLE001 -- user code; every kind is judged below
            self._returned(number, None, error)
        else:
            self._returned(number, value, None)

    def interrupt(self) -> None:
        """Let go of an attempt whose result will not count: no alarm any more, and a coroutine is cancelled."""
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            alarm.cancel()
        future, self._future = self._future, None
        if future is not None:
            future.cancel()

    # --- calling -----------------------------------------------------------------------------------------------

    def _invoke(self, context: StepContext) -> Any:
        bind_context(context)
        if not self._delivery.scopes:
            return self.planned.step.invoke(self._values, context)
        with contextlib.ExitStack() as stack:
            for scope in self._delivery.scopes:
                stack.enter_context(scope())
            return self.planned.step.invoke(self._values, context)

    def _spawn(self, number: int, context: StepContext) -> None:
        # The coroutine's task copies the contextvars in force where it is made, so it is made inside the copy.
        submit = self._delivery.step_loop().submit
        try:
            future = self._delivery.base.copy().run(lambda: submit(self._await(context)))
        except BaseException as error:  # noqa: BLE001 -- the call may fail before its first await
            self._returned(number, None, error)
            return

        def finished(future: Future[tuple[Any, BaseException | None]]) -> None:
            if not future.cancelled():
                value, error = future.result()
            elif self._future is future:
                value, error = None, asyncio.CancelledError("the step cancelled itself")
            else:
                return
            self._steps.carry_on(lambda: self._returned(number, value, error), self)

        self._future = future
        future.add_done_callback(finished)
        with self._steps.lock:
            stopped = self._open != number or self._steps.closed
        if stopped and not future.done():
            self.interrupt()

    async def _await(self, context: StepContext) -> tuple[Any, BaseException | None]:
        """Return the step's result or error; asyncio would let SystemExit and KeyboardInterrupt end the loop."""
        bind_context(context)
        try:
            return await self.planned.step.invoke(self._values, context), None
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 -- user code; every kind is judged by the caller
            return None, error

    def _close(self, number: int, *, give_up: bool = False) -> bool:
        with self._steps.lock:
            if self._open != number or self._steps.closed:
                return False
            self._open = 0
            if give_up and self.worker is not None:
                # Under the lock, which its return needs first: the worker cannot have gone on to other work.
                self._delivery.runtime.pool.abandon(self.worker, self.planned.step.name)
            self.worker = None
            alarm, self._alarm = self._alarm, None
            unlink, self._unlink = self._unlink, None
        if alarm is not None:
            alarm.cancel()
        if unlink is not None:
            unlink()
        return True

    def _ring(self, number: int, cancelled: Cancellation) -> None:
        """End an attempt at its deadline; runs on the timer's thread, so it hands the rest to the pool."""
        step, worker = self.planned.step, self.worker
        if not self._close(number, give_up=True):
            return
        error = StepTimedOut(step.name, number, step.timeout_s or 0.0)
        cancelled.cancel(error)
        self.interrupt()
        if worker is not None:
            self._delivery.tell(EventKind.STEP_ABANDONED, step.name, number, detail=error.describe())
            _logger.warning(
                "run %r: %s; its thread goes on until the step returns", self._delivery.execution_id, error
            )
        self._steps.carry_on(lambda: self._errored(error), self)

    def _returned(self, number: int, value: Any, error: BaseException | None) -> None:
        step = self.planned.step
        self._delivery.runtime.catch_up()  # a deadline that only this thread can ring has waited for the step
        if not self._close(number):
            self._delivery.tell(EventKind.STEP_LATE, step.name, number, elapsed_s=self._record.elapsed_s)
            return
        if error is None and type(value) is not step.output.kind:
            actual = "None" if value is None else type(value).__name__
            error = WrongResult(step.name, number, type_name(step.output.kind), actual)
        if error is None:
            self._succeeded(cast("Message", value))
        else:
            self._errored(error)

    # --- judging -----------------------------------------------------------------------------------------------

    def _errored(self, error: BaseException) -> None:
        step, number = self.planned.step, self._attempt_no
        stop = self._delivery.cancellation.error
        if stop is not None:
            # The run is being stopped; whatever the step raises now follows from that.
            self._steps.abort(stop)
            return
        if isinstance(error, AbortError):
            self._report_failed("FAILED", error)
        if isinstance(error, asyncio.CancelledError):
            error = RuntimeError(f"the step was cancelled from inside: {brief_error(error)}")
        if not isinstance(error, Exception) or isinstance(error, (AbortError, *self._delivery.passthrough)):
            self._steps.abort(error)
            return
        retriable, error = classify(step, error)
        failure = _failure(step, number, retriable, error)
        if retriable and number < step.max_attempts and step.options.retry is not None:
            delay_s = to_seconds(step.options.retry.backoff.delay_s(number), "the backoff's delay")
            self._delivery.tell(
                EventKind.STEP_RETRYING, step.name, number, detail=f"again in {delay_s:.3g} s: {failure}"
            )
            self._steps.pause(self, delay_s, failure)
        else:
            self.give_up(failure)

    def give_up(self, failure: StepFailed) -> None:
        """End the step with *failure*."""
        self.drop_claim()
        self._report_failed("TIMED_OUT" if isinstance(failure, StepTimedOut) else "FAILED", failure)
        self._steps.fail(self, failure)

    # --- checkpoints -------------------------------------------------------------------------------------------

    def _look_up(self, poll_s: float) -> None:
        """Restore a GLOBAL checkpoint, or claim the right to compute it, or look again later."""
        if self._steps.closed:
            return
        if self._steps.failing:
            self._steps.withdraw(self)
            return
        found = self._record.look_up()
        if isinstance(found, Checkpoint):
            self.restored(found)
        elif found:
            self.attempt()
        else:
            again = functools.partial(self._look_up, min(poll_s * 2, _POLL_MOST_S))
            self._delivery.runtime.timer.after(poll_s, lambda: self._steps.carry_on(again, self))

    def restored(self, checkpoint: Checkpoint) -> None:
        """Complete the step with a stored value."""
        value = read_value(self.planned.step, checkpoint, self._delivery)
        self.report_restored()
        self._steps.complete(self, value)

    def report_restored(self) -> None:
        """Record that a stored value was used."""
        if not self._values:
            self._record.begin()
        self._record.report("SUCCEEDED", attempts=0, cached=True)
        self._delivery.tell(EventKind.STEP_RESTORED, self.planned.step.name)

    def _succeeded(self, value: Message) -> None:
        if self.planned.step.persist is None:
            self._record.report("SUCCEEDED", attempts=self._attempt_no)
            self._done(value)
        else:
            row = self._record.row("SUCCEEDED", attempts=self._attempt_no)
            self._save(value, self._record.checkpoint(value), row, tries=1)

    def _save(self, value: Message, checkpoint: Checkpoint, row: StepExecution, tries: int) -> None:
        """Store the checkpoint; the first saver wins. Save before telling: listeners may read the row."""
        delivery = self._delivery
        try:
            winner = self._record.save(checkpoint, row)
        except StoreUnavailable as error:
            if tries >= _SAVE_TRIES or delivery.held is None or not delivery.held.trusted():
                raise
            _logger.warning(
                "run %r: saving %s, try %d: %s", delivery.execution_id, row.step_name, tries, error
            )
            again = functools.partial(self._save, value, checkpoint, row, tries + 1)
            delivery.runtime.timer.after(_SAVE_DELAY_S * 2**tries, lambda: self._steps.carry_on(again, self))
            return
        if winner is not checkpoint and winner.output_data != checkpoint.output_data:
            value = read_value(self.planned.step, winner, delivery)
        self._done(value)

    def _done(self, value: Message) -> None:
        elapsed = self._record.elapsed_s
        self._delivery.tell(
            EventKind.STEP_SUCCEEDED, self.planned.step.name, self._attempt_no, elapsed_s=elapsed
        )
        self._steps.complete(self, value)

    def drop_claim(self) -> None:
        """Let another run compute the GLOBAL checkpoint, if this step claimed to."""
        self._record.drop_claim()

    # --- reporting ---------------------------------------------------------------------------------------------

    def report_cancelled(self, error: BaseException) -> None:
        """Record that the run ended while the step was running."""
        self._record.report(
            "CANCELLED", attempts=self._attempt_no, error=error if isinstance(error, DocketError) else None
        )

    def _report_failed(self, status: str, error: DocketError) -> None:
        self._record.report(status, attempts=self._attempt_no, error=error)
        self._delivery.tell(
            EventKind.STEP_FAILED, self.planned.step.name, self._attempt_no, detail=str(error)
        )


def step_context(step: Step, delivery: Delivery, attempt: int) -> StepContext:
    """Return the context of one attempt; a timed attempt can be cancelled alone."""
    timed = step.timeout_s is not None
    return StepContext(
        graph=delivery.graph,
        execution_id=delivery.execution_id,
        step=step.name,
        make_key=functools.partial(idempotency_key, delivery.graph, delivery.execution_id, step.identity),
        attempt=attempt,
        delivery=delivery.number,
        values=delivery.values,
        deadline=time.monotonic() + step.timeout_s if step.timeout_s is not None else None,
        cancelled=delivery.cancellation.child() if timed else delivery.cancellation,
    )


def classify(step: Step, error: Exception) -> tuple[bool, Exception]:
    """Tell whether another attempt may cure *error*, and which error to report.

    A ``retriable`` predicate that raises is itself the failure: it is reported and nothing is retried.
    """
    if isinstance(error, WrongResult):
        return False, error
    if step.retriable is not None and not isinstance(error, StepTimedOut):
        try:
            return bool(step.retriable(error)), error
        except Exception as broken:  # noqa: BLE001 -- user code; what it raised is the failure
            broken.add_note(f"raised by retriable= of step {step.name!r} while judging {brief_error(error)}")
            return False, broken
    return isinstance(error, (StepTimedOut, StoreUnavailable)) or not isinstance(error, DocketError), error


def brief_error(error: BaseException) -> str:
    """Return the type and the first 200 characters of *error*."""
    return f"{type(error).__name__}: {safe_text(error)[:200]}"


def _failure(step: Step, attempts: int, retriable: bool, error: Exception) -> StepFailed:
    if isinstance(error, (StepTimedOut, WrongResult)) and error.step == step.name:
        failure: StepFailed = error
    else:
        failure = StepFailed.from_cause(step.name, attempts, retriable, error)
    if retriable and step.options.retry is None:
        failure.add_note(_ONE_ATTEMPT)
    return failure
