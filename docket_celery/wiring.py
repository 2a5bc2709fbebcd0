"""All steps of a graph together: who produces what, and everything that is wrong with it in one report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from docket_celery.errors import GraphError
from docket_celery.messages import type_name
from docket_celery.step import Registration, SignatureFault, Step, ValueKey, read_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """The steps of a graph whose signatures were read.

    Attributes:
        graph: The graph's name.
        steps: In the order of registration.
        producers: Which step makes a value; the first one where there are two (a fault).
        faults: What is wrong, each as one line with its code.
    """

    graph: str
    steps: tuple[Step, ...]
    producers: Mapping[ValueKey, Step]
    faults: tuple[str, ...]

    def names(self) -> frozenset[str]:
        """Return every name a step has or had."""
        return frozenset(name for step in self.steps for name in (step.name, *step.options.renamed_from))

    def gathered(self) -> frozenset[ValueKey]:
        """Return what aggregates take whole."""
        return frozenset(
            key for step in self.steps for key, many in zip(step.inputs, step.gathered, strict=True) if many
        )

    def check(self, given: Iterable[ValueKey] = (), *, complete: bool = False) -> None:
        """Refuse the graph unless it is free of faults.

        Args:
            given: The values a caller hands in; they are not made, so they break cycles.
            complete: Every other input must have a producer; else whatever no step returns counts as handed in.

        Raises:
            GraphError: With all faults.
        """
        known = frozenset(given)
        faults = [*self.faults, *_cycles(self, known)]
        if complete:
            faults += _missing(self, known)
        if faults:
            raise GraphError(self.graph, faults)


def read_wiring(graph: str, registrations: Iterable[Registration]) -> Wiring:
    """Read all signatures; faults are collected, not raised."""
    steps: list[Step] = []
    faults: list[str] = []
    names: dict[str, str] = {}
    producers: dict[ValueKey, Step] = {}
    for registration in registrations:
        if registration.name in names:
            first = names[registration.name]
            faults.append(
                f"DC112 duplicate name: step {registration.name!r} is registered at {first} and at "
                f"{registration.where}; give one of them name=..."
            )
            continue
        names[registration.name] = registration.where
        try:
            step = read_step(registration)
        except SignatureFault as fault:
            faults.append(f"DC111 signature: step {registration.name!r} ({registration.where}): {fault}")
            continue
        steps.append(step)
        other = producers.setdefault(step.output, step)
        if other is not step:
            faults.append(
                f"DC113 two producers: {step.output} is made by {other.name!r} ({other.where}) and by "
                f"{step.name!r} ({step.where}); drop one, or tell the results apart with Annotated[..., Named(...)]"
            )
    faults += _former_names(steps)
    faults += _shared_caches(steps)
    return Wiring(graph=graph, steps=tuple(steps), producers=producers, faults=tuple(faults))


def _missing(wiring: Wiring, given: frozenset[ValueKey]) -> Iterable[str]:
    for step in wiring.steps:
        for key in dict.fromkeys(step.inputs):
            if key not in wiring.producers and key not in given:
                shown = ", ".join(str(k) for k in given) or "nothing"
                yield (
                    f"DC114 no producer: step {step.name!r} ({step.where}) needs {key}, which no step returns and "
                    f"the caller does not give (given: {shown}); register a step that returns it, or hand it in"
                )


def _cycles(wiring: Wiring, given: frozenset[ValueKey]) -> Iterable[str]:
    """Find one path for each group of steps that wait for each other, without recursion."""
    state: dict[str, int] = {}
    for root in wiring.steps:
        if root.name in state:
            continue
        path: list[Step] = []
        todo: list[tuple[Step, bool]] = [(root, False)]
        while todo:
            step, leaving = todo.pop()
            if leaving:
                state[step.name] = 2
                path.pop()
                continue
            if state.get(step.name):
                continue
            state[step.name] = 1
            path.append(step)
            todo.append((step, True))
            for source in _sources(wiring, step, given):
                if state.get(source.name) == 1:
                    loop = [*path[path.index(source) :], source]
                    yield (
                        "DC115 cycle: "
                        + " needs ".join(f"{s.name!r}" for s in loop)
                        + f" ({source.where}); break it by handing one of the values in, or splitting a step"
                    )
                elif source.name not in state:
                    todo.append((source, False))


def _sources(wiring: Wiring, step: Step, given: frozenset[ValueKey]) -> list[Step]:
    keys = [key for key in dict.fromkeys(step.inputs) if key not in given]
    return [wiring.producers[key] for key in keys if key in wiring.producers]


def _former_names(steps: Iterable[Step]) -> Iterable[str]:
    """Find names that two steps would share: their checkpoints and idempotency keys would be one another's."""
    steps = list(steps)
    owners = {step.name: step for step in steps}
    for step in steps:
        for name in step.options.renamed_from:
            other = owners.setdefault(name, step)
            if other is not step or name == step.name:
                yield (
                    f"DC117 former name: step {step.name!r} ({step.where}) has {name!r} in renamed_from, which is "
                    f"also a name of step {other.name!r} ({other.where}); a name belongs to one step for good"
                )


def _shared_caches(steps: Iterable[Step]) -> Iterable[str]:
    """Find steps that would read each other's entries of one cache, and could not."""
    owners: dict[str, Step] = {}
    for step in steps:
        if step.options.cache is None:
            continue
        other = owners.setdefault(step.options.cache, step)
        if other.output.kind is not step.output.kind:
            yield (
                f"DC119 shared cache: cache={step.options.cache!r} is named by step {other.name!r} ({other.where}), "
                f"which returns {type_name(other.output.kind)}, and by step {step.name!r} ({step.where}), which "
                f"returns {type_name(step.output.kind)}; entries of one cache have one type: name another one"
            )
