"""Entries of GLOBAL steps: who shares them, and how one is dropped or computed anew."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from celery import _state

from docket_celery import settings
from docket_celery.errors import (
    CacheMismatch,
    CorruptCheckpoint,
    InvalidArguments,
    StepFailed,
    StoreMissing,
)
from docket_celery.graph import Graph
from docket_celery.plan.annotation import Named
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import FixedBackoff, RetryPolicy, Scope
from docket_celery.store import MemoryStore
from docket_celery.store.records import Checkpoint, StepExecution
from tests.unit.graphs import WAIT_S, pass_on, reached, start, within
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Shipment

ORDER = Order(order_id="7")


class WatchedStore(MemoryStore):
    """A store that knows how many look-ups were told to wait, each counted once."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    @property
    def waiting(self) -> int:
        """How many runs have been told to wait."""
        return len(self._told)

    def lookup(
        self, key: bytes, owner: str, lease_s: float, hit: StepExecution | None = None
    ) -> Checkpoint | bool:
        found = super().lookup(key, owner, lease_s, hit)
        if found is False:
            self._told.add(owner)
        return found


class Rates:
    """A graph with one shared step, which counts its calls; `body` runs inside each."""

    def __init__(self, store: WatchedStore | None = None, graph: str = "rates", **options: Any) -> None:
        self.calls = 0
        self.body: Callable[[StepContext], object] = lambda _ctx: None
        self.store = WatchedStore() if store is None else store
        self.graph = Graph(graph, store=self.store)
        self.graph.register(self.charge, **{"persist": Scope.GLOBAL, **options})

    def charge(self, order: Order, ctx: StepContext) -> Charge:
        """Make a charge that tells how many were begun before it."""
        self.calls += 1
        number = self.calls
        self.body(ctx)
        return Charge(charge_id=f"{self.graph.name} {number}", amount_cents=order.amount_cents)

    def ask(self, order: Order = ORDER) -> str:
        """Return the charge's id for an order, in a run of its own."""
        return within(lambda: self.graph.execute(Charge, order)).charge_id

    def refresh(self, order: Order = ORDER, **options: Any) -> str:
        """Compute the charge anew and return its id."""
        charge: Charge = within(lambda: self.graph.refresh(self.charge, order, **options))
        return charge.charge_id


def test_steps_of_one_cache_share_their_entries() -> None:
    """Neither graph nor step name counts: whoever comes second reads what the first one computed."""
    one = Rates(cache="exchange")
    two = Rates(one.store, "other", cache="exchange", name="lookup")
    assert (one.ask(), two.ask()) == ("rates 1", "rates 1")
    assert (one.calls, two.calls) == (1, 0)


@pytest.mark.parametrize("other", [{}, {"cache": "another"}, {"cache": "exchange", "version": "2"}])
def test_another_cache_or_version_shares_nothing(other: dict[str, str]) -> None:
    """Only the same name and version mean the same entries; a step's own are nobody else's."""
    one = Rates(cache="exchange")
    two = Rates(one.store, "other", **other)
    assert (one.ask(), two.ask()) == ("rates 1", "other 1")


def test_an_entry_of_another_type_is_a_clear_error() -> None:
    """Two graphs that do not know each other name one cache for different things; nothing is called."""
    rates = Rates(cache="exchange")
    rates.ask()
    labels, calls = Graph("labels", store=rates.store), list[str]()

    @labels.step(persist=Scope.GLOBAL, cache="exchange")
    def label(order: Order) -> Label:
        calls.append("label")
        return Label()

    with pytest.raises(
        CacheMismatch, match="give the step another cache= or version=, or drop the entry"
    ) as caught:
        within(lambda: labels.execute(Label, ORDER))
    expected = ("labels", "label", "exchange", "docket.tests.unit.Charge", "docket.tests.unit.Label")
    assert (caught.value.args, calls) == (expected, [])
    assert labels.forget(label, ORDER) is True
    assert within(lambda: labels.execute(Label, ORDER)) == Label()


def test_a_step_that_returns_another_type_now_asks_for_a_new_version() -> None:
    """Its own old entry is not taken for what it returns today."""
    rates = Rates()
    rates.ask()
    newer = Graph("rates", store=rates.store)

    @newer.step(persist=Scope.GLOBAL)
    def charge(order: Order) -> Label:
        return Label()

    with pytest.raises(
        CacheMismatch, match=r"its entry for these inputs is a .*give the step another version="
    ):
        within(lambda: newer.execute(Label, ORDER))


class TestForget:
    """`Graph.forget`."""

    def test_the_entry_for_these_inputs_is_dropped(self) -> None:
        """Others stay, and there is nothing to drop a second time."""
        rates = Rates()
        rates.ask()
        rates.ask(Order(order_id="8"))
        assert rates.graph.forget("charge", ORDER) is True
        assert rates.graph.forget("charge", ORDER) is False
        assert (rates.ask(), rates.ask(Order(order_id="8"))) == ("rates 3", "rates 2")

    def test_a_step_is_named_or_shown(self) -> None:
        """A function, a bound method, or an object with ``compute``."""
        graph = Graph("shop", store=MemoryStore())

        @graph.step(persist=Scope.GLOBAL)
        def ship(order: Order) -> Shipment:
            return Shipment()

        class Labelling:
            def compute(self, order: Order) -> Label:
                return Label(text=order.order_id)

        labelling = Labelling()
        graph.register(labelling, persist=Scope.GLOBAL)
        rates = Rates()
        rates.ask()
        within(lambda: graph.execute(Shipment, ORDER))
        within(lambda: graph.execute(Label, ORDER))
        assert graph.forget(ship, ORDER)
        assert graph.forget(labelling, ORDER)
        assert rates.graph.forget(rates.charge, ORDER)
        rates.ask()
        assert rates.graph.forget(Charge, ORDER)

    def test_key_decides_which_entry_is_meant(self) -> None:
        """What it leaves out of the inputs does not matter here either."""
        rates = Rates(key=lambda order: Order(order_id=order.order_id))
        rates.ask(Order(order_id="7", amount_cents=1))
        assert rates.graph.forget("charge", Order(order_id="7", amount_cents=2))

    def test_values_of_one_type_come_in_the_order_of_the_parameters(self) -> None:
        """As the step takes them; swapped, they are other inputs."""
        graph = Graph("shop", store=MemoryStore())

        @graph.step(persist=Scope.GLOBAL)
        def net(
            gross: Annotated[Money, Named("gross")], ctx: StepContext, tax: Annotated[Money, Named("tax")]
        ) -> Money:
            return Money(cents=gross.cents - tax.cents)

        gross, tax = Money(cents=120), Money(cents=20)
        assert within(lambda: graph.refresh(net, gross, tax)) == Money(cents=100)
        assert graph.forget(net, tax, gross) is False
        assert graph.forget(net, gross, tax) is True


@pytest.mark.parametrize("call", ["forget", "refresh"])
class TestWrongCalls:
    """What cannot be meant, refused before anything runs."""

    @pytest.mark.parametrize(
        ("step", "inputs", "text"),
        [
            ("chrage", [ORDER], "graph 'shop': 'chrage': the graph has no such step; it has charge, price"),
            (str, [ORDER], "<class 'str'>: no such step; name it by its name"),
            ("ship", [Charge()], "step 'ship' keeps nothing; persist=Scope.GLOBAL would"),
            ("price", [ORDER], "keeps its outputs for each run; submit the job under a new execution_id"),
            ("charge", [], "takes docket.tests.unit.Order, in this order; got nothing"),
            ("charge", [Charge()], "takes docket.tests.unit.Order, in this order; got Charge"),
            ("charge", [ORDER, ORDER], "got Order, Order"),
            ("charge", [Order], "in this order; got MessageMeta"),
        ],
        ids=["misspelt", "none", "keeps nothing", "workflow", "nothing", "type", "too many", "a class"],
    )
    def test_the_error_names_what_fits(self, call: str, step: Any, inputs: list[Any], text: str) -> None:
        """Step, inputs, and what to do instead."""
        graph = Graph("shop", store=MemoryStore())

        def charge(order: Order) -> Charge:
            raise AssertionError

        def price(order: Order) -> Money:
            raise AssertionError

        def ship(charge: Charge) -> Shipment:
            raise AssertionError

        graph.register(charge, persist=Scope.GLOBAL)
        graph.register(price, persist=Scope.WORKFLOW)
        graph.register(ship)
        with pytest.raises(InvalidArguments, match=text):
            getattr(graph, call)(step, *inputs)

    def test_without_a_store_there_is_nothing_to_change(
        self, call: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error names the setting."""
        # The app of another test of this process may be the current one, and have a database.
        state: Any = _state
        monkeypatch.setattr(state._tls, "current_app", None)
        monkeypatch.setattr(state, "default_app", None)
        rates = Rates()
        rates.graph.store = None
        with pytest.raises(StoreMissing, match="docket_database_url"):
            getattr(rates.graph, call)("charge", ORDER)


class TestRefresh:
    """`Graph.refresh`."""

    def test_others_read_the_old_entry_until_the_new_one_is_there(self) -> None:
        """Then everybody reads the new one."""
        rates = Rates()
        assert rates.ask() == "rates 1"
        computing, go = threading.Event(), threading.Event()
        rates.body = lambda _ctx: pass_on(computing, go)
        refreshing = start(rates.refresh)
        reached(computing)
        assert rates.ask() == "rates 1"
        go.set()
        assert refreshing.result(WAIT_S) == "rates 2"
        assert rates.ask() == "rates 2"

    def test_a_missing_entry_is_made(self) -> None:
        """For warming a cache; the entry's ttl counts from now."""
        rates = Rates(ttl=60)
        assert rates.refresh() == "rates 1"
        assert rates.ask() == "rates 1"

    def test_it_is_a_run_of_its_own(self) -> None:
        """It shows in the history under a name of its own, and keeps no run."""
        rates = Rates()
        within(lambda: rates.graph.execute(Charge, ORDER, execution_id="o-1"))
        rates.refresh()
        (_, row) = rates.store.executions
        assert (row.step_name, row.cached, row.attempts) == ("charge", False, 1)
        assert row.execution_id != "o-1"
        assert rates.store.find_run("rates", row.execution_id) is None

    def test_the_step_runs_under_its_policy(self) -> None:
        """Attempts, waits and the caller's values are those of any run."""
        rates = Rates(retry=RetryPolicy(max_attempts=3, backoff=FixedBackoff(0)))

        def body(ctx: StepContext) -> None:
            if ctx.attempt < ctx.values["good"]:
                raise ConnectionError("again")

        rates.body = body
        assert rates.refresh(context={"good": 3}) == "rates 3"
        with pytest.raises(StepFailed, match="failed after 3 attempts"):
            rates.refresh(context={"good": 4})
        assert rates.ask() == "rates 3"

    @pytest.mark.parametrize("threads", [0, 4])
    def test_an_async_step_is_refreshed_with_threads_or_without(self, threads: int) -> None:
        """It returns the message, not the coroutine."""
        graph, calls = Graph("shop", store=MemoryStore()), list[str]()

        @graph.step(persist=Scope.GLOBAL)
        async def ship(order: Order) -> Shipment:
            calls.append(order.order_id)
            return Shipment(tracking_id=str(len(calls)))

        settings(threads=threads)
        try:
            assert [graph.refresh(ship, ORDER).tracking_id for _ in range(2)] == ["1", "2"]
        finally:
            settings(threads=None)

    def test_two_at_once_both_compute(self) -> None:
        """None waits for the other, and the entry is what was stored last."""
        rates = Rates()
        computing, go = threading.Event(), threading.Event()
        rates.body = lambda _ctx: pass_on(computing, go) if not computing.is_set() else None
        first = start(rates.refresh)
        reached(computing)
        assert (rates.refresh(), rates.ask()) == ("rates 2", "rates 2")
        go.set()
        assert first.result(WAIT_S) == "rates 1"
        assert (rates.calls, rates.ask()) == (2, "rates 1")

    def test_a_run_that_began_before_does_not_overwrite_it(self) -> None:
        """What that run read may be older than the wish for something new, so it takes the new value too."""
        rates = Rates()
        computing, go = threading.Event(), threading.Event()
        rates.body = lambda _ctx: pass_on(computing, go) if not computing.is_set() else None
        run = start(rates.ask)
        reached(computing)
        assert rates.refresh() == "rates 2"
        go.set()
        assert run.result(WAIT_S) == "rates 2"
        assert (rates.calls, rates.ask()) == (2, "rates 2")

    def test_a_damaged_entry_is_replaced(self) -> None:
        """No run may use it; whoever asks for a new one does not need to read it."""
        rates = Rates()
        rates.ask()
        (stored,) = rates.store._cache.values()
        stored.checksum = b"\0" * 32
        with pytest.raises(CorruptCheckpoint):
            rates.ask()
        assert rates.refresh() == "rates 2"
        assert rates.ask() == "rates 2"
