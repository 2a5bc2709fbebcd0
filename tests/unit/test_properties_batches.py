"""Random graphs with fan-outs, splits and aggregates against plain Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run_context import Submission
from docket_celery.errors import GraphError, StepFailed
from docket_celery.graph import Graph
from docket_celery.plan.annotation import Named, ValueKey
from docket_celery.plan.batch import BatchPolicy
from docket_celery.plan.context import current_context
from docket_celery.plan.options import Scope
from docket_celery.store import MemoryStore
from tests.unit.protos.shop_pb2 import Money

RANDOM = st.builds(Random, st.integers(0, 2**32))
THREADS = st.sampled_from([0, 1, 2, 8])
LIMITS = st.sampled_from([None, 1, 3])
MODULUS = 1_000_003

Path = tuple[str, ...]


def mix(name: str, values: Iterable[Any]) -> int:
    """Return a number that every input and its place changes; a list counts with its order."""
    number = sum(map(ord, name))
    for value in values:
        inner = mix("list", value) if isinstance(value, list) else value
        number = (number * 31 + inner + 7) % MODULUS
    return number


def width(number: int) -> int:
    """Return into how many parts a split cuts a value."""
    return number % 4


@dataclass(frozen=True)
class Made:
    """A step of the model: what it takes (name, whole) and whether it splits."""

    name: str
    takes: tuple[tuple[str, bool], ...]
    splits: bool


@dataclass
class Model:
    """Values by name and place, computed one after the other."""

    batch: list[int]
    steps: dict[str, Made] = field(default_factory=dict[str, Made])
    paths: dict[str, Path] = field(default_factory=lambda: {"items": ("items",), "shared": ()})
    known: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict[Any, Any])

    def add(self, random: Random) -> None:
        """Add a step over values whose places fit together."""
        base = self.paths[random.choice(list(self.paths))]
        # The base itself is among what is taken, so that the step does run there.
        fitting = [(name, False) for name, path in self.paths.items() if path == base[: len(path)]]
        wholes = [(name, True) for name, path in self.paths.items() if path[:-1] == base and path]
        first = random.choice(
            [(name, whole) for name, whole in fitting + wholes if whole or self.paths[name] == base]
        )
        others = random.sample(fitting + wholes, min(len(fitting + wholes), random.randint(0, 2)))
        takes = (first, *(taken for taken in others if taken[0] != first[0]))
        lies = base
        splits = len(lies) < 2 and random.random() < 0.25
        name = f"v{len(self.steps)}"
        self.steps[name] = Made(name, takes, splits)
        self.paths[name] = (*lies, name) if splits else lies

    def count(self, path: Path, at: tuple[int, ...]) -> int:
        """Return how many items the innermost fan-out of *path* has at a place."""
        return len(self.batch) if path[-1] == "items" else width(self.raw(path[-1], at))

    def raw(self, name: str, at: tuple[int, ...]) -> int:
        """Return what a step computes at a place, before it is split."""
        made = self.steps[name]
        return mix(name, [self.input(taken, whole, at) for taken, whole in made.takes])

    def input(self, name: str, whole: bool, at: tuple[int, ...]) -> Any:
        """Return what a step at a place takes."""
        path = self.paths[name]
        if not whole:
            return self.value(name, at[: len(path)])
        outer = at[: len(path) - 1]
        return [self.value(name, (*outer, index)) for index in range(self.count(path, outer))]

    def value(self, name: str, at: tuple[int, ...]) -> int:
        """Return the value called *name* at a place."""
        if name == "items":
            return self.batch[at[0]]
        if name == "shared":
            return 5
        if (name, at) not in self.known:
            if self.steps[name].splits:
                self.known[name, at] = (self.raw(name, at[:-1]) + at[-1]) % MODULUS
            else:
                self.known[name, at] = self.raw(name, at)
        return self.known[name, at]


class Calls:
    """What the bodies were called for; some fail on their first call."""

    def __init__(self, broken: Random | None = None) -> None:
        self.done: list[tuple[str, str]] = []
        self._broken, self._failed = broken, set[tuple[str, str]]()

    def failed(self) -> int:
        """Return how many calls failed."""
        return len(self._failed)

    def note(self, name: str, item: str) -> None:
        """Fail, or count the call as done."""
        call = (name, item)
        if self._broken is not None and call not in self._failed and self._broken.random() < 0.3:
            self._failed.add(call)
            raise ConnectionError(f"{name} {item}")
        self.done.append(call)


def build(model: Model, random: Random, calls: Calls, *, persist: bool = False) -> Graph:
    """Return the graph of the model's steps; some persist, or all."""
    graph = Graph("random")
    for made in model.steps.values():
        body = _body(made, calls)
        names = [f"p{index}" for index in range(len(made.takes))]
        call: Any = eval(f"lambda {', '.join(names)}: body({', '.join(names)})", {"body": body})  # noqa: S307 -- a function of a wanted number of parameters
        kinds = [Annotated[Money, Named(name)] for name, _ in made.takes]
        annotations: dict[str, Any] = {
            parameter: random.choice([list[kind], Iterable[kind]]) if whole else kind  # type: ignore[valid-type]  # made here
            for parameter, kind, (_, whole) in zip(names, kinds, made.takes, strict=True)
        }
        result: Any = Annotated[Money, Named(made.name)]
        annotations["return"] = list[result] if made.splits else result
        call.__annotations__ = annotations
        register = graph.register_aggregate if any(whole for _, whole in made.takes) else graph.register
        register(
            call, name=made.name, persist=Scope.WORKFLOW if persist else random.choice([None, Scope.WORKFLOW])
        )
    return graph


def _body(made: Made, calls: Calls) -> Any:
    def body(*inputs: Any) -> Any:
        calls.note(made.name, current_context().item)
        values = [
            [money.cents for money in taken] if whole else taken.cents
            for taken, (_, whole) in zip(inputs, made.takes, strict=True)
        ]
        number = mix(made.name, values)
        if not made.splits:
            return Money(cents=number)
        return [Money(cents=(number + index) % MODULUS) for index in range(width(number))]

    return body


def run(graph: Graph, model: Model, target: str, threads: int, limit: int | None, store: MemoryStore) -> Any:
    """Run the graph and return the numbers it makes."""
    keys = (ValueKey(Money, "items"), ValueKey(Money, "shared"))
    collects = bool(model.paths[target])
    outcome = graph.deliver(
        graph.compiled(ValueKey(Money, target), keys, keys[0], collects=collects),
        [[Money(cents=cents) for cents in model.batch], Money(cents=5)],
        Submission(execution_id="run", max_concurrency=limit, policy=BatchPolicy()),
        Settings(threads=threads),
        store=store,
    )
    if outcome.error is not None:
        raise outcome.error
    return [money.cents for money in outcome.value] if collects else outcome.value.cents


@given(
    random=RANDOM,
    items=st.lists(st.integers(0, 1000), max_size=6),
    steps=st.integers(1, 9),
    threads=THREADS,
    limit=LIMITS,
)
@examples(max_examples=250, deadline=None)
def test_random_fan_outs_equal_plain_python(
    random: Random, items: list[int], steps: int, threads: int, limit: int | None
) -> None:
    """Splits, per-item work and aggregates in any order, on any number of threads; and again from what is stored."""
    model = Model(items)
    for _ in range(steps):
        model.add(random)
    target = random.choice(list(model.steps))
    graph = build(model, random, Calls())
    path = model.paths[target]
    if len(path) > 1:
        with pytest.raises(GraphError, match="two fan-outs deep"):
            run(graph, model, target, threads, limit, MemoryStore())
        return
    expected: Any = (
        [model.value(target, (index,)) for index in range(model.count(path, ()))]
        if path
        else model.value(target, ())
    )
    store = MemoryStore()
    assert run(graph, model, target, threads, limit, store) == expected
    assert run(graph, model, target, threads, limit, store) == expected


@given(
    random=RANDOM,
    items=st.lists(st.integers(0, 1000), max_size=6),
    steps=st.integers(1, 7),
    threads=THREADS,
    limit=LIMITS,
)
@examples(max_examples=120, deadline=None)
def test_a_batch_that_fails_goes_on_with_what_is_missing(
    random: Random, items: list[int], steps: int, threads: int, limit: int | None
) -> None:
    """However often it fails: no saved item is called again, and the results are those of a whole run."""
    model = Model(items)
    for _ in range(steps):
        model.add(random)
    target = random.choice(
        [name for name, path in model.paths.items() if name in model.steps and len(path) < 2] or [""]
    )
    if not target:
        return
    path, calls, store = model.paths[target], Calls(random), MemoryStore()
    graph = build(model, random, calls, persist=True)
    found: Any = None
    while found is None:
        failed = calls.failed()
        with contextlib.suppress(StepFailed):
            found = run(graph, model, target, threads, limit, store)
        assert found is not None or calls.failed() > failed, "it failed without a step of its own failing"
    assert found == (
        [model.value(target, (index,)) for index in range(model.count(path, ()))]
        if path
        else model.value(target, ())
    )
    assert len(calls.done) == len(set(calls.done))
