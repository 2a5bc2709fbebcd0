"""How often a run hands work to the pool: each time wakes a thread, which costs more than most of what a run does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from docket_celery.engine.handles import StartedRun
from docket_celery.engine.process.pool import Pool
from docket_celery.engine.process.state import process
from docket_celery.errors import RunCancelled
from docket_celery.graph import Graph
from docket_celery.plan.options import Scope
from docket_celery.store import MemoryStore
from docket_celery.store.records import Lease, RunEnd
from tests.unit.graphs import WAIT_S, add_step, build, deliver, reached, total
from tests.unit.protos.shop_pb2 import Label, Money, Order

SIDES = ["a", "b", "c"]
CHAIN: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["b"], "end": ["c"]}
FAN: dict[str, list[str]] = {**{side: [] for side in SIDES}, "end": SIDES}
THREADS = 4


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what keeps the names of the threads that hand work to the pool, which does it as ever."""
    pool, told = process.runtime(THREADS).pool, list[str]()
    submit = pool.submit

    def note(work: Callable[[], None]) -> None:
        told.append(threading.current_thread().name)
        submit(work)

    monkeypatch.setattr(pool, "submit", note)
    return told


@pytest.fixture
def busy_pool() -> Iterator[Pool]:
    """Keep all threads of the pool busy, so that none comes that is called."""
    pool, go = process.runtime(THREADS).pool, threading.Event()
    inside = threading.Barrier(THREADS + 1, timeout=WAIT_S)

    def wait() -> None:
        inside.wait()
        go.wait(WAIT_S)

    for _ in range(THREADS):
        pool.submit(wait)
    inside.wait()
    yield pool
    go.set()


@pytest.mark.parametrize(("helps", "expected"), [(True, 0), (False, 1)])
def test_a_chain_needs_at_most_one_thread(handed_over: list[str], helps: bool, expected: int) -> None:
    """The caller's thread runs it alone; where that may not, one other does, which also ends the run."""
    assert deliver(build(CHAIN, total), "end", threads=THREADS, helps=helps).value == Money(cents=4)
    assert len(handed_over) == expected


@pytest.mark.parametrize(("helps", "expected"), [(True, 2), (False, 3)])
def test_steps_that_wait_are_given_a_thread_each(handed_over: list[str], helps: bool, expected: int) -> None:
    """Three steps meet at a barrier: one thread each, and none for the step that joins them."""
    barrier = threading.Barrier(3, timeout=WAIT_S)

    def meet(*inputs: Money) -> Money:
        if not inputs:
            barrier.wait()
        return total(*inputs)

    assert deliver(build(FAN, meet), "end", threads=THREADS, helps=helps).value == Money(cents=4)
    assert len(handed_over) == expected


@pytest.mark.usefixtures("busy_pool")
def test_a_thread_is_called_once_until_it_comes(handed_over: list[str]) -> None:
    """The caller's thread runs all steps before the pool has a free one, and has called only for that one."""
    assert deliver(build(FAN, total), "end", threads=THREADS).value == Money(cents=4)
    assert len(handed_over) == 1


@pytest.fixture
def occupied(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Keep the only thread of a pool busy until this is set; when it comes then, one step is many."""
    monkeypatch.setattr("docket_celery.engine.execution._MANY", 0)
    go = threading.Event()
    process.runtime(1).pool.submit(lambda: reached(go))
    yield go
    go.set()


def test_a_thread_that_comes_late_takes_no_step_while_others_end_one_after_the_other(
    occupied: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step on the caller's thread ends after the pool's has looked, and before it looks again."""
    ran_on: list[threading.Thread] = []
    looked, moved = threading.Semaphore(0), threading.Semaphore(0)

    def look(_: float) -> None:
        looked.release()
        assert moved.acquire(timeout=WAIT_S)

    def step(*inputs: Money) -> Money:
        ran_on.append(threading.current_thread())
        if len(ran_on) == 2:
            occupied.set()
        elif len(ran_on) > 2:
            moved.release(9 if inputs else 1)
        if len(ran_on) in (2, 3):
            assert looked.acquire(timeout=WAIT_S)
        return total(*inputs)

    monkeypatch.setattr("docket_celery.engine.execution.time.sleep", look)
    sides = ["a", "b", "c", "d"]
    graph = build({**{side: [] for side in sides}, "end": sides}, step)
    assert deliver(graph, "end", threads=1).value == Money(cents=5)
    assert ran_on == [ran_on[0]] * 5


def test_a_thread_that_comes_late_takes_a_step_while_another_holds_up_the_others(
    occupied: threading.Event,
) -> None:
    """The second step ends only once the third has begun, which the pool's thread alone can begin."""
    ran_on: list[threading.Thread] = []
    third = threading.Event()

    def step(*inputs: Money) -> Money:
        ran_on.append(threading.current_thread())
        if len(ran_on) == 2:
            occupied.set()
            reached(third)
        elif len(ran_on) == 3:
            third.set()
        return total(*inputs)

    assert deliver(build(FAN, step), "end", threads=1).value == Money(cents=4)
    assert ran_on[1] is ran_on[0] is not ran_on[2]


def test_a_step_for_the_pool_does_not_wait_until_others_end(
    occupied: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with a deadline is taken by the pool's thread while the caller's is at its second one."""
    taken, begun = list[int](), threading.Event()

    def step(*inputs: Money) -> Money:
        taken.append(len(inputs))
        if len(taken) == 2:
            occupied.set()
            reached(begun)
        return total(*inputs)

    def timed() -> Money:
        begun.set()
        return total()

    monkeypatch.setattr("docket_celery.engine.execution.time.sleep", lambda _: reached(begun))
    graph = build({**{side: [] for side in SIDES}, "end": [*SIDES, "timed"]}, step)
    add_step(graph, "timed", [], timed, timeout=WAIT_S)
    assert deliver(graph, "end", threads=1).value == Money(cents=5)


class Noting(MemoryStore):
    """A store that keeps the names of the threads that write the end of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.ended_on: list[str] = []
        self.ended = threading.Event()

    def end(self, lease: Lease, end: RunEnd) -> None:
        self.ended_on.append(threading.current_thread().name)
        super().end(lease, end)
        self.ended.set()


def test_one_thread_opens_a_persisted_chain_runs_it_and_writes_its_end(handed_over: list[str]) -> None:
    """The caller hands over the opening of the run; everything else happens on the thread that does it."""
    graph, store, ran_on = Graph("shop"), Noting(), list[str]()

    def note(*inputs: Money) -> Money:
        ran_on.append(threading.current_thread().name)
        return total(*inputs)

    for name, sources in CHAIN.items():
        add_step(graph, name, sources, note, persist=Scope.WORKFLOW)
    assert deliver(graph, "end", threads=THREADS, store=store).value == Money(cents=4)
    assert len(handed_over) == 1
    assert {*ran_on, *store.ended_on} == {ran_on[0]}
    assert ran_on[0] not in handed_over
    assert (len(ran_on), len(store.ended_on)) == (4, 1)


def test_the_first_step_of_a_persisted_fan_runs_on_the_thread_that_opens_the_run(
    handed_over: list[str],
) -> None:
    """Three steps meet at a barrier: the thread that opened the run is one of theirs, and calls for the others."""
    graph, barrier = Graph("shop"), threading.Barrier(3, timeout=WAIT_S)

    def meet(*inputs: Money) -> Money:
        if not inputs:
            barrier.wait()
        return total(*inputs)

    for name, sources in FAN.items():
        add_step(graph, name, sources, meet, persist=Scope.WORKFLOW)
    assert deliver(graph, "end", threads=THREADS, store=MemoryStore()).value == Money(cents=4)
    assert len(handed_over) == 3


def test_a_step_that_cancels_its_own_run_does_not_write_the_end_itself() -> None:
    """Its thread is inside the user's code, perhaps in a transaction: another one does it."""
    graph, store, ran_on, begun = Graph("shop"), Noting(), list[str](), threading.Event()
    runs: list[StartedRun[Label]] = []

    @graph.step(persist=Scope.WORKFLOW)
    def ship(order: Order) -> Label:
        ran_on.append(threading.current_thread().name)
        reached(begun)
        assert runs[0].cancel()
        reached(store.ended)
        return Label()

    runs.append(graph.start(Label, Order(), store=store))
    begun.set()
    with pytest.raises(RunCancelled):
        runs[0].result(WAIT_S)
    assert len(store.ended_on) == 1
    assert store.ended_on != ran_on
