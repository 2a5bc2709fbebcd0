"""Runs one plan: who is ready, who takes it, and how it ends.

Every ready step may run at once. Ready steps lie in one list; each hand-over to the pool is only a hint that there
is something to take, and whoever finishes a step takes the next one itself, so a chain costs no hop and a thread
that wakes too late finds nothing to do. Nothing here waits on the pool.
"""

from __future__ import annotations

import bisect
import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from docket_celery.engine.checkpointing import hash_inputs, read_value
from docket_celery.engine.delivery import Delivery
from docket_celery.engine.process.limits import Slot, Slots
from docket_celery.engine.process.pool import Worker
from docket_celery.engine.process.timer import Alarm
from docket_celery.engine.step_run import StepCall
from docket_celery.errors import DocketError, InputsChanged, StepFailed
from docket_celery.observe.events import EventKind
from docket_celery.plan.messages import Value
from docket_celery.plan.plan import Plan, PlannedStep, count_pending, find_needed
from docket_celery.store.records import Checkpoint

_logger = logging.getLogger("docket_celery.engine")
_RECLAIM_S = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an execution ended: with the values of its outputs, or an error."""

    values: tuple[Any, ...] = ()
    error: BaseException | None = None


class Execution:
    """One plan being resolved for one delivery.

    Args:
        plan: What to do.
        inputs: The given values, in the order of ``plan.given``; None: only restored steps would use it.
        delivery: What the steps share.
        on_end: Called once with the outcome, on whichever thread ended it.
        checkpoints: Stored outputs by plan index; these steps do not run, nor do those that only they need.
        max_concurrency: Most steps at once; None: as many as there are threads.
        outputs: The slots that are wanted; None: those of the plan.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Value | None],
        delivery: Delivery,
        on_end: Callable[[Outcome], None],
        *,
        checkpoints: Mapping[int, Checkpoint] | None = None,
        max_concurrency: int | None = None,
        outputs: Sequence[int] | None = None,
    ) -> None:
        self.lock = threading.Lock()
        self.closed = False
        self.failing = False
        self._plan, self._delivery, self._on_end = plan, delivery, on_end
        self._checkpoints = checkpoints or {}
        self._limit = max_concurrency if max_concurrency is not None else len(plan.steps)
        self._outputs = plan.output_slots if outputs is None else tuple(outputs)
        self._missing = 0
        self._values: list[Value | None] = [*inputs, *([None] * len(plan.steps))]
        self._pending: list[int] = []
        self._ready: deque[PlannedStep] = deque()
        self._calls: set[StepCall] = set()
        self._parked: dict[StepCall, Alarm | Slot] = {}
        self._failures: list[StepFailed] = []

    # --- from outside ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Find what is needed, from the target down, and make the first steps ready.

        Raises:
            InputsChanged: A checkpoint was made from other inputs and its step asks for an error then.
            GraphChanged: A checkpoint is of a type which its step no longer returns.
        """
        if not self._checkpoints and len(self._outputs) == len(self._plan.output_slots):
            self._pending = list(self._plan.pending)
            needed = set(range(len(self._plan.steps)))
        else:
            needed, restored = find_needed(self._plan, self._outputs, self._checkpoints)
            for index in restored:
                planned = self._plan.steps[index]
                self._values[planned.slot] = read_value(
                    planned.step, self._checkpoints[index], self._delivery
                )
            self._check_inputs(restored)
            self._pending = count_pending(self._plan, needed)
        self._ready.extend(p for p in self._plan.steps if p.index in needed and not self._pending[p.index])
        self._missing = sum(self._values[slot] is None for slot in self._outputs)
        if not self._missing:
            self._end(self._outcome())

    def dispatch(self) -> None:
        """Hand all ready steps to the pool."""
        for _ in range(min(len(self._ready), self._limit)):
            self._delivery.runtime.pool.submit(self._work)

    def help(self) -> None:
        """Run what the calling thread may run: synchronous steps that neither persist nor have a deadline.

        The rest goes to the pool, also what other threads could start meanwhile.
        """
        for _ in range(min(len(self._ready), self._limit) - 1):
            self._delivery.runtime.pool.submit(self._work)
        while (call := self._take(_may_help)) is not None:
            self._guard(call, call.start)
        self.dispatch()

    def abort(self, error: BaseException) -> None:
        """End at once with *error*: nothing new starts, contexts are cancelled, late results are discarded."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self._ready.clear()
            parked, self._parked = self._parked, {}
            calls = list(self._calls)
            running = [(call, attempt) for call in calls if (attempt := call.in_flight) is not None]
            for _, attempt in running:
                attempt.abandon()
        self._delivery.cancellation.cancel(error)
        for waits_for in parked.values():
            waits_for.cancel()
        for call, attempt in running:
            attempt.interrupt()
            call.report_cancelled(error)
        if any(call.claims for call in calls):
            # SQL, and this may be the thread that waits for the run.
            self._delivery.runtime.submit_surely(functools.partial(_drop_claims, calls))
        self._on_end(Outcome(error=error))

    # --- what step calls use -----------------------------------------------------------------------------------

    def inputs_of(self, planned: PlannedStep) -> list[Value]:
        """Return the values of a step's inputs."""
        return [value for slot in planned.sources if (value := self._values[slot]) is not None]

    def complete(self, call: StepCall, value: Value) -> None:
        """Take a step's value and make ready whoever waited for it."""
        fresh = 0
        with self.lock:
            self._calls.discard(call)
            if self.closed:
                return
            self._values[call.planned.slot] = value
            self._missing -= call.planned.slot in self._outputs
            if not self.failing:
                for index in call.planned.consumers:
                    self._pending[index] -= 1
                    if self._pending[index] == 0:
                        self._make_ready(self._plan.steps[index])
                        fresh += 1
            over = not self._missing or (self.failing and not self._calls)
        if over:
            self._end(self._outcome())
            return
        # This thread takes one of the fresh steps itself.
        for _ in range(fresh - 1):
            self._delivery.runtime.pool.submit(self._work)

    def fail(self, call: StepCall, error: StepFailed) -> None:
        """Take a step's failure: nothing new starts, what is running finishes and is saved."""
        with self.lock:
            self._calls.discard(call)
            if self.closed:
                return
            self._failures.append(error)
        self.hold()

    def hold(self) -> None:
        """Start nothing more; what is running finishes and is saved, then the execution ends."""
        with self.lock:
            if self.closed:
                return
            self.failing = True
            self._ready.clear()
            parked, self._parked = self._parked, {}
            over = not self._calls
        # Taken under the lock, they are ours to end, even where an alarm has rung: it finds them gone.
        for waiting, waits_for in parked.items():
            waits_for.cancel()
            waiting.give_up()
        if over:
            self._end(self._outcome())

    def withdraw(self, call: StepCall) -> None:
        """Take back a step that has not begun because another one failed."""
        with self.lock:
            self._calls.discard(call)
            over = not self.closed and self.failing and not self._calls
        if over:
            self._end(self._outcome())

    def pause(self, call: StepCall, delay_s: float) -> None:
        """Attempt *call* again after *delay_s* seconds, unless the run is failing: then it is given up."""
        with self.lock:
            if self.closed:
                return
            failing = self.failing
            if not failing:
                again = functools.partial(self._resume, call, call.attempt)
                self._parked[call] = self._delivery.runtime.timer.after(delay_s, again)
        if failing:
            call.give_up()

    def take_slot(self, call: StepCall, slots: Slots) -> Slot | None:
        """Return a slot for the next attempt of *call*; None: it goes on when it is its turn, or was given up."""
        slot = Slot(slots, lambda: self._resume(call, lambda: call.attempt_in(slot)))
        slots.reclaim()
        with self.lock:
            closed = self.closed
            if not closed and not self.failing:
                if slot.take():
                    return slot
                self._parked[call] = slot
                if call.planned.step.is_async:
                    self._reclaim_later(call, slot)
                return None
        if closed:
            call.drop_claim()
        else:
            call.give_up()
        return None

    def carry_on(self, work: Callable[[], None], call: StepCall) -> None:
        """Go on with a step on the pool, then with what it made ready."""

        def go_on() -> None:
            self._guard(call, work)
            self._work()

        # Whoever calls may be the timer, or another run that gave a slot back: no error may reach it.
        self._delivery.runtime.submit_surely(go_on)

    # --- inside ------------------------------------------------------------------------------------------------

    def _make_ready(self, planned: PlannedStep) -> None:
        if self._delivery.runtime.inline:
            bisect.insort(self._ready, planned, key=attrgetter("index"))
        else:
            self._ready.append(planned)

    def _reclaim_later(self, call: StepCall, slot: Slot) -> None:
        """While *call* stands in the line, hand on what finalizers give back: they cannot wake anybody."""

        def reclaim() -> None:
            slot.slots.reclaim()
            with self.lock:
                if self._parked.get(call) is slot:
                    self._reclaim_later(call, slot)

        self._delivery.runtime.timer.after(_RECLAIM_S, reclaim)

    def _resume(self, call: StepCall, work: Callable[[], None]) -> None:
        with self.lock:
            if self._parked.pop(call, None) is None:
                return
        self.carry_on(work, call)

    def _work(self) -> None:
        while not _given_up():
            if (call := self._take(None)) is None:
                return
            self._guard(call, call.start)
        if self._ready:
            # The pool has replaced this thread; what it would have taken is for another.
            self._delivery.runtime.pool.submit(self._work)

    def _take(self, may: Callable[[PlannedStep], bool] | None) -> StepCall | None:
        with self.lock:
            if self.closed or self.failing or len(self._calls) >= self._limit:
                return None
            for index, planned in enumerate(self._ready):
                if may is None or may(planned):
                    del self._ready[index]
                    call = StepCall(planned, self, self._delivery)
                    self._calls.add(call)
                    return call
        return None

    def _guard(self, call: StepCall, work: Callable[[], None]) -> None:
        """Do *work* so that nothing it raises can leave the run hanging."""
        try:
            work()
        except DocketError as error:
            self.abort(error)
        except Exception as error:
            name = call.planned.step.name
            _logger.debug("step %r failed outside its own code", name, exc_info=True)
            self.abort(StepFailed.from_cause(name, 0, False, error))
        except BaseException as error:  # noqa: BLE001 -- whatever it is, the run must end
            self.abort(error)

    def _check_inputs(self, used: Sequence[int]) -> None:
        """Compare what restored steps were made from with what is at hand."""
        store = self._delivery.store
        for index in used:
            planned = self._plan.steps[index]
            values = self.inputs_of(planned)
            differs = (
                store is not None
                and len(values) == len(planned.sources)
                and hash_inputs(values, store) != self._checkpoints[index].input_hash
            )
            if differs:
                if planned.step.options.on_input_change == "error":
                    raise InputsChanged(self._delivery.execution_id, planned.step.name)
                self._delivery.tell(EventKind.INPUTS_CHANGED, planned.step.name, detail="checkpoint reused")
            StepCall(planned, self, self._delivery).report_restored()

    def _outcome(self) -> Outcome:
        if not self._missing:
            return Outcome(values=tuple(self._values[slot] for slot in self._outputs))
        return Outcome(error=join_failures(self._failures))

    def _end(self, outcome: Outcome) -> None:
        with self.lock:
            if self.closed:
                return
            self.closed = True
        self._on_end(outcome)


def join_failures(failures: Sequence[StepFailed]) -> StepFailed | None:
    """Return the first failure with the others mentioned in it; None where there are none."""
    if not failures:
        return None
    first, *others = failures
    if others:
        first.add_others(others)
    return first


def _drop_claims(calls: Sequence[StepCall]) -> None:
    for call in calls:
        call.drop_claim()


def _given_up() -> bool:
    thread = threading.current_thread()
    return isinstance(thread, Worker) and thread.given_up


def _may_help(planned: PlannedStep) -> bool:
    step = planned.step
    return not step.is_async and step.persist is None and step.timeout_s is None
