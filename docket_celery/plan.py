"""From a target to the minimal steps that make it, in an order that respects their inputs."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from docket_celery.errors import GraphError, InvalidArguments
from docket_celery.policy import Scope
from docket_celery.step import Step, ValueKey
from docket_celery.wiring import Wiring


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """A step with its place in a plan.

    Attributes:
        index: Position in the plan.
        sources: For each input, the slot that holds its value: given values first, then one slot for each step.
        slot: Where its own output goes.
        consumers: Indexes of the planned steps that take its output, each once.
    """

    step: Step
    index: int
    sources: tuple[int, ...]
    slot: int
    consumers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The minimal ordered steps from given values to a target. Iterating yields the steps' names.

    Attributes:
        graph: The graph's name.
        target: What the plan makes.
        given: What the caller hands in, in the order of their slots.
        steps: In an order that respects inputs; ties by registration.
        target_slot: The slot that holds the result.
        pending: For each step, how many other steps it waits for.
        known_names: Every present or former step name of the whole graph.
    """

    graph: str
    target: ValueKey
    given: tuple[ValueKey, ...]
    steps: tuple[PlannedStep, ...]
    target_slot: int
    pending: tuple[int, ...]
    known_names: frozenset[str]
    persists: bool
    keeps_run: bool

    def __iter__(self) -> Iterator[str]:
        return (planned.step.name for planned in self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def levels(self) -> tuple[tuple[str, ...], ...]:
        """The steps' names grouped by what may run together."""
        depth = [0] * len(self.steps)
        groups: list[list[str]] = []
        for planned in self.steps:
            at = depth[planned.index]
            while len(groups) <= at:
                groups.append([])
            groups[at].append(planned.step.name)
            for consumer in planned.consumers:
                depth[consumer] = max(depth[consumer], at + 1)
        return tuple(tuple(group) for group in groups)

    def mermaid(self) -> str:
        """Return the plan as a Mermaid flowchart."""
        lines = ["flowchart TD"]
        lines += [f'    in{slot}(["{_label(key)}"])' for slot, key in enumerate(self.given)]
        lines += [f'    s{p.index}["{p.step.name}"]' for p in self.steps]
        for planned in self.steps:
            for key, slot in zip(planned.step.inputs, planned.sources, strict=True):
                start = f"in{slot}" if slot < len(self.given) else f"s{slot - len(self.given)}"
                lines.append(f'    {start} -->|"{_label(key)}"| s{planned.index}')
        return "\n".join(lines)

    def __repr__(self) -> str:
        names = list(self)
        shown = ", ".join(names[:8]) + (f", … {len(names) - 8} more" if len(names) > 8 else "")
        return (
            f"<Plan {self.graph}: {', '.join(map(str, self.given))} -> {self.target} by {shown or 'nothing'}>"
        )


def compile_plan(wiring: Wiring, target: ValueKey, given: Sequence[ValueKey]) -> Plan:
    """Find the steps that *target* needs, given values of the types *given*.

    Raises:
        GraphError: No step makes a needed value, or steps wait for each other.
        InvalidArguments: A type is given twice.
    """
    slots = {key: slot for slot, key in enumerate(given)}
    if len(slots) != len(given):
        twice = next(key for key in given if list(given).count(key) > 1)
        raise InvalidArguments(
            f"graph {wiring.graph!r}", f"{twice} is given twice; one value of a type is used once"
        )
    needed = _needed(wiring, target, slots)
    ordered = _order(wiring, needed, slots)
    for index, step in enumerate(ordered):
        slots[step.output] = len(given) + index
    consumers: list[dict[int, None]] = [{} for _ in ordered]
    pending = [0] * len(ordered)
    for index, step in enumerate(ordered):
        for slot in {slots[key] for key in step.inputs}:
            if slot >= len(given):
                consumers[slot - len(given)][index] = None
                pending[index] += 1
    steps = tuple(
        PlannedStep(
            step=step,
            index=index,
            sources=tuple(slots[key] for key in step.inputs),
            slot=len(given) + index,
            consumers=tuple(consumers[index]),
        )
        for index, step in enumerate(ordered)
    )
    return Plan(
        graph=wiring.graph,
        target=target,
        given=tuple(given),
        steps=steps,
        target_slot=slots[target],
        pending=tuple(pending),
        known_names=wiring.names(),
        persists=any(step.persist is not None for step in ordered),
        keeps_run=any(step.persist is Scope.WORKFLOW for step in ordered),
    )


def _needed(wiring: Wiring, target: ValueKey, given: dict[ValueKey, int]) -> dict[str, Step]:
    needed: dict[str, Step] = {}
    todo: list[tuple[ValueKey, str]] = [(target, "the caller")]
    while todo:
        key, wanted_by = todo.pop()
        if key in given:
            continue
        step = wiring.producers.get(key)
        if step is None:
            shown = ", ".join(map(str, given)) or "nothing"
            fault = (
                f"DC114 no producer: {wanted_by} needs {key}, which no step returns and the caller does not give "
                f"(given: {shown}); register a step that returns it, or hand it in"
            )
            raise GraphError(wiring.graph, [fault])
        if step.name not in needed:
            needed[step.name] = step
            todo += [(source, f"step {step.name!r} ({step.where})") for source in step.inputs]
    return needed


def _order(wiring: Wiring, needed: dict[str, Step], given: dict[ValueKey, int]) -> list[Step]:
    waiting: dict[str, int] = {}
    users: dict[str, list[Step]] = {name: [] for name in needed}
    for step in needed.values():
        sources = {key for key in step.inputs if key not in given}
        waiting[step.name] = len(sources)
        for key in sources:
            users[wiring.producers[key].name].append(step)
    ready = [(step.order, step.name) for step in needed.values() if not waiting[step.name]]
    heapq.heapify(ready)
    ordered: list[Step] = []
    while ready:
        step = needed[heapq.heappop(ready)[1]]
        ordered.append(step)
        for user in users[step.name]:
            waiting[user.name] -= 1
            if not waiting[user.name]:
                heapq.heappush(ready, (user.order, user.name))
    if len(ordered) != len(needed):
        wiring.check(given)
    return ordered


def _label(key: ValueKey) -> str:
    label = key.kind.DESCRIPTOR.name
    return f"{label} {key.name}" if key.name else label
