"""The life of one step in one delivery: restore, slot, attempt, judge, wait, save, report.

It is a generator, read from top to bottom, which yields what it waits for; `execution` drives it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf.message import Message

from docket_celery.engine.attempt import Attempt
from docket_celery.engine.checkpointing import StepRecord, hash_inputs, read_value
from docket_celery.engine.delivery import Delivery
from docket_celery.engine.ending import Ending
from docket_celery.engine.process.limits import Slot
from docket_celery.engine.process.state import process
from docket_celery.errors import (
    AbortError,
    DocketError,
    InputMutated,
    InputsChanged,
    StepFailed,
    StepTimedOut,
    StoreUnavailable,
    WrongResult,
    safe_text,
)
from docket_celery.observe.events import EventKind
from docket_celery.plan.messages import Value, encoding_fault
from docket_celery.plan.options import RetryPolicy, Scope, to_seconds
from docket_celery.plan.plan import PlannedStep
from docket_celery.plan.step import Step
from docket_celery.store.records import Checkpoint

_logger = logging.getLogger("docket_celery.step_run")
_SAVE_TRIES = 5
_SAVE_DELAY_S = 0.2
_ONE_ATTEMPT = (
    "A step without retry= has one attempt; retry=RetryPolicy(max_attempts=3) gives it up to three."
)
_POLL_FIRST_S, _POLL_MOST_S = 0.05, 1.0


class GivenUp(Exception):
    """The run is failing: a step that waits for its next attempt does not get it."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait without a thread.

    Attributes:
        seconds: How long.
        firm: Not cut short when the run is failing or has ended.
    """

    seconds: float
    firm: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of a step that ends its whole run at once with *error*."""

    error: BaseException


Effect: TypeAlias = Attempt | Sleep | Slot
"""What a step waits for: the end of an attempt (sent back as a `Result`), a time, its turn for a slot."""
End: TypeAlias = Value | StepFailed | Stop | None
"""How a step ends: with its value, for good, with the whole run, or as if it had never begun."""


class StepRun:
    """A step of one delivery on its way to a value.

    Args:
        planned: The step and its place in the plan.
        values: Its inputs.
        delivery: What the steps share.
        gate: The execution that it belongs to.

    Attributes:
        life: What the scheduler drives.
        attempts: Calls made so far.
        attempt: The latest call.
        record: Its stored side.
    """

    __slots__ = ("attempt", "attempts", "delivery", "gate", "life", "planned", "record", "step", "values")

    def __init__(
        self, planned: PlannedStep, values: Sequence[Value], delivery: Delivery, gate: Ending
    ) -> None:
        self.planned, self.step, self.values = planned, planned.step, values
        self.delivery, self.gate = delivery, gate
        self.attempts = 0
        self.attempt: Attempt | None = None
        self.record = StepRecord(planned.step, delivery)
        self.life = _life(self)

    @property
    def in_flight(self) -> Attempt | None:
        """The attempt whose user code runs now."""
        attempt = self.attempt
        return attempt if attempt is not None and attempt.in_flight else None

    def check_inputs(self, checkpoint: Checkpoint) -> None:
        """Compare what a restored step was made from with what is at hand.

        Raises:
            InputsChanged: They differ, and the step asks for an error then.
        """
        store, step = self.delivery.store, self.step
        if store is None or len(self.values) != len(self.planned.sources):
            return
        if hash_inputs(self.values, store) == checkpoint.input_hash:
            return
        if step.options.on_input_change == "error":
            raise InputsChanged(self.delivery.execution_id, step.name)
        self.delivery.tell(EventKind.INPUTS_CHANGED, step.name, detail="checkpoint reused")

    def report_restored(self) -> None:
        """Record that a stored value was used."""
        self.record.report("SUCCEEDED", attempts=0, cached=True)
        self.delivery.tell(EventKind.STEP_RESTORED, self.step.name)

    def report_succeeded(self, value: Value) -> None:
        """Record that the step was computed."""
        record, elapsed_s = self.record, self.record.elapsed_s
        if self.step.persist is None:
            record.report("SUCCEEDED", attempts=self.attempts)
        record.keep(value)
        self.delivery.tell(EventKind.STEP_SUCCEEDED, self.step.name, self.attempts, elapsed_s=elapsed_s)

    def report_cancelled(self, error: BaseException) -> None:
        """Record that the run ended while the step was running."""
        shown = error if isinstance(error, DocketError) else None
        self.record.report("CANCELLED", attempts=self.attempts, error=shown)

    def report_failed(self, status: str, error: DocketError) -> None:
        """Record that the step failed."""
        self.record.report(status, attempts=self.attempts, error=error)
        self.delivery.tell(EventKind.STEP_FAILED, self.step.name, self.attempts, detail=str(error))


def _life(run: StepRun) -> Generator[Effect, Any, End]:
    """Restore the step or call it until it has a value, and save that. Waits only by what it yields.

    Raises:
        LeaseLost: The run is another worker's.
        TooManyAbandoned: Too many threads are held by timed-out steps.
        DocketError: Its checkpoint could not be read or written.
    """
    step, delivery, record = run.step, run.delivery, run.record
    failure: StepFailed | None = None
    limited = step.options.max_concurrent is not None
    record.begin(run.values)
    try:
        if step.persist is Scope.GLOBAL and (found := (yield from _look_up(record))) is not None:
            return _restore(run, found)
        while True:
            slot = None
            if limited and (slot := _find_slot(run)) is not None:
                yield slot
            run.attempt = attempt = _next_attempt(run, slot)
            value, error = yield attempt
            run.attempt = None
            if error is None:
                if (wrong := step.wrong_result(value) or _find_fault(value)) is None:
                    break
                error = WrongResult(step.name, run.attempts, step.result_name, wrong)
            end, delay_s = _judge(run, error, attempt.on_host)
            # The attempt knows its execution: kept, both and the error would wait for the collector.
            del attempt, error
            if isinstance(end, Stop):
                return end
            failure = end
            if delay_s is None:
                return _give_up(run, failure)
            yield Sleep(delay_s)
    except GivenUp:
        return _give_up(run, failure)
    kept: Value = value
    if step.persist is not None:
        kept = yield from _save(run, value)
    if delivery.listeners or delivery.store is not None:
        run.report_succeeded(kept)
    return kept


def _look_up(record: StepRecord) -> Generator[Effect, Any, Checkpoint | None]:
    """Return the GLOBAL checkpoint; None: this step has claimed the right to compute it."""
    wait_s = _POLL_FIRST_S
    while not (found := record.look_up()):
        yield Sleep(wait_s)
        wait_s = min(wait_s * 2, _POLL_MOST_S)
    return found if isinstance(found, Checkpoint) else None


def _restore(run: StepRun, checkpoint: Checkpoint) -> Value:
    value = read_value(run.step, checkpoint, run.delivery)
    run.report_restored()
    run.record.keep(value)
    return value


def _find_fault(value: Value) -> str | None:
    """Return what is wrong with a result that could not be written, or not be read back; None: nothing."""
    fault = (
        encoding_fault(value)
        if isinstance(value, Message)
        else next(filter(None, map(encoding_fault, value)), None)
    )
    return None if fault is None else f"one that cannot be kept ({fault})"


def _find_slot(run: StepRun) -> Slot | None:
    """Return what to wait for before an attempt; None: it is part of a call that holds a slot of the step."""
    slots = process.slots_of(run.step)
    return None if slots is None or slots.lent(run.delivery.base) else Slot(slots)


def _next_attempt(run: StepRun, slot: Slot | None) -> Attempt:
    """Return the next call of the user's code, if the run may still make one."""
    step, delivery = run.step, run.delivery
    try:
        if delivery.held is not None and not delivery.held.trusted():
            raise delivery.held.fault()
        if step.timeout_s is not None and process.holds_thread(step):
            # Such an attempt may come to hold a thread for good, and so may each retry of it.
            delivery.runtime.pool.check_abandoned()
    except DocketError:
        if slot is not None:
            slot.cancel()
        # The run may have ended during the look-up: then nothing else drops the claim.
        run.record.drop_claim()
        raise
    run.attempts += 1
    return Attempt(step, run.attempts, run.values, delivery, run.gate, slot, run.record.began)


def _judge(run: StepRun, error: BaseException, on_host: bool) -> tuple[StepFailed | Stop, float | None]:
    """Return what *error* means for the step, and in how many seconds it is called again, if at all."""
    step, delivery, number = run.step, run.delivery, run.attempts
    stop = delivery.cancellation.error
    if stop is not None:
        # The run is being stopped; whatever the step raises now follows from that.
        return Stop(stop), None
    if isinstance(error, AbortError):
        run.report_failed("FAILED", error)
    if isinstance(error, asyncio.CancelledError):
        error = RuntimeError(f"the step was cancelled from inside: {brief_error(error)}")
    if isinstance(error, (AbortError, *delivery.passthrough)) or _is_hosts(error, on_host):
        return Stop(error), None
    retriable, delay_s = False, None
    if isinstance(error, Exception):
        retriable, error = classify(step, error)
        if retriable and number < step.max_attempts and step.options.retry is not None:
            delay_s, retriable, error = _delay(step.options.retry, step, number, error)
    failure = _failure(step, number, retriable, error)
    if delivery.item:
        failure.place(delivery.item)
    if delay_s is not None:
        detail = f"again in {delay_s:.3g} s: {failure}"
        delivery.tell(EventKind.STEP_RETRYING, step.name, number, detail=detail)
    return failure, delay_s


def _is_hosts(error: BaseException, on_host: bool) -> bool:
    """Tell whether *error* came from the host of the thread rather than from the step's code.

    A step thread has no host: nothing but the step's code raises SystemExit or KeyboardInterrupt there. The thread of
    a caller gets both from signals and from its own end; gevent ends greenlets with GreenletExit.
    """
    return not isinstance(error, Exception) and (on_host or type(error).__name__ == "GreenletExit")


def _give_up(run: StepRun, failure: StepFailed | None) -> StepFailed | None:
    """End the step without another attempt: with its last failure, or as if it had never begun."""
    run.record.drop_claim()
    if failure is not None:
        run.report_failed("TIMED_OUT" if isinstance(failure, StepTimedOut) else "FAILED", failure)
    return failure


def _save(run: StepRun, value: Value) -> Generator[Effect, Any, Value]:
    """Store the checkpoint; the first saver wins. Save before telling: listeners may read the row."""
    record, delivery, tries = run.record, run.delivery, 1
    row = record.row("SUCCEEDED", attempts=run.attempts)
    checkpoint = record.checkpoint(value)
    while True:
        try:
            winner = record.save(checkpoint, row)
        except StoreUnavailable as error:
            if tries >= _SAVE_TRIES or delivery.held is None or not delivery.held.trusted():
                raise
            _logger.warning(
                "run %r: saving %s, try %d: %s", delivery.execution_id, row.step_name, tries, error
            )
        else:
            same = winner.output_data == checkpoint.output_data
            return value if same else read_value(run.step, winner, delivery)
        yield Sleep(_SAVE_DELAY_S * 2**tries, firm=True)
        tries += 1


def classify(step: Step, error: Exception) -> tuple[bool, Exception]:
    """Tell whether another attempt may cure *error*, and which error to report.

    A ``retriable`` predicate that raises is itself the failure: it is reported and nothing is retried.
    """
    if isinstance(error, (InputMutated, WrongResult)):
        return False, error
    if step.retriable is not None and not isinstance(error, StepTimedOut):
        try:
            return bool(step.retriable(error)), error
        except Exception as broken:  # noqa: BLE001 -- user code; what it raised is the failure
            broken.add_note(f"raised by retriable= of step {step.name!r} while judging {brief_error(error)}")
            return False, broken
    return isinstance(error, (StepTimedOut, StoreUnavailable)) or not isinstance(error, DocketError), error


def _delay(
    policy: RetryPolicy, step: Step, number: int, error: Exception
) -> tuple[float | None, bool, Exception]:
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
