"""Large messages where workers die, lack what others have, or cannot reach the database: each test its own worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult

from docket_celery import CodecFailed, PayloadTooLarge, RunConflict, settings
from tests.conftest import StartWorker
from tests.infra.servers import connect
from tests.integration.apps.bulky import app, measure, weigh_label, write
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]

APP = "tests.integration.apps.bulky"
WAIT_S = 40
MIB = 1024 * 1024
SIZE = 5 * MIB
TEXT = "x" * SIZE
BIG = Label(text=TEXT)


def rows(url: str, query: str, *values: object) -> list[tuple[Any, ...]]:
    """Return what Postgres answers."""
    with connect(url) as connection:
        return list(connection.execute(query.encode(), values or None).fetchall())


def test_a_large_job_survives_its_worker(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery]
) -> None:
    """A child that dies in the step: the job is delivered again and read again."""
    connect_app(app)
    start_worker(app=APP)
    shipped = measure.delay(Label(text="k1" + TEXT)).get(timeout=WAIT_S)
    assert shipped == Shipment(tracking_id=f"{SIZE + 2} in delivery 2")


def test_a_database_that_is_away_delays_a_large_job(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery], database_url: str
) -> None:
    """The worker cannot read the job yet: it is delivered again until it can, and no retry is used up."""
    connect_app(app)
    url = f"{database_url}{'&' if '?' in database_url else '?'}options=-c%20statement_timeout%3D300"
    worker = start_worker(app=APP, env={"DOCKET_CELERY_DATABASE_URL": url})
    result = measure.apply_async((Label(text="f2" + TEXT),), countdown=1)
    with connect(database_url) as blocker, blocker.transaction():
        blocker.execute("LOCK TABLE docket_runs IN ACCESS EXCLUSIVE MODE")
        worker.wait_for_log("did not find the job", within_s=20)
    assert result.get(timeout=WAIT_S) == Shipment(tracking_id=f"{SIZE + 2} in delivery 3")


def test_a_database_that_is_away_delays_a_large_argument(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery], database_url: str
) -> None:
    """A task that persists nothing has used up Celery's retries, and is delivered again all the same."""
    connect_app(app)
    url = f"{database_url}{'&' if '?' in database_url else '?'}options=-c%20statement_timeout%3D300"
    worker = start_worker(app=APP, env={"DOCKET_CELERY_DATABASE_URL": url})
    made = write.delay(Charge(amount_cents=SIZE))
    made.get(timeout=WAIT_S)
    reference: Any = AsyncResult(made.id, app=app).get(timeout=WAIT_S)
    with connect(database_url) as blocker, blocker.transaction():
        blocker.execute("LOCK TABLE docket_runs IN ACCESS EXCLUSIVE MODE")
        sent = app.send_task("bulky.weigh", (reference,), retries=3)
        worker.wait_for_log("did not find the run", within_s=20)
    assert weigh_label.AsyncResult(sent.id).get(timeout=WAIT_S) == Money(cents=SIZE)


def test_a_result_too_large_for_the_store_fails_the_run(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery], database_url: str
) -> None:
    """Task and row tell the same."""
    connect_app(app)
    start_worker(app=APP, env={"DOCKET_CELERY_MAX_STORED_BYTES": str(2 * MIB)})
    result = write.delay(Charge(amount_cents=SIZE))
    with pytest.raises(PayloadTooLarge, match="raise docket_max_stored_bytes"):
        result.get(timeout=WAIT_S)
    query = "SELECT state, error->>'code', result IS NULL FROM docket_runs WHERE execution_id = %s"
    assert rows(database_url, query, result.id) == [("FAILED", "DC500", True)]


def test_large_messages_pass_through_the_codec(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery], database_url: str
) -> None:
    """Job and result; nothing of either is in the tables as it was."""
    connect_app(app)
    start_worker(app=APP, env={"DOCKET_CELERY_CODEC": "tests.codecs:CODEC"})
    settings(codec="tests.codecs:CODEC")
    try:
        result = write.delay(Charge(charge_id="4111-1111", amount_cents=SIZE))
        assert result.get(timeout=WAIT_S).text.startswith("4111-1111")
        shipped = measure.delay(BIG).get(timeout=WAIT_S)
        assert shipped == Shipment(tracking_id=f"{SIZE} in delivery 1")
        with pytest.raises(RunConflict, match="another job"):
            write.apply_async((Charge(amount_cents=1),), execution_id=result.id).get(timeout=WAIT_S)
    finally:
        settings(codec=None)
    counts = "position('xxxxxxxx'::bytea in {0}), position('4111-1111'::bytea in {0})"
    for column in ("job", "result"):
        query = f"SELECT {counts.format(column)} FROM docket_runs WHERE {column} IS NOT NULL"  # noqa: S608 -- ours
        assert set(rows(database_url, query)) == {(0, 0)}


def test_a_caller_without_the_codec_is_told(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery]
) -> None:
    """The row is there, but it cannot be read here; and a job queued in plain is refused by the worker."""
    connect_app(app)
    start_worker(app=APP, env={"DOCKET_CELERY_CODEC": "tests.codecs:CODEC"})
    with pytest.raises(CodecFailed, match="this process has none; set docket_codec"):
        write.delay(Charge(amount_cents=SIZE)).get(timeout=WAIT_S)
    with pytest.raises(CodecFailed, match="stored without a codec, and this process has one"):
        measure.delay(BIG).get(timeout=WAIT_S)
