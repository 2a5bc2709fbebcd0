"""One step of one delivery: restore, attempt, judge, save, report."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from docket_celery.engine.attempt import Attempt
from docket_celery.engine.checkpointing import StepRecord, read_value
from docket_celery.engine.delivery import Delivery
from docket_celery.engine.process.instances import holds_thread
from docket_celery.engine.process.limits import Slot, Slots, slots_of
from docket_celery.errors import (
    AbortError,
    DocketError,
    InputMutated,
    LeaseLost,
    StepFailed,
    StepTimedOut,
    StoreUnavailable,
    WrongResult,
    safe_text,
)
from docket_celery.observe.events import EventKind
from docket_celery.plan.messages import Value
from docket_celery.plan.options import RetryPolicy, Scope, to_seconds
from docket_celery.plan.plan import PlannedStep
from docket_celery.plan.step import Step
from docket_celery.store.records import Checkpoint, StepExecution

_logger = logging.getLogger("docket_celery.call")
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

    def inputs_of(self, planned: PlannedStep) -> list[Value]: ...
    def complete(self, call: StepCall, value: Value) -> None: ...
    def fail(self, call: StepCall, error: StepFailed) -> None: ...
    def withdraw(self, call: StepCall) -> None: ...
    def abort(self, error: BaseException) -> None: ...
    def pause(self, call: StepCall, delay_s: float) -> None: ...
    def take_slot(self, call: StepCall, slots: Slots) -> Slot | None: ...
    def carry_on(self, work: Callable[[], None], call: StepCall) -> None: ...


class StepCall:
    """A step on its way to a value, through restores, attempts, waits and the save. Never waits on a thread."""

    __slots__ = (
        "_attempt_no",
        "_delivery",
        "_failure",
        "_record",
        "_running",
        "_steps",
        "_values",
        "planned",
    )

    def __init__(self, planned: PlannedStep, steps: Steps, delivery: Delivery) -> None:
        self.planned, self._steps, self._delivery = planned, steps, delivery
        self._attempt_no = 0
        self._running: Attempt | None = None
        self._failure: StepFailed | None = None
        self._record = StepRecord(planned.step, delivery)
        self._values: list[Value] = []

    @property
    def in_flight(self) -> Attempt | None:
        """The attempt whose user code runs now."""
        running = self._running
        return running if running is not None and running.in_flight else None

    @property
    def claims(self) -> bool:
        """Whether others wait for this step to compute a GLOBAL checkpoint."""
        return self._record.claims

    @property
    def elapsed_s(self) -> float:
        """Seconds since the step began."""
        return self._record.elapsed_s

    def start(self) -> None:
        """Begin the step on this thread; it ends by `complete`, `fail`, `withdraw` or `abort` of its execution."""
        self._values = self._steps.inputs_of(self.planned)
        self._record.begin(self._values)
        if self.planned.step.persist is Scope.GLOBAL:
            self._look_up(_POLL_FIRST_S)
        else:
            self.attempt()

    def attempt(self) -> None:
        """Call the user's code once: now, or when a slot is free for it."""
        slots = slots_of(self.planned.step)
        if slots is None or slots.lent(self._delivery.base):
            self.attempt_in(None)
        elif (slot := self._steps.take_slot(self, slots)) is not None:
            self.attempt_in(slot)

    def attempt_in(self, slot: Slot | None) -> None:
        """Call the user's code once; *slot* is given back when that has ended."""
        begun = False
        try:
            begun = self._begin_attempt(slot)
        finally:
            # An attempt that has begun sees to both itself, whenever it ends.
            if not begun:
                if slot is not None:
                    slot.cancel()
                self.drop_claim()

    def _begin_attempt(self, slot: Slot | None) -> bool:
        """Call the user's code, unless the execution is closed or the lease is lost: then return False."""
        delivery = self._delivery
        if delivery.held is not None and not delivery.held.trusted():
            lease = delivery.held.lease
            self._steps.abort(LeaseLost(lease.graph, lease.execution_id, lease.epoch))
            return False
        if self.planned.step.timeout_s is not None and holds_thread(self.planned.step):
            # Such an attempt may come to hold a thread for good, and so may each retry of it.
            delivery.runtime.pool.check_abandoned()
        self._attempt_no += 1
        self._failure = None
        self._running = Attempt(
            self.planned.step, self._attempt_no, self._values, delivery, self._steps, self, slot
        )
        return self._running.start()

    def carry_on(self, work: Callable[[], None]) -> None:
        """Go on with this step on the pool."""
        self._steps.carry_on(work, self)

    # --- judging -----------------------------------------------------------------------------------------------

    def returned(self, value: Any) -> None:
        """Take what an attempt returned."""
        step, self._running = self.planned.step, None
        if (actual := step.wrong_result(value)) is None:
            self._succeeded(value)
        else:
            self.raised(WrongResult(step.name, self._attempt_no, step.result_name, actual))

    def raised(self, error: BaseException, *, is_own: bool = True) -> None:
        """Judge what an attempt raised: try again later, fail, or stop the run.

        Args:
            error: What it raised.
            is_own: The step's code raised it; False: the host of its thread did, to end more than this step.
        """
        step, number = self.planned.step, self._attempt_no
        # An attempt knows its call: kept, both and their messages would wait for the collector.
        self._running = None
        stop = self._delivery.cancellation.error
        if stop is not None:
            # The run is being stopped; whatever the step raises now follows from that.
            self._steps.abort(stop)
            return
        if isinstance(error, AbortError):
            self._report_failed("FAILED", error)
        if isinstance(error, asyncio.CancelledError):
            error = RuntimeError(f"the step was cancelled from inside: {brief_error(error)}")
            is_own = True
        if not is_own or isinstance(error, (AbortError, *self._delivery.passthrough)):
            self._steps.abort(error)
            return
        retriable, error = classify(step, error)
        delay_s = None
        if retriable and number < step.max_attempts and step.options.retry is not None:
            delay_s, retriable, error = _delay(step.options.retry, step, number, error)
        failure = self._failure = _failure(step, number, retriable, error)
        if self._delivery.item:
            failure.place(self._delivery.item)
        if delay_s is not None:
            self._delivery.tell(
                EventKind.STEP_RETRYING, step.name, number, detail=f"again in {delay_s:.3g} s: {failure}"
            )
            self._steps.pause(self, delay_s)
        else:
            self.give_up()

    def give_up(self) -> None:
        """End the step without another attempt: with its last failure, or as if it had never begun."""
        self.drop_claim()
        failure = self._failure
        if failure is None:
            self._steps.withdraw(self)
            return
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
            self._delivery.runtime.timer.after(poll_s, lambda: self.carry_on(again))

    def restored(self, checkpoint: Checkpoint) -> None:
        """Complete the step with a stored value."""
        value = read_value(self.planned.step, checkpoint, self._delivery)
        self.report_restored()
        self._record.keep(value)
        self._steps.complete(self, value)

    def report_restored(self) -> None:
        """Record that a stored value was used."""
        if not self._values:
            self._record.begin()
        self._record.report("SUCCEEDED", attempts=0, cached=True)
        self._delivery.tell(EventKind.STEP_RESTORED, self.planned.step.name)

    def _succeeded(self, value: Value) -> None:
        if self.planned.step.persist is None:
            self._record.report("SUCCEEDED", attempts=self._attempt_no)
            self._done(value)
        else:
            row = self._record.row("SUCCEEDED", attempts=self._attempt_no)
            self._save(value, self._record.checkpoint(value), row, tries=1)

    def _save(self, value: Value, checkpoint: Checkpoint, row: StepExecution, tries: int) -> None:
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
            delivery.runtime.timer.after(_SAVE_DELAY_S * 2**tries, lambda: self.carry_on(again))
            return
        if winner.output_data != checkpoint.output_data:
            value = read_value(self.planned.step, winner, delivery)
        self._done(value)

    def _done(self, value: Value) -> None:
        elapsed = self._record.elapsed_s
        self._record.keep(value)
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


def classify(step: Step, error: BaseException) -> tuple[bool, BaseException]:
    """Tell whether another attempt may cure *error*, and which error to report.

    A ``retriable`` predicate that raises is itself the failure: it is reported and nothing is retried. Nor is what
    asks for an end, such as the SystemExit of a library that calls ``sys.exit``.
    """
    if isinstance(error, (InputMutated, WrongResult)) or not isinstance(error, Exception):
        return False, error
    if step.retriable is not None and not isinstance(error, StepTimedOut):
        try:
            return bool(step.retriable(error)), error
        except Exception as broken:  # noqa: BLE001 -- user code; what it raised is the failure
            broken.add_note(f"raised by retriable= of step {step.name!r} while judging {brief_error(error)}")
            return False, broken
    return isinstance(error, (StepTimedOut, StoreUnavailable)) or not isinstance(error, DocketError), error


def _delay(
    policy: RetryPolicy, step: Step, number: int, error: BaseException
) -> tuple[float | None, bool, BaseException]:
    """Return the wait before the next attempt, or None where the backoff has none: then that is the failure."""
    try:
        return to_seconds(policy.backoff.delay_s(number), "the backoff's delay"), True, error
    except Exception as broken:  # noqa: BLE001 -- it may be user code; what it raised is the failure
        broken.add_note(f"raised by the backoff of step {step.name!r} after {brief_error(error)}")
        return None, False, broken


def brief_error(error: BaseException) -> str:
    """Return the type and the first 200 characters of *error*."""
    return f"{type(error).__name__}: {safe_text(error)[:200]}"


def _failure(step: Step, attempts: int, retriable: bool, error: BaseException) -> StepFailed:
    if isinstance(error, (StepTimedOut, WrongResult, InputMutated)) and error.step == step.name:
        failure: StepFailed = error
    else:
        failure = StepFailed.from_cause(step.name, attempts, retriable, error)
    if retriable and step.options.retry is None:
        failure.add_note(_ONE_ATTEMPT)
    return failure
