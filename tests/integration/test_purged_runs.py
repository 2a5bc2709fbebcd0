"""Messages that come once more after their run was purged: no effect happens twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import redis
from celery import Celery

from docket_celery import RunNotFound
from tests.conftest import StartWorker
from tests.infra.processes import wait_until
from tests.infra.servers import connect
from tests.integration.apps.book import Book
from tests.integration.apps.lease_app import app, process
from tests.unit.protos.shop_pb2 import Order, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

APP = "tests.integration.apps.lease_app"
WITHIN_S = 30.0


@pytest.mark.parametrize("how", ["redelivered", "attached"])
def test_a_message_that_comes_once_more_after_the_purge_starts_nothing(
    connect_app: Callable[[Celery], Celery],
    start_worker: StartWorker,
    broker_url: str,
    database_url: str,
    how: str,
) -> None:
    """Its task has ended, as the result backend or its own headers tell; the card is charged once."""
    connect_app(app)
    book = Book(database_url)
    book.create()
    with redis.Redis.from_url(broker_url) as broker:
        result = process.apply_async((Order(order_id="once"),), execution_id="once")
        (raw,) = broker.lrange("celery", 0, -1)  # type: ignore[misc, unused-ignore]
        worker = start_worker("prefork", 1, app=APP)
        assert isinstance(result.get(timeout=WITHIN_S), Shipment)
        with connect(database_url) as admin:
            admin.execute("TRUNCATE docket_cache, docket_executions, docket_runs")
        message: dict[str, Any] = json.loads(raw)
        if how == "redelivered":
            message["properties"]["delivery_info"]["redelivered"] = True
        else:
            message["headers"]["docket_attached"] = 1
        broker.lpush("celery", json.dumps(message))
        # The next job is taken up after it: one child works on both.
        after = process.apply_async((Order(order_id="after"),), execution_id="after")
        assert isinstance(after.get(timeout=WITHIN_S), Shipment)
    wait_until(
        lambda: worker.read_log().count(result.id) >= 2, within_s=WITHIN_S, what="the copy is taken up"
    )
    assert len(book.acts("once", "charge")) == 1
    assert result.state == "SUCCESS", "the copy's end is not the task's"


def test_cancelling_a_run_that_no_worker_has_taken_up_says_so(
    connect_app: Callable[[Celery], Celery],
) -> None:
    """The database does not know a job that lies in the broker alone."""
    connect_app(app)
    with pytest.raises(RunNotFound, match=r"no worker has begun it yet(.|\n)*revoke\(\)"):
        process.handle("queued").cancel()
