"""What submitting an execution id again means in process, also after the graph has changed."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from docket_celery.errors import GraphChanged, InputsChanged, RunCancelled, StepFailed
from docket_celery.graph import Graph
from docket_celery.observe.events import EventKind
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import Scope
from docket_celery.store import MemoryStore
from docket_celery.store.identity import idempotency_key
from docket_celery.store.records import Purged, RunState
from tests.unit.graphs import WAIT_S, reached, within
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Shipment

ORDER, LABEL = Order(order_id="7"), Label(text="fragile")
KEY = idempotency_key("shop", "o-1", "charge")


class Deploy:
    """The graph as one deploy has it, over a store that outlives it, and a note of what it calls."""

    def __init__(
        self, store: MemoryStore, *, wider: bool = False, fails: bool = False, **charging: Any
    ) -> None:
        self.calls: list[str] = []
        self.heard: list[EventKind] = []
        self._fails = fails
        self.graph = Graph("shop", store=store)
        self.graph.listeners.append(lambda event: self.heard.append(event.kind))
        options = {"name": "charge", "persist": Scope.WORKFLOW, **charging}
        self.graph.step(**options)(self.charge_with_label if wider else self.charge)
        self.graph.register(self.ship)

    def charge(self, order: Order, ctx: StepContext) -> Charge:
        """Charge, and tell by which key."""
        self.calls.append(f"charge {order.order_id}")
        return Charge(charge_id=ctx.idempotency_key)

    def charge_with_label(self, order: Order, label: Label, ctx: StepContext) -> Charge:
        """The same from one input more."""
        self.calls.append(f"charge {order.order_id} {label.text}")
        return Charge(charge_id=ctx.idempotency_key)

    def ship(self, charge: Charge) -> Shipment:
        """Ship, unless this deploy cannot."""
        self.calls.append("ship")
        if self._fails:
            raise ConnectionError("no carrier")
        return Shipment(tracking_id=charge.charge_id)

    def run(self, name: str = "o-1") -> Shipment:
        """Execute the graph."""
        return within(lambda: self.graph.execute(Shipment, ORDER, LABEL, execution_id=name))

    def fail(self) -> None:
        """Execute the graph, which must fail at its last step."""
        with pytest.raises(StepFailed, match="no carrier"):
            self.run()


@pytest.fixture
def store() -> MemoryStore:
    """A store in which the first deploy has charged and then failed."""
    store = MemoryStore()
    Deploy(store, fails=True).fail()
    return store


def test_a_chain_of_renames_keeps_checkpoints_and_keys(store: MemoryStore) -> None:
    """However many names the step has had; also where one deploy in between never saw the run."""
    Deploy(store, name="charge_card", renamed_from=("charge",), fails=True).fail()
    last = Deploy(store, name="charge_payment", renamed_from=("charge", "charge_card"))
    assert last.run() == Shipment(tracking_id=KEY)
    assert last.calls == ["ship"]
    assert last.run("o-2") == Shipment(tracking_id=idempotency_key("shop", "o-2", "charge"))


def test_a_checkpoint_saved_under_a_later_name_is_found_too(store: MemoryStore) -> None:
    """A deploy that forgot the first name saved under the second: both are this step's."""
    other = MemoryStore()
    Deploy(other, name="charge_card", fails=True).fail()
    last = Deploy(other, name="charge_payment", renamed_from=("charge", "charge_card"))
    assert last.run() == Shipment(tracking_id=idempotency_key("shop", "o-1", "charge_card"))
    assert last.calls == ["ship"]


@pytest.mark.parametrize(
    ("deploy", "text"),
    [
        ({"name": "invoice"}, "holds checkpoints of 'charge', which the graph no longer has"),
        ({"name": "invoice", "renamed_from": ("bill",)}, "holds checkpoints of 'charge'"),
    ],
)
def test_a_graph_without_the_step_runs_nothing(store: MemoryStore, deploy: dict[str, Any], text: str) -> None:
    """The error names the fixes, and each of them works."""
    changed = Deploy(store, **deploy)
    with pytest.raises(GraphChanged, match=text) as caught:
        changed.run()
    for fix in ("put the step back", "renamed_from=", "use a new execution_id"):
        assert fix in str(caught.value)
    assert changed.calls == []
    assert changed.run("o-2").tracking_id
    assert Deploy(store, name="invoice", renamed_from=("charge",)).run() == Shipment(tracking_id=KEY)


@pytest.mark.parametrize("persist", [None, Scope.GLOBAL])
def test_a_step_that_keeps_nothing_for_the_run_any_more_runs_nothing(persist: Scope | None) -> None:
    """Its effect would be repeated; another step that persists still has the store asked."""
    store = MemoryStore()

    def deploy(persist: Scope | None, *, fails: bool) -> tuple[Deploy, Graph]:
        made = Deploy(store, persist=persist)
        graph = Graph("shop", store=store)
        graph.step(name="charge", persist=persist)(made.charge)

        @graph.step(persist=Scope.WORKFLOW)
        def ship(charge: Charge) -> Shipment:
            if fails:
                raise ConnectionError("no carrier")
            return Shipment(tracking_id=charge.charge_id)

        return made, graph

    _, first = deploy(Scope.WORKFLOW, fails=True)
    with pytest.raises(StepFailed):
        within(lambda: first.execute(Shipment, ORDER, execution_id="o-1"))
    made, second = deploy(persist, fails=False)
    with pytest.raises(
        GraphChanged, match=r"charge \(kept its output for the run, now has .*make the step what"
    ):
        within(lambda: second.execute(Shipment, ORDER, execution_id="o-1"))
    assert made.calls == []
    _, third = deploy(Scope.WORKFLOW, fails=False)
    assert within(lambda: third.execute(Shipment, ORDER, execution_id="o-1")) == Shipment(tracking_id=KEY)


def test_a_job_that_only_caches_now_starts_from_the_beginning(store: MemoryStore) -> None:
    """No run is kept any more, so none that was begun before is looked at."""
    changed = Deploy(store, persist=Scope.GLOBAL)
    assert changed.run().tracking_id
    assert changed.calls == ["charge 7", "ship"]


def test_a_step_that_returns_another_type_now_runs_nothing(store: MemoryStore) -> None:
    """Its checkpoint cannot be read as what it makes today."""
    graph, calls = Graph("shop", store=store), list[str]()

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Money:
        calls.append("charge")
        return Money()

    @graph.step
    def ship(money: Money) -> Shipment:
        calls.append("ship")
        return Shipment()

    with pytest.raises(GraphChanged, match=r"returned docket.tests.unit.Charge, now docket.tests.unit.Money"):
        within(lambda: graph.execute(Shipment, ORDER, LABEL, execution_id="o-1"))
    assert calls == []


@pytest.mark.parametrize("policy", ["reuse", "error"])
def test_a_step_with_one_input_more(store: MemoryStore, policy: str) -> None:
    """The input is at hand, so the difference is seen: an event, or an error before anything runs."""
    deploy = Deploy(store, wider=True, on_input_change=policy)
    if policy == "error":
        with pytest.raises(InputsChanged, match="made from other inputs; persist the step above it"):
            deploy.run()
        assert deploy.calls == []
    else:
        assert deploy.run() == Shipment(tracking_id=KEY)
        assert deploy.calls == ["ship"]
    assert (EventKind.INPUTS_CHANGED in deploy.heard) is (policy == "reuse")


def test_a_cancelled_run_stays_cancelled() -> None:
    """Submitting it again raises and calls nothing, whatever was saved."""
    store = MemoryStore()
    deploy, shipping = Deploy(store), threading.Event()
    graph = Graph("shop", store=store)
    graph.register(deploy.charge, persist=Scope.WORKFLOW)

    @graph.step
    def ship(charge: Charge, ctx: StepContext) -> Shipment:
        shipping.set()
        ctx.sleep(3600)
        return Shipment()

    handle = graph.start(Shipment, ORDER, LABEL, execution_id="o-1")
    reached(shipping)
    assert handle.cancel("fraud")
    with pytest.raises(RunCancelled, match="fraud"):
        handle.result(WAIT_S)
    again = Deploy(store)
    with pytest.raises(RunCancelled, match="fraud"):
        again.run()
    assert again.calls == []


def test_a_purged_run_starts_from_nothing() -> None:
    """Until then it is FAILED and resumable, however long its retention is over."""
    now = [1000.0]
    store = MemoryStore(lambda: now[0])
    Deploy(store, fails=True).fail()
    now[0] += 31 * 86400
    Deploy(store, fails=True).fail()
    now[0] += 31 * 86400
    assert store.purge(100) == Purged(runs=1, checkpoints=1, executions=4)
    assert store.find_run("shop", "o-1") is None
    fresh = Deploy(store)
    assert fresh.run() == Shipment(tracking_id=KEY)
    assert fresh.calls == ["charge 7", "ship"]
    row = store.find_run("shop", "o-1")
    assert row is not None
    assert (row.state, row.epoch) == (RunState.SUCCEEDED, 1)
