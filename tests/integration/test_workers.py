"""The deployable app: its three tasks in a real worker, and the payment provider's promise."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from celery import Celery

from docket_celery import StepFailed
from tests.conftest import StartWorker
from workers import app
from workers.orders import process_order
from workers.orders_pb2 import Order
from workers.providers import PaymentDeclined, Payments
from workers.users import enrich_user
from workers.users_pb2 import UserID
from workers.videos import process_video
from workers.videos_pb2 import VideoJob

pytestmark = pytest.mark.integration

WITHIN_S = 30.0


@pytest.fixture
def connection(database_url: str) -> Generator[psycopg.Connection]:
    """A session in the test's database, without anything that an earlier test paid."""
    with psycopg.connect(
        database_url.replace("postgresql+psycopg://", "postgresql://"), autocommit=True
    ) as opened:
        opened.execute("DROP TABLE IF EXISTS demo_payment_ledger")
        yield opened
        opened.execute("DROP TABLE IF EXISTS demo_payment_ledger")


@pytest.fixture
def worker(start_worker: StartWorker, connect_app: Callable[[Celery], Celery]) -> None:
    """``celery -A workers worker``, with quick providers."""
    connect_app(app)
    start_worker(app="workers", env={"PROVIDER_LATENCY_S": "0.01"})


def test_an_order_is_paid_once_however_often_it_is_submitted(
    worker: None, connection: psycopg.Connection
) -> None:
    """The order names the run: the second submission gets the first one's shipment."""
    order = Order(order_id="17", amount_cents=1000, skus=["mug"])
    shipment = process_order.delay(order).get(timeout=WITHIN_S)
    assert shipment.tracking_number.startswith("track-")
    assert process_order.delay(order).get(timeout=WITHIN_S) == shipment
    booked = connection.execute("SELECT order_id, amount_cents, charged FROM demo_payment_ledger").fetchall()
    assert booked == [("17", 1000, True)]


def test_a_declined_payment_fails_the_order_at_once(worker: None, connection: psycopg.Connection) -> None:
    """It is not retriable: one attempt, a typed error, nothing in the ledger."""
    with pytest.raises(StepFailed) as failed:
        process_order.delay(Order(order_id="18", amount_cents=0)).get(timeout=WITHIN_S)
    assert (failed.value.step, failed.value.attempts) == ("charge_card", 1)
    assert failed.value.caused_by(PaymentDeclined)


def test_a_user_is_put_together_without_the_database(worker: None, connection: psycopg.Connection) -> None:
    """Three answers in one message; the run left no row."""
    user = enrich_user.delay(UserID(id="user-123")).get(timeout=WITHIN_S)
    assert (user.profile.id, user.preferences.language, user.activity.login_count) == ("user-123", "en", 8)
    assert connection.execute("SELECT count(*) FROM docket_runs").fetchone() == (0,)


def test_a_film_is_transcoded_once_for_all_runs(worker: None, connection: psycopg.Connection) -> None:
    """The second run restores what is GLOBAL, and does its own part again."""
    job = VideoJob(url="https://films.example/a.mp4")
    results = [
        process_video.apply_async((job,), execution_id=name).get(timeout=WITHIN_S)
        for name in ("film-1", "film-2")
    ]
    assert [result.frame_count for result in results] == [3, 3]
    assert results[0].labels == results[1].labels
    cached = connection.execute(
        "SELECT step_name, cached FROM docket_executions WHERE execution_id = 'film-2' ORDER BY step_name"
    ).fetchall()
    assert cached == [
        ("extract_frames", False),
        ("fetch_raw", False),
        ("ml_inference", True),
        ("transcode", True),
        ("upload", False),
    ]


def test_the_provider_honours_keys_and_books_every_call(
    connection: psycopg.Connection, database_url: str
) -> None:
    """Calls with one key, side by side too, make one charge; another key makes another."""
    payments = Payments(database_url)

    def pay(key: str) -> str:
        return payments.charge("17", 1000, idempotency_key=key)

    with ThreadPoolExecutor(4) as pool:
        same = set(pool.map(pay, ["key-1"] * 4))
    assert len(same) == 1
    assert pay("key-2") not in same
    booked = connection.execute(
        "SELECT idempotency_key, count(*), count(*) FILTER (WHERE charged) FROM demo_payment_ledger"
        " GROUP BY idempotency_key ORDER BY idempotency_key"
    ).fetchall()
    assert booked == [("key-1", 4, 1), ("key-2", 1, 1)]
