"""``register(Class, factory=...)``: built on first use, once per process, closed in the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Generator
from typing import Any

import pytest

from docket_celery import settings
from docket_celery.engine.process.state import process
from docket_celery.errors import GraphError, RunCancelled, StepFailed, StepTimedOut
from docket_celery.graph import Graph
from docket_celery.observe.events import EventKind
from docket_celery.plan.options import FixedBackoff, RetryPolicy
from tests.unit.graphs import WAIT_S, execute, reached, start, within
from tests.unit.protos.shop_pb2 import Charge, Label, Order
from tests.unit.stage import Deadlines


class Scorer:
    """An object with state and a ``close``."""

    closed: list[str]

    def __init__(self, name: str = "scorer") -> None:
        self.name, self.calls, self.closed = name, 0, []

    def compute(self, order: Order) -> Charge:
        """Count the calls."""
        self.calls += 1
        return Charge(charge_id=f"{order.order_id}{self.name} {self.calls}")

    def close(self) -> None:
        """Say that it was closed."""
        self.closed.append(self.name)


class AsyncScorer:
    """The same for a loop."""

    def __init__(self) -> None:
        self.thread = threading.current_thread().name

    async def compute(self, order: Order) -> Charge:
        """Answer with where it was built."""
        return Charge(charge_id=order.order_id + self.thread)


class Static:
    """``compute`` without an instance."""

    @staticmethod
    def compute(order: Order) -> Charge:
        """Answer."""
        return Charge(charge_id=order.order_id + "static")


class Shared:
    """``compute`` of the class."""

    @classmethod
    def compute(cls, order: Order) -> Charge:
        """Answer."""
        return Charge(charge_id=order.order_id + cls.__name__)


def test_an_instance_is_built_at_the_first_call_and_kept() -> None:
    """Neither registering nor validating nor planning builds it; later calls and runs use the same one."""
    graph, made = Graph("shop"), list[Scorer]()

    def make() -> Scorer:
        made.append(Scorer())
        return made[-1]

    graph.register(Scorer, factory=make)
    graph.validate(Order)
    assert list(graph.plan(Charge, Order)) == ["Scorer"]
    assert made == []
    for number in (1, 2, 3):
        assert within(lambda: execute(graph, Charge, Order())).charge_id == f"scorer {number}"
    assert len(made) == 1
    process.close_instances()
    assert made[0].closed == ["scorer"]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_coroutines_instance_is_built_on_a_step_thread(threads: int) -> None:
    """The loop only awaits: other coroutines go on while a model is loaded."""
    graph = Graph("shop")
    graph.register(AsyncScorer, factory=AsyncScorer)
    name = within(lambda: execute(graph, Charge, Order(), threads=threads, helps=False)).charge_id
    assert name.startswith("docket-step-" if threads else "test-caller")


@pytest.mark.parametrize(("kind", "text"), [(Static, "static"), (Shared, "Shared")])
def test_compute_may_be_static_or_of_the_class(kind: Any, text: str) -> None:
    """All parameters are inputs then, or all but the class."""
    graph = Graph("shop")
    graph.register(kind, factory=kind)
    assert within(lambda: execute(graph, Charge, Order())) == Charge(charge_id=text)


def test_first_calls_at_once_build_one() -> None:
    """Eight runs arrive while the instance is being built; all of them use it."""
    graph, made, go = Graph("shop"), list[int](), threading.Event()

    def make() -> Scorer:
        made.append(1)
        reached(go)
        return Scorer()

    graph.register(Scorer, factory=make)
    runs = [start(lambda: execute(graph, Charge, Order(), threads=8)) for _ in range(8)]
    go.set()
    got = sorted(run.result(WAIT_S).charge_id for run in runs)
    assert len(got) == 8
    assert made == [1]


def test_a_factory_that_raises_fails_the_step_and_the_next_attempt_calls_it_again() -> None:
    """It is judged like the step's own errors: ``retriable``, attempts and backoff."""
    graph, tries = Graph("shop"), list[int]()

    def make() -> Scorer:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("no model server")
        return Scorer()

    graph.register(
        Scorer,
        factory=make,
        retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0)),
        retriable=ConnectionError,
    )
    with pytest.raises(StepFailed, match=r"'Scorer' failed after 2 attempts.*no model server") as caught:
        within(lambda: execute(graph, Charge, Order()))
    cause = caught.value.__cause__
    assert cause is not None
    assert "raised by factory" in cause.__notes__[0]
    assert "make" in cause.__notes__[0]
    assert within(lambda: execute(graph, Charge, Order())) == Charge(charge_id="scorer 1")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_factory_that_takes_too_long_meets_the_steps_timeout(is_async: bool) -> None:
    """Its thread is replaced, so that a pool of one goes on; what it builds late is used by later calls."""
    graph, late, made = Graph("shop"), threading.Event(), threading.Event()

    def make() -> Any:
        reached(late)
        made.set()
        return AsyncScorer() if is_async else Scorer()

    graph.register(AsyncScorer if is_async else Scorer, name="score", factory=make, timeout=0.05)

    @graph.step
    def label(order: Order) -> Label:
        return Label(text="goes on")

    with pytest.raises(StepTimedOut):
        within(lambda: execute(graph, Charge, Order(), threads=1, helps=False))
    assert within(lambda: execute(graph, Label, Order(), threads=1, helps=False)) == Label(text="goes on")
    late.set()
    reached(made)
    assert within(lambda: execute(graph, Charge, Order(), threads=1, helps=False)).charge_id


def test_an_instance_that_comes_after_the_deadline_is_not_called_for_it() -> None:
    """The attempt is told to be late and leaves its slot; its coroutine is not even made."""
    graph, deadlines = Graph("shop"), Deadlines()
    calls: list[str] = []
    process.runtime(2).timer = deadlines.timer()
    waiting, late = threading.Event(), threading.Event()

    class Slow:
        async def compute(self, order: Order) -> Charge:
            calls.append(order.order_id)
            await asyncio.sleep(3600)
            return Charge()

    def make() -> Slow:
        deadlines.ring(3600)
        reached(waiting)
        return Slow()

    retry = RetryPolicy(max_attempts=2, backoff=FixedBackoff(7200))
    graph.register(Slow, name="charge", factory=make, timeout=3600, retry=retry, max_concurrent=1)
    heard = {EventKind.STEP_RETRYING: waiting, EventKind.STEP_LATE: late}
    graph.listeners.append(lambda event: heard.get(event.kind, threading.Event()).set())
    settings(threads=2)
    try:
        run = graph.start(Charge, Order())
    finally:
        settings(threads=None)
    reached(late)
    (step,) = graph._read().steps
    slots = process.slots_of(step)
    assert slots is not None
    assert slots.free == 1
    run.cancel()
    with pytest.raises(RunCancelled):
        run.result(WAIT_S)
    assert calls == []


@pytest.mark.parametrize("built_before", [False, True])
def test_a_coroutine_holds_no_thread_once_its_instance_is_there(built_before: bool) -> None:
    """At its deadline it is cancelled, and no thread is given up for it."""
    graph, deadlines, heard = Graph("shop"), Deadlines(), list[EventKind]()
    process.runtime(2).timer = deadlines.timer()

    class Slow:
        async def compute(self, order: Order) -> Charge:
            deadlines.ring(3600)
            await asyncio.sleep(3600)
            return Charge(charge_id=order.order_id)

    if built_before:
        graph.register(Slow(), timeout=3600)
    else:
        graph.register(Slow, factory=Slow, timeout=3600)
    graph.listeners.append(lambda event: heard.append(event.kind))
    with pytest.raises(StepTimedOut):
        within(lambda: execute(graph, Charge, Order(), threads=2, helps=False))
    assert EventKind.STEP_ABANDONED not in heard
    assert process.runtime(2).pool.abandoned() == []


def test_what_has_no_compute_is_refused_with_the_factorys_name() -> None:
    """And it is closed at once."""
    graph, closed = Graph("shop"), list[str]()

    class Wrong:
        def close(self) -> None:
            closed.append("closed")

    def make_wrong() -> Any:
        return Wrong()

    graph.register(Scorer, factory=make_wrong)
    with pytest.raises(StepFailed, match=r"factory .*make_wrong made Wrong, which has no compute method"):
        within(lambda: execute(graph, Charge, Order()))
    assert closed == ["closed"]


def test_a_context_manager_is_entered_and_left() -> None:
    """A generator with clean-up is a factory; what it yields is the instance."""
    graph, seen = Graph("shop"), list[str]()

    @contextlib.contextmanager
    def scorer() -> Generator[Scorer]:
        seen.append("enter")
        yield Scorer("managed")
        seen.append("leave")

    graph.register(Scorer, factory=scorer)
    assert within(lambda: execute(graph, Charge, Order())) == Charge(charge_id="managed 1")
    assert seen == ["enter"]
    process.close_instances()
    assert seen == ["enter", "leave"]


def test_an_async_close_is_awaited() -> None:
    """On a loop of its own: the one that it was used on may be gone."""
    graph, closed = Graph("shop"), list[str]()

    class Client(AsyncScorer):
        async def close(self) -> None:
            closed.append("closed")

    graph.register(Client, factory=Client)
    within(lambda: execute(graph, Charge, Order()))
    process.close_instances()
    assert closed == ["closed"]


def test_closing_goes_backward_past_errors_and_the_next_call_builds_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first one built is closed last, though the second one's close raises."""
    graph, order = Graph("shop"), list[str]()

    class First(Scorer):
        def close(self) -> None:
            order.append("first")

    class Second:
        def compute(self, charge: Charge) -> Label:
            return Label(text=charge.charge_id)

        def close(self) -> None:
            order.append("second")
            raise OSError("cannot be closed")

    graph.register(First, factory=First)
    graph.register(Second, factory=Second)
    within(lambda: execute(graph, Label, Order()))
    process.close_instances()
    assert order == ["second", "first"]
    assert "Second was not closed properly" in caplog.text
    assert within(lambda: execute(graph, Label, Order())) == Label(text="scorer 1")
    process.close_instances()
    assert order == ["second", "first"] * 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_builds_its_own_and_leaves_its_parents_alone() -> None:
    """Also where the parent has run the graph before, and while another thread of the parent builds."""
    graph, building, go = Graph("shop"), threading.Event(), threading.Event()

    def make() -> Scorer:
        if threading.current_thread().name == "test-caller" and not building.is_set():
            building.set()
            reached(go)
        return Scorer(str(os.getpid()))

    graph.register(Scorer, factory=make)
    first = start(lambda: execute(graph, Charge, Order(), threads=0))
    reached(building)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            got = within(lambda: execute(graph, Charge, Order()))
            process.close_instances()
            status = 0 if got == Charge(charge_id=f"{os.getpid()} 1") else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go.set()
    assert first.result(WAIT_S) == Charge(charge_id=f"{os.getpid()} 1")


class Empty:
    """No ``compute``."""


@pytest.mark.parametrize(
    ("target", "factory", "text"),
    [
        (Scorer(), Scorer, "factory= builds instances of a class"),
        (Scorer.compute, Scorer, "factory= builds instances of a class"),
        (Scorer, "make_scorer", "factory= is a function without parameters, not 'make_scorer'"),
        (Empty, Empty, "Empty has no compute method"),
        (Scorer, None, "Scorer is a class; register an instance of it, or give factory="),
    ],
)
def test_a_factory_that_does_not_fit_is_a_fault(target: Any, factory: Any, text: str) -> None:
    """An instance has been built already, and a class needs one: the report says which."""
    graph = Graph("shop")
    graph.register(target, name="score", factory=factory)
    with pytest.raises(GraphError) as caught:
        graph.validate(Order)
    assert text in caught.value.faults[0]
