"""From a target to the minimal steps that make it, in an order that respects their inputs."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.options import Scope
from docket_celery.plan.step import Step


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step with its place in a plan; the slots are those of the given values, then one for each step.

    Attributes:
        sources: For each input, the slot that holds its value.
        slot: Where its own output goes.
        consumers: Indexes of the planned steps that take its output, each once.
    """

    step: Step
    index: int
    sources: tuple[int, ...]
    slot: int
    consumers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a plan with fan-outs does in one go.

    Attributes:
        plan: The steps, to be run once, or once for each item of *fan_out*.
        outputs: What later stages need of it.
        fan_out: The step whose parts the items are, '' for the batch itself; None: the steps run once.
        each: Which of the plan's given values are the item's own; the others are the same for all items.
    """

    plan: Plan
    outputs: tuple[ValueKey, ...]
    fan_out: str | None = None
    each: frozenset[ValueKey] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The minimal ordered steps from given values to a target. Iterating yields the steps' names.

    Attributes:
        graph: The graph's name.
        target: What the plan makes.
        given: What the caller hands in, in the order of their slots.
        steps: In an order that respects inputs; ties by registration.
        output_slots: The slots that must be filled, the target's first.
        pending: For each step, how many other steps it waits for.
        first: Indexes of the steps that wait for no other.
        pool_only: Indexes of the steps that need more than a thread, of whichever kind: see `Step.simple`.
        known_names: Every present or former step name of the whole graph.
        persists: A step keeps its output; else there is no store.
        keeps_run: A step keeps its output for the run, which then has a row and a lease; GLOBAL ones need neither.
        closing: The step that makes the target, if it is the only output and kept for the run: its checkpoint is
            saved with the end.
        stages: The same steps cut at the aggregates, in order; empty where nothing fans out.
        batch: Which of the given values is a batch, one item after the other.
        collects: The target is made for each item of a fan-out, and wanted as a list.
        fans_out: A stage runs for each item of a batch or of a step's output.
    """

    graph: str
    target: ValueKey
    given: tuple[ValueKey, ...]
    steps: tuple[PlannedStep, ...]
    output_slots: tuple[int, ...]
    pending: tuple[int, ...]
    first: tuple[int, ...]
    pool_only: frozenset[int]
    known_names: frozenset[str]
    persists: bool
    keeps_run: bool
    closing: str = ""
    stages: tuple[Stage, ...] = ()
    batch: ValueKey | None = None
    collects: bool = False
    fans_out: bool = False

    def __iter__(self) -> Iterator[str]:
        return (planned.step.name for planned in self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def levels(self) -> tuple[tuple[str, ...], ...]:
        """The steps' names grouped by what may run together."""
        depth = [0] * len(self.steps)
        for planned in self.steps:
            for consumer in planned.consumers:
                depth[consumer] = max(depth[consumer], depth[planned.index] + 1)
        groups: list[list[str]] = [[] for _ in range(max(depth, default=-1) + 1)]
        for planned in self.steps:
            groups[depth[planned.index]].append(planned.step.name)
        return tuple(map(tuple, groups))

    def mermaid(self) -> str:
        """Return the plan as a Mermaid flowchart."""
        lines = ["flowchart TD"]
        lines += [f'    in{slot}(["{_label(key)}"])' for slot, key in enumerate(self.given)]
        lines += self._mermaid_steps()
        for planned in self.steps:
            for key, slot in zip(planned.step.inputs, planned.sources, strict=True):
                start = f"in{slot}" if slot < len(self.given) else f"s{slot - len(self.given)}"
                lines.append(f'    {start} -->|"{_label(key)}"| s{planned.index}')
        return "\n".join(lines)

    def _mermaid_steps(self) -> list[str]:
        """Return the nodes; those that run for each item of a fan-out in a box of their own."""
        number = {planned.step.name: planned.index for planned in self.steps}
        lines: list[str] = []
        inside: set[str] = set()
        for index, stage in enumerate(self.stages):
            if stage.fan_out is not None:
                title = f"for each of {stage.fan_out}" if stage.fan_out else "for each item"
                lines.append(f'    subgraph p{index}["{title}"]')
                lines += [f'        s{number[name]}["{name}"]' for name in stage.plan]
                lines.append("    end")
                inside.update(stage.plan)
        return [f'    s{p.index}["{p.step.name}"]' for p in self.steps if p.step.name not in inside] + lines

    def __repr__(self) -> str:
        given, names = _brief([str(key) for key in self.given]), _brief(list(self))
        return f"<Plan {_short(self.graph)}: {given} -> {_short(str(self.target))} by {names}>"


def assemble(
    graph: str,
    steps: Sequence[Step],
    given: tuple[ValueKey, ...],
    outputs: Sequence[ValueKey],
    known_names: frozenset[str],
) -> Plan:
    """Return the plan of *steps*, which are in order and need nothing but *given*, that makes *outputs*.

    The target is the first output. *known_names* has every present or former step name of the whole graph.
    """
    first = len(given)
    slots = {key: slot for slot, key in enumerate((*given, *(step.output for step in steps)))}
    sources = [tuple(slots[key] for key in step.inputs) for step in steps]
    needs = [{slot - first for slot in used if slot >= first} for used in sources]
    consumers: list[list[int]] = [[] for _ in steps]
    for index, indexes in enumerate(needs):
        for source in indexes:
            consumers[source].append(index)
    planned = tuple(
        PlannedStep(step, index, sources[index], first + index, tuple(consumers[index]))
        for index, step in enumerate(steps)
    )
    closing = [
        step.name for step in steps if [step.output] == list(outputs) and step.persist is Scope.WORKFLOW
    ]
    return Plan(
        graph=graph,
        target=outputs[0],
        given=given,
        steps=planned,
        output_slots=tuple(slots[key] for key in outputs),
        pending=tuple(map(len, needs)),
        first=tuple(index for index, used in enumerate(needs) if not used),
        pool_only=frozenset(index for index, step in enumerate(steps) if not step.simple),
        known_names=known_names,
        persists=any(step.persist is not None for step in steps),
        keeps_run=any(step.persist is Scope.WORKFLOW for step in steps),
        closing=closing[0] if closing else "",
    )


def find_needed(plan: Plan, outputs: Iterable[int], stored: Container[int]) -> tuple[set[int], list[int]]:
    """Return which steps have to run to fill the slots *outputs*, and which *stored* steps they take values of.

    Stored steps do not run, nor do those that only they need.
    """
    first = len(plan.given)
    needed: set[int] = set()
    used: dict[int, None] = {}
    todo = [slot - first for slot in outputs if slot >= first]
    while todo:
        index = todo.pop()
        if index in stored:
            used[index] = None
        elif index not in needed:
            needed.add(index)
            todo += [slot - first for slot in plan.steps[index].sources if slot >= first]
    return needed, list(used)


def count_pending(plan: Plan, needed: Collection[int]) -> list[int]:
    """Return for each step how many of the *needed* ones it waits for."""
    first = len(plan.given)
    pending = [0] * len(plan.steps)
    for index in needed:
        pending[index] = sum(slot - first in needed for slot in set(plan.steps[index].sources))
    return pending


def _label(key: ValueKey) -> str:
    label = key.kind.DESCRIPTOR.name
    return f"{label} {key.name}" if key.name else label


def _brief(names: Sequence[str]) -> str:
    """Return the first *names*, short enough for a line of a log."""
    shown = [_short(name) for name in names[:8]]
    return ", ".join(shown) + (f", … {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:59] + "…"
