"""Cuts a plan at its aggregates: what runs once, what runs for each item of a fan-out, and in which order.

A value's path names its fan-outs, outermost first: ``()`` is made once in a run, ``("",)`` once for each item of the
batch, ``("", "split")`` once for each part that the step ``split`` cut an item into. A step that takes
``list[T]`` closes the innermost fan-out of T, so it runs one level further out than its items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from docket_celery.errors import GraphError, InvalidArguments
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.plan import Plan, Stage, assemble
from docket_celery.plan.step import Step
from docket_celery.plan.wiring import Wiring

Path = tuple[str, ...]
BATCH: Path = ("",)
"""The path of the items of a batch."""


def compile_plan(
    wiring: Wiring,
    target: ValueKey,
    given: tuple[ValueKey, ...],
    batch: ValueKey | None,
    collects: bool,
) -> Plan:
    """Return the plan that makes *target*, cut into stages if something fans out; arguments as for `Plan`.

    A GraphError has all faults of the graph, values without a producer and steps that cannot be staged.
    """
    if len(set(given)) != len(given):
        twice = next(key for key in given if given.count(key) > 1)
        problem = f"{twice} is given twice; one value of a type is used once"
        raise InvalidArguments(f"graph {wiring.graph!r}", problem)
    wiring.check(given, target=target)
    steps = wiring.order(given, wiring.needed(target, given))
    plan = assemble(wiring.graph, steps, given, (target,), wiring.names())
    if batch is None and not collects and not any(step.splits or step.aggregates for step in steps):
        return plan
    levels = _Levels(wiring, {key: BATCH if key == batch else () for key in given})
    faults = [fault for step in steps for fault in levels.place(step)]
    if not faults:
        faults += _target_faults(target, levels.values[target], collects=collects)
    if faults:
        raise GraphError(wiring.graph, faults)
    stages = levels.stages(steps, (), [target])
    fans_out = any(stage.fan_out is not None for stage in stages)
    closing = plan.closing if not stages else ""
    return replace(plan, stages=stages, closing=closing, batch=batch, collects=collects, fans_out=fans_out)


def find_faults(wiring: Wiring, given: Sequence[ValueKey], batch: ValueKey | None) -> list[str]:
    """Return what keeps the steps of a graph without other faults from being staged.

    Nothing *given*: callers hand in what no step returns, and what aggregates take of that as batches.
    """
    whole = wiring.gathered()
    values: dict[ValueKey, Path] = {key: BATCH if key == batch else () for key in given}
    for _, key in wiring.missing(wiring.steps, given):
        values[key] = (f"the batch of {key}",) if key in whole else ()
    levels = _Levels(wiring, values)
    return [fault for step in wiring.order(values) for fault in levels.place(step)]


class _Levels:
    """Finds the paths of values and steps, and cuts the steps of one path into stages.

    *values* holds the paths of what is handed in; those of the steps' results are added.
    """

    def __init__(self, wiring: Wiring, values: dict[ValueKey, Path]) -> None:
        self.values = values
        self._graph, self._names = wiring.graph, wiring.names()
        self._steps: dict[str, Path] = {}

    def place(self, step: Step) -> Iterable[str]:
        """Note the paths of *step* and of its result; yield what is wrong with it."""
        who = f"DC120 stages: step {step.name!r} ({step.where}) takes"
        taken: list[tuple[Path, ValueKey, bool]] = []
        for key, gathered in zip(step.inputs, step.gathered, strict=True):
            path = self.values[key]
            if gathered and not path:
                yield (
                    f"{who} {gathered}[{key}], but {key} is made once in a run; take it as it is, or make it for "
                    "each item of a fan-out"
                )
            whole = bool(gathered and path)
            taken.append((path[:-1] if whole else path, key, whole))
        deepest, example, _ = max(taken, key=lambda each: len(each[0]), default=((), None, False))
        for path, key, whole in taken:
            if path != deepest[: len(path)]:
                yield (
                    f"{who} {example} for each item of {_shown(deepest)} and {key} for each item of {_shown(path)}: "
                    "items of two fan-outs have no order in common; take one of them whole, as list[...], in an "
                    "aggregate before it"
                )
                break
            if whole and path != deepest:
                yield (
                    f"{who} all of {key} again for each item of {_shown(deepest)}; make what it needs of them in an "
                    "aggregate before it, once"
                )
        self._steps[step.name] = deepest
        self.values[step.output] = (*deepest, step.name) if step.splits else deepest

    def stages(self, steps: Sequence[Step], scope: Path, outputs: Sequence[ValueKey]) -> tuple[Stage, ...]:
        """Return the stages that *steps*, in order, form where the values at *scope* are seen.

        All of them run at *scope* or within its fan-outs; *outputs* are needed afterwards.
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
        usable: dict[ValueKey, int] = {}
        gatherable: dict[ValueKey, int] = {}
        groups: dict[tuple[int, str | None], list[Step]] = {}
        for step in steps:
            path = self._steps[step.name]
            once = path == scope
            pairs = zip(step.inputs, step.gathered, strict=True)
            rounds = [(gatherable if once and many else usable).get(key, 0) for key, many in pairs]
            number = max(rounds, default=0)
            groups.setdefault((number, None if once else path[len(scope)]), []).append(step)
            usable[step.output] = number
            gatherable[step.output] = number if once else number + 1
        return groups

    def _stage(self, steps: list[Step], scope: Path | None, wanted: set[ValueKey]) -> Stage:
        """Return one stage: of steps that run once, or for each item at *scope*."""
        made = {step.output for step in steps}
        given = tuple(dict.fromkeys(key for step in steps for key in step.inputs if key not in made))
        outputs = tuple(step.output for step in steps if step.output in wanted)
        plan = assemble(self._graph, steps, given, outputs, self._names)
        if scope is None:
            return Stage(plan=plan, outputs=outputs)
        if any(step.splits or step.aggregates for step in steps):
            plan = replace(plan, stages=self.stages(steps, scope, outputs))
        each = frozenset(key for key in given if self.values[key][: len(scope)] == scope)
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
