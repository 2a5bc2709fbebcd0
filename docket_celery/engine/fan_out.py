"""Runs a plan that fans out: its stages one after the other, the items of a stage side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from docket_celery.engine.execution import Scheduler, join_failures
from docket_celery.engine.run_context import Ending, OnEnd, RunContext
from docket_celery.errors import BatchFailed, DocketError, StepFailed
from docket_celery.observe.events import EventKind
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.batch import ONE_FAILS, BatchPolicy, BatchResult
from docket_celery.plan.messages import Value
from docket_celery.plan.plan import Plan, Stage, find_needed

_MOST_LINES = 10


class ItemGroup(Ending):
    """Executions of one stage, one for each of *count* items, at most *limit* at once.

    *make* returns the execution of an item, given its index and what to call at its end. *on_end* is called after
    the last one, or when one of them ended the run: with that error. Of the items, *allowed* may fail without
    stopping the others; those in *failed* did in an earlier stage and are left out. *on_item* is called after each
    with how many have ended, failed ones too, and how many there are.
    """

    def __init__(
        self,
        count: int,
        make: Callable[[int, OnEnd], Ending],
        on_end: OnEnd,
        *,
        limit: int,
        allowed: int,
        failed: Mapping[int, StepFailed] | None = None,
        on_item: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(None, on_end)
        self.results: list[Sequence[Any] | None] = [None] * count
        self.failures: dict[int, StepFailed] = dict(failed or {})
        self._make, self._limit, self._allowed, self._on_item = make, limit, allowed, on_item
        self._fatal: BaseException | None = None
        self._done = len(self.failures)
        self._cut = False
        self._running: dict[int, Ending] = {}
        self._next = 0
        self._asked = 0

    @property
    def complete(self) -> bool:
        """Whether each of them was begun, and none was cut short."""
        return self._next >= len(self.results) and not self._cut

    def start(self) -> None:
        """Start items while there is room, and see whether all have ended. One thread at a time does it."""
        with self.lock:
            self._asked += 1
            if self._asked > 1:
                return  # the thread that does it looks again
        while True:
            while (begun := self._begin()) is not None:
                index, execution = begun
                try:
                    execution.start()
                except Exception as error:  # noqa: BLE001 -- whatever it is, the run must end
                    self._ended(index, (), error)
            with self.lock:
                over = not self._running and (self._idle() or self._fatal is not None)
                again, self._asked = self._asked > 1, 1
                if not again:
                    self._asked = 0
            if over:
                self.end(error=self._fatal)
            if not again:
                return

    def hold(self) -> None:
        with self.lock:
            self.failing = True
            running = list(self._running.values())
        for execution in running:
            execution.hold()
        self.start()

    def _seize(self) -> None:
        self.failing = True

    def _let_go(self, error: BaseException) -> None:
        for execution in list(self._running.values()):
            execution.abort(error)

    def _idle(self) -> bool:
        return self.failing or self._next >= len(self.results)

    def _begin(self) -> tuple[int, Ending] | None:
        with self.lock:
            while not self._idle() and self._next in self.failures:
                self._next += 1
            if self._idle() or len(self._running) >= self._limit:
                return None
            index, self._next = self._next, self._next + 1
            execution = self._make(index, functools.partial(self._ended, index))
            self._running[index] = execution
            return index, execution

    def _ended(self, index: int, values: Sequence[Any], error: BaseException | None) -> None:
        stopped: list[Ending] = []
        with self.lock:
            if self._running.pop(index, None) is None or self.closed:
                return
            self._done = done = self._done + 1
            if error is None:
                self.results[index] = values or None
                # Held between two of its steps it ends without an error, and without what it was to make.
                self._cut = self._cut or not values
            elif isinstance(error, StepFailed):
                self.failures[index] = error
                if len(self.failures) > self._allowed and not self.failing:
                    self.failing = True
                    stopped = list(self._running.values())
            elif self._fatal is None:
                self._fatal, self.failing = error, True
                stopped = list(self._running.values())
        for execution in stopped:
            if self._fatal is None:
                execution.hold()
            else:
                execution.abort(self._fatal)
        if self._on_item is not None:
            self._on_item(done, len(self.results))
        self.start()


class StagedScheduler(Ending):
    """One plan with stages being resolved for one delivery; used like `Scheduler`.

    The submission's policy is about the items of the batch, or without one about those that the target is made for;
    one failed item of any other fan-out fails what it is a part of. The run's limit bounds items; within an item they
    are then made one after the other.

    Of its *inputs*, in the order of ``plan.given``, the batch is a list. *outputs* are wanted; None: the target.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Value | None],
        context: RunContext,
        on_end: OnEnd,
        outputs: Sequence[ValueKey] | None = None,
    ) -> None:
        super().__init__(context.cancellation, on_end)
        self._plan, self._context = plan, context
        self._policy = ONE_FAILS if context.item else context.submission.policy
        self._limit = 1 if context.item and context.max_concurrency is not None else context.most_items
        self._outputs = (plan.target,) if outputs is None else outputs
        self._values: dict[ValueKey, Any] = dict(zip(plan.given, inputs, strict=True))
        self._fan_outs = find_fan_outs(plan)
        self._failures: dict[str, dict[int, StepFailed]] = {}
        self._items: ItemGroup | None = None
        self._life = self._run_stages()

    def start(self) -> None:
        """Begin with the first stage."""
        self._go_on()

    def hold(self) -> None:
        with self.lock:
            self.failing, items = True, self._items
        if items is not None:
            items.hold()

    def _let_go(self, error: BaseException) -> None:
        if self._items is not None:
            self._items.abort(error)

    def _go_on(self, _: Sequence[Any] = (), error: BaseException | None = None) -> None:
        """Begin the next stage that is needed; *error* is that of the one before."""
        if error is not None:
            self.end(error=error)
            return
        try:
            if (items := next(self._life, None)) is None:
                return
            with self.lock:
                self._items = items
                closed, failing = self.closed, self.failing
            if not closed:
                (items.hold if failing else items.start)()
        except Exception as failure:  # noqa: BLE001 -- whatever it is, the run must end
            self.abort(failure)

    def _run_stages(self) -> Generator[ItemGroup]:
        """Yield the items of one stage after the other, then end."""
        wanted = self._find_wanted()
        for stage in self._plan.stages:
            keys = {planned.step.output for planned in stage.plan.steps if planned.step.name in wanted}
            outputs = [key for key in stage.outputs if key in keys]
            if not outputs:
                continue
            policy = policy_of(self._plan, stage, self._policy)
            items = self._make_items(stage, outputs, policy)
            yield items
            error = too_many(policy, items.failures, len(items.results))
            if error is not None or items.failing:
                self.end(error=error)
                return
            for position, key in enumerate(outputs):
                made = [None if values is None else values[position] for values in items.results]
                self._values[key] = made[0] if stage.fan_out is None else made
            if stage.fan_out is not None:
                self._failures[stage.fan_out] = items.failures
        self._context.failed = self._failures.get(tolerant_fan_out(self._plan) or "", {})
        self.end([self._result(key) for key in self._outputs])

    def _make_items(self, stage: Stage, outputs: Sequence[ValueKey], policy: BatchPolicy) -> ItemGroup:
        # What only restored items would use is not made: then one of the others tells how many there are.
        made = (self._values.get(key) for key in stage.each)
        count = 1 if stage.fan_out is None else next(len(values) for values in made if values is not None)
        return ItemGroup(
            count,
            functools.partial(self._make, stage, outputs),
            self._go_on,
            limit=self._limit,
            allowed=policy.allowed(count),
            failed=None if stage.fan_out is None else self._failures.get(stage.fan_out),
            on_item=None if stage.fan_out is None or self._context.item else self._tell,
        )

    def _tell(self, done: int, total: int) -> None:
        self._context.tell(EventKind.BATCH_PROGRESS, done=done, total=total)

    def _make(self, stage: Stage, outputs: Sequence[ValueKey], index: int, on_end: OnEnd) -> Ending:
        context = self._context
        if stage.fan_out is not None:
            context = replace(context, item=self._path(index))
        inputs = [self._input(key, stage, index) for key in stage.plan.given]
        return make_item(stage, inputs, context, on_end, outputs)

    def _input(self, key: ValueKey, stage: Stage, index: int) -> Any:
        """Return a value as an item sees it, or a step that runs once; None if only restored steps would use it."""
        value = self._values.get(key)
        if value is not None and key in stage.each:
            return value[index]
        if value is not None and stage.fan_out is None and self._failures.get(self._fan_outs.get(key, "")):
            # Of items, those that have one.
            return [each for each in value if each is not None]
        return value

    def _result(self, key: ValueKey) -> Any:
        value = self._values[key]
        if not self._plan.collects or self._policy.on_error != "collect":
            return value
        failures = self._failures.get(self._fan_outs[key], {})
        return BatchResult(tuple(value), {index: failures[index] for index in sorted(failures)})

    def _path(self, index: int) -> str:
        return f"{self._context.item}/{index}" if self._context.item else str(index)

    def _find_wanted(self) -> set[str]:
        """Return the steps that are needed, from the outputs down: none that only restored ones would use."""
        plan = self._plan
        stages = {name: stage for stage in plan.stages for name in stage.plan}
        restored = {p.index for p in plan.steps if self._is_restored(p.step.name, stages[p.step.name])}
        slots = [planned.slot for planned in plan.steps if planned.step.output in self._outputs]
        needed, used = find_needed(plan, slots, restored)
        return {plan.steps[index].step.name for index in (*needed, *used)}

    def _is_restored(self, name: str, stage: Stage) -> bool:
        """Tell whether a step need not run at all."""
        stored = self._context.stored
        if not stored or stage.plan.stages:
            return False
        if stage.fan_out is None:
            return (name, self._context.item) in stored
        items = next((self._values[key] for key in stage.each if key in self._values), None)
        return items is not None and all((name, self._path(i)) in stored for i in range(len(items)))


def make_item(
    stage: Stage,
    inputs: Sequence[Value | None],
    context: RunContext,
    on_end: OnEnd,
    outputs: Sequence[ValueKey],
) -> Ending:
    """Return the execution of one item of *stage*, which *context* names, or of its steps that run once.

    It calls *on_end* with the values of *outputs*; *inputs* are in the order of ``stage.plan.given``.
    """
    if stage.plan.stages:
        return StagedScheduler(stage.plan, inputs, context, on_end, outputs)
    slots = dict(zip(stage.outputs, stage.plan.output_slots, strict=True))
    return Scheduler(stage.plan, inputs, context, on_end, outputs=[slots[key] for key in outputs])


def find_fan_outs(plan: Plan) -> dict[ValueKey, str]:
    """Return the fan-outs that values are made for each item of; '' is the batch."""
    found: dict[ValueKey, str] = {} if plan.batch is None else {plan.batch: ""}
    for stage in plan.stages:
        for planned in stage.plan.steps:
            if stage.fan_out is not None:
                found[planned.step.output] = stage.fan_out
            elif planned.step.splits:
                found[planned.step.output] = planned.step.name
    return found


def policy_of(plan: Plan, stage: Stage, policy: BatchPolicy) -> BatchPolicy:
    """Return how the items of *stage* are treated: by the caller's *policy* only those that the call is about.

    They are the batch's, or without a batch those that the target is made for. An item of any other fan-out is a part
    of something, which would be wrong without it.
    """
    return policy if stage.fan_out is not None and stage.fan_out == tolerant_fan_out(plan) else ONE_FAILS


def tolerant_fan_out(plan: Plan) -> str | None:
    """Return the fan-out whose items the caller's policy is about."""
    if plan.batch is not None:
        return ""
    return next((each.fan_out for each in reversed(plan.stages) if plan.target in each.outputs), None)


def too_many(policy: BatchPolicy, failures: Mapping[int, StepFailed], total: int) -> DocketError | None:
    """Return what fails the run, if more of *total* items failed than *policy* allows."""
    allowed = policy.allowed(total)
    if len(failures) <= allowed:
        return None
    ordered = [failures[index] for index in sorted(failures)]
    if policy.on_error == "fail":
        return join_failures(ordered)
    return BatchFailed(len(ordered), total, allowed, [str(failure) for failure in ordered[:_MOST_LINES]])
