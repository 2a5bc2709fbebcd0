"""Runs a plan that fans out: its parts one after the other, the items of a part side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from docket_celery.engine.delivery import Delivery
from docket_celery.engine.ending import Ending, Outcome
from docket_celery.engine.execution import Scheduler, join_failures
from docket_celery.engine.items import ItemGroup
from docket_celery.errors import BatchFailed, DocketError, StepFailed
from docket_celery.observe.events import EventKind
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.batch import ONE_FAILS, BatchPolicy, BatchResult
from docket_celery.plan.messages import Value
from docket_celery.plan.plan import Plan, PlannedStep, Stage
from docket_celery.store.records import Checkpoint

Stored = Mapping[tuple[str, str], Checkpoint]
"""Checkpoints by step name and item path."""
_MOST_LINES = 10


def make_execution(
    plan: Plan,
    inputs: Sequence[Value],
    delivery: Delivery,
    on_end: Callable[[Outcome], None],
    *,
    stored: Stored,
    policy: BatchPolicy,
    max_concurrency: int | None,
    threads: int,
) -> Scheduler | StagedScheduler:
    """Return what resolves *plan*.

    Args:
        plan: What to do.
        inputs: The given values, in the order of ``plan.given``; a batch as a list.
        delivery: What the steps share.
        on_end: Called once with the outcome, on whichever thread ended it.
        stored: The run's checkpoints.
        policy: How a fan-out treats its items.
        max_concurrency: Most steps (or items) at once; None: as many as there are threads.
        threads: How many there are.
    """
    if delivery.runtime.inline:
        max_concurrency = 1
    if plan.stages:
        return StagedScheduler(
            plan,
            inputs,
            delivery,
            on_end,
            stored=stored,
            policy=policy,
            limit=max(1, threads) if max_concurrency is None else max_concurrency,
            max_concurrency=max_concurrency,
        )
    checkpoints = _by_index(plan, stored, delivery.item)
    return Scheduler(plan, inputs, delivery, on_end, checkpoints=checkpoints, max_concurrency=max_concurrency)


class StagedScheduler(Ending):
    """One plan with fan-outs being resolved for one delivery; used like `Scheduler`.

    Args:
        plan: What to do; it has parts.
        inputs: The given values, in the order of ``plan.given``; a batch as a list.
        delivery: What the steps share.
        on_end: Called once with the outcome, on whichever thread ended it.
        stored: The run's checkpoints.
        policy: How the items of the batch are treated, or without one those that the target is made for. One failed
            item of any other fan-out fails what it is a part of.
        limit: Most items at once.
        max_concurrency: What the caller said: most steps at once of those that run once, too, and no further
            items at once within an item.
        outputs: Which values are wanted; None: the target.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Value | None],
        delivery: Delivery,
        on_end: Callable[[Outcome], None],
        *,
        stored: Stored,
        policy: BatchPolicy,
        limit: int,
        max_concurrency: int | None = None,
        outputs: Sequence[ValueKey] | None = None,
    ) -> None:
        super().__init__(delivery.cancellation, on_end)
        self._plan, self._delivery = plan, delivery
        self._stored, self._policy = stored, policy
        self._limit, self._max_concurrency = limit, max_concurrency
        self._outputs = (plan.target,) if outputs is None else tuple(outputs)
        self._values: dict[ValueKey, Any] = dict(zip(plan.given, inputs, strict=True))
        self._fan_outs: dict[ValueKey, str] = {} if plan.batch is None else {plan.batch: ""}
        self._failures: dict[str, dict[int, StepFailed]] = {}
        self._wanted: frozenset[str] = frozenset()
        self._next = 0
        self._items: ItemGroup | None = None

    def start(self) -> None:
        """Find what is needed, from the target down."""
        self._wanted = frozenset(self._find_wanted())

    def dispatch(self) -> None:
        """Begin with the first part."""
        self._guard(self._advance)

    # The calling thread runs nothing of a fan-out itself.
    help = dispatch

    def hold(self) -> None:
        """Start nothing more; what is running finishes and is saved, then the execution ends."""
        with self.lock:
            self.failing, items = True, self._items
        if items is not None:
            items.hold()

    def _let_go(self, error: BaseException) -> None:
        if self._items is not None:
            self._items.abort(error)

    # --- parts -------------------------------------------------------------------------------------------------

    def _guard(self, work: Callable[[], None]) -> None:
        """Do *work* so that nothing it raises can leave the run hanging."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 -- whatever it is, the run must end
            self.abort(error)

    def _advance(self) -> None:
        """Begin the next part that is needed, or end."""
        while True:
            with self.lock:
                if self.closed:
                    return
                if self.failing or self._next == len(self._plan.stages):
                    break
                part = self._plan.stages[self._next]
                self._next += 1
                keys = {
                    planned.step.output for planned in part.plan.steps if planned.step.name in self._wanted
                }
                outputs = [key for key in part.outputs if key in keys]
                if not outputs:
                    continue
                items = self._items = self._make_items(part, outputs)
            items.dispatch()
            return
        if self.failing:
            self.end(Outcome())
            return
        failed = self._failures.get(tolerant_fan_out(self._plan) or "", {})
        self.end(Outcome(values=tuple(map(self._result, self._outputs)), failed=failed))

    def _make_items(self, part: Stage, outputs: Sequence[ValueKey]) -> ItemGroup:
        # What only restored items would use is not made: then one of the others tells how many there are.
        made = (self._values.get(key) for key in part.each)
        count = 1 if part.fan_out is None else next(len(values) for values in made if values is not None)

        def ended(outcome: Outcome) -> None:
            self._guard(lambda: self._part_ended(part, outputs, items, outcome.error))

        items = ItemGroup(
            count,
            functools.partial(self._make, part, outputs),
            ended,
            limit=self._limit,
            allowed=policy_of(self._plan, part, self._policy).allowed(count),
            on_item=self._tell if part.fan_out is not None and not self._delivery.item else None,
        )
        if part.fan_out is not None:
            items.skip(self._failures.get(part.fan_out, {}))
        return items

    def _tell(self, done: int, total: int) -> None:
        self._delivery.tell(EventKind.BATCH_PROGRESS, done=done, total=total)

    def _make(
        self, part: Stage, outputs: Sequence[ValueKey], index: int, on_end: Callable[[Outcome], None]
    ) -> Ending:
        """Return the execution of one item, or of the steps that run once."""
        inputs: list[Value | None]
        if part.fan_out is None:
            delivery = self._delivery
            inputs = [self._gather(key) for key in part.plan.given]
        else:
            delivery = replace(self._delivery, item=self._path(index))
            inputs = [self._value(key, index if key in part.each else None) for key in part.plan.given]
        return make_item(
            part,
            outputs,
            inputs,
            delivery,
            on_end,
            stored=self._stored,
            limit=self._limit,
            max_concurrency=self._max_concurrency,
        )

    def _part_ended(
        self, part: Stage, outputs: Sequence[ValueKey], items: ItemGroup, error: BaseException | None
    ) -> None:
        """Take what a part made, and go on."""
        error = error or self._failure(part, items)
        if error is not None:
            self.end(Outcome(error=error))
            return
        if items.failing:
            self.end(Outcome())
            return
        if part.fan_out is not None:
            self._failures[part.fan_out] = items.failures
        splits = {p.step.output: p.step.name for p in part.plan.steps if p.step.splits}
        for position, key in enumerate(outputs):
            made = [None if values is None else values[position] for values in items.results]
            self._values[key] = made[0] if part.fan_out is None else made
            fan_out = splits.get(key) if part.fan_out is None else part.fan_out
            if fan_out is not None:
                self._fan_outs[key] = fan_out
        self._advance()

    def _failure(self, part: Stage, items: ItemGroup) -> BaseException | None:
        """Return what fails the run, if too many items failed."""
        policy = policy_of(self._plan, part, self._policy)
        return too_many(policy, items.failures, len(items.results))

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
        return f"{self._delivery.item}/{index}" if self._delivery.item else str(index)

    def _find_wanted(self) -> set[str]:
        """Return the steps that are needed, from the outputs down: none that only restored ones would use."""
        makers = {
            planned.step.output: (planned, part) for part in self._plan.stages for planned in part.plan.steps
        }
        wanted: set[str] = set()
        todo = list(self._outputs)
        while todo:
            planned, part = makers.get(todo.pop(), (None, None))
            if planned is None or part is None or planned.step.name in wanted:
                continue
            wanted.add(planned.step.name)
            if not self._is_restored(planned, part):
                todo += planned.step.inputs
        return wanted

    def _is_restored(self, planned: PlannedStep, part: Stage) -> bool:
        """Tell whether a step need not run at all."""
        name = planned.step.name
        if not self._stored or part.plan.stages:
            return False
        if part.fan_out is None:
            return (name, self._delivery.item) in self._stored
        items = next((self._values[key] for key in part.each if key in self._values), None)
        return items is not None and all((name, self._path(i)) in self._stored for i in range(len(items)))


def make_item(
    part: Stage,
    outputs: Sequence[ValueKey],
    inputs: Sequence[Value | None],
    delivery: Delivery,
    on_end: Callable[[Outcome], None],
    *,
    stored: Stored,
    limit: int,
    max_concurrency: int | None = None,
) -> Ending:
    """Return the execution of one item of *part*, or of its steps that run once.

    Args:
        part: What to do.
        outputs: Which of its values are wanted.
        inputs: The given values, in the order of ``part.plan.given``.
        delivery: What the steps share; it names the item.
        on_end: Called once with the outcome.
        stored: The run's checkpoints.
        limit: Most items at once, of a fan-out within the item.
        max_concurrency: What the caller said, if anything.
    """
    if part.plan.stages:
        return StagedScheduler(
            part.plan,
            inputs,
            delivery,
            on_end,
            stored=stored,
            policy=ONE_FAILS,
            # Else each item under way would have as many parts under way itself.
            limit=limit if max_concurrency is None else 1,
            max_concurrency=None if max_concurrency is None else 1,
            outputs=outputs,
        )
    steps_at_once = max_concurrency if part.fan_out is None else None
    slots = dict(zip(part.outputs, part.plan.output_slots, strict=True))
    return Scheduler(
        part.plan,
        inputs,
        delivery,
        on_end,
        checkpoints=_by_index(part.plan, stored, delivery.item),
        max_concurrency=1 if delivery.runtime.inline else steps_at_once,
        outputs=[slots[key] for key in outputs],
    )


def policy_of(plan: Plan, part: Stage, policy: BatchPolicy) -> BatchPolicy:
    """Return how the items of *part* are treated: by the caller's *policy* only those that the call is about.

    They are the batch's, or without a batch those that the target is made for. An item of any other fan-out is a part
    of something, which would be wrong without it.
    """
    return policy if part.fan_out is not None and part.fan_out == tolerant_fan_out(plan) else ONE_FAILS


def tolerant_fan_out(plan: Plan) -> str | None:
    """Return the fan-out whose items the caller's policy is about."""
    if plan.batch is not None:
        return ""
    return next((part.fan_out for part in reversed(plan.stages) if plan.target in part.outputs), None)


def too_many(policy: BatchPolicy, failures: Mapping[int, StepFailed], total: int) -> DocketError | None:
    """Return what fails the run, if more of *total* items failed than *policy* allows."""
    allowed = policy.allowed(total)
    if len(failures) <= allowed:
        return None
    ordered = [failures[index] for index in sorted(failures)]
    if policy.on_error == "fail":
        return join_failures(ordered)
    return BatchFailed(len(ordered), total, allowed, [str(failure) for failure in ordered[:_MOST_LINES]])


def _by_index(plan: Plan, stored: Stored, path: str) -> dict[int, Checkpoint]:
    if not stored:
        return {}
    pairs = ((planned.index, stored.get((planned.step.name, path))) for planned in plan.steps)
    return {index: checkpoint for index, checkpoint in pairs if checkpoint is not None}
