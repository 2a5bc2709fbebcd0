from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal

import pytest
from celery import _state

from docket_celery.engine.process.state import process
from docket_celery.engine.process.timer import Alarm, Timer
from docket_celery.engine.run_context import Submission
from docket_celery.engine.run_row import is_busy, job_parts
from docket_celery.errors import (
    AbortError,
    GraphChanged,
    InputsChanged,
    LeaseLost,
    PayloadTooLarge,
    RunConflict,
    RunQuarantined,
    RunTimedOut,
    StepFailed,
    StoreMissing,
    StoreUnavailable,
)
from docket_celery.graph import Graph
from docket_celery.observe.events import EventKind
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.context import StepContext
from docket_celery.plan.messages import to_bytes, value_bytes
from docket_celery.plan.options import FixedBackoff, RetryPolicy, Scope
from docket_celery.store import MemoryStore
from docket_celery.store.contract import Store
from docket_celery.store.records import Checkpoint, Lease, RunEnd, RunRequest, RunRow, RunState, StepExecution
from docket_celery.task.app_settings import settings
from tests.unit.graphs import WAIT_S, execute, pass_on, reached, start, within
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Shipment


class Clock:
    """A store's clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FaultyStore(MemoryStore):
    """A store of which single calls fail: `faults` maps a method to what its next call raises."""

    def __init__(self, **faults: Exception) -> None:
        super().__init__(clock := Clock())
        self.clock = clock
        self.faults = faults
        self.calls: list[str] = []

    def _meet_fault(self, name: str) -> None:
        self.calls.append(name)
        if (error := self.faults.pop(name, None)) is not None:
            raise error

    def acquire(self, request: RunRequest) -> Lease | RunRow:
        self._meet_fault("acquire")
        return super().acquire(request)

    def find_run(self, graph: str, execution_id: str) -> RunRow | None:
        self._meet_fault("find_run")
        return super().find_run(graph, execution_id)

    def restore(self, lease: Lease, keys: Sequence[bytes], *, items: bool = False) -> list[Checkpoint]:
        self._meet_fault("restore")
        return super().restore(lease, keys, items=items)

    def save(self, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None) -> Checkpoint:
        self._meet_fault("save")
        return super().save(lease, checkpoint, execution)

    def lookup(
        self, key: bytes, owner: str, lease_s: float, hit: StepExecution | None = None
    ) -> Checkpoint | bool:
        self._meet_fault("lookup")
        return super().lookup(key, owner, lease_s, hit)

    def publish(
        self,
        checkpoint: Checkpoint,
        owner: str,
        execution: StepExecution | None,
        *,
        replace: bool = False,
    ) -> Checkpoint:
        self._meet_fault("publish")
        return super().publish(checkpoint, owner, execution, replace=replace)

    def end(self, lease: Lease, end: RunEnd) -> None:
        self._meet_fault("end")
        super().end(lease, end)


class CloneFails(MemoryStore):
    """A store without connections for a heartbeat."""

    def clone(self) -> MemoryStore:
        raise OSError("no connections left")


def down() -> StoreUnavailable:
    """Return what a store raises that does not answer."""
    return StoreUnavailable("answer", "gone for a moment")


class Shop:
    """The order graph with its charge persisted, and a note of every call."""

    def __init__(self, store: Store | None = None, name: str = "shop", **charging: Any) -> None:
        self.calls: list[str] = []
        self.keys: set[str] = set()
        self.broken = False
        self.before_ship: Callable[[], object] = lambda: None
        self.graph = Graph(name, store=store)
        self.graph.step(**{"name": "charge", "persist": Scope.WORKFLOW, **charging})(self.charge)
        self.graph.register(self.ship)

    def charge(self, order: Order, ctx: StepContext) -> Charge:
        """Charge the order."""
        self.calls.append("charge")
        self.keys.add(ctx.idempotency_key)
        return Charge(charge_id=f"{order.order_id} {len(self.calls)}")

    def ship(self, charge: Charge) -> Shipment:
        """Ship, unless the shop is broken."""
        self.calls.append("ship")
        self.before_ship()
        if self.broken:
            raise ConnectionError("no carrier")
        return Shipment(tracking_id=charge.charge_id)

    def run(self, name: str = "o-1", order: Order | None = None, **options: Any) -> Shipment:
        """Execute the graph."""
        wanted = Order(order_id="7") if order is None else order
        return within(lambda: self.graph.execute(Shipment, wanted, execution_id=name, **options))

    def fail(self, **options: Any) -> None:
        """Execute the graph with the carrier out of reach."""
        self.broken = True
        with pytest.raises(StepFailed, match="no carrier"):
            self.run(**options)
        self.broken = False


def state(store: Store, name: str = "o-1", graph: str = "shop") -> RunState:
    """Return how the run stands in the store."""
    row = store.find_run(graph, name)
    assert row is not None
    return row.state


def test_a_failed_run_resumes_from_its_checkpoints() -> None:
    """The second submission calls what is missing and nothing else; the record shows what was restored."""
    store = MemoryStore()
    shop = Shop(store)
    shop.fail()
    assert state(store) is RunState.FAILED
    assert shop.run() == Shipment(tracking_id="7 1")
    assert shop.calls == ["charge", "ship", "ship"]
    assert state(store) is RunState.SUCCEEDED
    rows = [(row.step_name, row.delivery, row.attempts, row.cached, row.status) for row in store.executions]
    assert rows == [
        ("charge", 1, 1, False, "SUCCEEDED"),
        ("ship", 1, 1, False, "FAILED"),
        ("charge", 2, 0, True, "SUCCEEDED"),
        ("ship", 2, 1, False, "SUCCEEDED"),
    ]
    assert all(0 <= row.duration_ms < 1000 * WAIT_S for row in store.executions)


def test_a_run_that_succeeded_returns_its_result_without_calling_anything() -> None:
    """Submitting the same job again is a read."""
    shop = Shop(MemoryStore())
    first = shop.run()
    assert shop.run() == first
    assert shop.calls == ["charge", "ship"]


def test_a_step_whose_consumers_are_restored_does_not_run() -> None:
    """Resolution goes from the target down: what only a restored step needed is not computed again."""
    graph, calls, broken = Graph("shop", store=MemoryStore()), list[str](), [True]

    @graph.step
    def label(order: Order) -> Label:
        calls.append("label")
        return Label()

    @graph.step(persist=Scope.WORKFLOW)
    def charge(label: Label) -> Charge:
        calls.append("charge")
        return Charge()

    @graph.step
    def ship(charge: Charge) -> Shipment:
        calls.append("ship")
        if broken[0]:
            raise ConnectionError("no carrier")
        return Shipment()

    with pytest.raises(StepFailed):
        within(lambda: graph.execute(Shipment, Order(), execution_id="o-1"))
    broken[0] = False
    within(lambda: graph.execute(Shipment, Order(), execution_id="o-1"))
    assert calls == ["label", "charge", "ship", "ship"]


@pytest.mark.parametrize("ended", [False, True])
def test_another_job_under_the_same_name_is_a_conflict(ended: bool) -> None:
    """Whether the run succeeded or failed, its name stands for one job; another target is one too."""
    shop = Shop(MemoryStore())
    if ended:
        shop.run()
    else:
        shop.fail()
    with pytest.raises(RunConflict, match="exists with another job"):
        shop.run(order=Order(order_id="8"))
    with pytest.raises(RunConflict, match="exists with another target"):
        within(lambda: shop.graph.execute(Charge, Order(order_id="7"), execution_id="o-1"))


def test_a_job_calls_its_values_by_type_and_name() -> None:
    """Names tell values of one type apart; without one the text is the type's, as in every stored digest."""
    net, tax = ValueKey(Charge, "net"), ValueKey(Charge, "tax")
    charge, batch = Charge(amount_cents=5), [Order(order_id="1")]
    assert job_parts((ValueKey(Charge), ValueKey(Order)), (charge, batch)) == [
        ("docket.tests.unit.Charge", to_bytes(charge)),
        ("list", value_bytes(batch)),
    ]
    names = [name for name, _ in job_parts((net, tax, ValueKey(Order, "new")), (charge, charge, batch))]
    prefix = "docket.tests.unit.Charge named"
    assert names == [f'{prefix} "net"', f'{prefix} "tax"', 'list named "new"']


def test_runs_of_two_graphs_may_share_a_name() -> None:
    """A run is named by graph and execution id."""
    store = MemoryStore()
    one, two = Shop(store), Shop(store, "market")
    assert one.run().tracking_id == two.run().tracking_id
    assert one.calls == two.calls == ["charge", "ship"]
    assert one.keys.isdisjoint(two.keys)


def test_of_two_submissions_at_once_one_runs_and_both_get_the_outcome() -> None:
    """The second waits for the first one's lease and returns what it made."""
    shop = Shop(MemoryStore())
    shipping, go = threading.Event(), threading.Event()
    shop.before_ship = lambda: pass_on(shipping, go)
    first = start(lambda: shop.graph.execute(Shipment, Order(order_id="7"), execution_id="o-1"))
    reached(shipping)
    second = start(lambda: shop.graph.execute(Shipment, Order(order_id="7"), execution_id="o-1"))
    go.set()
    assert first.result(WAIT_S) == second.result(WAIT_S) == Shipment(tracking_id="7 1")
    assert shop.calls == ["charge", "ship"]


def test_a_waiting_submission_shares_a_failure() -> None:
    """It attaches to the live run, so it reports that run's error instead of starting over."""
    store = FaultyStore()
    shop = Shop(store)
    shop.broken = True
    shipping, go = threading.Event(), threading.Event()
    shop.before_ship = lambda: pass_on(shipping, go)
    first = start(lambda: shop.graph.execute(Shipment, Order(order_id="7"), execution_id="o-1"))
    reached(shipping)
    second = start(lambda: shop.graph.execute(Shipment, Order(order_id="7"), execution_id="o-1"))
    while store.calls.count("acquire") < 2:
        assert not second.done()
    go.set()
    for submission in (first, second):
        with pytest.raises(StepFailed, match="no carrier"):
            submission.result(WAIT_S)
    assert shop.calls == ["charge", "ship"]


def looked(store: FaultyStore, times: int, waiting: Future[Any]) -> None:
    """Wait until *store* was asked so often how a run stands, while *waiting* has no outcome."""
    until = time.monotonic() + WAIT_S
    while store.calls.count("find_run") < times:
        assert not waiting.done()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_waiting_sends_the_job_again_only_when_the_run_can_be_taken() -> None:
    """A job may have many megabytes; how the run stands is asked without it."""
    store = FaultyStore()
    shop = Shop(store)
    shipping, go = threading.Event(), threading.Event()
    shop.before_ship = lambda: pass_on(shipping, go)
    first = start(lambda: shop.graph.execute(Shipment, Order(order_id="7"), execution_id="o-1"))
    reached(shipping)
    second = start(lambda: shop.graph.execute(Shipment, Order(order_id="7"), execution_id="o-1"))
    looked(store, 3, second)
    assert store.calls.count("acquire") == 2
    go.set()
    assert first.result(WAIT_S) == second.result(WAIT_S) == Shipment(tracking_id="7 1")
    assert store.calls.count("acquire") == 3


def test_waiting_takes_over_from_a_holder_that_is_lost() -> None:
    """Once its lease has expired the run is taken, and its death counted."""
    store = FaultyStore()
    shop = Shop(store)
    shop.fail()
    row = store.find_run("shop", "o-1")
    assert row is not None
    request = RunRequest(
        graph="shop", execution_id="o-1", target=row.target, job=b"", job_digest=row.job_digest,
        owner="lost", lease_s=30, max_deliveries=10,
    )  # fmt: skip
    assert isinstance(store.acquire(request), Lease)
    waiting = start(shop.run)
    looked(store, 4, waiting)
    store.clock.now += 31
    assert waiting.result(WAIT_S) == Shipment(tracking_id="7 1")
    row = store.find_run("shop", "o-1")
    assert row is not None
    assert row.lost == 1


def test_a_copy_that_met_a_holder_comes_back_without_sending_the_job() -> None:
    """Of a task that was told to come again: it is told so once more, by a look at the run alone."""
    store = FaultyStore()
    shop = Shop(store)
    shipping, go = threading.Event(), threading.Event()
    shop.before_ship = lambda: pass_on(shipping, go)
    first = start(lambda: shop.graph.execute(Shipment, Order(order_id="7"), execution_id="o-1"))
    reached(shipping)
    told: list[tuple[EventKind, str]] = []
    copy = Submission(
        execution_id="o-1",
        task_id="t",
        waits_for_other=True,
        waits=False,
        listeners=[lambda event: told.append((event.kind, event.detail))],
    )
    plan = shop.graph.compiled(ValueKey(Shipment), (ValueKey(Order),))
    outcome = within(lambda: shop.graph.deliver(plan, [Order(order_id="7")], copy))
    assert outcome.busy_s is not None
    assert 0 < outcome.busy_s <= 30
    assert told[-1] == (EventKind.RUN_ENDED, "another delivery advances the run")
    assert store.calls.count("acquire") == 1
    go.set()
    assert first.result(WAIT_S) == Shipment(tracking_id="7 1")
    outcome = within(lambda: shop.graph.deliver(plan, [Order(order_id="7")], copy))
    assert outcome.value == Shipment(tracking_id="7 1")


@pytest.mark.parametrize(
    ("changes", "task_id", "retries", "busy"),
    [
        ({}, "t", 0, True),
        ({}, "t", 1, False),
        ({}, None, 1, True),
        ({"task_id": None}, None, 1, True),
        ({"lease_left_s": 0.0}, "t", 0, False),
        ({"lease_left_s": None, "state": RunState.WAITING}, "t", 0, False),
        ({"state": RunState.SUCCEEDED}, "t", 0, False),
    ],
)
def test_busy_is_what_the_store_would_refuse(
    changes: dict[str, Any], task_id: str | None, retries: int, busy: bool
) -> None:
    """A live lease of somebody else; the next retry of its own task may take it."""
    row = RunRow(
        graph="shop", execution_id="o-1", target="", job_digest=b"", state=RunState.RUNNING, epoch=1, lost=0,
        failures=0, retries=0, task_name=None, task_id="t", lease_left_s=1.0,
    )  # fmt: skip
    submission = Submission(execution_id="o-1", task_id=task_id, retries=retries)
    assert is_busy(replace(row, **changes), submission) is busy


def test_waiting_for_another_holder_ends_with_the_timeout() -> None:
    """`timeout` covers the wait for a live lease; the holder is not disturbed."""
    shop = Shop(MemoryStore())
    shipping, go = threading.Event(), threading.Event()
    shop.before_ship = lambda: pass_on(shipping, go)
    first = start(lambda: shop.graph.execute(Shipment, Order(order_id="7"), execution_id="o-1"))
    reached(shipping)
    with pytest.raises(RunTimedOut, match=r"passed its timeout of 0.05 s"):
        shop.run(timeout=0.05)
    go.set()
    assert first.result(WAIT_S) == Shipment(tracking_id="7 1")


def test_a_run_that_times_out_fails_and_resumes() -> None:
    """The step that slept on its context follows the stop, which stays the error; the next run goes on."""
    store = MemoryStore()
    shop = Shop(store)
    graph, hanging = Graph("hanging", store=store), [True]
    graph.register(shop.charge, name="charge", persist=Scope.WORKFLOW)

    @graph.step
    def ship(charge: Charge, ctx: StepContext) -> Shipment:
        if hanging[0]:
            ctx.sleep(3600)
        return Shipment()

    for _ in range(5):
        with pytest.raises(RunTimedOut):
            within(lambda: graph.execute(Shipment, Order(), execution_id="o-1", timeout=0.05))
        assert state(store, graph="hanging") is RunState.FAILED
    hanging[0] = False
    assert within(lambda: graph.execute(Shipment, Order(), execution_id="o-1")) == Shipment()
    assert shop.calls == ["charge"]
    rows = [(r.status, r.attempts, r.error_code) for r in store.executions if r.step_name == "ship"]
    assert rows == [("CANCELLED", 1, "DC301")] * 5 + [("SUCCEEDED", 1, None)]


def test_a_run_whose_workers_were_lost_too_often_is_not_started_again() -> None:
    """Ten dead leases quarantine it; no step is called."""
    clock = Clock()
    store = MemoryStore(clock)
    shop = Shop(store)
    shop.fail()
    row = store.find_run("shop", "o-1")
    assert row is not None
    for delivery in range(11):
        request = RunRequest(
            graph="shop", execution_id="o-1", target=row.target, job=b"", job_digest=row.job_digest,
            owner=f"lost {delivery}", lease_s=30, max_deliveries=10,
        )  # fmt: skip
        store.acquire(request)
        clock.now += 60
    with pytest.raises(RunQuarantined, match="its worker was lost 10 times"):
        shop.run()
    assert shop.calls == ["charge", "ship"]


def test_a_checkpoint_of_a_step_that_is_gone_stops_the_run_before_it_starts() -> None:
    """A deploy that drops a step must not repeat its effect under another name."""
    store = MemoryStore()
    Shop(store).fail()
    shop = Shop(store, name="shop")
    renamed = Shop(store)
    renamed.graph = Graph("shop", store=store)
    renamed.graph.register(renamed.charge, name="charge_card", persist=Scope.WORKFLOW)
    renamed.graph.register(renamed.ship)
    with pytest.raises(GraphChanged, match="holds checkpoints of 'charge', which the graph no longer has"):
        renamed.run()
    assert renamed.calls == []
    assert shop.run() == Shipment(tracking_id="7 1")


def test_a_checkpoint_of_another_type_stops_the_run_before_it_starts() -> None:
    """The step returns something else by now: the error says of which run and step, and what."""
    store = MemoryStore()
    Shop(store).fail()
    graph = Graph("shop", store=store)

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Label:
        raise AssertionError("called")

    @graph.step
    def ship(label: Label) -> Shipment:
        raise AssertionError("called")

    with pytest.raises(GraphChanged, match=r"'o-1'.*charge \(returned .*\.Charge, now .*\.Label\)"):
        within(lambda: graph.execute(Shipment, Order(order_id="7"), execution_id="o-1"))


def test_a_renamed_step_keeps_its_checkpoint_and_its_idempotency_key() -> None:
    """``renamed_from`` carries both over, so that nothing is paid twice."""
    store = MemoryStore()
    old = Shop(store, name="shop")
    old.fail()
    new = Shop(store, name="shop")
    new.graph = Graph("shop", store=store)
    new.graph.register(new.charge, name="charge_card", persist=Scope.WORKFLOW, renamed_from=("charge",))
    new.graph.register(new.ship)
    assert new.run() == Shipment(tracking_id="7 1")
    assert new.calls == ["ship"]
    new.run("o-2")
    old.run("o-3")
    fresh = Shop(MemoryStore())
    fresh.run("o-2")
    assert fresh.keys == new.keys


@pytest.mark.parametrize("policy", ["reuse", "error"])
def test_inputs_that_are_not_at_hand_are_not_computed_to_compare(policy: Literal["reuse", "error"]) -> None:
    """An unpersisted upstream may give other bytes later: the checkpoint stands, whatever the policy."""
    store, labels = MemoryStore(), list[str]()
    graph = Graph("shop", store=store)

    @graph.step
    def label(order: Order) -> Label:
        labels.append("label")
        return Label(text=str(len(labels)))

    @graph.step(persist=Scope.WORKFLOW, on_input_change=policy)
    def charge(order: Order, label: Label) -> Charge:
        return Charge(charge_id=label.text)

    @graph.step
    def ship(charge: Charge, label: Label) -> Shipment:
        if label.text == "1":
            raise ConnectionError("no carrier")
        return Shipment(tracking_id=charge.charge_id)

    with pytest.raises(StepFailed):
        within(lambda: graph.execute(Shipment, Order(), execution_id="o-1"))
    assert within(lambda: graph.execute(Shipment, Order(), execution_id="o-1")) == Shipment(tracking_id="1")


@pytest.mark.parametrize("policy", ["reuse", "error"])
def test_a_checkpoint_whose_given_inputs_differ(policy: str) -> None:
    """With the inputs at hand the difference is seen: a warning event, or `InputsChanged` before anything runs."""
    store, heard = MemoryStore(), list[tuple[EventKind, str, str]]()
    shop = Shop(store, on_input_change=policy)
    shop.graph.listeners.append(lambda event: heard.append((event.kind, event.step, event.detail)))
    digest = b"\1" * 32
    shop.broken = True
    with pytest.raises(StepFailed):
        within(lambda: execute(shop.graph, Shipment, Order(order_id="7"), job_digest=digest))
    shop.broken = False
    again = lambda: execute(shop.graph, Shipment, Order(order_id="8"), job_digest=digest)  # noqa: E731
    if policy == "error":
        with pytest.raises(
            InputsChanged, match="checkpoint of step 'charge' was made from other inputs"
        ) as caught:
            within(again)
        assert caught.value.execution_id == "run"
        assert shop.calls == ["charge", "ship"]
    else:
        assert within(again) == Shipment(tracking_id="7 1")
    told = (EventKind.INPUTS_CHANGED, "charge", "checkpoint reused")
    assert [event for event in heard if event[0] is told[0]] == ([told] if policy == "reuse" else [])


def test_nothing_that_persists_means_no_store_call() -> None:
    """A graph with a store but no persisted step never touches it."""
    store = FaultyStore()
    shop = Shop(store, persist=None)
    assert shop.run() == Shipment(tracking_id="7 1")
    assert store.calls == []


def test_a_run_of_n_persisted_steps_takes_n_plus_2_calls() -> None:
    """Acquire, a save for each, end; what no delivery has advanced has nothing to restore."""
    store = FaultyStore()
    Shop(store).run()
    assert store.calls == ["acquire", "save", "end"]


def test_a_target_that_persists_is_saved_with_the_end() -> None:
    """One call less; it counts as any other checkpoint."""
    store = FaultyStore()
    graph = Graph("shop", store=store)

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        return Charge(charge_id=order.order_id)

    within(lambda: graph.execute(Charge, Order(order_id="7"), execution_id="o-1"))
    assert store.calls == ["acquire", "end"]
    (row,) = store.executions
    assert (row.step_name, row.status, row.attempts) == ("charge", "SUCCEEDED", 1)
    lease = Lease(graph="shop", execution_id="o-1", target="", owner="", epoch=0, lease_s=1.0)
    (kept,) = store.restore(lease, [])
    assert Charge.FromString(kept.output_data) == Charge(charge_id="7")


def test_a_run_that_was_advanced_before_restores() -> None:
    """After a failure its next delivery reads what is saved."""
    store = FaultyStore()
    shop = Shop(store)
    shop.fail()
    store.calls.clear()
    shop.run()
    assert store.calls == ["acquire", "restore", "end"]


def test_a_plan_of_shared_steps_keeps_no_run() -> None:
    """It takes no lease: one call for a hit, two for a miss."""
    store = FaultyStore()
    shop = Shop(store, persist=Scope.GLOBAL)
    shop.run("o-1")
    shop.run("o-2")
    assert store.calls == ["lookup", "publish", "lookup"]
    assert [(row.execution_id, row.cached) for row in store.executions] == [("o-1", False), ("o-2", True)]
    assert store.find_run("shop", "o-1") is None


def test_a_step_that_persists_needs_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the step and the setting, and nothing ran."""
    # An app that another test left current may have a database.
    state: Any = _state
    monkeypatch.setattr(state._tls, "current_app", None)
    monkeypatch.setattr(state, "default_app", None)
    shop = Shop()
    with pytest.raises(StoreMissing, match=r"step 'charge' of graph 'shop' persists.*docket_database_url"):
        shop.run()
    assert shop.calls == []


@pytest.mark.parametrize("name", ["save", "end"])
def test_a_store_that_is_away_for_a_moment_is_asked_again(name: str) -> None:
    """Neither a save nor the closing statement is given up at the first refusal."""
    store = FaultyStore(**{name: down()})
    shop = Shop(store)
    assert shop.run() == Shipment(tracking_id="7 1")
    assert shop.calls == ["charge", "ship"]
    assert store.calls.count(name) == 2
    assert state(store) is RunState.SUCCEEDED


class Unsaving(MemoryStore):
    """A store that refuses its first *refusals* saves."""

    def __init__(self, refusals: int, before: Callable[[Store], object] = lambda _: None) -> None:
        super().__init__()
        self._left, self._before, self.saves = refusals, before, 0

    def save(self, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None) -> Checkpoint:
        self.saves += 1
        if self.saves <= self._left:
            self._before(self)
            raise down()
        return super().save(lease, checkpoint, execution)


class Hasty(Timer):
    """A timer that cuts short what it is asked to wait, and notes it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def after(self, delay_s: float, call: Callable[[], None]) -> Alarm:
        self.waits.append(delay_s)
        return super().after(0.001, call)


def ship_hastily(store: Store) -> list[float]:
    """Execute the order graph on *store* and return what was waited for; raise what it raises."""
    timer = process.runtime(2).timer = Hasty()
    within(lambda: execute(Shop(store).graph, Shipment, Order(order_id="7"), threads=2, store=store))
    return timer.waits


def test_a_save_is_tried_again_at_ever_longer_intervals(caplog: pytest.LogCaptureFixture) -> None:
    """Four refusals are waited out; each is logged, and the fifth try stores the step's row too."""
    store = Unsaving(4)
    assert ship_hastily(store) == [0.4, 0.8, 1.6, 3.2]
    assert [(row.step_name, row.status) for row in store.executions] == [
        ("charge", "SUCCEEDED"),
        ("ship", "SUCCEEDED"),
    ]
    logged = [record.getMessage() for record in caplog.records if record.name.endswith("step_run")]
    assert logged == [f"run 'run': saving charge, try {number}: {down()}" for number in (1, 2, 3, 4)]


def test_a_save_is_given_up_at_the_fifth_refusal() -> None:
    """The run ends with what the store said, and its checkpoint is missing."""
    store = Unsaving(99)
    with pytest.raises(StoreUnavailable):
        ship_hastily(store)
    assert store.saves == 5


class Unending(MemoryStore):
    """A store that refuses its first *refusals* ends."""

    def __init__(self, refusals: int) -> None:
        super().__init__()
        self._left = refusals

    def end(self, lease: Lease, end: RunEnd) -> None:
        if self._left:
            self._left -= 1
            raise down()
        super().end(lease, end)


def test_an_end_that_saves_the_target_is_tried_as_often_as_a_save() -> None:
    """Its step would be called again for an outage that a save outlives."""
    store, graph = Unending(4), Graph("shop")
    timer = process.runtime(2).timer = Hasty()

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        return Charge()

    made = within(lambda: execute(graph, Charge, Order(order_id="7"), threads=2, store=store))
    assert made == Charge()
    assert timer.waits == [0.4, 0.8, 1.6, 3.2]
    assert [row.step_name for row in store.executions] == ["charge"]


def test_a_save_is_not_tried_again_under_a_lease_that_may_be_another_workers() -> None:
    """The store did not answer for so long that somebody else may have the run."""

    def lose(store: Store) -> None:
        for held in process.heartbeat(store)._held.values():
            held.lost = True

    store = Unsaving(1, before=lose)
    with pytest.raises(StoreUnavailable):
        ship_hastily(store)
    assert store.saves == 1


@pytest.mark.parametrize("name", ["acquire", "restore"])
def test_a_store_that_is_away_at_the_start_fails_the_run_typed(name: str) -> None:
    """The caller may try again; no step was called."""
    store = FaultyStore()
    shop = Shop(store)
    shop.fail()
    shop.calls.clear()
    store.faults[name] = down()
    with pytest.raises(StoreUnavailable):
        shop.run()
    assert shop.calls == []
    assert shop.run() == Shipment(tracking_id="7 1")
    assert shop.calls == ["ship"]


@pytest.mark.parametrize("name", ["acquire", "restore", "save", "end"])
def test_a_store_that_breaks_fails_the_run_instead_of_hanging_it(name: str) -> None:
    """An error that no store should raise still reaches the caller."""
    store = FaultyStore()
    shop = Shop(store)
    if name == "restore":
        shop.fail()
    store.faults[name] = ZeroDivisionError("broken store")
    with pytest.raises((StepFailed, ZeroDivisionError), match="broken store"):
        shop.run()
    if name in {"restore", "save"}:
        assert state(store) is RunState.FAILED


def test_a_store_that_breaks_under_a_second_attempt_is_blamed_on_its_step() -> None:
    """The failure names the step whose value could not be saved, whichever thread went on with it."""
    shop = Shop(FaultyStore(save=ZeroDivisionError("broken store")))
    graph = Graph("shop", store=shop.graph.store)

    @graph.step(persist=Scope.WORKFLOW, retry=RetryPolicy(backoff=FixedBackoff(0)))
    def charge(order: Order, ctx: StepContext) -> Charge:
        if ctx.attempt == 1:
            raise ConnectionError("again")
        return Charge()

    graph.register(shop.ship)
    with pytest.raises(StepFailed, match="ZeroDivisionError: broken store") as caught:
        within(lambda: graph.execute(Shipment, Order()))
    assert caught.value.step == "charge"


def test_a_store_that_breaks_behind_a_coroutine_is_blamed_on_its_step() -> None:
    """What follows its end goes on on the pool, and still knows whose it is."""
    graph = Graph("shop", store=FaultyStore(save=ZeroDivisionError("broken store")))

    @graph.step(persist=Scope.WORKFLOW)
    async def charge(order: Order) -> Charge:
        return Charge()

    graph.register(Shop().ship)
    with pytest.raises(StepFailed, match="ZeroDivisionError: broken store") as caught:
        within(lambda: graph.execute(Shipment, Order()))
    assert caught.value.step == "charge"


def test_a_checkpoint_that_was_saved_first_and_is_of_another_type_stops_the_run() -> None:
    """Its value cannot be had, and one that is not stored must not be used."""

    class Overtaken(MemoryStore):
        def save(self, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None) -> Checkpoint:
            first = replace(checkpoint, output_type="shop.Receipt", output_data=b"other")
            return super().save(lease, first, execution)

    with pytest.raises(GraphChanged, match=r"'o-1' of graph 'shop'.*charge \(returned shop\.Receipt, now "):
        Shop(Overtaken()).run()


def test_no_attempt_begins_under_a_lease_that_is_lost() -> None:
    """The step is not called again; the error names the run and the epoch of the lease."""
    store = FaultyStore()
    graph, calls = Graph("shop", store=store), list[int]()

    @graph.step(persist=Scope.WORKFLOW, retry=RetryPolicy(backoff=FixedBackoff(0)))
    def charge(order: Order, ctx: StepContext) -> Charge:
        calls.append(ctx.attempt)
        for held in process.heartbeat(store)._held.values():
            held.lost = True
        raise ConnectionError("again")

    with pytest.raises(LeaseLost) as caught:
        within(lambda: graph.execute(Charge, Order(), execution_id="o-1"))
    assert caught.value.args == ("shop", "o-1", 1)
    assert calls == [1]


def test_a_lost_lease_ends_the_run_with_what_happened() -> None:
    """A save that the fence refuses stops everything at once."""
    store = FaultyStore(save=LeaseLost("shop", "o-1", 1))
    shop = Shop(store)
    with pytest.raises(LeaseLost):
        shop.run()
    assert shop.calls == ["charge"]


def test_an_abort_is_kept_as_the_runs_outcome() -> None:
    """The record names the step and the error; submitting again resumes."""
    store = MemoryStore()
    shop = Shop(store)

    def abort() -> None:
        raise AbortError("fraud", "stolen card")

    shop.before_ship = abort
    with pytest.raises(AbortError, match="fraud"):
        shop.run()
    row = store.find_run("shop", "o-1")
    assert row is not None
    assert row.error == {"code": "DC200", "args": ["fraud", "stolen card"]}
    assert [(r.step_name, r.status, r.error_code) for r in store.executions][-1] == (
        "ship",
        "FAILED",
        "DC200",
    )


@pytest.mark.parametrize("fault", ["acquire", "end", "step"])
def test_a_host_that_cannot_decide_fails_the_run_instead_of_hanging_it(fault: str) -> None:
    """What a host's own code raises when it is asked whether to park the run reaches the waiting caller."""

    def decide(error: BaseException, lease: Lease | None) -> float | None:
        raise ZeroDivisionError("broken host")

    store = FaultyStore(**({} if fault == "step" else {fault: down()}))
    shop = Shop(store)
    shop.broken = True
    with pytest.raises(ZeroDivisionError, match="broken host"):
        within(lambda: execute(shop.graph, Shipment, Order(), park_s=decide))


def test_an_output_too_large_for_the_store_ends_the_run() -> None:
    """Before it is sent to the database; what was saved before it stays."""
    store, calls = MemoryStore(), list[str]()
    graph = Graph("bulky", store=store)

    @graph.step(persist=Scope.WORKFLOW)
    def small(order: Order) -> Label:
        calls.append("small")
        return Label(text="fits")

    @graph.step(persist=Scope.WORKFLOW)
    def large(label: Label) -> Charge:
        calls.append("large")
        return Charge(charge_id="x" * 2000)

    settings(max_stored_bytes=1000)
    try:
        with pytest.raises(PayloadTooLarge, match="the output of step 'large' of run 'o-1'"):
            graph.execute(Charge, Order(), execution_id="o-1")
    finally:
        settings(max_stored_bytes=None)
    row = store.find_run("bulky", "o-1")
    assert row is not None
    assert row.state is RunState.FAILED
    assert len(graph.execute(Charge, Order(), execution_id="o-1").charge_id) == 2000
    assert calls == ["small", "large", "large"]


def test_a_run_without_a_heartbeat_fails_in_its_row_and_for_its_caller() -> None:
    """Its lease is given back, and the caller hears of it instead of waiting for ever."""
    store, shop = CloneFails(), Shop()
    with pytest.raises(OSError, match="no connections left"):
        within(lambda: shop.graph.execute(Shipment, Order(), execution_id="order-1", store=store))
    row = store.find_run(shop.graph.name, "order-1")
    assert row is not None
    assert row.state is RunState.FAILED
