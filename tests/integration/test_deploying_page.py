"""The SQL of docs/deploying.md, on real tables."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from docket_celery import Graph, Scope, SQLStore, StepFailed
from tests.unit.protos.shop_pb2 import Charge, Order

pytestmark = pytest.mark.integration

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deploying.md"


def statements() -> list[str]:
    """Return the page's SQL statements."""
    blocks = re.findall(r"^```sql\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [statement.strip() for block in blocks for statement in block.split(";") if statement.strip()]


def test_the_statements_run_and_find_what_the_page_says(database_url: str) -> None:
    """One failed run, one that its worker left, their steps, and one that is queued."""
    store = SQLStore(database_url)
    graph = Graph("shop", store=store)

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        if order.order_id == "bad":
            raise ValueError(order.order_id)
        return Charge()

    graph.execute(Charge, Order(order_id="good"), execution_id="left")
    graph.execute(Charge, Order(order_id="good"), execution_id="queued")
    with pytest.raises(StepFailed):
        graph.execute(Charge, Order(order_id="bad"), execution_id="failed")
    url = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        connection.execute(
            "UPDATE docket_runs SET state = 'RUNNING', lease_until = now() - interval '1 hour', ended_at = NULL "
            "WHERE execution_id = 'left'"
        )
        connection.execute(
            "UPDATE docket_runs SET state = 'QUEUED', ended_at = NULL WHERE execution_id = 'queued'"
        )
        found: list[list[tuple[object, ...]]] = []
        for statement in statements():
            cursor = connection.execute(statement.encode())
            found.append(cursor.fetchall() if cursor.description else [])
        connection.rollback()
    store.close()
    *_, stuck, ended, steps, queued = found
    assert [row[:3] for row in stuck] == [("shop", "left", "RUNNING")]
    assert [row[:4] for row in ended] == [("shop", "FAILED", "DC201", 1)]
    assert {row[:4] for row in steps} == {("shop", "charge", "SUCCEEDED", 2), ("shop", "charge", "FAILED", 1)}
    assert [row[1] for row in queued] == [1]
