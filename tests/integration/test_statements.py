"""How many round trips to Postgres a run costs, counted on the wire."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Annotated, Any

import pytest

from docket_celery import Graph, Named, PayloadUnavailable, Scope, StepFailed
from docket_celery.engine.stored_items import ENVELOPE_BYTES, PAGE, StoredBatch, StoredItems
from docket_celery.store import SQLStore
from docket_celery.store.records import Lease
from tests.conformance.samples import GRAPH, RUN, ending, output, request
from tests.infra.servers import connect
from tests.infra.wire import Wire
from tests.unit.protos.shop_pb2 import Money, Order

pytestmark = [pytest.mark.integration]


@pytest.fixture
def wire(database_url: str) -> Generator[Wire]:
    """What counts, before the Postgres of the test run."""
    with Wire(database_url) as made:
        yield made


@pytest.fixture
def store(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Generator[SQLStore]:
    """A store on it, with a connection; its heartbeat, at a quarter of a lease, never beats within a test."""
    monkeypatch.setenv("DOCKET_CELERY_LEASE_SECONDS", "3600")
    made = SQLStore(wire.url)
    made.check_schema()
    yield made
    made.close()


def chain(length: int, persist: Scope | None = None, *, target: bool = False) -> Graph:
    """Return a graph of *length* steps that persist, each over the one before, with or without the *target*."""
    graph = Graph(f"chain-{length}-{persist}-{target}")

    def first(order: Order) -> Annotated[Money, Named("1")]:
        return Money(cents=order.amount_cents)

    between = length - target
    graph.register(first, name="step-1", persist=persist)
    for number in range(2, between + 1):
        graph.register(_next(number), name=f"step-{number}", persist=persist)
    graph.register(_total(between), name="total", persist=persist if target else None)
    return graph


def _next(number: int) -> Any:
    def step(money: Money) -> Money:
        return Money(cents=money.cents + 1)

    step.__annotations__ = {
        "money": Annotated[Money, Named(str(number - 1))],
        "return": Annotated[Money, Named(str(number))],
    }
    return step


def _total(length: int) -> Any:
    def total(money: Money) -> Money:
        return Money(cents=money.cents)

    total.__annotations__ = {"money": Annotated[Money, Named(str(length))], "return": Money}
    return total


def fan() -> Graph:
    """Return a graph of three steps side by side and one over them all; each persists."""
    graph = Graph("fan")

    @graph.step(persist=Scope.WORKFLOW)
    def left(order: Order) -> Annotated[Money, Named("left")]:
        return Money(cents=order.amount_cents)

    @graph.step(persist=Scope.WORKFLOW)
    def middle(order: Order) -> Annotated[Money, Named("middle")]:
        return Money(cents=order.amount_cents)

    @graph.step(persist=Scope.WORKFLOW)
    def right(order: Order) -> Annotated[Money, Named("right")]:
        return Money(cents=order.amount_cents)

    @graph.step(persist=Scope.WORKFLOW)
    def join(
        one: Annotated[Money, Named("left")],
        two: Annotated[Money, Named("middle")],
        three: Annotated[Money, Named("right")],
    ) -> Money:
        return Money(cents=one.cents + two.cents + three.cents)

    return graph


@pytest.mark.parametrize("length", [1, 4, 8])
def test_a_run_of_n_saved_steps_makes_n_plus_two_round_trips(
    wire: Wire, store: SQLStore, length: int
) -> None:
    """Acquire, n saves, end; the rows of the executions travel with them."""
    graph = chain(length, Scope.WORKFLOW)
    graph.execute(Money, Order(amount_cents=5), store=store)
    with wire.counted() as trips:
        money = graph.execute(Money, Order(amount_cents=5), store=store)
    assert money.cents == 5 + length - 1
    assert len(trips) == length + 2, trips


@pytest.mark.parametrize("length", [2, 4, 8])
def test_a_saved_target_costs_no_round_trip_of_its_own(wire: Wire, store: SQLStore, length: int) -> None:
    """It is saved with the end."""
    graph = chain(length, Scope.WORKFLOW, target=True)
    graph.execute(Money, Order(amount_cents=5), store=store)
    with wire.counted() as trips:
        graph.execute(Money, Order(amount_cents=5), store=store)
    assert len(trips) == length + 1, trips


def test_a_run_that_is_resumed_restores_in_the_round_trip_that_takes_it(wire: Wire, store: SQLStore) -> None:
    """Its row is read before: acquire twice, end."""
    graph, broken = Graph("resumed"), [True]

    @graph.step(persist=Scope.WORKFLOW)
    def first(order: Order) -> Annotated[Money, Named("1")]:
        return Money(cents=order.amount_cents)

    @graph.step
    def last(money: Annotated[Money, Named("1")]) -> Money:
        if broken.pop():
            raise ConnectionError
        return money

    order = Order(amount_cents=5)
    with pytest.raises(StepFailed):
        graph.execute(Money, order, store=store, execution_id="resumed")
    broken.append(False)
    with wire.counted() as trips:
        assert graph.execute(Money, order, store=store, execution_id="resumed") == Money(cents=5)
    assert len(trips) == 3, trips


def test_a_fan_makes_as_many_round_trips_as_a_chain(wire: Wire, store: SQLStore) -> None:
    """Side by side, three steps are saved each for itself."""
    graph = fan()
    graph.execute(Money, Order(amount_cents=5), store=store)
    with wire.counted() as trips:
        assert graph.execute(Money, Order(amount_cents=5), store=store) == Money(cents=15)
    assert len(trips) == 4 + 1, trips


@pytest.mark.parametrize("target", [False, True])
def test_a_finished_run_submitted_again_makes_one_round_trip(
    wire: Wire, store: SQLStore, target: bool
) -> None:
    """The run is not taken but read; nothing is restored, since nothing runs."""
    graph = chain(4, Scope.WORKFLOW, target=target)
    money = graph.execute(Money, Order(amount_cents=5), store=store, execution_id="again")
    with wire.counted() as trips:
        assert graph.execute(Money, Order(amount_cents=5), store=store, execution_id="again") == money
    assert len(trips) == 1, trips


@pytest.mark.parametrize("length", [1, 4])
def test_a_shared_step_makes_two_round_trips_on_a_miss_and_one_on_a_hit(
    wire: Wire, store: SQLStore, length: int
) -> None:
    """Looked up and published; or found. No lease is taken for it."""
    graph = chain(length, Scope.GLOBAL)
    graph.execute(Money, Order(amount_cents=1), store=store)
    with wire.counted() as miss:
        graph.execute(Money, Order(amount_cents=5), store=store)
    with wire.counted() as hit:
        graph.execute(Money, Order(amount_cents=5), store=store)
    assert len(miss) == 2 * length, miss
    assert len(hit) == length, hit


def test_a_refresh_makes_one_round_trip_and_forgetting_one(wire: Wire, store: SQLStore) -> None:
    """The new entry is published; the old one is deleted."""
    graph = Graph("rates", store=store)

    @graph.step(persist=Scope.GLOBAL)
    def find_rate(order: Order) -> Money:
        return Money(cents=order.amount_cents)

    order = Order(amount_cents=5)
    for _ in range(2):
        with wire.counted() as trips:
            assert graph.refresh(find_rate, order) == Money(cents=5)
        assert len(trips) == 1, trips
    with wire.counted() as trips:
        assert graph.forget(find_rate, order)
    assert len(trips) == 1, trips


def test_a_page_of_a_batch_makes_one_round_trip(wire: Wire, store: SQLStore) -> None:
    """That it is of the same job is part of it; only where nothing is found the run is asked why. None measures."""
    lease, total = store.acquire(request()), 2 * PAGE + 1
    assert isinstance(lease, Lease)
    kind = Money.DESCRIPTOR.full_name
    rows = [output("rate", b"\x08\x07", item=str(n), item_index=n, output_type=kind) for n in range(total)]
    store.save_many(lease, rows)
    store.end(lease, ending())
    items = StoredItems(
        store=store,
        graph=GRAPH,
        execution_id=RUN,
        names=("rate",),
        kind=Money,
        total=total,
        job_digest=b"d" * 32,
    )
    with wire.counted() as trips:
        found = list(items)  # which asks how many there are, too
    assert found == [Money(cents=7)] * total
    assert len(trips) == 3, trips
    with wire.counted() as trips:
        assert StoredBatch(items=items).load_within(total * ENVELOPE_BYTES - 1) is None
    assert trips == []
    with wire.counted() as trips, pytest.raises(PayloadUnavailable, match="has another job now"):
        replace(items, job_digest=b"e" * 32).page(0)
    assert len(trips) == 2, trips


def test_a_run_that_saves_nothing_does_not_even_connect(
    wire: Wire, store: SQLStore, database_url: str
) -> None:
    """With a store at hand, a graph without checkpoints leaves the database alone."""
    store.close()
    with connect(database_url) as watcher, wire.counted() as trips:
        money = chain(4).execute(Money, Order(amount_cents=5), store=store)
        sessions = watcher.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchone()
    assert money.cents == 8
    assert trips == []
    assert sessions == (0,)
