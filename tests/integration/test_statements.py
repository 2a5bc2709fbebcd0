"""How many statements a run costs on Postgres, counted where they leave for the server."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import pytest
from sqlalchemy import event

from docket_celery import Graph, Named, PayloadUnavailable, Scope
from docket_celery.engine.stored_items import PAGE, StoredItems
from docket_celery.store import SQLStore
from docket_celery.store.records import Lease
from tests.conformance.samples import GRAPH, RUN, ending, output, request
from tests.infra.servers import connect
from tests.unit.protos.shop_pb2 import Money, Order

pytestmark = [pytest.mark.integration]


@pytest.fixture
def store(database_url: str) -> Generator[SQLStore]:
    """A store on Postgres whose heartbeat has connections, and so an engine, of its own."""
    made = SQLStore(database_url)
    yield made
    made.close()


@contextmanager
def counted(store: SQLStore) -> Generator[list[str]]:
    """Collect the statements of *store*.

    Those of the heartbeat go over another engine and are left out: they depend on how long a run takes, not on
    what it does, and one statement extends all runs of the process at once.
    """
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        found.append(" ".join(statement.split())[:60])

    event.listen(store.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(store.engine, "before_cursor_execute", note)


def chain(length: int, **options: Any) -> Graph:
    """Return a graph of *length* steps, each over the one before."""
    graph = Graph(f"chain-{length}-{len(options)}")

    def first(order: Order) -> Annotated[Money, Named("1")]:
        return Money(cents=order.amount_cents)

    graph.register(first, name="step-1", **options)
    for number in range(2, length + 1):
        graph.register(_next(number), name=f"step-{number}", **options)
    graph.register(_total(length), name="total")
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
        return money

    total.__annotations__ = {"money": Annotated[Money, Named(str(length))], "return": Money}
    return total


@pytest.mark.parametrize("length", [1, 4, 8])
def test_a_run_of_n_saved_steps_makes_n_plus_three_statements(store: SQLStore, length: int) -> None:
    """Acquire, restore, n saves, end; the rows of the executions travel with them."""
    graph = chain(length, persist=Scope.WORKFLOW)
    with counted(store) as statements:
        money = graph.execute(Money, Order(amount_cents=5), store=store, execution_id="counted")
    assert money.cents == 5 + length - 1
    assert len(statements) == length + 3, statements
    with counted(store) as statements:
        assert graph.execute(Money, Order(amount_cents=5), store=store, execution_id="counted") == money
    # The run is not taken but read: nothing is restored, since nothing runs.
    assert len(statements) == 1, statements


def test_a_shared_step_makes_two_statements_on_a_miss_and_one_on_a_hit(store: SQLStore) -> None:
    """Looked up and published; or found. The run's own lease is taken and given back around it."""
    graph = chain(1, persist=Scope.GLOBAL)
    with counted(store) as bare:
        chain(1, persist=Scope.WORKFLOW).execute(Money, Order(amount_cents=1), store=store)
    around = len(bare) - 2  # without its restore and its save
    with counted(store) as miss:
        graph.execute(Money, Order(amount_cents=5), store=store)
    with counted(store) as hit:
        graph.execute(Money, Order(amount_cents=5), store=store)
    assert len(miss) == around + 2, miss
    assert len(hit) == around + 1, hit


def test_a_refresh_makes_three_statements_and_forgetting_one(store: SQLStore) -> None:
    """It is a run: acquire, publish, end. To forget is to delete."""
    graph = Graph("rates", store=store)

    @graph.step(persist=Scope.GLOBAL)
    def find_rate(order: Order) -> Money:
        return Money(cents=order.amount_cents)

    order = Order(amount_cents=5)
    for _ in range(2):
        with counted(store) as statements:
            assert graph.refresh(find_rate, order) == Money(cents=5)
        assert len(statements) == 3, statements
    with counted(store) as statements:
        assert graph.forget(find_rate, order)
    assert len(statements) == 1, statements


def test_a_page_of_a_batch_makes_one_statement(store: SQLStore) -> None:
    """That it is of the same job is part of it; only where nothing is found the run is asked why."""
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
    with counted(store) as statements:
        found = list(iter(items))
    assert found == [Money(cents=7)] * total
    assert len(statements) == 3, statements
    with counted(store) as statements, pytest.raises(PayloadUnavailable, match="has another job now"):
        replace(items, job_digest=b"e" * 32).page(0)
    assert len(statements) == 2, statements


def test_a_run_that_saves_nothing_does_not_even_connect(store: SQLStore, database_url: str) -> None:
    """With a store at hand, a graph without checkpoints leaves the database alone."""
    with connect(database_url) as watcher, counted(store) as statements:
        money = chain(4).execute(Money, Order(amount_cents=5), store=store)
        sessions = watcher.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchone()
    assert money.cents == 8
    assert statements == []
    assert sessions == (0,)
