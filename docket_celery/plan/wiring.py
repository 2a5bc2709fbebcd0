"""All steps of a graph together: who produces what, and everything that is wrong with it in one report."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

from docket_celery.errors import GraphError
from docket_celery.plan.annotation import SignatureFault, ValueKey
from docket_celery.plan.messages import type_name
from docket_celery.plan.options import option_faults
from docket_celery.plan.plan import Plan
from docket_celery.plan.step import Registration, Step, read_step

_MOST_SHOWN = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Wiring:
    """The steps of a graph whose signatures were read.

    Attributes:
        steps: In the order of registration.
        producers: Which step makes a value; the first one where there are two (a fault).
        faults: What is wrong, each as one line with its code.
        unread: What steps return that have faults of their own; a step that needs it is not reported as well.
        unknown: There are steps whose result could not be read, so any value may be theirs.
        plans: What was compiled of these steps, by what it was compiled for.
    """

    graph: str
    steps: tuple[Step, ...]
    producers: Mapping[ValueKey, Step]
    faults: tuple[str, ...]
    unread: frozenset[ValueKey] = frozenset()
    unknown: bool = False
    plans: dict[object, Plan] = field(default_factory=dict[object, Plan])

    def names(self) -> frozenset[str]:
        """Return every name a step has or had."""
        return frozenset(name for step in self.steps for name in (step.name, *step.options.renamed_from))

    def needed(self, target: ValueKey, given: Container[ValueKey]) -> dict[str, Step]:
        """Return the steps on the way to *target*, by name."""
        needed: dict[str, Step] = {}
        todo = [target]
        while todo:
            key = todo.pop()
            step = self.producers.get(key)
            if step is not None and key not in given and step.name not in needed:
                needed[step.name] = step
                todo += step.inputs
        return needed

    def gathered(self) -> frozenset[ValueKey]:
        """Return what aggregates take whole."""
        return frozenset(
            key for step in self.steps for key, many in zip(step.inputs, step.gathered, strict=True) if many
        )

    def missing(self, steps: Iterable[Step], given: Collection[ValueKey]) -> Iterator[tuple[Step, ValueKey]]:
        """Yield what *steps* need and have no producer for besides *given*."""
        known = (self.producers, given, self.unread)
        for step in steps:
            for key in dict.fromkeys(step.inputs):
                if not any(key in keys for keys in known):
                    yield step, key

    def check(
        self, given: Iterable[ValueKey], *, complete: bool = False, target: ValueKey | None = None
    ) -> None:
        """Refuse the graph unless it is free of faults, where a caller hands in *given*; these break cycles.

        *complete*: every other input must have a producer. Else what no step returns counts as handed in, but for a
        *target* and what the steps on the way to it take. All faults are raised as one GraphError.
        """
        known = dict.fromkeys(given)
        faults = [*self.faults, *_cycles(self, known)]
        steps: Iterable[Step] = self.steps if complete else ()
        if target is not None and not complete:
            steps = self.needed(target, known).values()
            if not self.unknown and not any(target in keys for keys in (self.producers, known, self.unread)):
                faults.append(
                    f"DC122 no result: the caller asks for {target}, which no step returns and which is not given "
                    f"(given: {_listed(known)}; the steps return {_listed(self.producers)}); register a step that "
                    "returns it, or ask for one of those"
                )
        if not self.unknown:
            faults += (
                f"DC114 no producer: step {step.name!r} ({step.where}) needs {key}, which no step returns and the "
                f"caller does not give (given: {_listed(known)}); register a step that returns it, or hand it in"
                for step, key in self.missing(steps, known)
            )
        if faults:
            raise GraphError(self.graph, faults)

    def order(self, given: Collection[ValueKey], needed: Mapping[str, Step] | None = None) -> list[Step]:
        """Return *needed* steps (None: all) in an order that respects their inputs, ties by registration.

        GraphError: steps wait for each other.
        """
        if needed is None:
            needed = {step.name: step for step in self.steps if step.output not in given}
        sorter = TopologicalSorter(
            {
                step.name: [self.producers[key].name for key in step.inputs if key not in given]
                for step in needed.values()
            }
        )
        with suppress(CycleError):
            sorter.prepare()
        ready: list[tuple[int, str]] = []
        ordered: list[Step] = []
        while sorter.is_active():
            for name in sorter.get_ready():
                heapq.heappush(ready, (needed[name].order, name))
            ordered.append(needed[heapq.heappop(ready)[1]])
            sorter.done(ordered[-1].name)
        if len(ordered) != len(needed):
            self.check(given)
        return ordered


def read_wiring(graph: str, registrations: Iterable[Registration]) -> Wiring:
    """Read all signatures; faults are collected, not raised."""
    steps: list[Step] = []
    faults: list[str] = []
    names: dict[str, Registration] = {}
    producers: dict[ValueKey, Step] = {}
    unread: set[ValueKey] = set()
    unknown = False
    for registration in registrations:
        who = f"step {registration.name!r} ({registration.where})"
        first = names.setdefault(registration.name, registration)
        if first is not registration:
            faults.append(
                f"DC112 duplicate name: step {registration.name!r} is registered at {first.where} and at "
                f"{registration.where}; give one of them name=..."
            )
        problems = [f"DC121 options: {who}: {text}" for text in option_faults(registration.options)]
        try:
            step = read_step(registration)
        except SignatureFault as fault:
            faults += (f"DC111 signature: {who}: {text}" for text in fault.texts)
            faults += problems
            unread.update(() if fault.output is None else (fault.output,))
            unknown = unknown or fault.output is None
            continue
        if step.output in step.inputs:
            problems.append(
                f"DC123 never runs: {who} takes {step.output} and returns it; a value that is there is not made "
                "again, so the step waits for itself: return another type, or tell the two apart with "
                f'Annotated[{step.output.kind.__name__}, Named("...")]'
            )
        faults += problems
        if problems or first is not registration:
            unread.add(step.output)
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
    return Wiring(
        graph=graph,
        steps=tuple(steps),
        producers=producers,
        faults=tuple(faults),
        unread=frozenset(unread),
        unknown=unknown,
    )


def _cycles(wiring: Wiring, given: Container[ValueKey]) -> Iterable[str]:
    """Find one path for each group of steps that wait for each other, without recursion."""
    state: dict[str, int] = {}
    for root in wiring.steps:
        if root.name in state:
            continue
        path: dict[str, Step] = {}
        todo: list[tuple[Step, bool]] = [(root, False)]
        while todo:
            step, leaving = todo.pop()
            if leaving:
                state[step.name] = 2
                path.popitem()
                continue
            if state.get(step.name):
                continue
            state[step.name] = 1
            path[step.name] = step
            todo.append((step, True))
            taken = (key for key in dict.fromkeys(step.inputs) if key not in given)
            for source in filter(None, map(wiring.producers.get, taken)):
                if state.get(source.name) == 1:
                    yield _cycle(path, source)
                elif source.name not in state:
                    todo.append((source, False))


def _cycle(path: dict[str, Step], source: Step) -> str:
    """Describe the end of *path*, from *source* on."""
    loop: list[Step] = []
    for step in reversed(path.values()):
        loop.append(step)
        if step is source or len(loop) == _MOST_SHOWN:
            break
    loop.reverse()
    names = [repr(step.name) for step in loop]
    if loop[0] is not source:
        # Nobody reads a longer path, and the whole paths of a thousand cycles take too long to build.
        names = [repr(source.name), "...", *names]
    values = [f"{step.output} ({step.where})" for step in loop]
    return (
        f"DC115 cycle: {' needs '.join([*names, repr(source.name)])} ({source.where}); their results in turn: "
        f"{', '.join(values)}; break it by handing one of the values in, or splitting a step"
    )


def _listed(keys: Collection[ValueKey]) -> str:
    shown = [str(key) for key in itertools.islice(keys, _MOST_SHOWN)]
    more = len(keys) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "") or "nothing"


def _former_names(steps: Sequence[Step]) -> Iterable[str]:
    """Find names that two steps would share: their checkpoints and idempotency keys would be one another's."""
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
