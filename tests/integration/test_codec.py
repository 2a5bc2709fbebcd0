"""A codec under real workers and Postgres: what the tables hold, and workers that do not agree on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from celery import Celery

from docket_celery import CodecFailed, StepFailed
from tests.conftest import StartWorker
from tests.infra.servers import connect
from tests.integration.apps.book import Book
from tests.integration.apps.lease_app import app, process
from tests.unit.protos.shop_pb2 import Order

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]

APP = "tests.integration.apps.lease_app"
WITHIN_S = 40.0
SECRET = "4111-1111-1111-1111"
CODEC = {"DOCKET_CELERY_CODEC": "tests.codecs:CODEC"}


@pytest.fixture
def book(connect_app: Callable[[Celery], Celery], database_url: str) -> Book:
    """What the steps write into tables of their own; the app is connected to the test's servers."""
    connect_app(app)
    made = Book(database_url)
    made.create()
    return made


def scan(database_url: str) -> str:
    """Return every value in every table of this library, bytes and JSON too, as text."""
    found: list[str] = []
    with connect(database_url) as connection:
        names = connection.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename LIKE 'docket\\_%'"
        ).fetchall()
        assert len(names) >= 6
        for (name,) in names:
            found += map(repr, connection.execute(f'SELECT * FROM "{name}"').fetchall())  # type: ignore[arg-type, unused-ignore]  # noqa: S608 -- names from the catalogue
    return "\n".join(found)


@pytest.mark.parametrize("env", [CODEC, {}], ids=["codec", "plain"])
def test_no_table_holds_plain_text(
    start_worker: StartWorker, book: Book, database_url: str, env: dict[str, str]
) -> None:
    """Job, outputs, result and error texts of runs that succeed and fail; without the codec all would be found."""
    worker = start_worker(app=APP, env=env)
    order = Order(order_id=SECRET, amount_cents=17)
    shipment = process.apply_async((order,), execution_id="good").get(timeout=WITHIN_S)
    broken = Order(order_id=SECRET, stock={"reserve:fail": 1})
    with pytest.raises(StepFailed, match="the warehouse is closed"):
        process.apply_async((broken,), execution_id="bad").get(timeout=WITHIN_S)
    found = scan(database_url)
    told = [text in found for text in (SECRET, shipment.tracking_id, "the warehouse is closed")]
    assert told == [not env] * 3
    assert found.count("'code': 'DC201'") == 1
    assert "first key" not in worker.read_log()
    # What is stored is also what another submission of the same job gets.
    assert process.apply_async((order,), execution_id="good").get(timeout=WITHIN_S) == shipment


def test_workers_that_do_not_agree_say_so(start_worker: StartWorker, book: Book) -> None:
    """One has the codec, one lacks it: each names the row that it cannot use, and the right one goes on."""
    start_worker(concurrency=1, app=APP, env=CODEC)
    start_worker(concurrency=1, app=APP, args=["-Q", "plain"])
    order = Order(order_id="17", stock={"reserve:fail": 1})

    def submit(execution_id: str, queue: str) -> str:
        result = process.apply_async((order,), execution_id=execution_id, queue=queue)
        with pytest.raises((StepFailed, CodecFailed)) as failed:
            result.get(timeout=WITHIN_S)
        return str(failed.value)

    assert "the warehouse is closed" in submit("sealed", "celery")
    assert "this process has none; set docket_codec" in submit("sealed", "plain")
    assert "the warehouse is closed" in submit("open", "plain")
    assert "was stored without a codec, and this process has one" in submit("open", "celery")
    assert "the warehouse is closed" in submit("sealed", "celery")
    assert [len(book.acts(name, "charge")) for name in ("sealed", "open")] == [1, 1]
