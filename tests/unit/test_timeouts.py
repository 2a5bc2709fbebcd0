"""A thousand attempts that end right around their deadlines: whoever is first decides, everywhere alike."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest

from docket_celery.engine.process.state import process
from docket_celery.errors import StepTimedOut, TooManyAbandoned
from docket_celery.graph import Graph
from docket_celery.observe.events import Event, EventKind
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import FixedBackoff, RetryPolicy, Scope
from docket_celery.store import MemoryStore
from docket_celery.store.records import RunState
from tests.unit.graphs import WAIT_S, execute, reached, start, within
from tests.unit.protos.shop_pb2 import Charge, Label, Order
from tests.unit.stage import Deadlines, MemoryShelf, Shelf, SQLiteShelf, poll

DEADLINE_S = 3600.0
RACE_S = 0.001
THREADS = 4
Body = Callable[[StepContext], None]


class Ledger:
    """One persisted step with a deadline, run many times; each run is checked for one story told everywhere."""

    def __init__(self, shelf: Shelf, body: Body, timeout_s: float) -> None:
        self.shelf, self._body = shelf, body
        self.events: list[Event] = []
        self.graph = Graph("scripted")
        self.graph.register(self.charge, persist=Scope.WORKFLOW, timeout=timeout_s)
        self.graph.listeners.append(self.events.append)
        self.ends = Counter[str]()

    def charge(self, order: Order, ctx: StepContext) -> Charge:
        """Do what the test says and return."""
        self._body(ctx)
        return Charge(charge_id=ctx.execution_id, amount_cents=order.amount_cents)

    def run(self, name: str) -> None:
        """Run once under *name*."""
        try:
            value = execute(
                self.graph, Charge, Order(), threads=THREADS, store=self.shelf.store, execution_id=name
            )
        except StepTimedOut:
            self.ends["timed out"] += 1
        else:
            assert value == Charge(charge_id=name)
            self.ends["value"] += 1

    def check(self) -> None:
        """Compare rows, checkpoints, runs and events of all runs."""
        poll(lambda: process.runtime(THREADS).pool.abandoned() == [])
        heard: dict[str, Counter[EventKind]] = {}
        for event in self.events:
            heard.setdefault(event.execution_id, Counter())[event.kind] += 1
        rows = {row.execution_id: row for row in self.shelf.rows()}
        assert len(rows) == len(self.shelf.rows()) == len(heard) == self.ends.total()
        found = Counter(self.story(name, rows[name].status, kinds) for name, kinds in heard.items())
        assert found == self.ends

    def story(self, name: str, status: str, heard: Counter[EventKind]) -> str:
        """Return how run *name* ended; fail unless checkpoint, run, row and events say so."""
        begun = Counter({EventKind.RUN_STARTED: 1, EventKind.STEP_STARTED: 1, EventKind.RUN_ENDED: 1})
        run = self.shelf.store.find_run("scripted", name)
        assert run is not None
        saved = self.shelf.saved(name)
        if status == "SUCCEEDED":
            assert run.state is RunState.SUCCEEDED
            assert list(saved) == ["charge"]
            assert heard == begun + Counter([EventKind.STEP_SUCCEEDED])
            return "value"
        assert (status, run.state) == ("TIMED_OUT", RunState.FAILED)
        assert run.error is not None
        assert run.error["code"] == StepTimedOut.code
        assert saved == {}, "a late result was saved"
        late = [EventKind.STEP_ABANDONED, EventKind.STEP_FAILED, EventKind.STEP_LATE]
        assert heard == begun + Counter(late)
        return "timed out"


@pytest.fixture(params=["memory", "sqlite"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    """A store, and what it holds."""
    return (
        MemoryShelf() if request.param == "memory" else SQLiteShelf(f"sqlite:///{tmp_path / 'docket.sqlite'}")
    )


def times(shelf: Shelf) -> int:
    """Return how many runs a store gets: a thousand in memory, a sample elsewhere."""
    return 1000 if isinstance(shelf, MemoryShelf) else 100


def test_a_deadline_that_comes_first_wins_a_thousand_times(shelf: Shelf) -> None:
    """Each step returns after its deadline has passed: no result is saved, no run succeeds."""
    deadlines = Deadlines()
    process.runtime(THREADS).timer = deadlines.timer()

    def outlast(ctx: StepContext) -> None:
        deadlines.ring(DEADLINE_S)
        assert ctx.cancelled.wait(WAIT_S)

    trial = Ledger(shelf, outlast, DEADLINE_S)
    for index in range(times(shelf)):
        trial.run(f"o-{index}")
        poll(lambda: process.runtime(THREADS).pool.abandoned() == [])
    trial.check()
    assert trial.ends == {"timed out": times(shelf)}


def test_a_return_that_comes_first_wins_a_thousand_times(shelf: Shelf) -> None:
    """Each alarm is already on its way when the step returns, and arrives after the run: it changes nothing."""
    deadlines = Deadlines()
    process.runtime(THREADS).timer = deadlines.timer()
    rings: list[Callable[[], None]] = []
    trial = Ledger(shelf, lambda _: rings.append(deadlines.take(DEADLINE_S)), DEADLINE_S)
    for index in range(times(shelf)):
        trial.run(f"o-{index}")
    for ring in rings:
        ring()
    trial.check()
    assert trial.ends == {"value": times(shelf)}


def test_a_thousand_races_between_return_and_deadline_each_have_one_end(shelf: Shelf) -> None:
    """Steps return within half a millisecond of their deadline, before or after: who knows, but one of the two."""
    random = Random(17)

    def race(ctx: StepContext) -> None:
        assert ctx.deadline is not None
        until = ctx.deadline + random.uniform(-RACE_S / 2, RACE_S / 2)
        while time.monotonic() < until:
            pass

    trial = Ledger(shelf, race, RACE_S)
    for index in range(times(shelf)):
        trial.run(f"o-{index}")
        poll(lambda: len(process.runtime(THREADS).pool.abandoned()) < THREADS)
    trial.check()


def test_steps_that_never_stop_hold_a_bounded_number_of_threads(caplog: pytest.LogCaptureFixture) -> None:
    """Retries of a stuck step end with the limit, not with the attempts; each thread is reported and comes back."""
    graph, go, heard = Graph("shop"), threading.Event(), list[Event]()

    @graph.step(timeout=0.01, retry=RetryPolicy(max_attempts=1000, backoff=FixedBackoff(0)))
    def charge(order: Order) -> Charge:
        reached(go)
        return Charge()

    @graph.step
    def label(order: Order) -> Label:
        return Label(text="free")

    graph.listeners.append(heard.append)
    pool = process.runtime(2).pool
    with caplog.at_level(logging.WARNING), pytest.raises(TooManyAbandoned, match=r"limit 4\): charge;"):
        within(lambda: execute(graph, Charge, Order(), threads=2))
    assert pool.abandoned() == ["charge"] * 4
    told = [(e.step, e.attempt, e.detail) for e in heard if e.kind is EventKind.STEP_ABANDONED]
    texts = [StepTimedOut("charge", attempt, 0.01).describe() for attempt in (1, 2, 3, 4)]
    assert told == [("charge", attempt, text) for attempt, text in enumerate(texts, 1)]
    logged = [f"run 'run': [DC202] {text}; its thread continues until the step returns" for text in texts]
    assert [record.getMessage() for record in caplog.records if record.name.endswith("attempt")] == logged
    go.set()
    poll(lambda: pool.abandoned() == [])
    assert within(lambda: execute(graph, Label, Order(), threads=2)) == Label(text="free")
    assert within(lambda: execute(graph, Charge, Order(), threads=2)) == Charge()


def test_a_factory_that_never_returns_holds_a_bounded_number_of_threads() -> None:
    """A coroutine needs a thread for its instance: its retries end with the limit too."""
    graph, go = Graph("shop"), threading.Event()

    class Model:
        async def compute(self, order: Order) -> Charge:
            return Charge(charge_id=order.order_id)

    def load() -> Model:
        reached(go)
        return Model()

    retry = RetryPolicy(max_attempts=1000, backoff=FixedBackoff(0))
    graph.register(Model, name="charge", factory=load, timeout=0.01, retry=retry)
    pool = process.runtime(2).pool
    with pytest.raises(TooManyAbandoned, match=r"limit 4\): charge;"):
        within(lambda: execute(graph, Charge, Order(), threads=2))
    assert pool.abandoned() == ["charge"] * 4
    go.set()
    poll(lambda: pool.abandoned() == [])
    assert within(lambda: execute(graph, Charge, Order(order_id="7"), threads=2)) == Charge(charge_id="7")


def test_a_coroutine_whose_instance_is_built_is_refused_no_thread() -> None:
    """It holds none: beside too many stuck threads it runs, with its deadline."""
    graph, go, full, begun = Graph("shop"), threading.Event(), threading.Event(), threading.Event()

    class Model:
        async def compute(self, label: Label) -> Charge:
            return Charge(charge_id=label.text)

    @graph.step
    def label(order: Order) -> Label:
        if order.order_id == "later":
            begun.set()
            reached(full)
        return Label(text=order.order_id)

    graph.register(Model, factory=Model, timeout=DEADLINE_S)
    stuck = Graph("stuck")

    @stuck.step(timeout=0.01, retry=RetryPolicy(max_attempts=4, backoff=FixedBackoff(0)))
    def wait(order: Order) -> Charge:
        reached(go)
        return Charge()

    within(lambda: execute(graph, Charge, Order(order_id="first"), threads=2))
    later = start(lambda: execute(graph, Charge, Order(order_id="later"), threads=2, helps=False))
    reached(begun)
    with pytest.raises(StepTimedOut):
        within(lambda: execute(stuck, Charge, Order(), threads=2))
    full.set()
    assert later.result(WAIT_S) == Charge(charge_id="later")
    go.set()
    poll(lambda: process.runtime(2).pool.abandoned() == [])


def test_runs_in_progress_are_refused_only_what_could_hold_another_thread() -> None:
    """Beside too many stuck threads a step without a deadline still runs, one with a deadline ends its run."""
    go, full = threading.Event(), threading.Event()
    begun = threading.Semaphore(0)

    def shop(timeout_s: float | None) -> Graph:
        graph = Graph("shop")

        @graph.step
        def label(order: Order) -> Label:
            begun.release()
            reached(full)
            return Label(text="free")

        @graph.step(timeout=timeout_s)
        def charge(label: Label) -> Charge:
            return Charge(charge_id=label.text)

        return graph

    stuck = Graph("stuck")

    @stuck.step(timeout=0.01, retry=RetryPolicy(max_attempts=6, backoff=FixedBackoff(0)))
    def wait(order: Order) -> Charge:
        reached(go)
        return Charge()

    graphs = [shop(None), shop(DEADLINE_S)]
    without, timed = (start(partial(execute, g, Charge, Order(), threads=3, helps=False)) for g in graphs)
    for _ in range(2):
        assert begun.acquire(timeout=WAIT_S)
    with pytest.raises(StepTimedOut):
        within(lambda: execute(stuck, Charge, Order(), threads=3))
    assert len(process.runtime(3).pool.abandoned()) == 6
    full.set()
    assert without.result(WAIT_S) == Charge(charge_id="free")
    with pytest.raises(TooManyAbandoned):
        timed.result(WAIT_S)
    go.set()
    poll(lambda: process.runtime(3).pool.abandoned() == [])
    # With the threads back, it runs as any other.
    assert within(lambda: execute(graphs[1], Charge, Order(), threads=3)) == Charge(charge_id="free")


def test_a_step_without_threads_is_never_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Inline runs have no thread to lose: retries go on to their number."""
    store, graph = MemoryStore(), Graph("shop")
    attempts: list[int] = []

    @graph.step(
        persist=Scope.WORKFLOW, timeout=0.001, retry=RetryPolicy(max_attempts=20, backoff=FixedBackoff(0))
    )
    def charge(order: Order, ctx: StepContext) -> Charge:
        attempts.append(ctx.attempt)
        assert ctx.cancelled.wait(WAIT_S)
        return Charge()

    with pytest.raises(StepTimedOut):
        within(lambda: execute(graph, Charge, Order(), threads=0, store=store))
    assert attempts == list(range(1, 21))
