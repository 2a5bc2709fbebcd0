"""Runs one plan: which steps are ready, which thread takes them, and how the run ends.

Every ready step may run at once. Ready steps are kept in one list; each submission to the pool is only a hint that
there is something to take. A thread that finishes a step takes the next one itself, so a chain costs no hop, and a
thread that wakes too late finds nothing to do. Nothing here waits on the pool.

The life of a step is the generator of `step_run`. This module drives it and alone knows threads, timers and the
order of things; it knows nothing of retries, saves or claims.
"""

from __future__ import annotations

import bisect
import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

from docket_celery.engine.attempt import Attempt, Result
from docket_celery.engine.checkpointing import read_value
from docket_celery.engine.delivery import Delivery
from docket_celery.engine.ending import Ending, Outcome
from docket_celery.engine.process.limits import Slot
from docket_celery.engine.process.pool import Worker
from docket_celery.engine.process.timer import Alarm
from docket_celery.engine.step_run import End, GivenUp, Sleep, StepRun, Stop
from docket_celery.errors import DocketError, StepFailed
from docket_celery.plan.messages import Value
from docket_celery.plan.plan import Plan, PlannedStep, count_pending, find_needed
from docket_celery.store.records import Checkpoint

_logger = logging.getLogger("docket_celery.engine")


class Scheduler(Ending):
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
        super().__init__(delivery.cancellation, on_end)
        self._plan, self._delivery = plan, delivery
        self._checkpoints = checkpoints or {}
        self._limit = max_concurrency if max_concurrency is not None else len(plan.steps)
        self._outputs = plan.output_slots if outputs is None else tuple(outputs)
        self._missing = 0
        self._values: list[Value | None] = [*inputs, *([None] * len(plan.steps))]
        self._pending: list[int] = []
        self._ready: deque[PlannedStep] = deque()
        self._runs: set[StepRun] = set()
        self._waiting: dict[StepRun, Alarm | Slot] = {}
        self._seized: dict[StepRun, Alarm | Slot] = {}
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
            for index in restored:
                planned = self._plan.steps[index]
                run = StepRun(planned, self._inputs_of(planned), self._delivery, self)
                run.check_inputs(self._checkpoints[index])
                run.record.begin()
                run.report_restored()
            self._pending = count_pending(self._plan, needed)
        self._ready.extend(p for p in self._plan.steps if p.index in needed and not self._pending[p.index])
        self._missing = sum(self._values[slot] is None for slot in self._outputs)
        if not self._missing:
            self.end(self._outcome())

    def dispatch(self) -> None:
        """Hand all ready steps to the pool."""
        for _ in range(min(len(self._ready), self._limit)):
            self._delivery.runtime.pool.submit(self._work)

    def help(self) -> None:
        """Run synchronous steps that neither persist nor have a deadline here, and the others on the pool."""
        for _ in range(min(len(self._ready), self._limit) - 1):
            self._delivery.runtime.pool.submit(self._work)
        while (run := self._take(_may_help)) is not None:
            self._drive(run)
        self.dispatch()

    def hold(self) -> None:
        """Start nothing more; what is running finishes and is saved, then the execution ends."""
        with self.lock:
            if self.closed:
                return
            self.failing = True
            self._ready.clear()
            waiting, self._waiting = self._waiting, {}
            over = not self._runs
        # Taken under the lock, they are ours to end, even where an alarm has rung: it finds them gone.
        for run, waits_for in waiting.items():
            waits_for.cancel()
            self._drive(run, GivenUp())
        if over:
            self.end(self._outcome())

    def _seize(self) -> None:
        self._ready.clear()
        # Taken under the lock, they are ours to end: an alarm or a slot that comes now finds them gone.
        self._seized, self._waiting = self._waiting, {}
        for run in self._runs:
            if (attempt := run.in_flight) is not None:
                attempt.abandon()

    def _let_go(self, error: BaseException) -> None:
        runs = list(self._runs)
        for run, waits_for in self._seized.items():
            waits_for.cancel()
            run.life.close()
        for run in runs:
            if (attempt := run.in_flight) is not None:
                attempt.interrupt()
                run.report_cancelled(error)
        if any(run.record.claims for run in runs):
            # SQL, and this may be the thread that waits for the run.
            self._delivery.runtime.submit_or_retry(functools.partial(_drop_claims, runs))

    # --- driving a step ----------------------------------------------------------------------------------------

    def _drive(self, run: StepRun, given: Result | GivenUp | None = None) -> None:
        """Resume a step until it waits or ends. Nothing that it raises can leave the run hanging."""
        try:
            self._resume(run, given)
        except DocketError as error:
            self.abort(error)
        except Exception as error:
            name = run.step.name
            _logger.debug("step %r failed outside its own code", name, exc_info=True)
            self.abort(StepFailed.from_cause(name, 0, False, error))
        except BaseException as error:  # noqa: BLE001 -- whatever it is, the run must end
            self.abort(error)

    def _resume(self, run: StepRun, given: Result | GivenUp | None) -> None:
        end, life = None, run.life
        while True:
            try:
                effect = life.throw(given) if isinstance(given, GivenUp) else life.send(given)
            except StopIteration as stop:
                end = stop.value
                break
            if isinstance(effect, Attempt):
                if (given := self._call(run, effect)) is None:
                    return
            else:
                if self._wait(run, effect):
                    return
                given = None if isinstance(effect, Slot) and effect.held else GivenUp()
        self._finish(run, end)

    def _call(self, run: StepRun, attempt: Attempt) -> Result | None:
        """Have an attempt made; None: it ends later, or its end does not count."""
        if run.step.is_async or run.step.timeout_s is not None:
            attempt.go_on = functools.partial(self._go_on, run)
        begun = False
        try:
            begun = attempt.start()
        finally:
            # An attempt that has begun gives its slot back itself, whenever it ends.
            if not begun:
                attempt.release()
                run.record.drop_claim()
        return attempt.result

    def _wait(self, run: StepRun, effect: Sleep | Slot) -> bool:
        """Have *run* resumed later; False: at once, with its slot, or as the execution is failing without."""
        timer = self._delivery.runtime.timer
        if isinstance(effect, Sleep) and effect.firm:
            timer.after(effect.seconds, functools.partial(self._go_on, run))
            return True
        with self.lock:
            if not self.closed and self.failing:
                return False
            if not self.closed:
                wake = functools.partial(self._wake, run)
                if isinstance(effect, Sleep):
                    self._waiting[run] = timer.after(effect.seconds, wake)
                    return True
                effect.turn = wake
                if effect.take():
                    return False
                self._waiting[run] = effect
                return True
        run.record.drop_claim()
        return True

    def _wake(self, run: StepRun) -> None:
        with self.lock:
            if self._waiting.pop(run, None) is None:
                return
        self._go_on(run)

    def _go_on(self, run: StepRun, find: Callable[[], Result | None] | None = None) -> None:
        """Go on with a step on the pool, then with what it made ready.

        Args:
            run: The step.
            find: Returns how its attempt ended, None where that does not count; without it the step has only waited.
        """

        def work() -> None:
            try:
                given = None if find is None else find()
            except BaseException as error:  # noqa: BLE001 -- whatever it is, the run must end
                self.abort(error)
                return
            if find is None or given is not None:
                self._drive(run, given)
            self._work()

        # This may be the timer's thread, or another run's that gave a slot back: no error may reach it.
        self._delivery.runtime.submit_or_retry(work)

    # --- how a step ends ---------------------------------------------------------------------------------------

    def _finish(self, run: StepRun, end: End) -> None:
        if end is None:
            self.withdraw(run)
        elif isinstance(end, StepFailed):
            self.fail(run, end)
        elif isinstance(end, Stop):
            self.abort(end.error)
        else:
            self.complete(run, end)

    def complete(self, run: StepRun, value: Value) -> None:
        """Take a step's value and make ready the steps that waited for it."""
        fresh = 0
        with self.lock:
            self._runs.discard(run)
            if self.closed:
                return
            self._values[run.planned.slot] = value
            self._missing -= run.planned.slot in self._outputs
            if not self.failing:
                for index in run.planned.consumers:
                    self._pending[index] -= 1
                    if self._pending[index] == 0:
                        self._make_ready(self._plan.steps[index])
                        fresh += 1
            over = not self._missing or (self.failing and not self._runs)
        if over:
            self.end(self._outcome())
            return
        # This thread takes one of the fresh steps itself.
        for _ in range(fresh - 1):
            self._delivery.runtime.pool.submit(self._work)

    def fail(self, run: StepRun, error: StepFailed) -> None:
        """Take a step's failure: nothing new starts, what is running finishes and is saved."""
        with self.lock:
            self._runs.discard(run)
            if self.closed:
                return
            self._failures.append(error)
        self.hold()

    def withdraw(self, run: StepRun) -> None:
        """Take back a step that has not begun because another one failed."""
        with self.lock:
            self._runs.discard(run)
            over = not self.closed and self.failing and not self._runs
        if over:
            self.end(self._outcome())

    def _make_ready(self, planned: PlannedStep) -> None:
        if self._delivery.runtime.inline:
            bisect.insort(self._ready, planned, key=attrgetter("index"))
        else:
            self._ready.append(planned)

    def _work(self) -> None:
        while not _given_up():
            if (run := self._take(None)) is None:
                return
            self._drive(run)
        if self._ready:
            # The pool has replaced this thread; what it would have taken is for another.
            self._delivery.runtime.pool.submit(self._work)

    def _take(self, may: Callable[[PlannedStep], bool] | None) -> StepRun | None:
        with self.lock:
            if self.closed or self.failing or len(self._runs) >= self._limit:
                return None
            for index, planned in enumerate(self._ready):
                if may is None or may(planned):
                    del self._ready[index]
                    run = StepRun(planned, self._inputs_of(planned), self._delivery, self)
                    self._runs.add(run)
                    return run
        return None

    def _inputs_of(self, planned: PlannedStep) -> list[Value]:
        return [value for slot in planned.sources if (value := self._values[slot]) is not None]

    def _outcome(self) -> Outcome:
        if not self._missing:
            return Outcome(values=tuple(self._values[slot] for slot in self._outputs))
        return Outcome(error=join_failures(self._failures))


def join_failures(failures: Sequence[StepFailed]) -> StepFailed | None:
    """Return the first failure with the others mentioned in it; None where there are none."""
    if not failures:
        return None
    first, *others = failures
    if others:
        first.add_others(others)
    return first


def _drop_claims(runs: Sequence[StepRun]) -> None:
    for run in runs:
        run.record.drop_claim()


def _given_up() -> bool:
    thread = threading.current_thread()
    return isinstance(thread, Worker) and thread.given_up


def _may_help(planned: PlannedStep) -> bool:
    step = planned.step
    return not step.is_async and step.persist is None and step.timeout_s is None
