"""Graphs of any shape over one message type, and runs whose threads a test chooses and closes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Annotated, Any, NamedTuple, TypeVar

from google.protobuf.message import Message

from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run_context import OnEnd, RunOutcome, Submission
from docket_celery.graph import Graph
from docket_celery.plan.annotation import Named, ValueKey
from docket_celery.store.contract import Store
from tests.unit.protos.shop_pb2 import Money

T = TypeVar("T")
M = TypeVar("M", bound=Message)

WAIT_S = float(os.environ.get("TEST_WAIT_S", "30"))
"""How long a test waits for what must happen; passing it is a failure, never a measurement."""


class Ended(NamedTuple):
    """How an execution told its end."""

    values: tuple[object, ...] = ()
    error: BaseException | None = None


def telling(tell: Callable[[Ended], None]) -> OnEnd:
    """Return what an execution calls at its end, as one value for *tell*."""
    return lambda values, error: tell(Ended(tuple(values), error))


def value(name: str) -> Any:
    """Return the annotation of the value called *name*."""
    return Annotated[Money, Named(name)]


def key(name: str) -> ValueKey:
    """Return the identity of the value called *name*."""
    return ValueKey(Money, name)


def add_step(
    graph: Graph, name: str, sources: Sequence[str], body: Callable[..., Money], **options: Any
) -> None:
    """Register a step that makes the value *name* from the values *sources* by ``body(*messages)``."""

    def step(*inputs: Money) -> Money:
        return body(*inputs)

    parameters = [f"p{index}" for index in range(len(sources))]
    source = f"lambda {', '.join(parameters)}: step({', '.join(parameters)})"
    call: Any = eval(source, {"step": step})  # noqa: S307 -- a function of a wanted number of parameters
    call.__annotations__ = {p: value(s) for p, s in zip(parameters, sources, strict=True)}
    call.__annotations__["return"] = value(name)
    graph.register(call, name=name, **options)


def build(edges: Mapping[str, Sequence[str]], body: Callable[..., Money], name: str = "shape") -> Graph:
    """Return a graph with one step for each key of *edges*."""
    graph = Graph(name)
    for step, sources in edges.items():
        add_step(graph, step, sources, body)
    return graph


def total(*inputs: Money) -> Money:
    """Add 1 to the sum of the inputs: what a sequential model computes as easily."""
    return Money(cents=1 + sum(money.cents for money in inputs) % 1_000_003)


def deliver(
    graph: Graph,
    target: str,
    given: Mapping[str, int] | None = None,
    *,
    threads: int = 4,
    helps: bool = True,
    store: Store | None = None,
    **facts: Any,
) -> RunOutcome:
    """Run *graph* to the value *target* on *threads* threads and return how it ended; never hangs a test."""
    names = list(given or {})
    submission = replace(Submission(execution_id="run", may_help=helps, listeners=graph.listeners), **facts)
    return within(
        lambda: graph.deliver(
            graph.compiled(key(target), tuple(key(name) for name in names)),
            [Money(cents=(given or {})[name]) for name in names],
            submission,
            Settings(threads=threads),
            store=store,
        )
    )


def execute(
    graph: Graph,
    target: type[M],
    *inputs: Message,
    threads: int = 4,
    helps: bool = True,
    store: Store | None = None,
    **facts: Any,
) -> M:
    """Like `Graph.execute` on *threads* threads, from the calling thread."""
    outcome = graph.deliver(
        graph.plan_for(ValueKey(target), inputs),
        inputs,
        replace(Submission(execution_id="run", may_help=helps, listeners=graph.listeners), **facts),
        Settings(threads=threads),
        store=store,
    )
    if outcome.error is not None:
        raise outcome.error
    assert isinstance(outcome.value, target)
    return outcome.value


def within(call: Callable[[], T]) -> T:
    """Make *call* on a thread of its own and return its result, or fail if it takes longer than `WAIT_S`."""
    return start(call).result(WAIT_S)


def start(call: Callable[[], T]) -> Future[T]:
    """Make *call* on a daemon thread: a test that hangs there fails and the process can still end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 -- it is the test's to judge
            future.set_exception(error)

    threading.Thread(target=run, name="test-caller", daemon=True).start()
    return future


def pass_on(mine: threading.Event, theirs: threading.Event) -> None:
    """Say *mine*, then wait for *theirs*."""
    mine.set()
    reached(theirs)


def reached(event: threading.Event) -> None:
    """Wait for *event*; fail if it does not come."""
    assert event.wait(WAIT_S), "what was waited for did not happen"
