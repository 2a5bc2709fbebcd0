from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import pytest
from celery import Celery, chain

from docket_celery import (
    AbortError,
    FixedBackoff,
    Graph,
    InputMutated,
    InvalidArguments,
    InvalidSettings,
    MemoryStore,
    Named,
    RetryPolicy,
    RunCancelled,
    RunTimedOut,
    Scope,
    StepContext,
    StepFailed,
    StepTimedOut,
    current_context,
    graph_task,
)
from docket_celery.observe.events import EventKind
from docket_celery.store.identity import idempotency_key
from docket_celery.task import app_settings
from docket_celery.testing import FakeClock, eager, inline, record_events, run_step, step_context
from docket_celery.testing.workers import forget_connections
from tests.unit.graphs import reached
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Shipment

ORDER = Order(order_id="7", amount_cents=100)
HOUR_S = 3600.0
app = Celery("kit", broker="memory://", backend="cache+memory://", set_as_current=False)


class BusyError(Exception):
    """A passing failure."""


flaky = Graph("flaky")
failures: list[int] = []


@flaky.step(persist=Scope.WORKFLOW, retry=RetryPolicy(max_attempts=3, backoff=FixedBackoff(HOUR_S)))
def charge(order: Order, ctx: StepContext) -> Charge:
    """Fail as often as the list says."""
    if failures:
        failures.pop()
        raise BusyError(order.order_id)
    return Charge(charge_id=f"{order.order_id} at attempt {ctx.attempt}")


@flaky.step
def ship(charge: Charge) -> Shipment:
    """Ship."""
    return Shipment(tracking_id=charge.charge_id)


@graph_task(app, flaky, name="kit.ship", autoretry_for=(BusyError,), max_retries=1, default_retry_delay=60)
def ship_order(order: Order) -> Shipment:
    """Ship."""
    raise NotImplementedError


@graph_task(app, flaky, name="kit.charge")
def charge_order(order: Order) -> Charge:
    """Charge."""
    raise NotImplementedError


@graph_task(app, flaky, name="kit.ship_charge")
def ship_charge(charge: Charge) -> Shipment:
    """Ship what was charged."""
    raise NotImplementedError


@pytest.fixture(autouse=True)
def _no_failures() -> None:
    failures.clear()


# --- the clock ---------------------------------------------------------------------------------------------------


def test_two_backoffs_of_an_hour_pass_at_once() -> None:
    """And the test reads that two hours were waited."""
    failures.extend([1, 1])
    began = time.monotonic()
    with inline() as bench:
        assert flaky.execute(Shipment, ORDER).tracking_id == "7 at attempt 3"
    assert bench.clock.waited_s == pytest.approx(2 * HOUR_S)
    assert time.monotonic() - began < 60


def test_a_lease_is_kept_alive_by_the_same_clock() -> None:
    """An hour is a hundred leases: the heartbeats keep them while the store's clock goes on."""
    failures.append(1)
    with inline() as bench:
        flaky.execute(Shipment, ORDER, execution_id="long")
    row = bench.store.find_run("flaky", "long")
    assert row is not None
    assert (row.state, row.epoch, row.lost) == ("SUCCEEDED", 1, 0)


def test_sleeping_steps_and_deadlines_go_by_it() -> None:
    """ctx.sleep takes no time; a deadline comes in the middle of it."""
    graph = Graph("sleepy")

    @graph.step(timeout=60)
    def nap(order: Order, ctx: StepContext) -> Label:
        assert ctx.deadline is not None
        left = ctx.deadline - bench.clock.monotonic()
        ctx.sleep(order.amount_cents)
        return Label(text=f"{left:g}")

    with inline() as bench:
        assert graph.execute(Label, Order(amount_cents=59)).text == "60"
        assert bench.clock.waited_s == pytest.approx(59)
        with pytest.raises(StepTimedOut):
            graph.execute(Label, Order(amount_cents=61))
        assert bench.clock.waited_s == pytest.approx(59 + 60)
        with pytest.raises(RunTimedOut):
            graph.execute(Label, Order(amount_cents=50), timeout=40)


def test_asyncio_sleep_in_a_step_goes_by_it() -> None:
    """So a timeout cancels a coroutine in time."""
    graph = Graph("async")

    @graph.step(timeout=60)
    async def nap(order: Order) -> Label:
        await asyncio.sleep(order.amount_cents)
        return Label(text="slept")

    with inline() as bench:
        assert graph.execute(Label, Order(amount_cents=59)).text == "slept"
        assert bench.clock.waited_s == pytest.approx(59)
        with pytest.raises(StepTimedOut):
            graph.execute(Label, Order(amount_cents=int(HOUR_S)))
        assert bench.clock.waited_s == pytest.approx(59 + 60)


def test_a_ttl_runs_out_when_the_clock_is_advanced() -> None:
    """A shared result is computed again after its time."""
    graph, calls = Graph("cached"), list[str]()

    @graph.step(persist=Scope.GLOBAL, ttl=HOUR_S)
    def label(order: Order) -> Label:
        calls.append(order.order_id)
        return Label()

    with inline() as bench:
        for _ in range(2):
            graph.execute(Label, ORDER)
        assert len(calls) == 1
        bench.clock.advance(HOUR_S + 1)
        graph.execute(Label, ORDER)
    assert len(calls) == 2
    assert bench.clock.waited_s == 0


def test_wall_time_begins_where_the_test_says() -> None:
    """Monotonic and wall time are one."""
    clock = FakeClock(start=1000)
    clock.sleep(2)
    clock.advance(3)
    assert (clock.monotonic(), clock.time(), clock.waited_s) == (5, 1005, 2)
    with pytest.raises(ValueError, match="advance must not be negative"):
        clock.advance(-1)


# --- inline ------------------------------------------------------------------------------------------------------


def test_every_block_has_a_memory_of_its_own() -> None:
    """Nothing that one test saved reaches another one, not even in a graph with a store."""
    graph = Graph("own store", store=MemoryStore())

    @graph.step(persist=Scope.WORKFLOW)
    def label(order: Order, ctx: StepContext) -> Label:
        return Label(text=current_context().execution_id)

    for _ in range(2):
        with inline() as bench:
            graph.execute(Label, ORDER, execution_id="same")
            assert bench.store.find_run("own store", "same") is not None
    own: Any = graph.store
    assert own.executions == []
    mine = MemoryStore()
    with inline():
        graph.execute(Label, ORDER, store=mine)
    assert len(mine.executions) == 1


def test_inputs_are_checked_unless_told_not_to() -> None:
    """The kit's modes turn the check on."""
    graph = Graph("spoiling")

    @graph.step
    def label(order: Order) -> Label:
        order.order_id = "8"
        return Label()

    with inline(), pytest.raises(InputMutated):
        graph.execute(Label, Order())
    with inline(docket_check_mutation=False):
        graph.execute(Label, Order())


@pytest.mark.parametrize(("name", "value"), [("threads", 2), ("lease_second", 3), ("max_deliveries", "x")])
def test_settings_that_cannot_be_are_refused(name: str, value: Any) -> None:
    """Before the block begins."""
    with pytest.raises(InvalidSettings), inline(**{name: value}):
        pass


# --- one step ----------------------------------------------------------------------------------------------------


def test_a_step_is_called_with_a_context_of_the_tests_own() -> None:
    """Whatever is left out has a plain value."""
    assert charge(ORDER, step_context(attempt=2)).charge_id == "7 at attempt 2"
    plain = step_context()
    assert (plain.attempt, plain.delivery, dict(plain.values), plain.deadline) == (1, 1, {}, None)
    assert plain.idempotency_key == idempotency_key("test", "test", "test")
    named = step_context(graph="g", execution_id="e", step="s", item="3", values={"user": 1})
    assert named.idempotency_key == idempotency_key("g", "e", "s", "3")
    assert (named.graph, named.execution_id, named.step, named.item, named.values["user"]) == (
        *("g", "e", "s", "3"),
        1,
    )
    assert step_context(idempotency_key="k").idempotency_key == "k"
    assert charge(ORDER, named).charge_id


def test_a_context_can_be_cancelled_and_sleeps_by_a_clock() -> None:
    """As in a run that stops."""
    stopped = step_context(cancelled=RunCancelled("test", "enough"))
    with pytest.raises(RunCancelled):
        stopped.check()
    clock = FakeClock()
    ctx = step_context(clock=clock, timeout=5)
    ctx.sleep(HOUR_S)
    assert (clock.waited_s, ctx.deadline) == (HOUR_S, 5)
    ctx.cancelled.cancel(AbortError("late"))
    with pytest.raises(AbortError):
        ctx.sleep(1)


def test_one_step_runs_alone_with_its_policy() -> None:
    """Retries, events and a checkpoint; nothing that comes before or after it runs."""
    failures.extend([1, 1])
    store = MemoryStore()
    with inline() as bench, record_events(flaky) as events:
        assert run_step(flaky, "charge", ORDER, store=store).charge_id == "7 at attempt 3"
        failures.append(1)
        assert run_step(flaky, charge, ORDER, store=store).charge_id == "7 at attempt 3"
    assert bench.clock.waited_s == pytest.approx(2 * HOUR_S)
    assert events.steps() == ["charge"] * 3
    assert [row.step_name for row in store.executions] == ["charge"]


def test_one_step_that_persists_needs_no_store() -> None:
    """Two calls have nothing to do with each other then."""
    assert run_step(flaky, Charge, ORDER) == run_step(flaky, Charge, ORDER)
    assert run_step(flaky, ship, Charge(charge_id="c")) == Shipment(tracking_id="c")


def test_one_step_fails_like_a_run() -> None:
    """With its attempts and cause."""
    failures.extend([1] * 3)
    with inline(), pytest.raises(StepFailed) as caught:
        run_step(flaky, "charge", ORDER)
    assert (caught.value.attempts, caught.value.caused_by(BusyError)) == (3, True)


def test_one_step_takes_named_inputs_in_the_order_of_its_parameters() -> None:
    """Two values of one type."""
    graph = Graph("named")

    @graph.step
    def total(net: Annotated[Money, Named("net")], tax: Annotated[Money, Named("tax")]) -> Money:
        return Money(cents=10 * net.cents + tax.cents)

    assert run_step(graph, "total", Money(cents=1), Money(cents=2), context={"a": 1}).cents == 12
    with graph.override({"total": Money(cents=5)}):
        assert run_step(graph, "total").cents == 5


def test_a_step_that_is_not_there_and_messages_that_do_not_fit_are_refused() -> None:
    """Naming what there is."""
    with pytest.raises(InvalidArguments, match="it has charge, ship"):
        run_step(flaky, "charg", ORDER)
    with pytest.raises(InvalidArguments, match="Order in this order, got Charge"):
        run_step(flaky, "charge", Charge())
    with pytest.raises(InvalidArguments, match="got nothing"):
        run_step(flaky, "charge")


# --- events ------------------------------------------------------------------------------------------------------


def test_events_of_a_graph_are_written_down() -> None:
    """By step, by kind, and in order."""
    failures.append(1)
    with inline(), record_events(flaky) as events:
        flaky.execute(Shipment, ORDER)
    assert events.kinds() == [EventKind.RUN_STARTED, EventKind.RUN_ENDED]
    assert events.kinds("charge") == [
        EventKind.STEP_STARTED,
        EventKind.STEP_RETRYING,
        EventKind.STEP_STARTED,
        EventKind.STEP_SUCCEEDED,
    ]
    assert events.steps(EventKind.STEP_SUCCEEDED) == ["charge", "ship"]
    assert [event.attempt for event in events.of("charge")] == [1, 1, 2, 2]
    assert (len(events), events[0].kind, len(events[1:])) == (8, EventKind.RUN_STARTED, 7)
    assert "step-retrying charge #1" in repr(events)
    events.assert_order("charge", "ship")
    with pytest.raises(AssertionError, match="'charge' began too early"):
        events.assert_order("ship", "charge")
    with pytest.raises(AssertionError, match="'pack' has no value"):
        events.assert_order("charge", "pack")


def test_nothing_is_written_down_after_the_block() -> None:
    """Though a run goes on; and the graph has no listener left."""
    import threading

    graph, begun, go = Graph("going on"), threading.Event(), threading.Event()

    @graph.step
    def wait(order: Order) -> Label:
        begun.set()
        reached(go)
        return Label()

    for scope in ((graph,), ()):
        begun.clear()
        go.clear()
        with record_events(*scope) as events:
            running = graph.start(Label, ORDER)
            reached(begun)
        go.set()
        running.result(30)
        assert events.kinds("wait") == [EventKind.STEP_STARTED]
    assert graph.listeners == []


def test_without_a_graph_the_runs_of_this_block_are_written_down() -> None:
    """Those of all graphs, and not those of other threads."""
    from tests.unit.graphs import start

    with inline(), record_events() as events:
        flaky.execute(Charge, ORDER)
        start(lambda: flaky.execute(Shipment, ORDER, store=MemoryStore())).result(30)
    assert events.steps() == ["charge"]


# --- eager -------------------------------------------------------------------------------------------------------


def test_an_eager_task_gives_its_message() -> None:
    """Where it is submitted, by the fake clock, into memory."""
    failures.append(1)
    with eager(app) as bench:
        assert ship_order.delay(ORDER).get().tracking_id == "7 at attempt 2"
        flow: Any = chain(charge_order.s(ORDER), ship_charge.s())
        assert flow().get().tracking_id == "7 at attempt 1"
    assert bench.clock.waited_s == pytest.approx(HOUR_S)


@pytest.mark.parametrize("in_worker", [False, True])
def test_an_eager_failure_is_raised_at_delay_after_celerys_retries(
    in_worker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three attempts of each of two deliveries; also where a worker's process submits it eagerly."""
    monkeypatch.setattr(app_settings.this_worker, "app", app if in_worker else None)
    failures.extend([1] * 99)
    with eager(app), record_events(flaky) as events, pytest.raises(StepFailed, match="BusyError: 7"):
        ship_order.delay(ORDER)
    assert [event.delivery for event in events if event.kind is EventKind.STEP_STARTED] == [1] * 3 + [2] * 3
    failures[:] = [1] * 4
    with eager(app):
        assert ship_order.delay(ORDER).get().tracking_id == "7 at attempt 2"


@pytest.mark.parametrize("namespace", [None, "CELERY"])
def test_the_apps_settings_are_back_after_the_block(namespace: str | None) -> None:
    """Those that were set and those that were not, under a namespace too."""

    class Source:
        CELERY_TASK_ALWAYS_EAGER = False

    other = Celery("settings", set_as_current=False)
    if namespace is not None:
        other.config_from_object(Source, namespace=namespace)
    with eager(other):
        assert (other.conf.task_always_eager, other.conf.task_eager_propagates) == (True, True)
    assert (other.conf.task_always_eager, other.conf.task_eager_propagates) == (False, False)
    other.conf.task_eager_propagates = True
    with eager(other), pytest.raises(ZeroDivisionError):
        _ = 1 / 0
    assert (other.conf.task_always_eager, other.conf.task_eager_propagates) == (False, True)


def test_an_app_that_forgets_its_connections_leaves_those_of_others() -> None:
    """There is one pool of an address for all apps of a process."""
    first, other = (Celery(name, broker="memory://", set_as_current=False) for name in ("first", "other"))
    for each in (first, other):
        with each.producer_pool.acquire(block=True) as producer:
            assert producer.connection
    assert first.producer_pool is other.producer_pool
    forget_connections(first)
    with other.producer_pool.acquire(block=True) as producer:
        assert producer.connection
    forget_connections(other)
