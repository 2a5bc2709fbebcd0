"""Random graphs of aggregates in sequence, with per-item steps around them, and the same in plain Python over lists.

Each aggregate depends on the one before it: by steps between them that take its value for each item, or directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any

from docket_celery.graph import Graph
from docket_celery.plan.annotation import Named, ValueKey
from docket_celery.plan.options import Scope
from tests.unit.protos.shop_pb2 import Money

MODULUS = 1_000_003
ITEMS = "items"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A step for each item, one that sees all of them, or one that runs once at the end.

    Attributes:
        columns: The values that there are for each item.
        totals: The values that there are once.
        whole: What an aggregate's columns come as; None: this is no aggregate.
        is_async: Whether it is an ``async def``.
        persists: Whether it saves at once.
    """

    name: str
    columns: tuple[str, ...]
    totals: tuple[str, ...]
    whole: type[list[Any] | Iterable[Any]] | None = None
    is_async: bool = False
    persists: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Three aggregates in sequence, what happens around them, and whether it ends in one message."""

    works: tuple[Work, ...]
    single: bool

    @property
    def target(self) -> str:
        """The name of what is made."""
        return self.works[-1].name


def draw(random: Random) -> Series:
    """Return a random series."""
    columns, totals, works = [ITEMS], list[str](), list[Work]()

    def few(names: Sequence[str], most: int) -> list[str]:
        return random.sample(names, random.randint(0, min(most, len(names))))

    def add(name: str, own: Iterable[str], once: Iterable[str], *, whole: Any = None) -> None:
        works.append(
            Work(
                name=name,
                columns=tuple(dict.fromkeys(own)),
                totals=tuple(dict.fromkeys(once)),
                whole=whole,
                is_async=random.random() < 0.2,
                persists=random.random() < 0.3,
            )
        )

    for number in range(1, 4):
        before = [f"each{number}{letter}" for letter in "ab"[: random.randint(0, 2)]]
        for name in before:
            # The newest total is among what is taken, so that all depend on it.
            add(name, [random.choice(columns), *few(columns, 2)], [*totals[-1:], *few(totals, 1)])
            columns.append(name)
        source = before[-1] if before else random.choice(columns)
        once = [] if before else totals[-1:]
        whole = random.choice([list, Iterable])
        add(f"total{number}", [source, *few(columns, 1)], [*once, *few(totals, 1)], whole=whole)
        totals.append(f"total{number}")
    single = random.random() < 0.4
    if not single:
        for letter in "abc"[: random.randint(1, 3)]:
            add(f"last{letter}", [columns[-1], *few(columns, 1)], [totals[-1], *few(totals, 1)])
            columns.append(f"last{letter}")
    elif random.random() < 0.5:
        add("end", [], [totals[-1], *few(totals, 2)])
    return Series(works=tuple(works), single=single)


def figure(work: Work, own: Iterable[int], once: Iterable[int]) -> int:
    """Return what one call makes of numbers; each of them and its place counts."""
    number = sum(map(ord, work.name))
    for value in (*own, *once):
        number = (number * 31 + value + 7) % MODULUS
    return number


def in_plain_python(series: Series, batch: list[int]) -> list[int] | int:
    """Return what *series* makes of *batch*, one list after the other."""
    lists, totals = {ITEMS: batch}, dict[str, int]()
    for work in series.works:
        rows = list(zip(*(lists[name] for name in work.columns), strict=True))
        once = [totals[name] for name in work.totals]
        if work.whole is not None:
            totals[work.name] = figure(work, [cell for row in rows for cell in row], once)
        elif work.columns:
            lists[work.name] = [figure(work, row, once) for row in rows]
        else:
            totals[work.name] = figure(work, [], once)
    return totals[series.target] if series.single else lists[series.target]


def build(series: Series, name: str = "series") -> Graph:
    """Return the graph of *series*."""
    graph = Graph(name)
    for work in series.works:
        register = graph.register if work.whole is None else graph.register_aggregate
        register(_function(work), name=work.name, persist=Scope.WORKFLOW if work.persists else None)
    return graph


def kind(name: str) -> Any:
    """Return the annotation of the value called *name*; the items themselves have no name."""
    return Money if name == ITEMS else Annotated[Money, Named(name)]


def key(name: str) -> ValueKey:
    """Return the identity of the value called *name*."""
    return ValueKey(Money, "" if name == ITEMS else name)


def money(numbers: Iterable[int]) -> list[Money]:
    """Return the messages of *numbers*."""
    return [Money(cents=number) for number in numbers]


def declare(series: Series) -> Callable[..., Any]:
    """Return the function that declares a GraphTask of *series*."""

    def task(items: Any) -> Any:
        raise NotImplementedError

    one, many = kind(series.target), list[kind(series.target)]  # type: ignore[misc]  # made here
    task.__annotations__ = {"items": list[Money], "return": one if series.single else many}
    return task


def _function(work: Work) -> Callable[..., Any]:
    """Return the step of *work*, annotated with what it takes."""
    names = (*work.columns, *work.totals)
    parameters = ", ".join(names)
    source = f"lambda {parameters}: body({parameters})"
    if work.is_async:
        source = f"async def step({parameters}): return body({parameters})"
    space: dict[str, Any] = {"body": _body(work)}
    exec(source if work.is_async else f"step = {source}", space)  # noqa: S102 -- a function of a wanted number of parameters
    step: Callable[..., Any] = space["step"]
    whole: Any = work.whole
    columns = {name: kind(name) if whole is None else whole[kind(name)] for name in work.columns}
    step.__annotations__ = {
        **columns,
        **{name: kind(name) for name in work.totals},
        "return": kind(work.name),
    }
    return step


def _body(work: Work) -> Callable[..., Money]:
    def body(*inputs: Any) -> Money:
        own, once = inputs[: len(work.columns)], inputs[len(work.columns) :]
        if work.whole is None:
            cells = [each.cents for each in own]
        else:
            cells = [each.cents for row in zip(*own, strict=True) for each in row]
        return Money(cents=figure(work, cells, [each.cents for each in once]))

    return body
