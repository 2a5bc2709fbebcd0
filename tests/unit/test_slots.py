"""``max_concurrent``: how many calls of one step run at once in a process."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from docket_celery.engine.execution import Help, Scheduler
from docket_celery.engine.process.inline import InlineRuntime
from docket_celery.engine.process.limits import Slots
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.process.timer import Alarm, Timer
from docket_celery.engine.run_context import RunContext, Submission
from docket_celery.errors import AbortError, RunCancelled, StepFailed, StepTimedOut, TooManyAbandoned
from docket_celery.graph import Graph
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import FixedBackoff, RetryPolicy, Scope
from docket_celery.store import MemoryStore
from docket_celery.store.records import Checkpoint, Lease, StepExecution
from tests.infra.processes import wait_until
from tests.unit.graphs import (
    WAIT_S,
    Ended,
    add_step,
    execute,
    key,
    reached,
    start,
    telling,
    total,
    value,
    within,
)
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Reservation, Shipment


class Gauge:
    """Counts how many are inside, and keeps the most and the order of entry."""

    def __init__(self) -> None:
        self.now, self.most = 0, 0
        self.entered: list[str] = []
        self._lock = threading.Lock()

    @contextmanager
    def inside(self, who: str) -> Generator[None]:
        """Be inside."""
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.entered.append(who)
        try:
            yield
        finally:
            with self._lock:
                self.now -= 1


def slots_in(graph: Graph, name: str = "charge") -> Slots:
    """Return this process's slots of a step."""
    (step,) = (step for step in graph._read().steps if step.name == name)
    slots = process.slots_of(step)
    assert slots is not None
    return slots


def in_line(graph: Graph, count: int) -> None:
    """Wait until *count* calls of the step charge wait for a slot."""
    wait_until(lambda: len(slots_in(graph).line) == count, within_s=WAIT_S, what=f"{count} in the line")


def holding(**options: Any) -> tuple[Graph, threading.Event, threading.Event]:
    """Return a graph whose step charge holds its one slot for the order "holder" until told; others are quick."""
    graph, inside, leave = Graph("shop"), threading.Event(), threading.Event()

    @graph.step(max_concurrent=1, **options)
    def charge(order: Order, ctx: StepContext) -> Charge:
        if order.order_id == "holder":
            inside.set()
            reached(leave)
        return Charge(charge_id=f"{order.order_id} {ctx.attempt}")

    return graph, inside, leave


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("is_async", [False, True])
def test_no_more_calls_run_at_once_than_there_are_slots(threads: int, is_async: bool) -> None:
    """Over 30 runs at once, of pools of any size, two calls of the step are the most; all runs end."""
    graph, gauge = Graph("shop"), Gauge()

    def charge(order: Order) -> Charge:
        with gauge.inside(order.order_id):
            threading.Event().wait(0.002)
        return Charge(charge_id=order.order_id)

    async def charge_on_loop(order: Order) -> Charge:
        with gauge.inside(order.order_id):
            await asyncio.sleep(0.002)
        return Charge(charge_id=order.order_id)

    graph.register(charge_on_loop if is_async else charge, name="charge", max_concurrent=2)
    runs = [
        start(lambda n=n: execute(graph, Charge, Order(order_id=str(n)), threads=threads, helps=n % 2 == 0))  # type: ignore[misc] # n is bound
        for n in range(30)
    ]
    assert [run.result(WAIT_S).charge_id for run in runs] == [str(n) for n in range(30)]
    assert gauge.most <= 2
    assert slots_in(graph).free == 2


def test_a_slot_is_handed_on_in_the_order_of_asking() -> None:
    """Five runs that came one after another get it in that order."""
    graph, gauge = Graph("shop"), Gauge()
    leave = threading.Event()

    @graph.step(max_concurrent=1)
    def charge(order: Order) -> Charge:
        with gauge.inside(order.order_id):
            reached(leave)
        return Charge()

    runs = [start(lambda: execute(graph, Charge, Order(order_id="0")))]
    wait_until(lambda: gauge.now == 1, within_s=WAIT_S, what="the first call")
    for n in range(1, 6):
        runs.append(start(lambda n=n: execute(graph, Charge, Order(order_id=str(n)), helps=False)))  # type: ignore[misc] # n is bound
        in_line(graph, n)
    leave.set()
    for run in runs:
        run.result(WAIT_S)
    assert gauge.entered == ["0", "1", "2", "3", "4", "5"]


def test_whoever_waits_for_a_slot_holds_no_thread() -> None:
    """On a pool of one thread other steps of the same run go on, and so do other runs."""
    graph, inside, leave = holding()
    labelled = threading.Event()

    @graph.step
    def label(order: Order) -> Label:
        labelled.set()
        return Label()

    @graph.step
    def ship(charge: Charge, label: Label) -> Shipment:
        return Shipment(tracking_id=charge.charge_id)

    holder = start(lambda: execute(graph, Charge, Order(order_id="holder"), threads=2, helps=False))
    reached(inside)
    waiter = start(lambda: execute(graph, Shipment, Order(order_id="w"), threads=1, helps=False))
    reached(labelled)
    in_line(graph, 1)
    assert within(lambda: execute(graph, Label, Order(), threads=1, helps=False)) == Label()
    leave.set()
    assert waiter.result(WAIT_S) == Shipment(tracking_id="w 1")
    holder.result(WAIT_S)


def test_a_run_without_threads_waits_for_a_slot_of_another_run() -> None:
    """Inline runs share the slots with all others of the process."""
    graph, inside, leave = holding()
    holder = start(lambda: execute(graph, Charge, Order(order_id="holder"), threads=0))
    reached(inside)
    waiter = start(lambda: execute(graph, Charge, Order(order_id="w"), threads=0))
    in_line(graph, 1)
    leave.set()
    assert waiter.result(WAIT_S) == Charge(charge_id="w 1")
    holder.result(WAIT_S)


def test_an_abandoned_thread_keeps_its_slot_until_it_returns() -> None:
    """What the limit protects is still in use: the next attempt waits for the late return, not for the timeout."""
    graph, gauge, leave = Graph("shop"), Gauge(), threading.Event()

    @graph.step(max_concurrent=1, timeout=0.05, retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0)))
    def charge(order: Order, ctx: StepContext) -> Charge:
        with gauge.inside(str(ctx.attempt)):
            if ctx.attempt == 1:
                reached(leave)
        return Charge(charge_id=str(ctx.attempt))

    run = start(lambda: execute(graph, Charge, Order()))
    in_line(graph, 1)
    assert gauge.entered == ["1"]
    leave.set()
    assert run.result(WAIT_S) == Charge(charge_id="2")
    assert gauge.most == 1


def test_a_call_that_is_refused_gives_its_slot_back() -> None:
    """Too many threads are stuck when it is its turn: the run fails, the slot is free for whoever comes later."""
    stuck, leave, go, waits = Graph("stuck"), threading.Event(), threading.Event(), threading.Event()
    graph = Graph("shop")

    @stuck.step(timeout=0.02)
    def hang(order: Order) -> Label:
        reached(leave)
        return Label()

    @graph.step
    async def reserve(order: Order) -> Reservation:
        waits.set()
        while not go.is_set():  # noqa: ASYNC110 -- set by a thread
            await asyncio.sleep(0.001)
        return Reservation()

    @graph.step(max_concurrent=1, timeout=WAIT_S)
    def charge(reservation: Reservation) -> Charge:
        return Charge()

    run = start(lambda: execute(graph, Charge, Order(), threads=1))
    reached(waits)
    for _ in range(2):
        with pytest.raises(StepTimedOut):
            within(lambda: execute(stuck, Label, Order(), threads=1))
    go.set()
    with pytest.raises(TooManyAbandoned):
        run.result(WAIT_S)
    assert slots_in(graph).free == 1
    leave.set()


def test_a_call_whose_deadline_cannot_be_watched_gives_its_slot_back() -> None:
    """There is no thread for the timer: the code is not called, and the slot is free again."""
    graph = Graph("shop")

    @graph.step(max_concurrent=1, timeout=WAIT_S)
    def charge(order: Order) -> Charge:
        raise AssertionError("called without its deadline")

    class Broken(Timer):
        def after(self, delay_s: float, call: Callable[[], None]) -> Alarm:
            raise RuntimeError(f"can't start new thread for {call} in {delay_s} s")

    process.runtime(1).timer = Broken()
    with pytest.raises(StepFailed, match="can't start new thread"):
        within(lambda: execute(graph, Charge, Order(), threads=1))
    assert slots_in(graph).free == 1


def test_a_cancelled_coroutine_keeps_its_slot_until_it_has_cleaned_up() -> None:
    """Its timeout cancels it, and its clean-up still uses what the limit protects."""
    graph, gauge = Graph("shop"), Gauge()
    cleaning, clean = threading.Event(), threading.Event()

    @graph.step(max_concurrent=1, timeout=0.5, retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0)))
    async def charge(order: Order, ctx: StepContext) -> Charge:
        with gauge.inside(str(ctx.attempt)):
            try:
                await asyncio.sleep(3600 if ctx.attempt == 1 else 0)
            finally:
                if ctx.attempt == 1:
                    cleaning.set()
                    await asyncio.to_thread(reached, clean)
        return Charge(charge_id=str(ctx.attempt))

    run = start(lambda: execute(graph, Charge, Order()))
    reached(cleaning)
    in_line(graph, 1)
    clean.set()
    assert run.result(WAIT_S) == Charge(charge_id="2")
    assert gauge.most == 1


def test_a_coroutine_that_is_cancelled_before_it_begins_gives_its_slot_back() -> None:
    """The loop was busy all the while; nothing of the step ran."""
    graph, busy, leave = Graph("shop"), threading.Event(), threading.Event()

    @graph.step(max_concurrent=1, timeout=0.05)
    async def charge(order: Order) -> Charge:
        return Charge(charge_id="ran")

    @graph.step
    async def label(order: Order) -> Label:
        busy.set()
        leave.wait(WAIT_S)
        return Label()

    blocker = start(lambda: execute(graph, Label, Order()))
    reached(busy)
    with pytest.raises(StepTimedOut):
        within(lambda: execute(graph, Charge, Order()))
    leave.set()
    blocker.result(WAIT_S)
    assert within(lambda: execute(graph, Charge, Order())) == Charge(charge_id="ran")


def test_the_slot_of_a_coroutine_whose_loop_was_closed_goes_to_the_line() -> None:
    """Only its finalizer gives it back, while another run waits for it already."""
    graph, inside, close = Graph("shop"), threading.Event(), threading.Event()

    @graph.step(max_concurrent=1)
    async def charge(order: Order) -> Charge:
        if order.order_id == "holder":
            inside.set()
            await asyncio.sleep(3600)
        return Charge()

    def hold() -> None:
        loop = asyncio.new_event_loop()
        run = loop.create_task(graph.aexecute(Charge, Order(order_id="holder")))
        while not close.is_set():
            loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        del run

    holder = start(hold)
    reached(inside)
    waiter = start(lambda: execute(graph, Charge, Order()))
    in_line(graph, 1)
    close.set()
    holder.result(WAIT_S)
    gc.collect()
    assert waiter.result(WAIT_S) == Charge()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_failure_gives_the_slot_back_and_a_backoff_needs_none(is_async: bool) -> None:
    """While one run waits an hour to try again, others get the slot."""
    graph = Graph("shop")
    policy = RetryPolicy(max_attempts=2, backoff=FixedBackoff(3600))

    def charge(order: Order) -> Charge:
        if order.order_id == "bad":
            raise ConnectionError("again")
        return Charge(charge_id=order.order_id)

    async def charge_on_loop(order: Order) -> Charge:
        return charge(order)

    graph.register(charge_on_loop if is_async else charge, name="charge", max_concurrent=1, retry=policy)
    run = graph.start(Charge, Order(order_id="bad"))
    wait_until(
        lambda: bool(getattr(run._run._execution, "_waiting", None)), within_s=WAIT_S, what="the backoff"
    )
    assert within(lambda: execute(graph, Charge, Order(order_id="good"))) == Charge(charge_id="good")
    run.cancel()
    with pytest.raises(RunCancelled):
        run.result(WAIT_S)


def test_a_slot_is_not_held_while_the_result_is_saved() -> None:
    """A slow database does not slow down whoever waits for the step's code."""
    saving, go_on = threading.Event(), threading.Event()

    class SlowStore(MemoryStore):
        def save(self, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None) -> Checkpoint:
            if lease.execution_id == "slow":
                saving.set()
                reached(go_on)
            return super().save(lease, checkpoint, execution)

    graph = Graph("shop", store=SlowStore())

    @graph.step(max_concurrent=1, persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        return Charge(charge_id=order.order_id)

    @graph.step
    def ship(charge: Charge) -> Shipment:
        return Shipment(tracking_id=charge.charge_id)

    slow = start(lambda: graph.execute(Shipment, Order(order_id="s"), execution_id="slow"))
    reached(saving)
    quick = within(lambda: graph.execute(Shipment, Order(order_id="q"), execution_id="quick"))
    assert quick == Shipment(tracking_id="q")
    go_on.set()
    assert slow.result(WAIT_S) == Shipment(tracking_id="s")


def test_a_cancelled_run_leaves_the_line() -> None:
    """Its place is not handed a slot that nobody would give back."""
    graph, inside, leave = holding()
    holder = start(lambda: execute(graph, Charge, Order(order_id="holder")))
    reached(inside)
    gone = graph.start(Charge, Order(order_id="gone"))
    in_line(graph, 1)
    stays = start(lambda: execute(graph, Charge, Order(order_id="stays")))
    in_line(graph, 2)
    gone.cancel()
    with pytest.raises(RunCancelled):
        gone.result(WAIT_S)
    in_line(graph, 1)
    leave.set()
    assert stays.result(WAIT_S) == Charge(charge_id="stays 1")
    holder.result(WAIT_S)
    assert slots_in(graph).free == 1


def test_a_failing_run_takes_its_waiting_step_back() -> None:
    """Nothing new starts: the step that stood in the line never begins, and only the real failure is reported."""
    graph, inside, leave = holding()
    waiting = threading.Event()

    @graph.step
    def label(order: Order) -> Label:
        reached(waiting)
        raise ValueError("no label")

    @graph.step
    def ship(charge: Charge, label: Label) -> Shipment:
        return Shipment()

    holder = start(lambda: execute(graph, Charge, Order(order_id="holder")))
    reached(inside)
    fails = start(lambda: execute(graph, Shipment, Order(order_id="w"), helps=False))
    in_line(graph, 1)
    waiting.set()
    with pytest.raises(StepFailed, match="no label") as caught:
        fails.result(WAIT_S)
    assert caught.value.others == ()
    in_line(graph, 0)
    leave.set()
    holder.result(WAIT_S)


@pytest.mark.parametrize("ending", ["closed", "failing"])
def test_a_run_that_has_ended_takes_no_place_in_the_line(
    ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that asks for a slot only then gets none, and nobody has to pass it over."""
    graph = Graph("shop")

    @graph.step(max_concurrent=1)
    def charge(order: Order) -> Charge:
        raise AssertionError("called after the end")

    submission = Submission(execution_id="o-1")
    context = RunContext(graph="shop", submission=submission, settings=Settings(), runtime=InlineRuntime())
    outcomes: list[Ended] = []
    scheduler = Scheduler(
        graph.plan(Charge, Order), [Order()], context, telling(outcomes.append), helps=Help.ALL
    )

    def end_first(*_: object) -> bool:
        setattr(scheduler, ending, True)
        return False

    monkeypatch.setattr(Slots, "lent", end_first)
    scheduler.start()
    assert outcomes == ([Ended()] if ending == "failing" else [])
    assert (slots_in(graph).free, list(slots_in(graph).line)) == (1, [])


def test_a_step_that_stops_all_leaves_no_slot_taken() -> None:
    """AbortError gives it back like any other end."""
    graph = Graph("shop")

    @graph.step(max_concurrent=1)
    def charge(order: Order) -> Charge:
        raise AbortError("stop")

    for _ in range(3):
        with pytest.raises(AbortError):
            within(lambda: execute(graph, Charge, Order()))
    assert slots_in(graph).free == 1


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_a_run_inside_a_step_shares_the_slot_of_that_step(threads: int) -> None:
    """A step that runs its own graph for a smaller order does not wait for itself."""
    graph = Graph("shop")

    @graph.step(max_concurrent=1)
    def charge(order: Order) -> Charge:
        if not order.amount_cents:
            return Charge()
        inner = execute(graph, Charge, Order(amount_cents=order.amount_cents - 1), threads=threads)
        return Charge(charge_id=inner.charge_id + "i")

    assert within(lambda: execute(graph, Charge, Order(amount_cents=3), threads=threads)).charge_id == "iii"
    assert slots_in(graph).free == 1


def test_a_context_that_outlives_its_call_shares_nothing_any_more() -> None:
    """What a call has left running stands in the line like everybody else once the call has ended."""
    graph, inside, leave, go = Graph("shop"), threading.Event(), threading.Event(), threading.Event()
    left: list[Future[Charge]] = []

    @graph.step(max_concurrent=1)
    def charge(order: Order) -> Charge:
        if order.order_id == "starter":
            context = contextvars.copy_context()

            def later() -> Charge:
                reached(go)
                return execute(graph, Charge, Order(order_id="left"))

            left.append(start(lambda: context.run(later)))
        if order.order_id == "holder":
            inside.set()
            reached(leave)
        return Charge(charge_id=order.order_id)

    within(lambda: execute(graph, Charge, Order(order_id="starter")))
    holder = start(lambda: execute(graph, Charge, Order(order_id="holder")))
    reached(inside)
    go.set()
    in_line(graph, 1)
    leave.set()
    assert left[0].result(WAIT_S) == Charge(charge_id="left")
    holder.result(WAIT_S)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_slots_of_its_own() -> None:
    """The parent's one is taken while the child is made; the child does not wait for it."""
    graph, inside, leave = holding()
    holder = start(lambda: execute(graph, Charge, Order(order_id="holder"), helps=False))
    reached(inside)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            got = within(lambda: execute(graph, Charge, Order(order_id="child")))
            status = 0 if got == Charge(charge_id="child 1") else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert slots_in(graph).free == 0
    leave.set()
    holder.result(WAIT_S)


def test_each_step_has_its_own_limit() -> None:
    """Two steps of one preset do not share slots."""
    graph, inside, leave = holding()

    @graph.step(max_concurrent=1)
    def label(order: Order) -> Label:
        return Label(text="at once")

    holder = start(lambda: execute(graph, Charge, Order(order_id="holder")))
    reached(inside)
    assert within(lambda: execute(graph, Label, Order())) == Label(text="at once")
    leave.set()
    holder.result(WAIT_S)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), limit=st.integers(1, 3), threads=st.sampled_from([0, 1, 2, 8]))
def test_any_mix_of_runs_ends_and_respects_the_limit(data: st.DataObject, limit: int, threads: int) -> None:
    """Runs that succeed, fail, retry, time out, abort or are cancelled, all at once: no slot is lost."""
    kinds = data.draw(
        st.lists(
            st.sampled_from(["good", "fail", "retry", "late", "abort", "cancel"]), min_size=1, max_size=12
        )
    )
    is_async = data.draw(st.booleans())
    graph, gauge = Graph("shape"), Gauge()

    def body(money: Money) -> Money:
        kind = kinds[money.cents]
        with gauge.inside(kind):
            if kind == "late":
                threading.Event().wait(0.03)
            if kind == "abort":
                raise AbortError("stop")
            if kind in ("fail", "retry"):
                raise ValueError(kind)
            return total(money)

    async def on_loop(money: Any) -> Any:
        return body(money)

    options: dict[str, Any] = {
        "max_concurrent": limit,
        "retry": RetryPolicy(max_attempts=2, backoff=FixedBackoff(0.001)),
        "timeout": 0.02,
        "retriable": lambda error: "retry" in str(error),
    }
    graph.register(_typed(on_loop if is_async else body), name="limited", **options)
    add_step(graph, "after", ["limited"], total)
    runs = [start(lambda n=n: _one(graph, n, kinds[n], threads)) for n in range(len(kinds))]  # type: ignore[misc] # n is bound
    for run in runs:
        run.result(WAIT_S)
    wait_until(lambda: slots_in(graph, "limited").free == limit, within_s=WAIT_S, what="all slots given back")
    assert gauge.most <= limit
    assert not slots_in(graph, "limited").line


def _typed(call: Any) -> Any:
    call.__annotations__ = {"money": value("in"), "return": value("limited")}
    return call


def _one(graph: Graph, number: int, kind: str, threads: int) -> None:

    timeout_s = 0.0 if kind == "cancel" else None
    outcome = graph.deliver(
        graph.compiled(key("after"), (key("in"),)),
        [Money(cents=number)],
        Submission(execution_id=str(number), timeout_s=timeout_s, may_help=False),
        Settings(threads=threads),
    )
    assert outcome.value is not None or outcome.error is not None
