"""Runs one plan: which steps are ready, which thread takes them, and how the run ends.

Every ready step may run at once. Ready steps are kept in one list; each submission to the pool only calls a thread to
take one. A thread that finishes a step takes the next one itself, so a chain costs no hop. A thread that takes a step
and leaves others behind calls one more, which does the same: of steps that wait, all soon run; of steps that end at
once, none waits for a thread. A thread that wakes too late finds nothing to do. Nothing here waits on the pool.

The life of a step is the generator of `step_run`. This module drives it and alone knows threads, timers and the
order of things; it knows nothing of retries, saves or claims.
"""

from __future__ import annotations

import enum
import functools
import heapq
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from docket_celery.engine.attempt import Attempt, Result
from docket_celery.engine.checkpointing import read_value
from docket_celery.engine.process.limits import Slot
from docket_celery.engine.process.pool import Worker, current_worker
from docket_celery.engine.process.timer import Alarm
from docket_celery.engine.run_context import Ending, OnEnd, RunContext
from docket_celery.engine.step_run import End, GivenUp, Sleep, StepRun, Stop
from docket_celery.errors import DocketError, StepFailed
from docket_celery.plan.messages import Value
from docket_celery.plan.plan import Plan, PlannedStep, count_pending, find_needed
from docket_celery.store.records import Checkpoint

_logger = logging.getLogger("docket_celery.engine")
_LOOK_S = 0.0001
_MANY = 20
"""Steps since a thread was called, or has looked: it waits for its turn to compute for up to 5 ms each time."""


class Help(enum.Enum):
    """Which steps the thread that starts an execution may run itself: none, those that are `simple`, or all."""

    NONE, SIMPLE, ALL = range(3)


class Scheduler(Ending):
    """One plan being resolved for one delivery; what is stored does not run, nor do steps that only that needs.

    Of the *inputs*, in the order of ``plan.given``, those are None that only restored steps would use. *outputs*
    are the slots that are wanted; None: those of the plan. The thread that starts it *helps*.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Value | None],
        context: RunContext,
        on_end: OnEnd,
        *,
        outputs: Sequence[int] | None = None,
        helps: Help = Help.NONE,
    ) -> None:
        super().__init__(context.cancellation, on_end)
        self._plan, self._context, self._helps = plan, context, helps
        self._checkpoints = _find_checkpoints(plan, context) if context.stored else {}
        # In an item the caller's limit is one of items, not of steps.
        limit = context.max_concurrency if not context.item or context.runtime.inline else None
        self._limit = len(plan.steps) if limit is None else limit
        self._outputs = plan.output_slots if outputs is None else tuple(outputs)
        self._missing = len(self._outputs)
        self._values: list[Value | None] = [*inputs, *([None] * len(plan.steps))]
        self._pending: list[int] = []
        # Heaps of indexes: the first in plan order is taken first. Where a thread helps, others wait for the pool.
        self._ready: list[int] = []
        self._ready_on_pool: list[int] = []
        self._pool_only = plan.pool_only if helps is Help.SIMPLE else frozenset[int]()
        self._called, self._taken = False, 0
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
            ready: Sequence[int] = plan.first
        else:
            needed, restored = find_needed(plan, self._outputs, self._checkpoints)
            self._restore([plan.steps[index] for index in restored])
            self._pending = count_pending(plan, needed)
            ready = [index for index in needed if not self._pending[index]]
        for index in ready:
            self._make_ready(index)
        self._missing = len([slot for slot in self._outputs if self._values[slot] is None])
        if not self._missing:
            self._end()
            return
        if self._helps is Help.NONE:
            self._call_thread()
        else:
            self._work(on_pool=self._helps is Help.ALL)

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
            self._drop_ready()
            waiting, self._waiting = self._waiting, {}
            over = not self._runs
        # Taken under the lock, they are ours to end, even where an alarm has rung: it finds them gone.
        for run, waits_for in waiting.items():
            waits_for.cancel()
            give_up = functools.partial(self._drive, run, None, GivenUp())
            if run.claims and not self._context.runtime.pool.has_thread():
                self._context.runtime.submit_or_retry(give_up)  # it drops the claim, which is SQL
            else:
                give_up()
        if over:
            self._end()

    def _seize(self) -> None:
        self._drop_ready()
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

    def _drive(self, run: StepRun, worker: Worker | None, given: Result | GivenUp | None = None) -> None:
        """Resume a step until it waits or ends. Nothing that it raises can leave the run hanging.

        The calling thread is that *worker* of the pool, or another one.
        """
        life, end = run.life, None
        try:
            try:
                while True:
                    effect = life.throw(given) if isinstance(given, GivenUp) else life.send(given)
                    if isinstance(effect, Attempt):
                        if (given := self._call(run, effect, worker)) is None:
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

    def _call(self, run: StepRun, attempt: Attempt, worker: Worker | None) -> Result | None:
        """Make an attempt; None: it ends later, or its end does not count."""
        if not run.step.ends_here:
            attempt.go_on = functools.partial(self._go_on, run)
        begun = False
        try:
            begun = attempt.start(worker)
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
                self._drive(run, current_worker(), given)
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
                planned, pending = run.planned, self._pending
                self._values[planned.slot] = end
                self._missing -= planned.slot in self._outputs
                for index in () if self.failing else planned.consumers:
                    pending[index] -= 1
                    if not pending[index]:
                        self._make_ready(index)
            over = not self._missing or (self.failing and not self._runs)
        if isinstance(end, StepFailed):
            self.hold()
        elif over:
            self._end()

    def _end(self) -> None:
        """End with the outputs, or without them: with what failed, if anything did."""
        if self._missing:
            self.end(error=join_failures(self._failures))
        else:
            self.end([self._values[slot] for slot in self._outputs])

    # --- which step is next ------------------------------------------------------------------------------------

    def _make_ready(self, index: int) -> None:
        heapq.heappush(self._ready_on_pool if index in self._pool_only else self._ready, index)

    def _drop_ready(self) -> None:
        self._ready.clear()
        self._ready_on_pool.clear()

    def _call_thread(self) -> None:
        """Call a thread of the pool to take a step, unless there is none to take, or one is on its way."""
        with self.lock:
            none = not (self._ready or self._ready_on_pool) or len(self._runs) >= self._limit
            if none or self._called:
                return
            self._called, taken = True, self._taken
        self._context.runtime.pool.submit(functools.partial(self._come, taken))

    def _come(self, taken: int) -> None:
        """Take steps too, at once, or as soon as the others take them no longer one right after the other.

        The interpreter lets one thread at a time compute: one more could then only take turns with the others. What
        they leave to the pool does not wait for them.
        """
        while self._taken - taken > _MANY and not self._ready_on_pool:
            taken = self._taken
            time.sleep(_LOOK_S)
        self._called = False
        self._work()

    def _work(self, *, on_pool: bool = True) -> None:
        """Take steps and run them, until there is none that this thread may run: on the pool it may run all."""
        worker = current_worker()
        while worker is None or not worker.given_up:
            run = self._take(on_pool)
            if (self._ready or self._ready_on_pool) and not self._called:
                self._call_thread()
            if run is None:
                return
            self._drive(run, worker)
        if self._ready or self._ready_on_pool:
            # The pool has replaced this thread; what it would have taken is for another.
            self._context.runtime.submit_or_retry(self._work)

    def _take(self, on_pool: bool) -> StepRun | None:
        with self.lock:
            ready = self._ready_on_pool if on_pool and self._ready_on_pool else self._ready
            if not ready or self.closed or self.failing or len(self._runs) >= self._limit:
                return None
            planned = self._plan.steps[heapq.heappop(ready)]
            values: list[Any] = list(map(self._values.__getitem__, planned.sources))
            run = StepRun(planned, values, self._context, self)
            self._runs.add(run)
            self._taken += 1
            return run

    def _inputs_of(self, planned: PlannedStep) -> list[Value]:
        return [value for slot in planned.sources if (value := self._values[slot]) is not None]


def _find_checkpoints(plan: Plan, context: RunContext) -> dict[int, Checkpoint]:
    """Return what is stored of the plan's steps, by their indexes."""
    names = {planned.index: (planned.step.name, context.item) for planned in plan.steps}
    return {index: context.stored[name] for index, name in names.items() if name in context.stored}


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
