from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest

from docket_celery.engine.process import pool as pool_module
from docket_celery.engine.process.loops import LoopThread
from docket_celery.engine.process.pool import Pool, Worker
from docket_celery.engine.process.state import process
from docket_celery.engine.process.timer import Timer
from docket_celery.errors import (
    RunCancelled,
    RunTimedOut,
    StepFailed,
    StepTimedOut,
    StoreUnavailable,
    TooManyAbandoned,
)
from docket_celery.graph import Graph
from docket_celery.observe.events import Event, EventKind
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import FixedBackoff, RetryPolicy, Scope
from docket_celery.store import MemoryStore
from docket_celery.store.records import RunState
from tests.unit.graphs import WAIT_S, build, deliver, execute, pass_on, reached, start, total, within
from tests.unit.protos.shop_pb2 import Charge, Money, Order, Reservation, Shipment

if TYPE_CHECKING:
    from _typeshed import TraceFunction


def poll(condition: Callable[[], bool]) -> None:
    """Wait until *condition* holds; fail if it does not."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)


def reached_by(meet: threading.Barrier) -> None:
    """Wait until all have come."""
    meet.wait(WAIT_S)


def interrupt_after(event: threading.Event) -> None:
    """Wait for *event*, then press Ctrl-C."""
    reached(event)
    os.kill(os.getpid(), signal.SIGINT)


def test_threads_are_grown_one_by_one_and_reused() -> None:
    """A pool of eight that never has more than one piece of work uses one thread."""
    pool, threads = Pool(8), set[int]()
    for _ in range(20):
        done = threading.Event()

        def note(done: threading.Event = done) -> None:
            threads.add(threading.get_ident())
            done.set()

        pool.submit(note)
        reached(done)
        poll(lambda: pool._outstanding == 0)
    pool.close()
    assert len(threads) == 1


def test_one_thread_wakes_for_each_piece_of_work() -> None:
    """That which has been idle for the shortest time; the others wait on."""
    pool, meet, threads = Pool(3), threading.Barrier(3), set[int]()
    for _ in range(3):
        pool.submit(lambda: reached_by(meet))
    for _ in range(20):
        poll(lambda: len(pool._idle) == 3)
        pool.submit(lambda: threads.add(threading.get_ident()))
    poll(lambda: len(pool._idle) == 3)
    pool.close()
    assert len(threads) == 1


def test_threads_wake_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three pieces of work that come at once one wakes a thread, which wakes the next: all three soon run."""
    pool, meet, awake, given = Pool(3), threading.Barrier(4), threading.Event(), list[object]()
    for _ in range(3):
        pool.submit(lambda: reached_by(meet))
    reached_by(meet)
    poll(lambda: len(pool._idle) == 3)
    give, wait = Worker.give, Worker.wait

    def note(worker: Worker, work: Callable[[], None] | None) -> None:
        given.append(work)
        give(worker, work)

    def wait_longer(worker: Worker, timeout_s: float) -> bool:
        woken = wait(worker, timeout_s)
        reached(awake)
        return woken

    monkeypatch.setattr(Worker, "give", note)
    monkeypatch.setattr(Worker, "wait", wait_longer)
    # Each of these finds the threads as they are now, in the old wait: a round of work takes them to the new one.
    awake.set()
    for _ in range(3):
        pool.submit(lambda: reached_by(meet))
    reached_by(meet)
    poll(lambda: len(pool._idle) == 3)
    awake.clear()
    given.clear()
    for _ in range(3):
        pool.submit(lambda: reached_by(meet))
    assert len(given) == 1
    awake.set()
    reached_by(meet)
    assert len(given) == 3
    poll(lambda: len(pool._idle) == 3)
    pool.close()


def interrupted_at(line: int, call: Callable[[], object]) -> bool:
    """Raise in *call* at the *line*-th line of what `Pool.submit` calls, as a signal does; False: it has fewer."""
    left = itertools.count(line, -1)

    def stop(frame: FrameType, event: str, _argument: object) -> TraceFunction | None:
        if frame.f_code.co_filename != pool_module.__file__:
            return None
        # Not where `with` gives its lock back: there Python looks for no signal.
        if frame.f_code.co_name != Pool.submit.__name__ and event == "line" and next(left) == 0:
            raise InterruptedError
        return stop

    traced = sys.gettrace()
    sys.settrace(stop)
    try:
        call()
    except InterruptedError:
        return True
    finally:
        sys.settrace(traced)
    return False


def interrupt_submission(line: int) -> bool:
    """Interrupt a submission to a pool of idle threads, check that the next work is done; tell whether it was cut."""
    pool, meet, done = Pool(3, idle_s=3600.0), threading.Barrier(4), threading.Event()
    for _ in range(3):
        pool.submit(lambda: reached_by(meet))
    reached_by(meet)
    poll(lambda: len(pool._idle) == 3)
    workers = list(pool._workers)
    interrupted = interrupted_at(line, lambda: pool.submit(lambda: None))
    pool.submit(done.set)
    reached(done)
    pool.close(timeout_s=0.0)
    for worker in workers:
        # One that was to be woken may have been taken from the idle ones; it would wake by itself after an hour.
        with contextlib.suppress(RuntimeError):
            worker.give(None)
        worker.join(WAIT_S)
    assert not pool._workers
    return interrupted


def test_a_signal_at_any_moment_of_a_submission_leaves_no_thread_asleep() -> None:
    """Whatever it interrupts, other threads that are idle still wake for the work that comes next."""
    assert next(line for line in itertools.count() if not interrupt_submission(line)) > 3


def test_idle_threads_end_and_later_work_starts_new_ones() -> None:
    """All of them, so that nothing bound to a thread outlives the work; and the pool goes on as before."""
    pool, meet = Pool(3, idle_s=0.05), threading.Barrier(3)
    for _ in range(3):
        pool.submit(lambda: reached_by(meet))
    poll(lambda: len(pool._workers) == 3)
    workers = list(pool._workers)
    for worker in workers:
        worker.join(WAIT_S)
    assert not pool._workers
    done = threading.Event()
    pool.submit(done.set)
    reached(done)
    (fresh,) = pool._workers
    assert fresh not in workers
    pool.close()


def test_a_thread_in_a_step_outlives_any_idle_time() -> None:
    """Idle is who waits for work, not who works; what comes meanwhile finds a thread."""
    pool, inside, go_on, other = Pool(1, idle_s=0.01), threading.Event(), threading.Event(), threading.Event()
    pool.submit(lambda: pass_on(inside, go_on))
    reached(inside)
    time.sleep(0.05)
    pool.submit(other.set)
    assert not other.is_set()
    go_on.set()
    reached(other)
    pool.close()


def test_work_that_comes_while_threads_end_is_never_left_behind() -> None:
    """Submitted at about the moment a thread gives up waiting, with nothing after it that would wake another one."""
    pool, done = Pool(2, idle_s=0.001), threading.Semaphore(0)
    for number in range(1500):
        pool.submit(done.release)
        assert done.acquire(timeout=WAIT_S), f"work {number} was left behind"
        time.sleep(0.0009 + 0.00002 * (number % 11))
    poll(lambda: not pool._workers)
    assert pool._outstanding == 0
    pool.close()


def test_an_abandoned_thread_is_replaced_counted_and_forgotten_when_it_ends() -> None:
    """A pool of one goes on at once, and the report names the step until its thread returns."""
    pool, stuck, go, other = Pool(1), threading.Event(), threading.Event(), threading.Event()
    workers: list[threading.Thread] = []

    def slow() -> None:
        workers.append(threading.current_thread())
        stuck.set()
        reached(go)

    pool.submit(slow)
    reached(stuck)
    worker = workers[0]
    assert isinstance(worker, Worker)
    pool.abandon(worker, "slow")
    pool.abandon(worker, "slow")
    assert pool.abandoned() == ["slow"]
    pool.submit(other.set)
    reached(other)
    go.set()
    poll(lambda: pool.abandoned() == [])
    worker.join(WAIT_S)
    assert not worker.is_alive()
    pool.close()


@pytest.mark.parametrize("refused", [False, True])
def test_a_thread_that_was_given_up_hands_on_what_it_would_have_taken(
    refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's thread that the pool has replaced leaves the next step to another, as soon as there can be one."""
    pool, workers = process.runtime(4).pool, list[Worker]()
    monkeypatch.setattr("docket_celery.engine.process.runtime._LATER_S", 0.01)
    refusing = Refusing(pool, lambda _: refused and bool(workers))
    monkeypatch.setattr(pool, "submit", refusing)

    def body(*inputs: Money) -> Money:
        worker = threading.current_thread()
        assert isinstance(worker, Worker)
        workers.append(worker)
        if not inputs:
            pool.abandon(worker, "replaced")
        return total(*inputs)

    outcome = deliver(build({"a": [], "b": ["a"], "c": ["b"]}, body), "c", threads=4, helps=False)
    assert outcome.value == Money(cents=3)
    assert workers[0] not in workers[1:]
    assert refusing.refused.is_set() is refused


def test_too_many_abandoned_threads_refuse_new_runs() -> None:
    """Twice the pool's size of stuck steps is the limit; once they return, runs are accepted again."""
    graph, go, stuck = Graph("shop"), threading.Event(), list[int]()

    @graph.step(timeout=0.02)
    def charge(order: Order) -> Charge:
        if order.order_id != "quick":
            stuck.append(1)
            reached(go)
        return Charge()

    for _ in range(4):
        with pytest.raises(StepTimedOut):
            within(lambda: execute(graph, Charge, Order(), threads=2))
    with pytest.raises(
        TooManyAbandoned, match="4 threads are held by steps past their timeout \\(limit 4\\): charge"
    ):
        within(lambda: execute(graph, Charge, Order(order_id="quick"), threads=2))
    assert len(stuck) == 4
    go.set()
    poll(lambda: process.runtime(2).pool.abandoned() == [])
    assert within(lambda: execute(graph, Charge, Order(order_id="quick"), threads=2)) == Charge()


def test_the_timer_calls_in_the_order_of_time() -> None:
    """Alarms ring in their order, whichever was set first; cancelled ones do not."""
    timer, rung, done = Timer(), list[str](), threading.Event()
    late = timer.after(0.05, functools.partial(rung.append, "late"))
    never = timer.after(3600, functools.partial(rung.append, "never"))
    early = timer.after(0.01, functools.partial(rung.append, "early"))
    timer.after(0.1, done.set)
    assert never.cancel() is True
    assert never.cancel() is False
    reached(done)
    assert rung == (["early", "late"] if early.at < late.at else ["late", "early"])
    assert late.cancel() is False
    timer.close()


@pytest.mark.parametrize("error", [ValueError("call"), SystemExit(3), KeyboardInterrupt()])
def test_the_timer_survives_what_it_calls(error: BaseException) -> None:
    """One broken call must not end all timeouts of the process."""
    timer, done = Timer(), threading.Event()

    def fail() -> None:
        raise error

    timer.after(0, fail)
    timer.after(0.01, done.set)
    reached(done)
    timer.close()


def test_a_worker_that_cannot_be_replaced_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told so before it waits, and the pool grows to its old size afterwards, no further."""
    pool, told = Pool(1), Future[BaseException]()

    def refuse(_: Worker) -> None:
        raise RuntimeError("can't start new thread")

    def wait() -> None:
        pool.submit(lambda: None)
        with monkeypatch.context() as patched:
            patched.setattr(Worker, "start", refuse)
            try:
                with pool.blocking():
                    told.set_exception(AssertionError("it waits"))
            except RuntimeError as error:
                told.set_result(error)

    pool.submit(wait)
    assert "can't start" in str(told.result(WAIT_S))
    assert pool._size == 1
    pool.close()


class Refusing:
    """A pool's submit that finds no thread once, at a chosen moment.

    Args:
        pool: Whose.
        when: Whether it is this call, given how many came before it.
    """

    def __init__(self, pool: Pool, when: Callable[[int], bool]) -> None:
        self.refused, self._when, self._calls = threading.Event(), when, itertools.count()
        self._submit = pool.submit

    def __call__(self, work: Callable[[], None]) -> None:
        if self._when(next(self._calls)) and not self.refused.is_set():
            self.refused.set()
            raise RuntimeError("can't start new thread")
        self._submit(work)


class Stumbling(MemoryStore):
    """A store that cannot write the end of a run at once."""

    def __init__(self) -> None:
        super().__init__()
        self._ends = itertools.count()

    def end(self, *args: Any, **options: Any) -> None:
        if not next(self._ends):
            raise StoreUnavailable("answer", "gone for a moment")
        super().end(*args, **options)


def by_the_timer(_: int) -> bool:
    """Whether the timer's thread is the calling one."""
    return threading.current_thread().name == "docket-timer"


@pytest.mark.parametrize("moment", [*range(8), by_the_timer])
def test_a_moment_without_threads_leaves_no_run_hanging(
    moment: int | Callable[[int], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes, the run ends: with its value, or by telling of it, and nothing keeps its lease."""
    store = Stumbling()
    graph = Graph("shop", store=store)

    @graph.step(persist=Scope.GLOBAL)
    async def charge(order: Order) -> Charge:
        return Charge(charge_id="paid")

    @graph.step(persist=Scope.WORKFLOW, retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0.001)))
    def ship(charge: Charge, ctx: StepContext) -> Shipment:
        if ctx.attempt == 1:
            raise ValueError("again")
        return Shipment(tracking_id=charge.charge_id)

    monkeypatch.setattr("docket_celery.engine.process.runtime._LATER_S", 0.01)
    refusing = Refusing(
        process.runtime(2).pool, moment if callable(moment) else lambda calls: calls == moment
    )
    monkeypatch.setattr(process.runtime(2).pool, "submit", refusing)
    run = start(lambda: execute(graph, Shipment, Order(), threads=2, store=store))
    error = run.exception(WAIT_S)
    assert "can't start" in str(error) if error else run.result() == Shipment(tracking_id="paid")
    assert not process.heartbeat(store)._held
    assert not process.heartbeat(store)._claims


def test_a_run_that_is_stopped_while_there_is_no_thread_ends_in_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever stops it hears of nothing; the end is written as soon as there is a thread."""
    store, waiting = MemoryStore(), threading.Event()
    graph = Graph("shop", store=store)

    @graph.step(persist=Scope.GLOBAL, retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(3600)))
    def charge(order: Order) -> Charge:
        raise ValueError("again")

    @graph.step(persist=Scope.WORKFLOW)
    def ship(charge: Charge) -> Shipment:
        return Shipment()

    def listen(event: Event) -> None:
        if event.kind is EventKind.STEP_RETRYING:
            waiting.set()

    graph.listeners.append(listen)
    run = graph.start(Shipment, Order(), execution_id="run")
    reached(waiting)
    poll(lambda: run._run.pool._outstanding == 0)
    monkeypatch.setattr("docket_celery.engine.process.runtime._LATER_S", 0.01)
    refusing = Refusing(run._run.pool, lambda _: True)
    monkeypatch.setattr(run._run.pool, "submit", refusing)
    assert run.cancel()
    with pytest.raises(RunCancelled):
        run.result(WAIT_S)
    assert refusing.refused.is_set()
    row = store.find_run("shop", "run")
    assert row is not None
    assert row.state is RunState.CANCELLED
    poll(lambda: not store._claims)


def test_cancelled_alarms_do_not_pile_up() -> None:
    """Timeouts of an hour whose steps took a moment are gone long before that."""
    timer = Timer()
    for _ in range(5000):
        timer.after(3600, lambda: None).cancel()
    assert len(timer._heap) < 200
    timer.close()


def test_the_loop_survives_a_task_that_ends_programs() -> None:
    """A loop lets SystemExit out of `run_forever`; the loop goes on for everybody else."""
    loop = LoopThread()

    async def stray() -> None:
        raise SystemExit(3)

    async def fine() -> str:
        return "fine"

    loop.submit(stray())
    assert loop.submit(fine()).result(WAIT_S) == "fine"
    loop.close()


def test_closing_the_loop_cancels_what_runs_there() -> None:
    """A coroutine that sleeps is told, and nothing is left pending."""
    loop = LoopThread()
    future = loop.submit(asyncio.sleep(3600))
    loop.close()
    with pytest.raises(CancelledError):
        future.result(WAIT_S)


@pytest.mark.parametrize("helps", [True, False])
def test_an_interrupt_of_the_waiting_thread_cancels_the_run(helps: bool) -> None:
    """Ctrl-C reaches the caller, the steps' contexts are cancelled, and the process runs graphs as before."""
    graph = Graph("shop")
    begun, woken, caught = threading.Event(), threading.Event(), list[BaseException]()

    @graph.step(timeout=WAIT_S)
    def charge(order: Order, ctx: StepContext) -> Charge:
        if order.order_id == "quick":
            return Charge()
        begun.set()
        try:
            ctx.sleep(WAIT_S)
        except KeyboardInterrupt as error:
            caught.append(error)
            woken.set()
            raise
        return Charge()

    interrupter = start(lambda: interrupt_after(begun))
    with pytest.raises(KeyboardInterrupt):
        execute(graph, Charge, Order(), helps=helps)
    interrupter.result(WAIT_S)
    reached(woken)
    assert len(caught) == 1
    assert execute(graph, Charge, Order(order_id="quick"), helps=helps) == Charge()


def test_an_interrupt_of_a_step_that_the_caller_runs_itself_cancels_the_run() -> None:
    """The helping thread's own step is hit; the step beside it is told."""
    graph = Graph("shop")
    begun, woken = threading.Event(), threading.Event()

    @graph.step(timeout=WAIT_S)
    def charge(order: Order, ctx: StepContext) -> Charge:
        begun.set()
        if ctx.cancelled.wait(WAIT_S):
            woken.set()
        return Charge()

    @graph.step
    def reserve(order: Order) -> Reservation:
        reached(begun)
        signal.raise_signal(signal.SIGINT)
        return Reservation()

    @graph.step
    def ship(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    with pytest.raises(KeyboardInterrupt):
        execute(graph, Shipment, Order())
    reached(woken)


def test_an_interrupted_run_gives_its_lease_back() -> None:
    """The next submission does not wait for an expiry, and what was saved is not called again."""
    graph, calls, begun = Graph("shop", store=MemoryStore()), list[str](), threading.Event()

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        calls.append("charge")
        return Charge()

    @graph.step
    def ship(charge: Charge, ctx: StepContext) -> Shipment:
        calls.append("ship")
        if not begun.is_set():
            begun.set()
            ctx.sleep(WAIT_S)
        return Shipment()

    interrupter = start(lambda: interrupt_after(begun))
    with pytest.raises(KeyboardInterrupt):
        graph.execute(Shipment, Order(), execution_id="o-1")
    interrupter.result(WAIT_S)
    assert within(lambda: graph.execute(Shipment, Order(), execution_id="o-1")) == Shipment()
    assert calls == ["charge", "ship", "ship"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_runs_graphs_after_its_parent_did() -> None:
    """Pool, timer, loop and heartbeat of the parent are not the child's, which makes its own."""
    graph = Graph("shop", store=MemoryStore())

    @graph.step(timeout=WAIT_S, retry=RetryPolicy(backoff=FixedBackoff(0.001)))
    def charge(order: Order, ctx: StepContext) -> Charge:
        if ctx.attempt == 1:
            raise ValueError("again")
        return Charge()

    @graph.step(persist=Scope.WORKFLOW)
    async def ship(charge: Charge) -> Shipment:
        return Shipment(tracking_id=str(os.getpid()))

    assert within(lambda: graph.execute(Shipment, Order())).tracking_id == str(os.getpid())
    child = os.fork()
    if child == 0:
        status = 1
        try:
            shipped = within(lambda: graph.execute(Shipment, Order())).tracking_id
            gc.collect()
            status = 0 if shipped == str(os.getpid()) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert within(lambda: graph.execute(Shipment, Order())).tracking_id == str(os.getpid())


@pytest.mark.parametrize("helps", [True, False])
def test_an_ended_run_is_freed_without_the_collector(helps: bool) -> None:
    """Messages of thousands of runs a second do not wait for a collection of cycles."""
    freed = threading.Event()

    class Tenant:
        """Something of the caller's that a run holds."""

    graph = build({"a": [], "b": ["a"], "c": ["a"], "end": ["b", "c"]}, total)

    def run() -> weakref.ref[Tenant]:
        tenant = Tenant()
        watched = weakref.ref(tenant, lambda _: freed.set())
        outcome = deliver(graph, "end", helps=helps, values={"tenant": tenant})
        assert outcome.error is None
        return watched

    gc.collect()
    gc.disable()
    try:
        watched = run()
        poll(freed.is_set)
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("persist", [None, Scope.WORKFLOW])
def test_a_stop_at_any_moment_ends_the_run_with_its_own_error(persist: Scope | None) -> None:
    """A deadline that passes while the run begins, runs or closes: it ends with a value or `RunTimedOut`."""
    graph, store = Graph("shop"), MemoryStore()

    @graph.step(persist=persist)
    def charge(order: Order, ctx: StepContext) -> Charge:
        ctx.sleep(0.001)
        return Charge()

    @graph.step(retry=RetryPolicy(backoff=FixedBackoff(0.0005)))
    def ship(charge: Charge, ctx: StepContext) -> Shipment:
        ctx.check()
        if ctx.attempt < 3:
            raise ValueError("again")
        return Shipment()

    ends = {"value": 0, "stopped": 0}
    for spin in range(150):
        run = functools.partial(
            graph.execute, Shipment, Order(), execution_id=f"o-{spin}", timeout=spin * 0.00006, store=store
        )
        try:
            within(run)
            ends["value"] += 1
        except RunTimedOut:
            ends["stopped"] += 1
    assert sum(ends.values()) == 150
    assert ends["stopped"] > 0


def test_events_of_a_run_end_with_its_end() -> None:
    """RUN_ENDED comes last and once, whether the run succeeds or fails, and says how."""
    graph, heard = Graph("shop"), list[tuple[EventKind, str]]()

    @graph.step
    def charge(order: Order) -> Charge:
        if not order.order_id:
            raise ValueError("no order")
        return Charge()

    graph.listeners.append(lambda event: heard.append((event.kind, event.detail)))
    within(lambda: graph.execute(Charge, Order(order_id="7")))
    assert heard[-1] == (EventKind.RUN_ENDED, "")
    with pytest.raises(StepFailed):
        within(lambda: graph.execute(Charge, Order()))
    assert heard[-1] == (EventKind.RUN_ENDED, "StepFailed")
    assert [kind for kind, _ in heard].count(EventKind.RUN_ENDED) == 2


def test_work_that_comes_after_the_close_is_done_and_leaves_no_thread() -> None:
    """A run that ends late hands its last work to a pool that has been closed; the thread for it ends too."""
    pool = Pool(2)
    started, release, late = threading.Event(), threading.Event(), threading.Event()

    def hand_on() -> None:
        started.set()
        release.wait(5)
        pool.submit(late.set)

    pool.submit(hand_on)
    assert started.wait(5)
    workers = list(pool._workers)
    pool.close(timeout_s=0.0)
    release.set()
    assert late.wait(5)
    for worker in {*workers, *pool._workers}:
        worker.join(5)
        assert not worker.is_alive()
    assert not pool._workers
