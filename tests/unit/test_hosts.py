"""Runs for hosts that do not wait with a thread: an asyncio loop, and a handle."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any, ParamSpec

import pytest
from sqlalchemy import event

from docket_celery.engine.handles import StartedRun
from docket_celery.engine.run_context import Submission
from docket_celery.errors import (
    AbortError,
    InvalidArguments,
    InvalidSettings,
    RunCancelled,
    RunTimedOut,
    StepFailed,
    StepTimedOut,
)
from docket_celery.graph import Graph
from docket_celery.observe.events import Event, EventKind
from docket_celery.plan.context import StepContext, current_context
from docket_celery.plan.options import FixedBackoff, RetryPolicy, Scope
from docket_celery.store import MemoryStore, SQLStore
from docket_celery.store.records import RunState
from tests.unit.graphs import WAIT_S, add_step, key, reached, within
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Shipment

P = ParamSpec("P")

USER: contextvars.ContextVar[str] = contextvars.ContextVar("user", default="nobody")


def on_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on a loop of its own; one that hangs there fails."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            await asyncio.wait_for(test(*args, **kwargs), WAIT_S)

        asyncio.run(bounded())

    return run


class Client:
    """Bound to the loop it is made on, as an httpx.AsyncClient is: its future wakes on no other."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[str] = self.loop.create_future()

    async def get(self) -> str:
        """Return the answer; asyncio refuses to await it from another loop."""
        self.loop.call_later(0.01, self.answer.set_result, "hello")
        return await self.answer


def shipping(
    charge: Callable[[Order], Charge] = lambda order: Charge(charge_id=order.order_id),
    persist: Scope | None = Scope.WORKFLOW,
) -> Graph:
    """Return a graph of two steps: *charge*, then one that ships."""
    graph = Graph("shipping")

    @graph.step(name="charge", persist=persist)
    def pay(order: Order) -> Charge:
        return charge(order)

    @graph.step
    def ship(charge: Charge) -> Shipment:
        return Shipment(tracking_id=f"T-{charge.charge_id}")

    return graph


def wait_for_end(started: StartedRun[Shipment]) -> None:
    """Wait until *started* is done, whichever way."""
    until = time.monotonic() + WAIT_S
    while not started.done():
        assert time.monotonic() < until, "the run did not end"
        time.sleep(0.005)


# --- aexecute --------------------------------------------------------------------------------------------------


@on_loop
async def test_aexecute_returns_what_execute_returns() -> None:
    """Steps on threads and steps on the loop, persisted and not, make one result."""
    graph = Graph("mixed")
    store = MemoryStore()

    @graph.step(persist=Scope.WORKFLOW)
    async def charge(order: Order) -> Charge:
        await asyncio.sleep(0)
        return Charge(charge_id=order.order_id)

    @graph.step(persist=Scope.WORKFLOW)
    def ship(charge: Charge, ctx: StepContext) -> Shipment:
        return Shipment(tracking_id=f"{ctx.values['prefix']}-{charge.charge_id}")

    order = Order(order_id="17")
    shipped = await graph.aexecute(Shipment, order, execution_id="a", context={"prefix": "T"}, store=store)
    assert shipped == Shipment(tracking_id="T-17")
    waited = graph.start(Shipment, order, context={"prefix": "T"}, store=store).result(WAIT_S)
    assert waited == shipped


@on_loop
async def test_async_steps_of_aexecute_run_on_the_callers_loop() -> None:
    """A client made on the caller's loop answers there; from another loop it raises."""
    graph = Graph("fetch")
    client = Client()

    @graph.step
    async def fetch(order: Order, ctx: StepContext) -> Label:
        assert current_context() is ctx
        return Label(text=await client.get())

    assert await graph.aexecute(Label, Order()) == Label(text="hello")


@on_loop
async def test_aexecute_leaves_the_loop_free_while_a_step_blocks_its_thread() -> None:
    """What the loop does meanwhile is what lets the step go on."""
    graph = Graph("blocking")
    inside, go_on = threading.Event(), threading.Event()

    @graph.step
    def wait(order: Order) -> Label:
        inside.set()
        reached(go_on)
        return Label(text=threading.current_thread().name)

    running = asyncio.create_task(graph.aexecute(Label, Order()))
    await asyncio.to_thread(reached, inside)
    assert not running.done()
    go_on.set()
    assert (await running).text.startswith("docket-step-")


@on_loop
async def test_steps_of_aexecute_see_the_callers_contextvars() -> None:
    """On the pool and on the loop; and what a step sets stays with that step."""
    graph = Graph("who")

    @graph.step
    def charge(order: Order) -> Charge:
        seen = USER.get()
        USER.set("somebody else")
        return Charge(charge_id=seen)

    @graph.step
    async def label(charge: Charge) -> Label:
        seen = USER.get()
        USER.set("somebody else")
        return Label(text=f"{charge.charge_id} {seen}")

    USER.set("ann")
    assert await graph.aexecute(Label, Order()) == Label(text="ann ann")
    assert USER.get() == "ann"


@pytest.mark.parametrize("persist", [None, Scope.WORKFLOW])
@on_loop
async def test_aexecute_raises_what_execute_raises(persist: Scope | None) -> None:
    """A failure, an abort and a job that does not fit have their types."""

    def fail(order: Order) -> Charge:
        if order.order_id == "abort":
            raise AbortError("stop")
        raise ValueError(order.order_id)

    graph = shipping(fail, persist)
    with pytest.raises(StepFailed) as failed:
        await graph.aexecute(Shipment, Order(order_id="1"), store=MemoryStore())
    assert failed.value.caused_by(ValueError)
    with pytest.raises(AbortError, match="stop"):
        await graph.aexecute(Shipment, Order(order_id="abort"), store=MemoryStore())
    with pytest.raises(InvalidArguments):
        await graph.aexecute(Shipment, Order(), max_concurrency=0)


@on_loop
async def test_aexecute_retries_async_steps_and_cancels_them_at_their_timeout() -> None:
    """The first attempt hangs on the caller's loop and is cancelled there; the second one answers."""
    graph = Graph("slow")
    ended: list[str] = []

    @graph.step(timeout=0.05, retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0)))
    async def fetch(order: Order, ctx: StepContext) -> Label:
        try:
            if ctx.attempt == 1:
                await asyncio.sleep(WAIT_S)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return Label(text=f"attempt {ctx.attempt}")

    assert await graph.aexecute(Label, Order()) == Label(text="attempt 2")
    assert ended == ["cancelled"]


@on_loop
async def test_aexecute_ends_a_run_at_its_deadline() -> None:
    """Nobody's thread watches over it: the timer does."""
    graph = Graph("late")

    @graph.step
    async def fetch(order: Order) -> Label:
        await asyncio.sleep(WAIT_S)
        return Label()

    with pytest.raises(RunTimedOut):
        await graph.aexecute(Label, Order(), timeout=0.05)


@on_loop
async def test_cancelling_aexecute_cancels_async_steps() -> None:
    """The step's task on the caller's loop is cancelled, and nothing after it starts."""
    graph = Graph("cancelled")
    inside, after = asyncio.Event(), asyncio.Event()

    @graph.step
    async def fetch(order: Order) -> Label:
        inside.set()
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            after.set()
        return Label()

    running = asyncio.create_task(graph.aexecute(Label, Order()))
    await inside.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.wait_for(after.wait(), WAIT_S)


@on_loop
async def test_cancelling_aexecute_gives_the_lease_back_and_keeps_what_is_saved() -> None:
    """Contexts are cancelled, late results dropped; the same run then goes on from its checkpoint."""
    store = MemoryStore()
    graph = Graph("resumed")
    inside, stopped = threading.Event(), threading.Event()
    charges: list[str] = []

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        charges.append(order.order_id)
        return Charge(charge_id=order.order_id)

    @graph.step
    def ship(charge: Charge, ctx: StepContext) -> Shipment:
        if ctx.delivery == 1:
            inside.set()
            assert ctx.cancelled.wait(WAIT_S)
            stopped.set()
        return Shipment(tracking_id=f"delivery {ctx.delivery}")

    running = asyncio.create_task(
        graph.aexecute(Shipment, Order(order_id="7"), execution_id="r", store=store)
    )
    await asyncio.to_thread(reached, inside)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    row = store.find_run("resumed", "r")
    assert row is not None
    assert (row.state, row.lease_left_s) == (RunState.WAITING, None)
    reached(stopped)
    again = await graph.aexecute(Shipment, Order(order_id="7"), execution_id="r", store=store)
    assert (again, charges) == (Shipment(tracking_id="delivery 2"), ["7"])


@on_loop
async def test_many_runs_share_one_loop() -> None:
    """Runs side by side, each with a step on the loop and one on the pool."""
    graph = Graph("many")

    @graph.step
    async def charge(order: Order) -> Charge:
        await asyncio.sleep(0)
        return Charge(charge_id=order.order_id)

    @graph.step
    def ship(charge: Charge) -> Shipment:
        return Shipment(tracking_id=charge.charge_id)

    jobs = [Order(order_id=str(number)) for number in range(50)]
    shipped = await asyncio.gather(*(graph.aexecute(Shipment, job) for job in jobs))
    assert [one.tracking_id for one in shipped] == [str(number) for number in range(50)]


# --- start -----------------------------------------------------------------------------------------------------


def test_a_started_run_goes_on_by_itself_and_its_result_can_be_asked_for_again() -> None:
    """The handle is there before the end, names the run, and gives the same message each time."""
    inside, go_on = threading.Event(), threading.Event()

    def charge(order: Order) -> Charge:
        inside.set()
        reached(go_on)
        return Charge(charge_id=order.order_id)

    started = shipping(charge).start(Shipment, Order(order_id="9"), execution_id="s", store=MemoryStore())
    reached(inside)
    assert (started.execution_id, started.done()) == ("s", False)
    with pytest.raises(TimeoutError, match=r"'s' has not ended within 0\.01 s"):
        started.result(timeout=0.01)
    go_on.set()
    assert started.result(WAIT_S) == Shipment(tracking_id="T-9")
    assert started.result(0) == Shipment(tracking_id="T-9")
    assert started.done()
    assert started.cancel() is False
    assert repr(started) == "<StartedRun 's': done>"


def test_a_started_run_can_be_waited_for_by_several_threads() -> None:
    """None of them takes the outcome from another."""
    go_on = threading.Event()

    def charge(order: Order) -> Charge:
        reached(go_on)
        return Charge(charge_id="1")

    started = shipping(charge, None).start(Shipment, Order())
    got: list[Shipment] = []
    threads = [threading.Thread(target=lambda: got.append(started.result(WAIT_S))) for _ in range(4)]
    for thread in threads:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert got == [Shipment(tracking_id="T-1")] * 4


def test_cancelling_a_started_run_ends_it_with_run_cancelled() -> None:
    """The step's context is cancelled, what it returns late is dropped, and the next step never starts."""
    graph = Graph("stopped")
    inside, late = threading.Event(), threading.Event()
    shipped: list[Charge] = []

    @graph.step
    def charge(order: Order, ctx: StepContext) -> Charge:
        inside.set()
        assert ctx.cancelled.wait(WAIT_S)
        return Charge()

    @graph.step
    def ship(charge: Charge) -> Shipment:
        shipped.append(charge)
        return Shipment()

    def listen(event: Event) -> None:
        if event.kind is EventKind.STEP_LATE:
            late.set()

    graph.listeners.append(listen)
    started = graph.start(Shipment, Order(), execution_id="x")
    reached(inside)
    assert started.cancel("not needed any more") is True
    with pytest.raises(RunCancelled, match="'x' was cancelled: not needed any more"):
        started.result(WAIT_S)
    reached(late)
    assert shipped == []


def test_cancelling_a_started_run_that_persists_leaves_its_row_cancelled() -> None:
    """The lease is given back, the finished step is kept, and submitting it again tells why it does not run."""
    store = MemoryStore()
    graph = Graph("kept")
    inside = threading.Event()

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        return Charge(charge_id="1")

    @graph.step
    def ship(charge: Charge, ctx: StepContext) -> Shipment:
        inside.set()
        ctx.sleep(WAIT_S)
        return Shipment()

    started = graph.start(Shipment, Order(), execution_id="c", store=store)
    reached(inside)
    started.cancel("by ann")
    with pytest.raises(RunCancelled, match="by ann"):
        started.result(WAIT_S)
    row = store.find_run("kept", "c")
    assert row is not None
    assert (row.state, row.lease_left_s) == (RunState.CANCELLED, None)
    with pytest.raises(RunCancelled, match="by ann"):
        graph.execute(Shipment, Order(), execution_id="c", store=store)


def test_a_started_run_ends_at_its_deadline_though_nobody_waits() -> None:
    """`result` is never called while it runs."""
    graph = Graph("deadline")

    @graph.step
    def ship(order: Order, ctx: StepContext) -> Shipment:
        ctx.sleep(WAIT_S)
        return Shipment()

    started = graph.start(Shipment, Order(), timeout=0.05)
    wait_for_end(started)
    with pytest.raises(RunTimedOut):
        started.result(0)


def test_a_started_run_raises_the_failure_of_its_step() -> None:
    """As `execute` would."""
    graph = Graph("failing")

    @graph.step(timeout=0.02)
    def ship(order: Order, ctx: StepContext) -> Shipment:
        ctx.sleep(WAIT_S)
        return Shipment()

    with pytest.raises(StepTimedOut):
        graph.start(Shipment, Order()).result(WAIT_S)


def test_a_step_may_wait_for_a_run_that_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread: while the step waits, another thread takes its place."""
    monkeypatch.setenv("DOCKET_CELERY_THREADS", "1")
    inner, outer = shipping(persist=None), Graph("outer")

    @outer.step
    def label(order: Order) -> Label:
        return Label(text=inner.start(Shipment, order).result(WAIT_S).tracking_id)

    assert outer.start(Label, Order(order_id="3")).result(WAIT_S) == Label(text="T-3")


# --- docket_threads = 0 ----------------------------------------------------------------------------------------


class Watched(SQLStore):
    """SQLite in memory that notes which threads call it."""

    def __init__(self) -> None:
        super().__init__("sqlite://")
        self.threads: set[int] = set()
        self.migrate()
        event.listen(self.engine, "before_cursor_execute", lambda *_: self.threads.add(threading.get_ident()))


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set ``docket_threads`` to 0."""
    monkeypatch.setenv("DOCKET_CELERY_THREADS", "0")


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("persist", [None, Scope.WORKFLOW, Scope.GLOBAL])
def test_without_threads_steps_and_sql_stay_on_the_calling_thread(persist: Scope | None) -> None:
    """Synchronous and asynchronous steps, SQL and heartbeats; no thread is started."""
    graph, store = Graph("inline"), Watched()
    store.threads.clear()
    before, seen = set(threading.enumerate()), set[int]()

    @graph.step(persist=persist, timeout=WAIT_S)
    def charge(order: Order) -> Charge:
        seen.add(threading.get_ident())
        return Charge(charge_id=order.order_id)

    @graph.step(persist=persist, timeout=WAIT_S)
    async def ship(charge: Charge) -> Shipment:
        await asyncio.sleep(0.001)
        seen.add(threading.get_ident())
        assert set(threading.enumerate()) <= before
        return Shipment(tracking_id=charge.charge_id)

    for _ in range(2):
        shipped = graph.execute(Shipment, Order(order_id="5"), execution_id="i", timeout=WAIT_S, store=store)
        assert shipped == Shipment(tracking_id="5")
    here = {threading.get_ident()}
    assert (seen, store.threads) == (here, here if persist is not None else set())


@pytest.mark.usefixtures("no_threads")
def test_without_threads_steps_run_in_plan_order() -> None:
    """Also where a retry waits: the backoff is spent on the calling thread, before any later step."""
    graph = Graph("ordered")
    called: list[str] = []

    def note(name: str) -> Callable[..., Money]:
        def body(*_: Money) -> Money:
            called.append(name)
            if name == "b" and called.count("b") == 1:
                raise ValueError(name)
            return Money(cents=1)

        return body

    edges = {"a": [], "b": [], "c": ["a"], "d": ["b"], "e": ["c"], "f": ["d", "e"]}
    for name, sources in edges.items():
        retry = RetryPolicy(max_attempts=2, backoff=FixedBackoff(0.01))
        add_step(graph, name, sources, note(name), retry=retry)
    outcome = graph.deliver(graph.compiled(key("f"), ()), [], Submission(execution_id="o"))
    assert outcome.value == Money(cents=1)
    plan = [planned.step.name for planned in graph.compiled(key("f"), ()).steps]
    plan.insert(plan.index("b"), "b")
    assert called == plan


@pytest.mark.usefixtures("no_threads")
def test_without_threads_a_late_result_is_not_taken() -> None:
    """Nothing can interrupt the step: it returns, is found late, and its result is discarded."""
    graph, store = Graph("late"), MemoryStore()

    @graph.step(persist=Scope.WORKFLOW, timeout=0.01)
    def ship(order: Order) -> Shipment:
        time.sleep(0.03)
        return Shipment()

    with pytest.raises(StepTimedOut):
        graph.execute(Shipment, Order(), execution_id="l", store=store)
    row = store.find_run("late", "l")
    assert row is not None
    assert (row.state, row.lease_left_s) == (RunState.FAILED, None)


@pytest.mark.usefixtures("no_threads")
def test_without_threads_a_step_that_asks_its_context_is_stopped() -> None:
    """Of the attempt and of the run: the deadline rings when the step sleeps or checks."""
    graph = Graph("asking")

    @graph.step
    def ship(order: Order, ctx: StepContext) -> Shipment:
        ctx.sleep(WAIT_S)
        return Shipment()

    @graph.step(timeout=0.02)
    def label(order: Order, ctx: StepContext) -> Label:
        while not ctx.cancelled.wait(0.001):
            pass
        ctx.check()
        return Label()

    with pytest.raises(RunTimedOut):
        graph.execute(Shipment, Order(), timeout=0.02)
    with pytest.raises(StepTimedOut):
        graph.execute(Label, Order())


@pytest.mark.usefixtures("no_threads")
def test_without_threads_an_async_step_is_cancelled_at_its_deadline() -> None:
    """The private loop looks at the clock while the step waits."""
    graph = Graph("waiting")
    ended: list[str] = []

    @graph.step(timeout=0.02)
    async def ship(order: Order) -> Shipment:
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            ended.append("cancelled")
        return Shipment()

    with pytest.raises(StepTimedOut):
        graph.execute(Shipment, Order())
    assert ended == ["cancelled"]


@pytest.mark.usefixtures("no_threads")
def test_without_threads_a_step_longer_than_its_lease_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease is extended as soon as the thread comes to it, if nobody has taken the run over."""
    monkeypatch.setenv("DOCKET_CELERY_LEASE_SECONDS", "1")

    def charge(order: Order) -> Charge:
        time.sleep(1.05)
        return Charge(charge_id="1")

    graph, store = shipping(charge), MemoryStore()
    assert graph.execute(Shipment, Order(), execution_id="h", store=store) == Shipment(tracking_id="T-1")


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_without_threads_an_interruption_gives_the_lease_back(kind: type[BaseException]) -> None:
    """It reaches the caller, and the next call goes on at once."""
    raised: list[BaseException] = []

    def charge(order: Order) -> Charge:
        if not raised:
            raised.append(kind("stop"))
            raise raised[0]
        return Charge(charge_id="1")

    graph, store = shipping(charge), MemoryStore()
    with pytest.raises(kind, match="stop"):
        graph.execute(Shipment, Order(), execution_id="k", store=store)
    row = store.find_run("shipping", "k")
    assert row is not None
    assert (row.state, row.lease_left_s) == (RunState.WAITING, None)
    assert graph.execute(Shipment, Order(), execution_id="k", store=store) == Shipment(tracking_id="T-1")


@pytest.mark.usefixtures("no_threads")
def test_without_threads_a_step_may_execute_a_graph() -> None:
    """Each run is driven by the call that made it."""
    outer = Graph("outer")

    @outer.step
    def label(order: Order) -> Label:
        return Label(text=shipping(persist=None).execute(Shipment, order).tracking_id)

    assert outer.execute(Label, Order(order_id="4")) == Label(text="T-4")


@pytest.mark.usefixtures("no_threads")
def test_without_threads_aexecute_and_start_are_refused() -> None:
    """They would block whoever calls them."""
    graph = shipping(persist=None)
    with pytest.raises(InvalidSettings, match=r"docket_threads.*at least 1"):
        graph.start(Shipment, Order())
    with pytest.raises(InvalidSettings, match=r"docket_threads.*at least 1"):
        asyncio.run(graph.aexecute(Shipment, Order()))


@pytest.mark.usefixtures("no_threads")
@on_loop
async def test_without_threads_async_steps_are_refused_where_a_loop_runs() -> None:
    """One thread runs one loop; the text says what to do."""
    graph = Graph("nested")

    @graph.step
    async def ship(order: Order) -> Shipment:
        return Shipment()

    with pytest.raises(StepFailed, match="await aexecute with at least 1") as failed:
        graph.execute(Shipment, Order())
    assert failed.value.caused_by(InvalidSettings)


@pytest.mark.usefixtures("no_threads")
def test_without_threads_several_failures_and_an_abort_are_reported_as_ever() -> None:
    """The first failure starts nothing new; an abort ends at once."""

    def fail(order: Order) -> Charge:
        raise AbortError("stop") if order.order_id == "abort" else ValueError(order.order_id)

    graph = shipping(fail)
    with pytest.raises(StepFailed) as failed:
        graph.execute(Shipment, Order(order_id="1"), store=MemoryStore())
    assert failed.value.caused_by(ValueError)
    with pytest.raises(AbortError, match="stop"):
        graph.execute(Shipment, Order(order_id="abort"), store=MemoryStore())


@pytest.fixture
def interrupt_soon() -> Generator[Callable[[], None]]:
    """Return what has the main thread interrupted a moment later, as Ctrl-C does."""
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    timers: list[threading.Timer] = []

    def arm() -> None:
        timers.append(threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGUSR1]))
        timers[-1].start()

    yield arm
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("no_threads")
def test_without_threads_ctrl_c_ends_a_backoff_and_an_async_step(interrupt_soon: Callable[[], None]) -> None:
    """Wherever the thread waits: the lease is given back, and the coroutine sees its cancellation."""
    graph, store = Graph("interrupted"), MemoryStore()
    ended: list[str] = []

    @graph.step(persist=Scope.WORKFLOW, retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(WAIT_S)))
    def charge(order: Order) -> Charge:
        interrupt_soon()
        raise ValueError("again later")

    @graph.step(persist=Scope.WORKFLOW)
    async def label(order: Order) -> Label:
        interrupt_soon()
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            ended.append("label")
        return Label()

    for target in (Charge, Label):
        with pytest.raises(KeyboardInterrupt):
            graph.execute(target, Order(), execution_id=target.__name__, store=store)
        row = store.find_run("interrupted", target.__name__)
        assert row is not None
        assert (row.state, row.lease_left_s) == (RunState.WAITING, None)
    assert ended == ["label"]


def test_a_run_that_is_cancelled_at_any_moment_ends_and_holds_no_lease() -> None:
    """Whatever came first counts: the message, or the cancellation; a row never stays leased."""
    graph, store = Graph("races"), MemoryStore()

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        return Charge(charge_id=order.order_id)

    @graph.step
    async def ship(charge: Charge) -> Shipment:
        await asyncio.sleep(0)
        return Shipment(tracking_id=charge.charge_id)

    for number in range(200):
        name = str(number)
        started = graph.start(Shipment, Order(order_id=name), execution_id=name, store=store)
        time.sleep(number % 20 / 10_000)
        started.cancel("changed my mind")
        try:
            assert started.result(WAIT_S) == Shipment(tracking_id=name)
            expected: set[RunState | None] = {RunState.SUCCEEDED}
        except RunCancelled:
            expected = {RunState.CANCELLED, None}
        row = store.find_run("races", name)
        assert (row.state if row is not None else None) in expected
        assert row is None or row.lease_left_s is None


@pytest.mark.parametrize("waits", ["execute", "result"])
def test_a_coroutine_step_that_would_block_the_loop_is_refused(waits: str) -> None:
    """A run inside it needs the loop that it blocks: it is told so at once, and the loop goes on for others."""
    inner, outer = Graph("inner"), Graph("outer")

    @inner.step
    async def charge(order: Order) -> Charge:
        return Charge(charge_id=order.order_id)

    @outer.step
    async def ship(order: Order) -> Shipment:
        if order.order_id == "awaits":
            charge = await inner.aexecute(Charge, order)
        elif waits == "execute":
            charge = inner.execute(Charge, order)
        else:
            charge = inner.start(Charge, order).result()
        return Shipment(tracking_id=charge.charge_id)

    with pytest.raises(StepFailed, match=r"await graph\.aexecute") as caught:
        within(lambda: outer.execute(Shipment, Order(order_id="blocks")))
    assert isinstance(caught.value.__cause__, InvalidArguments)
    assert within(lambda: inner.execute(Charge, Order(order_id="7"))).charge_id == "7"
    assert within(lambda: outer.execute(Shipment, Order(order_id="awaits"))).tracking_id == "awaits"
