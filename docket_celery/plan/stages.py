"""Cuts a plan at its aggregates: what runs once, what runs for each item of a fan-out, and in which order.

A value's path names the fan-outs it lies in, outermost first: ``()`` is made once in a run, ``("",)`` once for each
item of the batch, ``("", "split")`` once for each part that the step ``split`` cut an item into. A step that takes
``list[T]`` closes the innermost fan-out of T, so it runs one level further out than its items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from docket_celery.errors import GraphError
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.plan import Plan, Stage, assemble, compile_plan, order_steps
from docket_celery.plan.step import Step
from docket_celery.plan.wiring import Wiring

Path = tuple[str, ...]
BATCH: Path = ("",)
"""Where the items of a batch lie."""


class Asked(NamedTuple):
    """What a plan is for.

    Attributes:
        target: What to make.
        given: What is handed in.
        batch: Which of *given* comes as a list, item by item; None: all are given once.
        collects: The target is wanted for each item, as a list.
    """

    target: ValueKey
    given: tuple[ValueKey, ...]
    batch: ValueKey | None = None
    collects: bool = False


def compile_asked(wiring: Wiring, asked: Asked) -> Plan:
    """Return the plan for what is asked, cut into stages if something fans out.

    Raises:
        GraphError: The graph has faults, a needed value has no producer, or a step cannot be staged.
        InvalidArguments: A type is given twice.
    """
    plan = compile_plan(wiring, asked.target, asked.given)
    fans_out = any(planned.step.splits or planned.step.aggregates for planned in plan.steps)
    return _cut(plan, asked) if fans_out or asked.collects or asked.batch is not None else plan


def _cut(plan: Plan, asked: Asked) -> Plan:
    """Return *plan* with its `stages`: per-item work, and what runs once before, between and after it."""
    steps = [planned.step for planned in plan.steps]
    paths = _Paths({key: BATCH if key == asked.batch else () for key in plan.given}, {})
    faults = [fault for step in steps for fault in paths.place(step)]
    if not faults:
        faults += _target_faults(plan.target, paths.values[plan.target], collects=asked.collects)
    if faults:
        raise GraphError(plan.graph, faults)
    stages = _Cut(plan, paths).stages(steps, (), [plan.target])
    return replace(plan, stages=stages, batch=asked.batch, collects=asked.collects)


def find_faults(wiring: Wiring, given: Sequence[ValueKey], batch: ValueKey | None) -> list[str]:
    """Return what keeps the steps of a graph without other faults from being staged.

    Args:
        wiring: The graph.
        given: What callers hand in; empty: whatever no step returns, and what aggregates take of that as batches.
        batch: Which of *given* comes as a list.
    """
    whole = wiring.gathered()
    values: dict[ValueKey, Path] = {key: BATCH if key == batch else () for key in given}
    for step in wiring.steps:
        for key in step.inputs:
            if key not in wiring.producers and key not in values:
                values[key] = (f"the batch of {key}",) if key in whole else ()
    paths = _Paths(values, {})
    return [fault for step in order_steps(wiring, values) for fault in paths.place(step)]


@dataclass(frozen=True, slots=True)
class _Paths:
    """Where values lie and where steps run."""

    values: dict[ValueKey, Path]
    steps: dict[str, Path]

    def place(self, step: Step) -> Iterable[str]:
        """Note where *step* runs and its result lies; yield what is wrong with it."""
        lies: list[tuple[Path, ValueKey, bool]] = []
        for key, gathered in zip(step.inputs, step.gathered, strict=True):
            path = self.values[key]
            whole = bool(gathered)
            if whole and not path:
                yield (
                    f"DC120 stages: step {step.name!r} ({step.where}) takes {gathered}[{key}], but {key} is made "
                    f"once in a run; take it as it is, or make it for each item of a fan-out"
                )
                whole = False
            lies.append((path[:-1] if whole else path, key, whole))
        deepest, example, _ = max(lies, key=lambda lie: len(lie[0]), default=((), None, False))
        for path, key, whole in lies:
            if path != deepest[: len(path)]:
                yield (
                    f"DC120 stages: step {step.name!r} ({step.where}) takes {example} for each item of "
                    f"{_shown(deepest)} and {key} for each item of {_shown(path)}: items of two fan-outs have no "
                    f"order in common; take one of them whole, as list[...], in an aggregate before it"
                )
                break
            if whole and path != deepest:
                yield (
                    f"DC120 stages: step {step.name!r} ({step.where}) takes all of {key} again for each item of "
                    f"{_shown(deepest)}; make what it needs of them in an aggregate before it, once"
                )
        self.steps[step.name] = deepest
        self.values[step.output] = (*deepest, step.name) if step.splits else deepest


class _Cut:
    """Assigns the steps of one level to stages, and descends into the fan-outs."""

    def __init__(self, whole: Plan, paths: _Paths) -> None:
        self._whole, self._paths = whole, paths

    def stages(self, steps: Sequence[Step], scope: Path, outputs: Sequence[ValueKey]) -> tuple[Stage, ...]:
        """Return the stages that *steps* form for somebody who sees the values at *scope*.

        Args:
            steps: In an order that respects inputs; all run at *scope* or within its fan-outs.
            scope: The path of what is made once here.
            outputs: Values that are needed afterwards.
        """
        groups = self._group(steps, scope)
        ordered = sorted(groups, key=lambda group: (group[0], group[1] is not None))
        stages: list[Stage] = []
        for index, group in enumerate(ordered):
            later = {key for other in ordered[index + 1 :] for step in groups[other] for key in step.inputs}
            inner = None if group[1] is None else (*scope, group[1])
            stages.append(self._stage(groups[group], inner, {*later, *outputs}))
        return tuple(stages)

    def _group(self, steps: Sequence[Step], scope: Path) -> dict[tuple[int, str | None], list[Step]]:
        """Return the steps by when they run: (round, None) once, then (round, fan-out) for each of its items."""
        depth = len(scope)
        usable: dict[ValueKey, int] = {}
        gatherable: dict[ValueKey, int] = {}
        groups: dict[tuple[int, str | None], list[Step]] = {}
        for step in steps:
            path = self._paths.steps[step.name]
            once = path == scope
            pairs = zip(step.inputs, step.gathered, strict=True)
            number = max(
                (gatherable.get(k, 0) if once and many else usable.get(k, 0) for k, many in pairs), default=0
            )
            groups.setdefault((number, None if once else path[depth]), []).append(step)
            usable[step.output] = number
            gatherable[step.output] = number if once else number + 1
        return groups

    def _stage(self, steps: list[Step], scope: Path | None, wanted: set[ValueKey]) -> Stage:
        """Return one stage: of steps that run once, or for each item at *scope*."""
        made = {step.output for step in steps}
        given = tuple(dict.fromkeys(key for step in steps for key in step.inputs if key not in made))
        outputs = tuple(step.output for step in steps if step.output in wanted)
        plan = assemble(self._whole.graph, steps, given, outputs, self._whole.known_names)
        if scope is None:
            return Stage(plan=plan, outputs=outputs)
        if any(step.splits or step.aggregates for step in steps):
            plan = replace(plan, stages=self.stages(steps, scope, outputs))
        each = frozenset(key for key in given if self._paths.values[key][: len(scope)] == scope)
        return Stage(plan=plan, outputs=outputs, fan_out=scope[-1], each=each)


def _target_faults(target: ValueKey, path: Path, *, collects: bool) -> Iterable[str]:
    if not collects and path:
        yield (
            f"DC120 stages: {target} is made for each item of {_shown(path)}, not once; ask for list[{target}], or "
            f"for what an aggregate makes of it"
        )
    elif collects and not path:
        yield (
            f"DC120 stages: {target} is made once in a run, not for each item; ask for {target} instead of a list"
        )
    elif len(path) > 1:
        yield (
            f"DC120 stages: {target} is made for each part of {_shown(path)}, two fan-outs deep; merge the parts of "
            f"an item in an aggregate and ask for list[...] of what it makes"
        )


def _shown(path: Path) -> str:
    return " of ".join(f"step {name!r}" if name else "the batch" for name in reversed(path)) or "the run"
