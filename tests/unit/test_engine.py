from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from docket_celery.engine.attempt import Attempt
from docket_celery.engine.execution import Help, Scheduler
from docket_celery.engine.process.inline import InlineRuntime
from docket_celery.engine.process.pool import Worker
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.run_context import RunContext, Submission
from docket_celery.errors import AbortError, RunCancelled, StepFailed, StepTimedOut
from docket_celery.graph import Graph
from docket_celery.observe.events import Event, EventKind, Listener
from docket_celery.plan.context import Cancellation, StepContext
from docket_celery.plan.options import FixedBackoff, RetryPolicy, Scope
from docket_celery.plan.plan import Plan
from docket_celery.store import MemoryStore
from docket_celery.store.identity import workflow_key
from tests.unit.graphs import (
    WAIT_S,
    Ended,
    add_step,
    build,
    deliver,
    execute,
    key,
    reached,
    start,
    telling,
    total,
    within,
)
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Reservation, Shipment
from tests.unit.stage import Deadlines, poll


@pytest.mark.parametrize("helps", [True, False])
def test_one_thread_resolves_a_graph_of_depth_200(helps: bool) -> None:
    """No step waits on the pool, so depth needs no threads."""
    edges = {f"s{i}": [f"s{i - 1}"] if i else [] for i in range(200)}
    outcome = deliver(build(edges, total), "s199", threads=1, helps=helps)
    assert outcome.value == Money(cents=200)


def test_the_caller_runs_only_steps_that_it_could_run_alone() -> None:
    """No deadline could let go of its thread, and SQL and coroutines have theirs."""
    threads: dict[str, int] = {}
    graph = Graph("shape")

    def body(name: str) -> Callable[..., Money]:
        def note(*inputs: Money) -> Money:
            threads[name] = threading.get_ident()
            return total(*inputs)

        return note

    add_step(graph, "plain", [], body("plain"))
    add_step(graph, "timed", ["plain"], body("timed"), timeout=3600)
    add_step(graph, "end", ["timed"], body("end"))

    def run(helps: bool) -> tuple[bool, ...]:
        submission = Submission(execution_id="run", may_help=helps)
        plan = graph.compiled(key("end"), ())
        assert graph.deliver(plan, [], submission, Settings(threads=4)).error is None
        return tuple(threads[name] == threading.get_ident() for name in ("plain", "timed"))

    assert within(lambda: run(helps=True)) == (True, False)
    assert within(lambda: run(helps=False)) == (False, False)


def test_a_step_that_no_thread_can_take_over_now_goes_on_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system refuses a thread between a coroutine's end and what follows, the run waits a moment."""
    graph, refusals = Graph("shop"), list[str]()
    pool = process.runtime(2).pool
    submit = pool.submit

    def refuse_once(work: Callable[[], None]) -> None:
        if refusals == ["next"]:
            refusals.append("refused")
            raise RuntimeError("can't start new thread")
        submit(work)

    @graph.step
    async def charge(order: Order) -> Charge:
        refusals.append("next")
        return Charge(charge_id="paid")

    @graph.step
    def label(charge: Charge) -> Label:
        return Label(text=charge.charge_id)

    monkeypatch.setattr(pool, "submit", refuse_once)
    assert within(lambda: execute(graph, Label, Order(), threads=2)) == Label(text="paid")
    assert refusals == ["next", "refused"]


def test_a_value_that_two_steps_need_is_computed_once() -> None:
    """The tip of a diamond runs once, and the join sees both sides."""
    edges = {"tip": [], "left": ["tip"], "right": ["tip"], "join": ["left", "right"]}
    calls: list[int] = []

    def body(*inputs: Money) -> Money:
        calls.append(len(inputs))
        return total(*inputs)

    assert deliver(build(edges, body), "join").value == Money(cents=5)
    assert sorted(calls) == [0, 1, 1, 2]


@pytest.mark.parametrize("helps", [True, False])
def test_ready_steps_overlap(helps: bool) -> None:
    """Three steps without inputs meet at a barrier, which they could not one after the other."""
    barrier = threading.Barrier(3, timeout=WAIT_S)

    def meet(*inputs: Money) -> Money:
        if not inputs:
            barrier.wait()
        return total(*inputs)

    outcome = deliver(build({"a": [], "b": [], "c": [], "end": ["a", "b", "c"]}, meet), "end", helps=helps)
    assert outcome.value == Money(cents=4)


def test_steps_that_one_step_makes_ready_overlap() -> None:
    """Whoever finishes the tip takes one of its consumers itself and hands all others over."""
    barrier = threading.Barrier(4, timeout=WAIT_S)

    def meet(*inputs: Money) -> Money:
        if len(inputs) == 1:
            barrier.wait()
        return total(*inputs)

    sides = ["a", "b", "c", "d"]
    graph = build({"tip": [], **{side: ["tip"] for side in sides}, "end": sides}, meet)
    assert deliver(graph, "end", threads=4, helps=False).value == Money(cents=9)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_more_steps_run_at_once_than_asked_for(limit: int) -> None:
    """With twelve ready steps and eight threads, `max_concurrency` bounds the steps in progress, and is used up."""
    lock, full = threading.Lock(), threading.Barrier(limit, timeout=WAIT_S)
    running: list[int] = [0]
    most: list[int] = [0]

    def body(*inputs: Money) -> Money:
        if inputs:
            return total(*inputs)
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        full.wait()
        with lock:
            running[0] -= 1
        return total(*inputs)

    sides = [f"s{i}" for i in range(12)]
    graph = build({**{side: [] for side in sides}, "end": sides}, body)
    assert deliver(graph, "end", threads=8, max_concurrency=limit).value == Money(cents=13)
    assert most == [limit]


def test_a_step_that_executes_a_graph_does_not_starve_a_pool_of_one() -> None:
    """Three levels of runs inside steps end on one thread, though each waits for steps of the same pool."""
    inner = Graph("inner")

    @inner.step(timeout=WAIT_S)
    def deepest(order: Order) -> Label:
        return Label(text=order.order_id)

    def nest(below: Graph, name: str) -> Graph:
        graph = Graph(name)

        @graph.step(timeout=WAIT_S)
        def outer(order: Order) -> Label:
            return Label(text=f"{name} {execute(below, Label, order, threads=1).text}")

        return graph

    top = nest(nest(inner, "middle"), "top")
    label = within(lambda: execute(top, Label, Order(order_id="7"), threads=1))
    assert label == Label(text="top middle 7")


def test_after_a_failure_nothing_new_starts_and_what_runs_finishes() -> None:
    """The step that runs beside the failing one ends as usual; its consumer is not called."""
    graph = Graph("shop")
    begun, failed, calls = threading.Event(), threading.Event(), list[str]()

    @graph.step
    def charge(order: Order) -> Charge:
        reached(begun)
        raise ValueError("card refused")

    @graph.step
    def reserve(order: Order) -> Reservation:
        begun.set()
        reached(failed)
        calls.append("reserve")
        return Reservation()

    @graph.step
    def label(reservation: Reservation) -> Label:
        calls.append("label")
        return Label()

    @graph.step
    def ship(charge: Charge, label: Label) -> Shipment:
        calls.append("ship")
        return Shipment()

    graph.listeners.append(lambda event: failed.set() if event.kind is EventKind.STEP_FAILED else None)
    with pytest.raises(StepFailed, match="card refused") as caught:
        within(lambda: graph.execute(Shipment, Order()))
    assert calls == ["reserve"]
    assert caught.value.step == "charge"
    assert caught.value.caused_by(ValueError)
    assert isinstance(caught.value.__cause__, ValueError)


def test_all_failures_are_reported() -> None:
    """Two steps that fail side by side both stand in the error, and in its transported fields."""
    barrier = threading.Barrier(2, timeout=WAIT_S)

    def fail(*inputs: Money) -> Money:
        if inputs:
            return total(*inputs)
        barrier.wait()
        raise ValueError("broken")

    outcome = deliver(build({"a": [], "b": [], "end": ["a", "b"]}, fail), "end")
    assert isinstance(outcome.error, StepFailed)
    assert len(outcome.error.others) == 1
    assert {outcome.error.step, outcome.error.others[0].split("'")[1]} == {"a", "b"}
    assert outcome.error.args[-2] == list(outcome.error.others)


def test_a_step_that_waits_to_be_retried_is_given_up_when_another_fails() -> None:
    """The run does not sit out an hour's backoff for a result that nobody will use."""
    graph = Graph("shop")
    waiting = threading.Event()

    @graph.step(retry=RetryPolicy(backoff=FixedBackoff(3600)))
    def charge(order: Order) -> Charge:
        raise ValueError("try later")

    @graph.step
    def reserve(order: Order) -> Reservation:
        reached(waiting)
        raise KeyError("sold out")

    @graph.step
    def ship(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    graph.listeners.append(lambda event: waiting.set() if event.kind is EventKind.STEP_RETRYING else None)
    with pytest.raises(StepFailed, match="sold out") as caught:
        within(lambda: graph.execute(Shipment, Order()))
    assert [
        "after 1 attempt (attempts used up): ValueError: try later" in o for o in caught.value.others
    ] == [True]


def test_a_step_that_fails_after_another_one_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the run is failing, no further attempt begins, be it allowed ever so many."""
    hold = Scheduler.hold

    def note(execution: Scheduler) -> None:
        hold(execution)
        failed.set()

    monkeypatch.setattr(Scheduler, "hold", note)
    graph, calls = Graph("shop"), list[int]()
    begun, failed = threading.Event(), threading.Event()

    @graph.step(retry=RetryPolicy(max_attempts=5, backoff=FixedBackoff(0)))
    def charge(order: Order, ctx: StepContext) -> Charge:
        calls.append(ctx.attempt)
        begun.set()
        reached(failed)
        raise ValueError("try later")

    @graph.step
    def reserve(order: Order) -> Reservation:
        reached(begun)
        raise KeyError("sold out")

    @graph.step
    def ship(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    pool = process.runtime(2).pool
    with pytest.raises(StepFailed, match="sold out") as caught:
        within(lambda: execute(graph, Shipment, Order(), threads=2))
    assert len(caught.value.others) == 1
    poll(lambda: pool._outstanding == 0)
    assert calls == [1]


def make_context(listeners: Sequence[Listener] = (), **facts: Any) -> RunContext:
    """Return what the steps of a run on two threads share."""
    submission = Submission(execution_id="o-1", listeners=listeners)
    common: dict[str, Any] = {"graph": "shop", "submission": submission, "settings": Settings(threads=2)}
    return RunContext(**{"runtime": process.runtime(2), **common, **facts})


class Interleaved(Cancellation):
    """Does something in the middle of an abort, as another thread may."""

    meanwhile: Callable[[], None] | None = None

    def cancel(self, error: BaseException) -> None:
        if self.meanwhile is not None:
            self.meanwhile()
        super().cancel(error)


def test_a_wait_that_ends_while_its_run_is_aborted_resumes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer may ring between the end of the run and the moment when its alarms are cancelled."""
    graph, outcomes, resumed = Graph("shop"), queue.SimpleQueue[Ended](), list[object]()
    cancellation = Interleaved()

    @graph.step(retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(3600)))
    def charge(order: Order) -> Charge:
        raise ValueError("busy")

    execution = Scheduler(
        graph.plan(Charge, Order), [Order()], make_context(cancellation=cancellation), telling(outcomes.put)
    )
    execution.start()
    poll(lambda: bool(execution._waiting))
    (waiting,) = execution._waiting
    monkeypatch.setattr(execution, "_go_on", resumed.append)
    cancellation.meanwhile = lambda: execution._wake(waiting)
    stop = RunCancelled("o-1", "asked to")
    execution.abort(stop)
    assert outcomes.get(timeout=WAIT_S).error is stop
    assert resumed == []


class Watch(Cancellation):
    """Tells the time that a test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.time_s = 100.0

    def now(self) -> float:
        return self.time_s


def end_of(plan: Plan, context: RunContext) -> Ended:
    """Execute *plan* for an order and return how it ended."""
    outcomes = queue.SimpleQueue[Ended]()
    execution = Scheduler(plan, [Order()], context, telling(outcomes.put))
    execution.start()
    return outcomes.get(timeout=WAIT_S)


class TimerLast:
    """An execution's lock that the timer's thread gets only once the execution is failing."""

    def __init__(self, execution: Scheduler) -> None:
        self._execution, self._lock = execution, threading.Lock()
        self.rung, self._failing = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        if threading.current_thread().name == "docket-timer":
            self.rung.set()
            reached(self._failing)
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if self._execution.failing:
            self._failing.set()
        self._lock.release()


def test_a_retry_whose_alarm_rings_while_another_step_fails_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Between the alarm's ring and the retry's start the step belongs to the failure, which ends it."""
    graph, outcomes = Graph("shop"), queue.SimpleQueue[Ended]()

    @graph.step(retry=RetryPolicy(backoff=FixedBackoff(0)))
    def charge(order: Order) -> Charge:
        raise ValueError("again")

    @graph.step
    def reserve(order: Order) -> Reservation:
        reached(gate.rung)
        raise KeyError("sold out")

    @graph.step
    def ship(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    execution = Scheduler(graph.plan(Shipment, Order), [Order()], make_context(), telling(outcomes.put))
    gate = TimerLast(execution)
    execution.lock = gate  # type: ignore[assignment] # it needs to be a lock for `with` alone
    execution.start()
    error = outcomes.get(timeout=WAIT_S).error
    assert isinstance(error, StepFailed)
    assert (error.step, len(error.others)) == ("reserve", 1)
    passed = threading.Event()
    process.runtime(2).timer.after(0, passed.set)
    reached(passed)
    assert caplog.messages == []


def test_what_a_step_raises_while_its_run_is_being_stopped_is_not_its_failure() -> None:
    """The stop is known before it has reached the execution; the step's error follows from it."""
    graph, context = Graph("shop"), make_context()
    stop = RunCancelled("o-1", "asked to")

    @graph.step
    def charge(order: Order) -> Charge:
        context.cancellation.cancel(stop)
        raise ValueError("connection closed")

    assert end_of(graph.plan(Charge, Order), context).error is stop


def test_what_ends_programs_outside_of_a_steps_code_is_no_failure_of_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The caller gets it as it is, and no thread dies of it."""
    graph, leave = Graph("shop"), SystemExit("leaving")

    @graph.step
    def charge(order: Order) -> Charge:
        return Charge()

    def exit_now(_: Attempt, thread: Worker | None) -> bool:
        raise leave

    monkeypatch.setattr(Attempt, "start", exit_now)
    assert end_of(graph.plan(Charge, Order), make_context()).error is leave


def test_a_step_that_a_stop_keeps_from_beginning_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop comes when everything is prepared for its call: it is no cancelled step, and its slot is free."""
    graph, context, begin = Graph("shop"), make_context(store=MemoryStore()), Attempt.start
    executions: list[Scheduler] = []

    @graph.step(max_concurrent=1)
    def charge(order: Order) -> Charge:
        raise AssertionError("called after the stop")

    def stop_first(attempt: Attempt, thread: Worker | None) -> bool:
        executions[0].abort(RunCancelled("o-1", "asked to"))
        return begin(attempt, thread)

    monkeypatch.setattr(Attempt, "start", stop_first)
    outcomes: list[Ended] = []
    plan = graph.plan(Charge, Order)
    executions.append(Scheduler(plan, [Order()], context, telling(outcomes.append), helps=Help.ALL))
    executions[0].start()
    assert [type(outcome.error) for outcome in outcomes] == [RunCancelled]
    assert context.rows == []
    slots = process.slots_of(plan.steps[0].step)
    assert slots is not None
    assert slots.free == 1


def test_only_what_is_wanted_of_a_plan_is_computed() -> None:
    """Of a plan with several outputs, some may be known already: what only they need is not called."""
    graph, calls, outcomes = Graph("shop"), list[str](), list[Ended]()

    @graph.step
    def charge(order: Order) -> Charge:
        calls.append("charge")
        return Charge()

    @graph.step
    def reserve(order: Order) -> Reservation:
        calls.append("reserve")
        return Reservation(reservation_id="kept")

    @graph.step
    def ship(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    plan = graph.plan(Shipment, Order)
    slots = {planned.step.name: planned.slot for planned in plan.steps}
    both = replace(plan, output_slots=(slots["charge"], slots["reserve"]))
    context = make_context(runtime=InlineRuntime())
    end, wanted = telling(outcomes.append), [slots["reserve"]]
    execution = Scheduler(both, [Order()], context, end, outputs=wanted, helps=Help.ALL)
    execution.start()
    assert outcomes == [Ended(values=(Reservation(reservation_id="kept"),))]
    assert calls == ["reserve"]


def test_an_execution_that_has_ended_is_not_aborted_any_more() -> None:
    """A stop that comes too late tells nobody a second end, and cancels nothing."""
    graph, outcomes, context = Graph("shop"), list[Ended](), make_context(runtime=InlineRuntime())

    @graph.step
    def charge(order: Order) -> Charge:
        return Charge(charge_id="paid")

    end = telling(outcomes.append)
    execution = Scheduler(graph.plan(Charge, Order), [Order()], context, end, helps=Help.ALL)
    execution.start()
    execution.abort(RunCancelled("o-1", "too late"))
    assert outcomes == [Ended(values=(Charge(charge_id="paid"),))]
    assert context.cancellation.error is None


def test_an_execution_tells_its_end_while_no_exception_is_handled() -> None:
    """An error that the receiver raises has no foreign context."""
    graph, handled = Graph("shop"), list[BaseException | None]()

    @graph.step
    def charge(order: Order) -> Charge:
        return Charge()

    def note(*_: object) -> None:
        handled.append(sys.exception())

    context = make_context(runtime=InlineRuntime())
    Scheduler(graph.plan(Charge, Order), [Order()], context, note, helps=Help.ALL).start()
    assert handled == [None]


@pytest.mark.parametrize("persist", [None, Scope.GLOBAL])
def test_what_others_need_of_a_step_is_noted_for_the_run(persist: Scope | None) -> None:
    """Whether it was computed or lay in a cache: the run's next save carries it under the run's own name."""
    store = MemoryStore()
    graph = Graph("shop", store=store)

    @graph.step(persist=persist)
    def charge(order: Order) -> Charge:
        return Charge(charge_id="paid")

    within(lambda: graph.execute(Charge, Order(), execution_id="earlier"))
    context = make_context(store=store, keeps=frozenset({"charge"}))
    assert end_of(graph.plan(Charge, Order), context).values == (Charge(charge_id="paid"),)
    (kept,) = context.kept
    assert kept.key == workflow_key("shop", "o-1", "charge")
    assert Charge.FromString(kept.output_data) == Charge(charge_id="paid")
    assert [row.cached for row in store.executions] == ([] if persist is None else [False, True])


def test_a_success_tells_how_long_the_step_took() -> None:
    """From its begin to its end, on the run's clock."""
    graph, heard, watch = Graph("shop"), list[Event](), Watch()

    @graph.step
    def charge(order: Order) -> Charge:
        watch.time_s += 2.5
        return Charge()

    end_of(graph.plan(Charge, Order), make_context(cancellation=watch, listeners=[heard.append]))
    assert [(event.kind, event.at, event.elapsed_s) for event in heard] == [
        (EventKind.STEP_STARTED, 100.0, None),
        (EventKind.STEP_SUCCEEDED, 102.5, 2.5),
    ]


def test_a_late_return_tells_how_late_it_is() -> None:
    """The step knew its deadline; the event names step and attempt, and how long that had been going on."""
    graph, heard, watch, deadlines = Graph("shop"), list[Event](), Watch(), Deadlines()
    late = threading.Event()
    process.runtime(2).timer = deadlines.timer()

    @graph.step(timeout=3600)
    def charge(order: Order, ctx: StepContext) -> Charge:
        assert ctx.deadline == watch.time_s + 3600
        deadlines.ring(3600)
        assert ctx.cancelled.wait(WAIT_S)
        watch.time_s += 2.5
        return Charge()

    def listen(event: Event) -> None:
        if event.kind is EventKind.STEP_LATE:
            heard.append(event)
            late.set()

    outcome = end_of(graph.plan(Charge, Order), make_context(cancellation=watch, listeners=[listen]))
    assert isinstance(outcome.error, StepTimedOut)
    reached(late)
    assert [(event.step, event.attempt, event.elapsed_s) for event in heard] == [("charge", 1, 2.5)]


@pytest.mark.parametrize("helps", [False, True])
@pytest.mark.parametrize("at", [1, 2])
def test_what_breaks_outside_of_a_steps_code_is_told_with_its_name(
    at: int, helps: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On whichever thread the step begins or goes on: the run ends, and says where; the log has the traceback."""
    graph, begin = Graph("shop"), Attempt.start

    @graph.step(retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0)))
    def charge(order: Order) -> Charge:
        raise ValueError("again")

    def break_down(attempt: Attempt, thread: Worker | None) -> bool:
        if attempt._number == at:
            raise MemoryError("broken")
        return begin(attempt, thread)

    monkeypatch.setattr(Attempt, "start", break_down)
    with caplog.at_level(logging.DEBUG, "docket_celery.engine"), pytest.raises(StepFailed) as caught:
        within(lambda: execute(graph, Charge, Order(), threads=2, helps=helps))
    assert caught.value.args[:3] == ("charge", 0, False)
    assert caught.value.caused_by(MemoryError)
    (record,) = (record for record in caplog.records if record.name == "docket_celery.engine")
    assert record.getMessage() == "step 'charge' failed outside its own code"
    assert record.exc_info is not None
    assert record.exc_info[0] is MemoryError


def test_abort_cancels_the_contexts_of_running_steps_at_once() -> None:
    """A step that sleeps on its context wakes with the abort, which is what the caller gets, cause included."""
    graph = Graph("shop")
    sleeping, woken = threading.Event(), threading.Event()
    seen: list[BaseException] = []

    @graph.step
    def charge(order: Order) -> Charge:
        reached(sleeping)
        raise AbortError("fraud", KeyError("card"))

    @graph.step
    def reserve(order: Order, ctx: StepContext) -> Reservation:
        sleeping.set()
        try:
            ctx.sleep(3600)
        except AbortError as error:
            seen.append(error)
            woken.set()
            raise
        return Reservation()

    @graph.step
    def ship(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    with pytest.raises(AbortError, match="fraud") as caught:
        within(lambda: graph.execute(Shipment, Order()))
    assert caught.value.cause == "KeyError: 'card'"
    reached(woken)
    assert seen == [caught.value]


def test_an_abort_leaves_the_callers_thread_to_its_step() -> None:
    """It is none of the pool's, so nothing replaces it: the run ends, and the caller hears when its step returns."""
    graph, threads, begun = Graph("shop"), list[int](), threading.Event()

    # With a deadline it is for the pool, whose one thread has nothing left for the other step.
    @graph.step(timeout=3600)
    def charge(order: Order) -> Charge:
        reached(begun)
        raise AbortError("stop")

    @graph.step
    def reserve(order: Order, ctx: StepContext) -> Reservation:
        threads.append(threading.get_ident())
        begun.set()
        assert ctx.cancelled.wait(WAIT_S)
        return Reservation()

    @graph.step
    def ship(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    def run() -> int:
        with pytest.raises(AbortError):
            execute(graph, Shipment, Order(), threads=1)
        return threading.get_ident()

    assert [within(run)] == threads


@pytest.mark.parametrize("timeout", [None, 3600])
def test_a_run_forgets_the_attempts_that_are_over(timeout: int | None) -> None:
    """A long run with many of them does not keep telling each when it is stopped."""
    graph, context = Graph("shop"), make_context()

    @graph.step(timeout=timeout, retry=RetryPolicy(max_attempts=3, backoff=FixedBackoff(0)))
    def charge(order: Order, ctx: StepContext) -> Charge:
        if ctx.attempt < 3:
            raise ConnectionError("again")
        return Charge()

    assert end_of(graph.plan(Charge, Order), context).values == (Charge(),)
    assert context.cancellation._callbacks == []


def test_aborting_one_run_leaves_the_other_runs_of_the_pool_alone() -> None:
    """Threads that an abort gives up may be back at other work by then; that work still goes on to its end."""
    aborting = Graph("aborting")
    barrier = threading.Barrier(2, timeout=WAIT_S)

    @aborting.step
    def charge(order: Order) -> Charge:
        barrier.wait()
        raise AbortError("stop")

    @aborting.step
    def reserve(order: Order) -> Reservation:
        barrier.wait()
        return Reservation()

    @aborting.step
    def ship(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    edges = {f"s{i}": [f"s{i - 1}"] if i else [] for i in range(40)}
    chain = build(edges, total, "chain")

    def abort_often() -> None:
        for _ in range(200):
            with pytest.raises(AbortError):
                execute(aborting, Shipment, Order(), threads=3, helps=False)

    def run_often() -> None:
        for _ in range(200):
            assert deliver(chain, "s39", threads=3, helps=False).value == Money(cents=40)

    tasks = [start(abort_often), start(run_often)]
    for task in tasks:
        task.result(2 * WAIT_S)


@pytest.mark.parametrize("helps", [True, False])
def test_ready_steps_are_taken_in_plan_order(helps: bool) -> None:
    """Also those that become ready later than others; a step that the caller may not run does not stop it."""
    order: list[str] = []

    def body(name: str) -> Callable[..., Money]:
        def note(*inputs: Money) -> Money:
            order.append(name)
            return total(*inputs)

        return note

    graph = Graph("shop")
    add_step(graph, "a", [], body("a"))
    add_step(graph, "timed", [], body("timed"), timeout=3600)
    add_step(graph, "b", ["a"], body("b"))
    add_step(graph, "c", [], body("c"))
    add_step(graph, "end", ["timed", "b", "c"], body("end"))
    names = list(graph.compiled(key("end"), ()))
    assert names == ["a", "timed", "b", "c", "end"]
    assert deliver(graph, "end", threads=1, helps=helps).value is not None
    here = [name for name in names if name != "timed"] if helps else names
    assert [name for name in order if name in here] == here
