"""Runs one plan: which steps are ready, which thread takes them, and how the run ends.

Every ready step may run at once. Ready steps are kept in one list; each submission to the pool only calls a thread to
take one. A thread that finishes a step takes the next one itself, so a chain costs no hop. A thread that takes a step
and leaves others behind calls one more, which does the same: of steps that wait, all soon run; of steps that end at
once, none waits for a thread. A thread that wakes too late finds nothing to do. Nothing here waits on the pool.

The life of a step is the generator of `step_run`. This module drives it and alone knows threads, timers and the
order of things; it knows nothing of retries, saves or claims.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from operator import attrgetter

from docket_celery.engine.attempt import Attempt, Result
from docket_celery.engine.checkpointing import read_value
from docket_celery.engine.process.limits import Slot
from docket_celery.engine.process.pool import Worker
from docket_celery.engine.process.timer import Alarm
from docket_celery.engine.run_context import Ending, OnEnd, RunContext
from docket_celery.engine.step_run import End, GivenUp, Sleep, StepRun, Stop
from docket_celery.errors import DocketError, StepFailed
from docket_celery.plan.messages import Value
from docket_celery.plan.plan import Plan, PlannedStep, count_pending, find_needed

_logger = logging.getLogger("docket_celery.engine")


class Scheduler(Ending):
    """One plan being resolved for one delivery; what is stored does not run, nor do steps that only that needs.

    Of the *inputs*, in the order of ``plan.given``, those are None that only restored steps would use. *outputs*
    are the slots that are wanted; None: those of the plan. The thread that starts it runs the steps that it *may*.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Value | None],
        context: RunContext,
        on_end: OnEnd,
        *,
        outputs: Sequence[int] | None = None,
        may: Callable[[PlannedStep], bool] | None = None,
    ) -> None:
        super().__init__(context.cancellation, on_end)
        self._plan, self._context, self._may = plan, context, may
        self._checkpoints = {
            planned.index: context.stored[name]
            for planned in (plan.steps if context.stored else ())
            if (name := (planned.step.name, context.item)) in context.stored
        }
        # In an item the caller's limit is one of items, not of steps.
        limit = context.max_concurrency if not context.item or context.runtime.inline else None
        self._limit = len(plan.steps) if limit is None else limit
        self._outputs = plan.output_slots if outputs is None else tuple(outputs)
        self._missing = len(self._outputs)
        self._values: list[Value | None] = [*inputs, *([None] * len(plan.steps))]
        self._pending: list[int] = []
        self._ready: deque[PlannedStep] = deque()
        self._called = False
        self._runs: set[StepRun] = set()
        self._waiting: dict[StepRun, Alarm | Slot] = {}
        self._seized: dict[StepRun, Alarm | Slot] = {}
        self._failures: list[StepFailed] = []

    # --- from outside ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Find what is needed, from the target down, and begin with it."""
        plan = self._plan
        if not self._checkpoints and len(self._outputs) == len(plan.output_slots):
            self._pending = list(plan.pending)
            self._ready.extend(planned for planned in plan.steps if not plan.pending[planned.index])
        else:
            needed, restored = find_needed(plan, self._outputs, self._checkpoints)
            self._restore([plan.steps[index] for index in restored])
            self._pending = count_pending(plan, needed)
            self._ready.extend(plan.steps[i] for i in sorted(needed) if not self._pending[i])
        self._missing = sum(self._values[slot] is None for slot in self._outputs)
        if not self._missing:
            self._end()
            return
        if self._may is None:
            self._call_thread()
        else:
            self._work(self._may)

    def _restore(self, restored: Sequence[PlannedStep]) -> None:
        for planned in restored:
            checkpoint = self._checkpoints[planned.index]
            self._values[planned.slot] = read_value(planned.step, checkpoint, self._context)
        for planned in restored:
            run = StepRun(planned, self._inputs_of(planned), self._context, self)
            run.use_restored(self._checkpoints[planned.index])

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
            self._end()

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
        if any(run.claims for run in runs):
            # SQL, and this may be the thread that waits for the run.
            self._context.runtime.submit_or_retry(functools.partial(_drop_claims, runs))

    # --- driving a step ----------------------------------------------------------------------------------------

    def _drive(self, run: StepRun, given: Result | GivenUp | None = None) -> None:
        """Resume a step until it waits or ends. Nothing that it raises can leave the run hanging."""
        life, end = run.life, None
        try:
            try:
                while True:
                    effect = life.throw(given) if isinstance(given, GivenUp) else life.send(given)
                    if isinstance(effect, Attempt):
                        if (given := self._call(run, effect)) is None:
                            return
                    elif self._wait(run, effect):
                        return
                    else:
                        given = None if isinstance(effect, Slot) and effect.held else GivenUp()
            except StopIteration as stop:
                end = stop.value
            self._finish(run, end)
        except DocketError as error:
            self.abort(error)
        except Exception as error:
            name = run.step.name
            _logger.debug("step %r failed outside its own code", name, exc_info=True)
            self.abort(StepFailed.from_cause(name, 0, False, error))
        except BaseException as error:  # noqa: BLE001 -- whatever it is, the run must end
            self.abort(error)

    def _call(self, run: StepRun, attempt: Attempt) -> Result | None:
        """Make an attempt; None: it ends later, or its end does not count."""
        if run.step.is_async or run.step.timeout_s is not None:
            attempt.go_on = functools.partial(self._go_on, run)
        begun = False
        try:
            begun = attempt.start()
        finally:
            # An attempt that has begun gives its slot back itself, whenever it ends.
            if not begun:
                attempt.release()
                run.drop_claim()
        return attempt.result

    def _wait(self, run: StepRun, effect: Sleep | Slot) -> bool:
        """Resume *run* later; False: at once, with its slot, or as the execution is failing without."""
        timer = self._context.runtime.timer
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
        run.drop_claim()
        return True

    def _wake(self, run: StepRun) -> None:
        with self.lock:
            if self._waiting.pop(run, None) is None:
                return
        self._go_on(run)

    def _go_on(self, run: StepRun, find: Callable[[], Result | None] | None = None) -> None:
        """Continue a step on the pool, then what it made ready; *find* tells how its attempt ended, if it counts."""

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
        self._context.runtime.submit_or_retry(work)

    # --- how a step ends ---------------------------------------------------------------------------------------

    def _finish(self, run: StepRun, end: End) -> None:
        """Take a step's value, or its failure, or that it has not begun as another one failed."""
        if isinstance(end, Stop):
            self.abort(end.error)
            return
        with self.lock:
            self._runs.discard(run)
            if self.closed:
                return
            if isinstance(end, StepFailed):
                self._failures.append(end)
            elif end is not None:
                self._complete(run.planned, end)
            over = not self._missing or (self.failing and not self._runs)
        if isinstance(end, StepFailed):
            self.hold()
        elif over:
            self._end()

    def _complete(self, planned: PlannedStep, value: Value) -> None:
        """Take a value and see which steps it makes ready; the caller holds the lock."""
        self._values[planned.slot] = value
        self._missing -= planned.slot in self._outputs
        fresh = False
        for index in () if self.failing else planned.consumers:
            self._pending[index] -= 1
            if self._pending[index] == 0:
                self._ready.append(self._plan.steps[index])
                fresh = True
        if fresh and self._context.runtime.inline:
            self._ready = deque(sorted(self._ready, key=attrgetter("index")))

    def _end(self) -> None:
        """End with the outputs, or without them: with what failed, if anything did."""
        if self._missing:
            self.end(error=join_failures(self._failures))
        else:
            self.end([self._values[slot] for slot in self._outputs])

    # --- which step is next ------------------------------------------------------------------------------------

    def _call_thread(self) -> None:
        """Call a thread of the pool to take a step, unless one is on its way."""
        with self.lock:
            if self._called:
                return
            self._called = True
        self._context.runtime.pool.submit(self._come)

    def _come(self) -> None:
        self._called = False
        self._work()

    def _work(self, may: Callable[[PlannedStep], bool] | None = None) -> None:
        """Take steps and run them, of those that this thread *may*; None: all."""
        thread = threading.current_thread()
        while not (isinstance(thread, Worker) and thread.given_up):
            run, leaves = self._take(may)
            if leaves:
                self._call_thread()
            if run is None:
                return
            self._drive(run)
        if self._ready:
            # The pool has replaced this thread; what it would have taken is for another.
            self._call_thread()

    def _take(self, may: Callable[[PlannedStep], bool] | None) -> tuple[StepRun | None, bool]:
        """Return the next step for this thread, and whether there is one for another."""
        run = None
        with self.lock:
            if self.closed or self.failing or len(self._runs) >= self._limit:
                return None, False
            for index, planned in enumerate(self._ready):
                if may is None or may(planned):
                    del self._ready[index]
                    run = StepRun(planned, self._inputs_of(planned), self._context, self)
                    self._runs.add(run)
                    break
            return run, bool(self._ready) and len(self._runs) < self._limit and not self._called

    def _inputs_of(self, planned: PlannedStep) -> list[Value]:
        return [value for slot in planned.sources if (value := self._values[slot]) is not None]


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
        run.drop_claim()


def any_step(_: PlannedStep) -> bool:
    """For a thread of the pool: it may run all steps."""
    return True


def waits_for_none(planned: PlannedStep) -> bool:
    """For the caller's thread: it may run synchronous steps that neither persist nor have a deadline."""
    step = planned.step
    return not step.is_async and step.persist is None and step.timeout_s is None
