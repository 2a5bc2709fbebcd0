"""Batches and what happens meanwhile: time runs out, others submit, cancel or read them, the database goes down."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from sqlalchemy import event

from docket_celery.engine.process.state import process
from docket_celery.engine.stored_items import PAGE
from docket_celery.errors import RunCancelled, RunConflict, StoreUnavailable
from docket_celery.store import SQLStore
from docket_celery.store.records import UNFINISHED
from docket_celery.task import app_settings
from examples.movies.movies_pb2 import Movie
from tests.infra import servers
from tests.infra.processes import wait_until
from tests.infra.workers import WorkerProcess
from tests.integration.apps import paced
from tests.integration.apps.journal import Journals
from tests.integration.apps.paced import let_go, movies
from tests.integration.apps.serving import Urls, drop_queue, query, queue_length, serving, unique

pytestmark = pytest.mark.integration
WAIT_S = 30
# Short, so that what hangs on heartbeats and sweeps takes seconds.
ENV = {"DOCKET_CELERY_LEASE_SECONDS": "2", "DOCKET_CELERY_THREADS": "4"}
OPEN = {"open": True}


@pytest.fixture(scope="module", autouse=True)
def worker(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """A prefork worker with two children."""
    with serving(paced.app, urls, tmp_path_factory.mktemp("worker"), concurrency=2, env=ENV) as started:
        yield started


@pytest.fixture
def short_lease() -> Generator[float]:
    """Submit from this process under a lease of a second, and return that."""
    paced.app.conf.docket_lease_seconds = 1
    yield 1.0
    paced.app.conf.docket_lease_seconds = None


def lease_is_over(urls: Urls, run: str) -> bool:
    """Tell whether nobody holds the run's lease."""
    statement = "SELECT lease_until <= clock_timestamp() FROM docket_runs WHERE execution_id = %s"
    return bool(query(urls, statement, run)[0][0])


# --- expires -----------------------------------------------------------------------------------------------------


def test_a_batch_that_was_begun_in_time_does_not_expire(journals: Journals, urls: Urls) -> None:
    """Its chunks wait for longer than it had to begin, in a queue that nobody consumes; so does its body."""
    run, queue = unique("patient"), unique("lane")
    control: Any = paced.app.control
    assert control.add_consumer(queue, reply=True)
    expires = datetime.now(UTC) + timedelta(seconds=2)
    sent = paced.gather_all.apply_async((movies(run, 6),), execution_id=run, queue=queue, expires=expires)
    journals.wait(f"{run}/began", 4)
    wait_until(lambda: datetime.now(UTC) > expires, within_s=WAIT_S, what="the expiry of the batch")
    let_go(urls, run, 6)
    try:
        assert sent.get(timeout=WAIT_S).count == 6
    finally:
        control.cancel_consumer(queue, reply=True)
        drop_queue(urls.broker, queue)


def test_a_batch_that_a_sweep_takes_up_does_not_expire(
    journals: Journals, urls: Urls, worker: WorkerProcess
) -> None:
    """The message of its body is lost; the copy that the sweep sends is delivered when ``expires`` has passed."""
    run, queue = unique("revived"), unique("lane")
    control: Any = paced.app.control
    assert control.add_consumer(queue, reply=True)
    expires = datetime.now(UTC) + timedelta(seconds=3)
    sent = paced.gather_all.apply_async((movies(run, 4),), execution_id=run, queue=queue, expires=expires)
    journals.wait(f"{run}/began", 4)
    # What is sent to the queue from now on stays there.
    assert control.cancel_consumer(queue, reply=True)
    let_go(urls, run, 4)
    with redis.Redis.from_url(urls.broker) as client:
        wait_until(lambda: client.llen(queue) == 1, within_s=WAIT_S, what="the message of the body")
        client.delete(queue)
    worker.wait_for_log(f"run {run!r} of graph 'pacing' is not advanced by any worker")
    wait_until(lambda: datetime.now(UTC) > expires, within_s=WAIT_S, what="the expiry of the batch")
    assert not sent.ready()
    assert control.add_consumer(queue, reply=True)
    try:
        assert sent.get(timeout=WAIT_S).count == 4
    finally:
        control.cancel_consumer(queue, reply=True)
        drop_queue(urls.broker, queue)
    assert journals.read(f"gather/{run}") == ["4"]


# --- cancelling --------------------------------------------------------------------------------------------------


def test_a_cancelled_batch_stops_in_all_workers(
    journals: Journals, urls: Urls, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two workers have a chunk each, one of which opened the stage: the items of both see that it is over."""
    run, queue = unique("everywhere"), unique("two")
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    own: dict[str, Any] = {"concurrency": 1, "env": ENV, "args": ["-Q", queue]}
    with serving(paced.app, urls, here, **own) as first, serving(paced.app, urls, there, **own) as second:
        names = [first.node_name, second.node_name]
        inspect: Any = paced.app.control.inspect(destination=names)

        def at_work() -> dict[str, int]:
            return {name: len(tasks) for name, tasks in (inspect.active() or {}).items()}

        sent = paced.look_at_all.apply_async((movies(run, 4),), execution_id=run, queue=queue)
        journals.wait(f"{run}/began", 4)
        assert at_work() == dict.fromkeys(names, 1)
        assert paced.look_at_all.handle(run).cancel("nobody wants it any more")
        stopped = journals.wait(f"{run}/stopped", 4)
        assert sorted(line.split()[0] for line in stopped) == ["0", "1", "2", "3"]
        with pytest.raises(RunCancelled, match="nobody wants it any more"):
            sent.get(timeout=WAIT_S)
        wait_until(
            lambda: at_work() == dict.fromkeys(names, 0), within_s=WAIT_S, what="the end of both chunks"
        )
    assert journals.read(f"{run}/ended") == []
    chunks = query(urls, "SELECT state FROM docket_chunks WHERE execution_id = %s", run)
    assert chunks == [("CANCELLED",)] * 2
    saved = "SELECT count(*) FROM docket_cache WHERE execution_id = %s AND step_name = 'look'"
    assert query(urls, saved, run) == [(0,)]


# --- submitting --------------------------------------------------------------------------------------------------


def test_a_slow_source_keeps_its_name(journals: Journals, urls: Urls, short_lease: float) -> None:
    """For longer than a lease: whoever submits under it meanwhile is refused, whatever the job, and sends nothing."""
    run, queue = unique("slow"), unique("rivals")
    taken = 0

    def refused(submit: Callable[[], object]) -> str:
        with pytest.raises(RunConflict) as caught:
            submit()
        return caught.value.what

    def source() -> Iterator[Movie]:
        nonlocal taken
        yield Movie(title=run, rating=taken)
        ((until,),) = query(urls, "SELECT lease_until FROM docket_runs WHERE execution_id = %s", run)
        while not query(urls, "SELECT 1 WHERE clock_timestamp() > %s", until):
            taken += 1
            yield Movie(title=run, rating=taken)
        task = paced.look_at_all
        what = [
            refused(lambda: task.submit_batch(movies(run, 1), execution_id=run, queue=queue)),
            refused(lambda: task.submit_batch(movies("other", 2), execution_id=run, queue=queue)),
            refused(lambda: task.apply_async((movies("other", 3000),), execution_id=run, queue=queue)),
        ]
        assert what == ["submission under way"] * 3
        assert queue_length(urls.broker, queue) == 0
        # One that is small enough to travel is refused by its worker.
        small = task.apply_async((movies("other", 1),), execution_id=run, context=OPEN)
        refused(lambda: small.get(timeout=WAIT_S))

    sent = paced.look_at_all.submit_batch(source(), execution_id=run, context=OPEN)
    assert [each.original.rating for each in sent.get(timeout=WAIT_S)] == list(range(taken + 1))
    assert sorted(map(int, journals.read(f"{run}/began"))) == list(range(taken + 1))


@contextmanager
def refusing(urls: Urls, run: str) -> Generator[None]:
    """Let the database be shutting down whenever the upload of *run* is to be finished, and only then."""
    with servers.connect(urls.database) as connection:
        connection.execute(
            f"""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.execution_id = '{run}' THEN RAISE 'going down' USING ERRCODE = 'cannot_connect_now'; END IF;
                RETURN NEW;
            END $$;
            CREATE TRIGGER refuse BEFORE UPDATE OF job_digest ON docket_runs
                FOR EACH ROW EXECUTE FUNCTION refuse()"""  # type: ignore[arg-type, unused-ignore]
        )
        try:
            yield
        finally:
            connection.execute("DROP TRIGGER refuse ON docket_runs; DROP FUNCTION refuse()")


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "listed"])
def test_an_upload_that_cannot_be_finished_sends_nothing(
    urls: Urls, short_lease: float, *, streams: bool
) -> None:
    """All items are there, but the run does not count; under the same name the next submission starts anew."""
    run, queue = unique("unfinished"), unique("never")
    task, items = paced.look_at_all, movies(run, 3000)

    def submit() -> None:
        if streams:
            task.submit_batch(iter(items), execution_id=run, queue=queue)
        else:
            task.apply_async((items,), execution_id=run, queue=queue)

    with refusing(urls, run), pytest.raises(StoreUnavailable, match="going down"):
        submit()
    assert queue_length(urls.broker, queue) == 0
    ((state, digest, count),) = query(
        urls,
        "SELECT state, job_digest, (SELECT count(*) FROM docket_cache AS c WHERE c.execution_id = r.execution_id"
        " AND item_index IS NOT NULL) FROM docket_runs AS r WHERE execution_id = %s",
        run,
    )
    assert (state, bytes(digest), count) == ("QUEUED", UNFINISHED, 3000)
    wait_until(lambda: lease_is_over(urls, run), within_s=WAIT_S, what="the end of the upload's lease")
    again = task.submit_batch(movies(run, 3), execution_id=run, context=OPEN)
    assert [each.original.rating for each in again.get(timeout=WAIT_S)] == [0, 1, 2]


# --- streams -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_result_is_read_one_page_at_a_time(urls: Urls) -> None:
    """The first item costs one page, and the next page is read when somebody asks for its first item."""
    run, pages = unique("pages"), list[tuple[int, int]]()
    sent = paced.look_at_all.submit_batch(
        movies(run, 2 * PAGE + 500), execution_id=run, context=OPEN, chunk_size=500
    )
    settings = app_settings.app_settings(paced.app)
    store = process.store(settings.database_url, settings.codec)
    assert isinstance(store, SQLStore)

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if "docket_cache" in statement:
            pages.append((values["p_first"], values["p_before"]))

    event.listen(store.engine, "before_cursor_execute", note)
    try:
        found = sent.stream(WAIT_S)
        ratings = [next(found).original.rating]
        assert pages == [(0, PAGE)]
        ratings += [next(found).original.rating for _ in range(PAGE - 1)]
        assert pages == [(0, PAGE)]
        ratings.append(next(found).original.rating)
        assert pages == [(0, PAGE), (PAGE, 2 * PAGE)]
        ratings += [each.original.rating for each in found]
    finally:
        event.remove(store.engine, "before_cursor_execute", note)
    assert pages == [(0, PAGE), (PAGE, 2 * PAGE), (2 * PAGE, 2 * PAGE + 500)]
    assert ratings == list(range(2 * PAGE + 500))
