"""Runs a plan that fans out: its stages one after the other, the items of a stage side by side."""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from docket_celery.engine.execution import Scheduler, join_failures
from docket_celery.engine.items import ItemGroup
from docket_celery.engine.run_context import Ending, OnEnd, RunContext
from docket_celery.errors import BatchFailed, DocketError, StepFailed
from docket_celery.observe.events import EventKind
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.batch import ONE_FAILS, BatchPolicy, BatchResult
from docket_celery.plan.messages import Value
from docket_celery.plan.plan import Plan, PlannedStep, Stage

_MOST_LINES = 10


class StagedScheduler(Ending):
    """One plan with stages being resolved for one delivery; used like `Scheduler`.

    Args:
        plan: What to do; it has stages.
        inputs: The given values, in the order of ``plan.given``; a batch as a list.
        context: What the steps share. Its policy is about the items of the batch, or without one about those that the
            target is made for; one failed item of any other fan-out fails what it is a part of. Its limit bounds
            items; within an item they are then made one after the other.
        on_end: Called once with the values of *outputs* or an error.
        outputs: Which values are wanted; None: the target.
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
        limit = context.max_concurrency
        self._limit = max(1, context.settings.threads) if limit is None else 1 if context.item else limit
        self._outputs = (plan.target,) if outputs is None else tuple(outputs)
        self._values: dict[ValueKey, Any] = dict(zip(plan.given, inputs, strict=True))
        self._fan_outs: dict[ValueKey, str] = {} if plan.batch is None else {plan.batch: ""}
        self._failures: dict[str, dict[int, StepFailed]] = {}
        self._items: ItemGroup | None = None
        self._life = self._run_stages()

    def start(self) -> None:
        """Begin with the first stage."""
        self._go_on()

    def hold(self) -> None:
        """Start nothing more; what is running finishes and is saved, then the execution ends."""
        with self.lock:
            self.failing, items = True, self._items
        if items is not None:
            items.hold()

    def _let_go(self, error: BaseException) -> None:
        if self._items is not None:
            self._items.abort(error)

    # --- stages ------------------------------------------------------------------------------------------------

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
            self._take(stage, outputs, items)
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
        """Return the execution of one item, or of the steps that run once."""
        context, given = self._context, stage.plan.given
        if stage.fan_out is None:
            inputs = [self._gather(key) for key in given]
        else:
            inputs = [self._value(key, index if key in stage.each else None) for key in given]
            context = replace(context, item=self._path(index))
        return make_item(stage, inputs, context, on_end, outputs)

    def _take(self, stage: Stage, outputs: Sequence[ValueKey], items: ItemGroup) -> None:
        """Take what a stage made."""
        if stage.fan_out is not None:
            self._failures[stage.fan_out] = items.failures
        splits = {p.step.output: p.step.name for p in stage.plan.steps if p.step.splits}
        for position, key in enumerate(outputs):
            made = [None if values is None else values[position] for values in items.results]
            self._values[key] = made[0] if stage.fan_out is None else made
            fan_out = splits.get(key) if stage.fan_out is None else stage.fan_out
            if fan_out is not None:
                self._fan_outs[key] = fan_out

    # --- values ------------------------------------------------------------------------------------------------

    def _value(self, key: ValueKey, index: int | None) -> Value | None:
        """Return a value as one item sees it; None if only restored steps would use it."""
        value = self._values.get(key)
        return value if index is None or value is None else value[index]

    def _gather(self, key: ValueKey) -> Value | None:
        """Return a value as a step that runs once sees it: of items, those that have one."""
        value = self._values.get(key)
        if value is None or not self._failures.get(self._fan_outs.get(key, ""), {}):
            return value
        return [each for each in value if each is not None]

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
        makers = {
            planned.step.output: (planned, stage)
            for stage in self._plan.stages
            for planned in stage.plan.steps
        }
        wanted: set[str] = set()
        todo = list(self._outputs)
        while todo:
            planned, stage = makers.get(todo.pop(), (None, None))
            if planned is None or stage is None or planned.step.name in wanted:
                continue
            wanted.add(planned.step.name)
            if not self._is_restored(planned, stage):
                todo += planned.step.inputs
        return wanted

    def _is_restored(self, planned: PlannedStep, stage: Stage) -> bool:
        """Tell whether a step need not run at all."""
        name = planned.step.name
        if not self._context.stored or stage.plan.stages:
            return False
        if stage.fan_out is None:
            return (name, self._context.item) in self._context.stored
        items = next((self._values[key] for key in stage.each if key in self._values), None)
        return items is not None and all(
            (name, self._path(i)) in self._context.stored for i in range(len(items))
        )


def make_item(
    stage: Stage,
    inputs: Sequence[Value | None],
    context: RunContext,
    on_end: OnEnd,
    outputs: Sequence[ValueKey],
) -> Ending:
    """Return the execution of one item of *stage*, which *context* names, or of its steps that run once.

    Args:
        stage: What to do.
        inputs: The given values, in the order of ``stage.plan.given``.
        context: What the steps share.
        on_end: Called once with the values of *outputs* or an error.
        outputs: Which of its values are wanted.
    """
    if stage.plan.stages:
        return StagedScheduler(stage.plan, inputs, context, on_end, outputs)
    slots = dict(zip(stage.outputs, stage.plan.output_slots, strict=True))
    return Scheduler(stage.plan, inputs, context, on_end, outputs=[slots[key] for key in outputs])


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
