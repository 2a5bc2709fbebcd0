"""Jobs and results too large for a message: through the store, with small references in Redis."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from celery import chain, chord
from celery.result import AsyncResult

from docket_celery import (
    PayloadTooLarge,
    PayloadUnavailable,
    RunConflict,
    StepFailed,
    StoredResult,
    settings,
)
from docket_celery.task.references import JOB, Stored
from tests.infra import servers
from tests.infra.servers import connect
from tests.infra.workers import WorkerProcess
from tests.integration.apps.bulky import (
    address_label,
    app,
    collect,
    grow_label,
    measure,
    named,
    weigh_label,
    write,
)
from tests.integration.apps.serving import Urls, connected, own_urls, queue_length, serving, unique
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]

APP = "tests.integration.apps.bulky"
WAIT_S = 40
MIB = 1024 * 1024
SIZE = 5 * MIB
SMALL = 4096
TEXT = "x" * SIZE
BIG = Label(text=TEXT)


@pytest.fixture(scope="module")
def urls(_celery_connections: None, server_urls: servers.ServerUrls, session_database_url: str) -> Urls:
    """This module's servers."""
    servers.truncate(session_database_url)
    return own_urls(server_urls, session_database_url)


@pytest.fixture(scope="module", params=["prefork", "threads"])
def worker(
    request: pytest.FixtureRequest, urls: Urls, tmp_path_factory: pytest.TempPathFactory
) -> Generator[WorkerProcess]:
    """One worker for the tests that need no other."""
    with serving(app, urls, tmp_path_factory.mktemp("worker"), pool=request.param) as started:
        yield started


@pytest.fixture
def alone(urls: Urls) -> Generator[Urls]:
    """The servers without a worker; the app is connected to them."""
    with connected(app, urls):
        yield urls


def largest(*urls: str) -> int:
    """Return the size in bytes of the largest value that Redis holds."""
    sizes = [0]
    for url in urls:
        with redis.Redis.from_url(url) as client:
            dumps: list[Any] = [client.dump(key) for key in client.keys()]  # type: ignore[union-attr, unused-ignore]  # noqa: SIM118
            sizes += [len(dump) for dump in dumps if dump is not None]
    return max(sizes)


def rows(url: str, query: str, *values: object) -> list[tuple[Any, ...]]:
    """Return what Postgres answers."""
    with connect(url) as connection:
        return list(connection.execute(query.encode(), values or None).fetchall())


@contextmanager
def without_database() -> Generator[None]:
    """Take the database away from this process, as in a web server that only submits."""
    before = app.conf.docket_database_url
    app.conf.docket_database_url = None
    try:
        yield
    finally:
        app.conf.docket_database_url = before


# --- jobs --------------------------------------------------------------------------------------------------------


def test_a_large_job_travels_as_a_reference(worker: WorkerProcess, urls: Urls) -> None:
    """Five megabytes lie in the run's row; what waits in Redis is small, and the worker measures all of them."""
    held = measure.apply_async((BIG,), queue="unserved")
    try:
        assert queue_length(urls.broker, "unserved") == 1
        assert 0 < largest(urls.broker, urls.results) < SMALL
        found = rows(
            urls.database,
            "SELECT state, length(job), task_id, task_name, epoch FROM docket_runs WHERE execution_id = %s",
            held.id,
        )
        assert [(row[0], row[1] > SIZE, *row[2:]) for row in found] == [
            ("QUEUED", True, held.id, "bulky.measure", 0)
        ]
    finally:
        with redis.Redis.from_url(urls.broker) as client:
            client.delete("unserved")
    assert measure.delay(BIG).get(timeout=WAIT_S) == Shipment(tracking_id=f"{SIZE} in delivery 1")


def test_a_large_job_by_name_and_by_business_key(worker: WorkerProcess, urls: Urls) -> None:
    """Keyword arguments and the task's own name for the run; the same job again is the same run."""
    text = unique("n")[:8] + TEXT
    results = [named.apply_async(kwargs={"label": Label(text=text)}) for _ in range(2)]
    shipped = Shipment(tracking_id=f"{len(text)} in delivery 1")
    assert [result.get(timeout=WAIT_S) for result in results] == [shipped, shipped]
    query = "SELECT state, epoch FROM docket_runs WHERE execution_id = %s"
    assert rows(urls.database, query, f"label-{text[:8]}") == [("SUCCEEDED", 1)]


def test_a_large_jobs_text_is_shown_as_ever(worker: WorkerProcess, urls: Urls) -> None:
    """In logs, events and Flower: the message's text, not the reference's."""
    held = measure.apply_async((BIG,), queue="unserved")
    with redis.Redis.from_url(urls.broker) as client:
        message = client.lpop("unserved")
        assert message is not None
        assert b"Label(text='xxxxxxxxxx" in message  # type: ignore[operator, unused-ignore]
    assert held.id


def test_another_large_job_under_one_name_is_refused_at_the_caller(alone: Urls) -> None:
    """Nothing is published; the same job again is."""
    name = unique("conflict")
    measure.apply_async((BIG,), execution_id=name, queue=name)
    with pytest.raises(RunConflict, match="another job"):
        measure.apply_async((Label(text=TEXT + "y"),), execution_id=name, queue=name)
    assert queue_length(alone.broker, name) == 1
    measure.apply_async((BIG,), execution_id=name, queue=name)
    assert queue_length(alone.broker, name) == 2


def test_a_large_job_of_an_ended_run_follows_the_rules(worker: WorkerProcess) -> None:
    """SUCCEEDED gives its result again; FAILED resumes what is missing."""
    done, failed = unique("done"), unique("failed")
    for _ in range(2):
        shipped = measure.apply_async((BIG,), execution_id=done).get(timeout=WAIT_S)
        assert shipped == Shipment(tracking_id=f"{SIZE} in delivery 1")
    broken = Label(text="f1" + TEXT)
    with pytest.raises(StepFailed, match="the scale is in use"):
        named.apply_async((broken,), execution_id=failed).get(timeout=WAIT_S)
    shipped = named.apply_async((broken,), execution_id=failed).get(timeout=WAIT_S)
    assert shipped == Shipment(tracking_id=f"{SIZE + 2} in delivery 2")


def test_a_large_job_survives_retries(worker: WorkerProcess) -> None:
    """The reference travels with each of Celery's own."""
    shipped = measure.delay(Label(text="f2" + TEXT)).get(timeout=WAIT_S)
    assert shipped == Shipment(tracking_id=f"{SIZE + 2} in delivery 3")


@pytest.mark.parametrize("gone", ["deleted", "replaced"])
def test_a_job_whose_row_is_gone_fails_its_task(worker: WorkerProcess, urls: Urls, gone: str) -> None:
    """Purged before the delivery, or purged and used by another job: a typed error, and the worker goes on."""
    name = unique(gone)
    result = measure.apply_async((BIG,), execution_id=name, queue="unserved")
    rows(urls.database, "DELETE FROM docket_runs WHERE execution_id = %s RETURNING 1", name)
    error: type[Exception] = PayloadUnavailable
    if gone == "replaced":
        measure.apply_async((Label(text=TEXT + "y"),), execution_id=name, queue="unserved")
        error = RunConflict
    with redis.Redis.from_url(urls.broker) as client:
        client.rpoplpush("unserved", "celery")
        client.delete("unserved")
    with pytest.raises(error, match=name):
        result.get(timeout=WAIT_S)
    assert measure.delay(Label(text="small")).get(timeout=WAIT_S).tracking_id == "5 in delivery 1"


def test_a_reference_that_nobody_wrote_fails_its_task(worker: WorkerProcess) -> None:
    """Forged, or sent past the task: there is no such job."""
    sent = app.send_task(
        "bulky.measure", (Stored(JOB, "bulky", "forged", "docket.tests.unit.Label", SIZE, b"d" * 32),)
    )
    with pytest.raises(PayloadUnavailable, match="its row is gone"):
        measure.AsyncResult(sent.id).get(timeout=WAIT_S)


def test_a_large_job_without_a_store_is_refused(alone: Urls) -> None:
    """A graph that persists nothing, and a caller without a database; what to do about it is said."""
    with pytest.raises(PayloadTooLarge, match="a step that persists, and docket_database_url") as refused:
        weigh_label.apply_async((BIG,), queue="unserved")
    assert (refused.value.limit_bytes, refused.value.setting) == (MIB, "docket_max_message_bytes")
    with without_database(), pytest.raises(PayloadTooLarge, match="docket_database_url"):
        measure.apply_async((BIG,), queue="unserved")
    assert queue_length(alone.broker, "unserved") == 0


def test_a_job_too_large_for_the_store_is_refused(alone: Urls) -> None:
    """The second limit, by its name; nothing is written."""
    before = rows(alone.database, "SELECT count(*) FROM docket_runs")
    settings(max_stored_bytes=SIZE)
    try:
        with pytest.raises(PayloadTooLarge, match="raise docket_max_stored_bytes") as refused:
            measure.apply_async((BIG,), queue="unserved")
    finally:
        settings(max_stored_bytes=None)
    assert (refused.value.limit_bytes, refused.value.setting) == (SIZE, "docket_max_stored_bytes")
    assert rows(alone.database, "SELECT count(*) FROM docket_runs") == before


def test_a_job_that_waits_long_is_kept_until_it_is_due(alone: Urls) -> None:
    """The row's date counts from when the task may begin."""
    day_s = 86400
    for wait_s in (40 * day_s, 0):
        result = measure.apply_async((BIG,), queue="unserved", countdown=wait_s)
        query = "SELECT EXTRACT(EPOCH FROM expires_at - clock_timestamp()) FROM docket_runs WHERE execution_id = %s"
        ((left,),) = rows(alone.database, query, result.id)
        assert float(left) == pytest.approx(30 * day_s + wait_s, abs=60)
    with redis.Redis.from_url(alone.broker) as client:
        client.delete("unserved")


# --- results -----------------------------------------------------------------------------------------------------


def test_a_large_result_travels_as_a_reference(worker: WorkerProcess, urls: Urls) -> None:
    """Five megabytes come from the store; what the result backend holds is small."""
    result = write.delay(Charge(amount_cents=SIZE))
    assert result.get(timeout=WAIT_S) == BIG
    with redis.Redis.from_url(urls.results) as client:
        stored = client.get(f"celery-task-meta-{result.id}")
    assert stored is not None
    assert 0 < len(stored) < SMALL  # type: ignore[arg-type, unused-ignore]
    assert result.get(timeout=WAIT_S) == BIG
    assert result.state == "SUCCESS"


def test_a_plain_promise_gets_the_reference(worker: WorkerProcess) -> None:
    """Whoever has only the id can read it all the same; its text tells what it is."""
    result = write.delay(Charge(amount_cents=SIZE))
    result.get(timeout=WAIT_S)
    found: Any = AsyncResult(result.id, app=app).get(timeout=WAIT_S)
    assert isinstance(found, StoredResult)
    assert repr(found).startswith(f"<Stored result docket.tests.unit.Label of run '{result.id}', 5242")
    assert found.size > SIZE
    assert found.read(app) == BIG


def test_a_caller_without_a_database_is_told_what_to_set(worker: WorkerProcess) -> None:
    """The run succeeded all the same, and another process can read it."""
    result = write.delay(Charge(amount_cents=SIZE))
    with without_database(), pytest.raises(PayloadUnavailable, match="set docket_database_url here"):
        result.get(timeout=WAIT_S)
    assert result.get(timeout=WAIT_S) == BIG


@pytest.mark.parametrize("gone", ["deleted", "replaced", "failed"])
def test_a_result_whose_row_is_gone_is_no_other_result(worker: WorkerProcess, urls: Urls, gone: str) -> None:
    """Purged; purged and run again with another job; or not succeeded any more."""
    name = unique(gone)
    result = write.apply_async((Charge(amount_cents=SIZE),), execution_id=name)
    result.get(timeout=WAIT_S)
    if gone == "failed":
        change = "UPDATE docket_runs SET state = 'FAILED', result = NULL, result_checksum = NULL"
        rows(urls.database, f"{change} WHERE execution_id = %s RETURNING 1", name)
    else:
        for table in ("docket_runs", "docket_cache"):
            rows(urls.database, f"DELETE FROM {table} WHERE execution_id = %s RETURNING 1", name)  # noqa: S608 -- ours
    if gone == "replaced":
        write.apply_async((Charge(amount_cents=SIZE + 1),), execution_id=name).get(timeout=WAIT_S)
    told = {
        "deleted": "its row is gone",
        "replaced": "another result than the one referred to",
        "failed": "the run is FAILED now",
    }
    with pytest.raises(PayloadUnavailable, match=told[gone]):
        write.AsyncResult(result.id).get(timeout=WAIT_S)


def test_a_large_result_without_a_store_fails_the_task(worker: WorkerProcess) -> None:
    """Nobody could read it; no run says otherwise."""
    with pytest.raises(PayloadTooLarge, match="a step that persists"):
        grow_label.delay(Charge(amount_cents=SIZE)).get(timeout=WAIT_S)


# --- canvas ------------------------------------------------------------------------------------------------------


def test_a_chain_hands_a_large_result_on(worker: WorkerProcess, urls: Urls) -> None:
    """To a graph that persists and to one that does not, and to one that takes another message beside it."""
    charge = Charge(charge_id="c", amount_cents=SIZE)
    first, second, third = (
        chain(write.s(charge), step).delay()
        for step in (measure.s(), weigh_label.s(), address_label.s(Charge(charge_id="other")))
    )
    assert measure.AsyncResult(first.id).get(timeout=WAIT_S).tracking_id == f"{SIZE + 1} in delivery 1"
    assert weigh_label.AsyncResult(second.id).get(timeout=WAIT_S) == Money(cents=SIZE + 1)
    assert address_label.AsyncResult(third.id).get(timeout=WAIT_S).tracking_id == f"{SIZE + 1} for other"
    assert largest(urls.broker, urls.results) < SMALL


def test_a_chain_retries_with_a_large_result(worker: WorkerProcess) -> None:
    """The reference is read again in each delivery."""
    result = chain(write.s(Charge(charge_id="f1", amount_cents=SIZE)), measure.s()).delay()
    assert measure.AsyncResult(result.id).get(timeout=WAIT_S).tracking_id == f"{SIZE + 2} in delivery 2"


def test_a_chords_body_reads_large_results(worker: WorkerProcess) -> None:
    """An ordinary task gets references for the large ones and messages for the others."""
    header = [write.s(Charge(amount_cents=size)) for size in (SIZE, 7, SIZE + 1)]
    assert chord(header)(collect.s()).get(timeout=WAIT_S) == [SIZE, 7, SIZE + 1]


def test_a_chain_whose_result_is_gone_fails(worker: WorkerProcess, urls: Urls) -> None:
    """A typed error names the run that made it."""
    made = write.delay(Charge(amount_cents=SIZE))
    made.get(timeout=WAIT_S)
    reference: Any = AsyncResult(made.id, app=app).get(timeout=WAIT_S)
    rows(urls.database, "DELETE FROM docket_runs WHERE execution_id = %s RETURNING 1", made.id)
    sent = app.send_task("bulky.weigh", (reference,))
    with pytest.raises(PayloadUnavailable, match=f"the result of run '{made.id}'"):
        weigh_label.AsyncResult(sent.id).get(timeout=WAIT_S)
