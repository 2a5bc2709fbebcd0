"""The crash matrix over Postgres: what it leaves in the user's own database is nothing."""

from __future__ import annotations

import pytest

from docket_celery import Graph, Scope, SQLStore, StepContext
from docket_celery.testing import crash_matrix
from tests.infra.servers import connect
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Shipment

pytestmark = pytest.mark.integration


def rows_of(url: str) -> dict[str, list[object]]:
    """Return what names each row of the tables that a run writes."""
    names = {
        "docket_runs": "execution_id",
        "docket_cache": "cache_key",
        "docket_executions": "execution_id || step_name",
        "docket_claims": "cache_key",
    }
    with connect(url) as connection:
        return {
            table: [row[0] for row in connection.execute(f"SELECT {name} FROM {table} ORDER BY 1").fetchall()]  # noqa: S608
            for table, name in names.items()
        }


@pytest.mark.slow
def test_a_users_database_is_as_it_was(database_url: str) -> None:
    """Every playing begins without the rows of the one before, shared results included; other rows stay."""
    graph = Graph("pg-crashing")

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order, ctx: StepContext) -> Charge:
        return Charge(charge_id=ctx.idempotency_key)

    @graph.step(persist=Scope.GLOBAL)
    def label(order: Order) -> Label:
        return Label(text=order.order_id)

    @graph.step
    def ship(charge: Charge, label: Label) -> Shipment:
        return Shipment(tracking_id=f"{charge.charge_id} {label.text}")

    store = SQLStore(database_url)
    mine = graph.execute(Shipment, Order(order_id="mine"), store=store, execution_id="mine")
    before = rows_of(database_url)
    assert [len(rows) for rows in before.values()] == [1, 2, 3, 1]
    report = crash_matrix(
        graph, Shipment, Order(order_id="7"), store=store, execution_id="crashing", effects=[Charge]
    )
    assert len(report.boundaries) == 12
    store.close()
    after = rows_of(database_url)
    # Claims that have done their work go after a minute, whoever had them.
    assert set(after.pop("docket_claims")) <= set(before.pop("docket_claims"))
    assert after == before
    again = SQLStore(database_url)
    assert graph.execute(Shipment, Order(order_id="mine"), store=again, execution_id="mine") == mine
    again.close()
