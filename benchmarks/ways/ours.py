"""This library in process: graphs of no-op steps, and of steps that persist."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any

from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import Int64Value, UInt64Value

from benchmarks.host import Run, repeat
from benchmarks.ways import steps
from docket_celery import Graph, Named, Scope
from docket_celery.store import SQLStore
from examples.parallel.parallel_pb2 import EnrichedUser, UserID

VALUE = Int64Value()


Made = UInt64Value
"""What the last step makes: a target is a type without a name."""


def key(number: int) -> Any:
    """Return how annotations name value *number*; 0 is given, which no name tells apart."""
    return Annotated[Int64Value, Named(f"v{number}")] if number else Int64Value


def numbered(name: str, graph: Sequence[Sequence[int]], **options: Any) -> Graph:
    """Return the graph of *graph*'s steps, each with *options*; the last one makes `Made`."""
    return _registered(name, _bodies(graph), **options)


def _registered(name: str, bodies: Sequence[Callable[..., Message]], **options: Any) -> Graph:
    made = Graph(name)
    for number, body in enumerate(bodies, start=1):
        made.register(body, name=f"v{number}", **options)
    return made


def _bodies(graph: Sequence[Sequence[int]]) -> list[Callable[..., Message]]:
    return [_body(sources, made, last=made == len(graph)) for made, sources in enumerate(graph, start=1)]


def _body(sources: Sequence[int], made: int, *, last: bool) -> Callable[..., Message]:
    def body(*values: Int64Value) -> Int64Value:
        return values[0]

    def last_body(*_: Int64Value) -> Made:
        return Made()

    step: Any = last_body if last else body
    step.__signature__ = inspect.Signature(
        [inspect.Parameter(f"v{source}", inspect.Parameter.POSITIONAL_OR_KEYWORD) for source in sources]
    )
    step.__annotations__ = {f"v{source}": key(source) for source in sources}
    step.__annotations__["return"] = Made if last else key(made)
    found: Callable[..., Message] = step
    return found


def enrichment(name: str, fetches: Sequence[Callable[..., Any]] = steps.FETCHES, **options: Any) -> Graph:
    """Return three fetches and a join."""
    graph = Graph(name)
    for step in (*fetches, steps.enrich_user):
        graph.register(step, **options)
    return graph


@contextmanager
def in_process(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Graphs of no-op steps, and three sleeps."""
    fan, sleeps = enrichment("fan"), enrichment("sleeps", steps.SLOW_FETCHES)
    user = UserID(id="u")
    figures = {
        "fan": repeat(lambda: fan.execute(EnrichedUser, user)),
        "sleeps": repeat(lambda: sleeps.execute(EnrichedUser, user)),
    }
    for length in (10, 100):
        figures[f"chain_{length}"] = repeat(_execution(numbered(f"chain{length}", steps.chain(length))))
    yield figures


def _execution(graph: Graph, **options: Any) -> Callable[[], object]:
    return lambda: graph.execute(Made, VALUE, **options)


@contextmanager
def random_graphs(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Large graphs: read and checked, and run. The functions are there before, as in the module of a service."""
    figures: dict[str, Run] = {}
    for size in (1000, 10_000):
        bodies = _bodies(steps.random_graph(size))

        def compile_it(bodies: Sequence[Callable[..., Message]] = bodies) -> None:
            _registered("random", bodies).validate()

        figures[f"compile_{size}"] = repeat(compile_it)
        figures[f"run_{size}"] = repeat(_execution(_registered(f"random-run-{size}", bodies)))
    yield figures


@contextmanager
def persisted(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Runs whose steps keep their outputs in Postgres."""
    store = SQLStore(options["database"])
    store.migrate()
    chain = numbered("chain", steps.chain(4), persist=Scope.WORKFLOW)
    one = numbered("one", steps.chain(1), persist=Scope.WORKFLOW)
    fan = enrichment("fan", persist=Scope.WORKFLOW)
    user = UserID(id="u")

    def run_chain(execution_id: str = "") -> object:
        return chain.execute(Made, VALUE, execution_id=execution_id or uuid.uuid4().hex, store=store)

    def run_fan() -> object:
        return fan.execute(EnrichedUser, user, execution_id=uuid.uuid4().hex, store=store)

    run_chain("again")
    with ThreadPoolExecutor(8) as callers:

        def run_on_8(count: int) -> None:
            for made in [callers.submit(run_chain) for _ in range(count)]:
                made.result()

        figures: dict[str, Run] = {
            "chain": repeat(run_chain),
            "fan": repeat(run_fan),
            "threads_8": run_on_8,
            "again": repeat(lambda: run_chain("again")),
            "one_step": repeat(lambda: one.execute(Made, VALUE, execution_id=uuid.uuid4().hex, store=store)),
        }
        for hits in (1, 4, 8):
            shared = numbered(f"hits{hits}", steps.chain(hits), persist=Scope.GLOBAL)
            figures[f"hits_{hits}"] = repeat(_execution(shared, store=store))
        yield figures
