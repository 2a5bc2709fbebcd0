"""The life of one step in one delivery: restore, slot, attempt, judge, wait, save, report.

It is a generator, read from top to bottom, which yields what it waits for; `execution` drives it.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeAlias

from docket_celery.engine.attempt import Attempt
from docket_celery.engine.checkpointing import StepRecord, hash_inputs, read_value
from docket_celery.engine.process.limits import Slot
from docket_celery.engine.process.state import process
from docket_celery.engine.run_context import Ending, RunContext
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
from docket_celery.plan.messages import Value
from docket_celery.plan.options import Scope, to_seconds
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


class Sleep(NamedTuple):
    """Wait without a thread; a *firm* wait is not cut short when the run is failing or has ended."""

    seconds: float
    firm: bool = False


class Stop(NamedTuple):
    """The end of a step that ends its whole run at once with *error*."""

    error: BaseException


Effect: TypeAlias = Attempt | Sleep | Slot
"""What a step waits for: the end of an attempt (sent back as a `Result`), a time, its turn for a slot."""
End: TypeAlias = Value | StepFailed | Stop | None
"""How a step ends: with its value, for good, with the whole run, or as if it had never begun."""


class StepRun:
    """A step of one delivery on its way to a value, in the execution that is its *gate*."""

    attempt: Attempt | None = None

    def __init__(
        self, planned: PlannedStep, values: Sequence[Value], context: RunContext, gate: Ending
    ) -> None:
        self.planned, self.step, self._values = planned, planned.step, values
        self._context, self._gate = context, gate
        self.attempts, self._began, self._watched = 0, 0.0, False
        self._record: StepRecord | None = None
        if (store := context.store) is not None or context.submission.listeners:
            self._began, self._watched = context.cancellation.now(), True
            if store is not None:
                self._record = StepRecord(self.step, values, context, store, self._began)
        self.life = self._live()

    @property
    def in_flight(self) -> Attempt | None:
        """The attempt whose user code runs now."""
        return self.attempt if self.attempt is not None and self.attempt.in_flight else None

    @property
    def claims(self) -> bool:
        """Whether others wait for this step to compute a GLOBAL checkpoint."""
        return self._record is not None and self._record.claims

    def drop_claim(self) -> None:
        """Leave the GLOBAL checkpoint for another run to compute, if this step claimed to."""
        if self._record is not None:
            self._record.drop_claim()

    def use_restored(self, checkpoint: Checkpoint) -> None:
        """Record that a restored value is used; raise `InputsChanged` if its inputs did and the step minds."""
        store, step = self._context.store, self.step
        known = store is not None and len(self._values) == len(self.planned.sources)
        if store is not None and known and hash_inputs(self._values, store) != checkpoint.input_hash:
            if step.options.on_input_change == "error":
                raise InputsChanged(self._context.execution_id, step.name)
            self._context.tell(EventKind.INPUTS_CHANGED, step.name, detail="checkpoint reused")
        self._report("SUCCEEDED", cached=True)
        self._context.tell(EventKind.STEP_RESTORED, step.name)

    def report_cancelled(self, error: BaseException) -> None:
        """Record that the run ended while the step was running."""
        self._report("CANCELLED", error=error if isinstance(error, DocketError) else None)

    # --- the life ----------------------------------------------------------------------------------------------

    def _live(self) -> Generator[Effect, Any, End]:
        """Restore the step or call it until it has a value, and save that. Waits only by what it yields."""
        step, record = self.step, self._record
        failure: StepFailed | None = None
        try:
            if record is not None and step.persist is Scope.GLOBAL:
                found = yield from self._look_up(record)
                if found is not None:
                    return found
            while True:
                slot = None
                if step.options.max_concurrent is not None and (slot := self._find_slot()) is not None:
                    yield slot
                if self._context.held is not None or not step.ends_here:
                    self._check_start(slot)
                self.attempts = number = self.attempts + 1
                self.attempt = attempt = Attempt(
                    step, number, self._values, self._context, self._gate, slot, self._began
                )
                value, error = yield attempt
                self.attempt = None
                if error is None:
                    if type(value) is step.sure_kind or not (wrong := step.wrong_result(value)):
                        break
                    error = WrongResult(step.name, self.attempts, step.result_name, wrong)
                end, delay_s = self._judge(error, attempt.on_host)
                # The attempt knows its execution: kept, both and the error would wait for the collector.
                del attempt, error
                if isinstance(end, Stop):
                    return end
                failure = end
                if delay_s is None:
                    return self._give_up(failure)
                yield Sleep(delay_s)
        except GivenUp:
            return self._give_up(failure)
        kept: Value = value
        if self._watched:
            kept = yield from self._keep(record, value)
        return kept

    def _look_up(self, record: StepRecord) -> Generator[Effect, Any, Value | None]:
        """Return what the GLOBAL checkpoint has; None: this step has claimed the right to compute it."""
        wait_s = _POLL_FIRST_S
        while not (found := record.look_up()):
            yield Sleep(wait_s)
            wait_s = min(wait_s * 2, _POLL_MOST_S)
        if not isinstance(found, Checkpoint):
            return None
        value = read_value(self.step, found, self._context)
        self._context.tell(EventKind.STEP_RESTORED, self.step.name)
        record.keep(value)
        return value

    def _find_slot(self) -> Slot | None:
        """Return what to wait for before an attempt; None: it is part of a call that holds a slot of the step."""
        slots = process.slots_of(self.step)
        return None if slots is None or slots.lent(self._context.base) else Slot(slots)

    def _check_start(self, slot: Slot | None) -> None:
        """Raise why the run may make no call of the user's code any more, if it may not."""
        step, context = self.step, self._context
        try:
            if (held := context.held) is not None and not held.trusted():
                raise held.fault()
            if step.timeout_s is not None and process.holds_thread(step):
                # Such an attempt may come to hold a thread for good, and so may each retry of it.
                context.runtime.pool.check_abandoned()
        except DocketError:
            if slot is not None:
                slot.cancel()
            # The run may have ended during the look-up: then nothing else drops the claim.
            self.drop_claim()
            raise

    def _judge(self, error: BaseException, on_host: bool) -> tuple[StepFailed | Stop, float | None]:
        """Return what *error* means for the step, and in how many seconds it is called again, if at all."""
        import asyncio

        step, context, number = self.step, self._context, self.attempts
        stop = context.cancellation.error
        if stop is not None:
            # The run is being stopped; whatever the step raises now follows from that.
            return Stop(stop), None
        if isinstance(error, AbortError):
            self._report_failed("FAILED", error)
        if isinstance(error, asyncio.CancelledError):
            error = RuntimeError(f"the step was cancelled from inside: {brief_error(error)}")
        if isinstance(error, (AbortError, *context.submission.passthrough)) or _is_hosts(error, on_host):
            return Stop(error), None
        retriable, delay_s = False, None
        if isinstance(error, Exception):
            retriable, error = classify(step, error)
            if retriable and number < step.max_attempts and step.options.retry is not None:
                try:
                    delay_s = to_seconds(step.options.retry.backoff.delay_s(number), "the backoff's delay")
                except Exception as broken:  # noqa: BLE001 -- it may be user code; what it raised is the failure
                    broken.add_note(f"raised by the backoff of step {step.name!r} after {brief_error(error)}")
                    retriable, error = False, broken
        failure = _failure(step, number, retriable, error)
        if context.item:
            failure.place(context.item)
        if delay_s is not None:
            detail = f"again in {delay_s:.3g} s: {brief_error(error)}"
            context.tell(EventKind.STEP_RETRYING, step.name, number, detail=detail)
        return failure, delay_s

    def _give_up(self, failure: StepFailed | None) -> StepFailed | None:
        """End the step without another attempt: with its last failure, or as if it had never begun."""
        self.drop_claim()
        if failure is not None:
            self._report_failed("TIMED_OUT" if isinstance(failure, StepTimedOut) else "FAILED", failure)
        return failure

    def _keep(self, record: StepRecord | None, value: Value) -> Generator[Effect, Any, Value]:
        """Save the value; the first saver's counts. Then tell the listeners: they may read the row."""
        step, context = self.step, self._context
        if record is not None:
            if step.persist is None:
                self._report("SUCCEEDED")
            else:
                value = yield from self._save(record, value)
            record.keep(value)
        elapsed_s = context.cancellation.now() - self._began
        context.tell(EventKind.STEP_SUCCEEDED, step.name, self.attempts, elapsed_s=elapsed_s)
        return value

    def _save(self, record: StepRecord, value: Value) -> Generator[Effect, Any, Value]:
        context, tries = self._context, 1
        row = record.row("SUCCEEDED", attempts=self.attempts)
        checkpoint = record.checkpoint(value, shared=self.step.persist is Scope.GLOBAL)
        if self.step.name == context.closing:
            context.last = checkpoint
            context.rows.append(row)
            return value
        while True:
            try:
                winner = record.save(checkpoint, row)
            except StoreUnavailable as error:
                if tries >= _SAVE_TRIES or not (context.held is None or context.held.trusted()):
                    raise
                _logger.warning(
                    "run %r: saving %s, try %d: %s", context.execution_id, row.step_name, tries, error
                )
            else:
                same = winner.output_data == checkpoint.output_data
                return value if same else read_value(self.step, winner, context)
            yield Sleep(_SAVE_DELAY_S * 2**tries, firm=True)
            tries += 1

    # --- reports -----------------------------------------------------------------------------------------------

    def _report(self, status: str, *, cached: bool = False, error: DocketError | None = None) -> None:
        """Keep a row for the run's end; nothing where no row of the run is kept."""
        if self._record is not None and self._context.held is not None:
            row = self._record.row(status, attempts=self.attempts, cached=cached, error=error)
            self._context.rows.append(row)

    def _report_failed(self, status: str, error: DocketError) -> None:
        self._report(status, error=error)
        self._context.tell(EventKind.STEP_FAILED, self.step.name, self.attempts, detail=str(error))


def _is_hosts(error: BaseException, on_host: bool) -> bool:
    """Tell whether *error* came from the host of the thread rather than from the step's code.

    A step thread has no host: nothing but the step's code raises SystemExit or KeyboardInterrupt there. The thread of
    a caller gets both from signals and from its own end; gevent ends greenlets with GreenletExit.
    """
    return not isinstance(error, Exception) and (on_host or type(error).__name__ == "GreenletExit")


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
