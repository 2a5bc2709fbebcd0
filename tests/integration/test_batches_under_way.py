"""Batches while they run on real workers: limits, progress, cancelling, streams, and joins that are lost."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from docket_celery.errors import (
    InvalidArguments,
    InvalidSettings,
    PayloadTooLarge,
    PayloadUnavailable,
    RunCancelled,
    RunConflict,
    RunNotFound,
    StepFailed,
)
from docket_celery.store import SQLStore
from docket_celery.store.records import UNFINISHED, LostRun, Progress
from docket_celery.task.chords import revive
from examples.movies.movies_pb2 import BatchStats, EnrichedMovie, Movie
from tests.infra.processes import wait_until
from tests.infra.workers import WorkerProcess
from tests.integration.apps import paced
from tests.integration.apps.journal import Journals
from tests.integration.apps.paced import let_go, movies
from tests.integration.apps.serving import Urls, connected, drop_queue, query, serving, unique

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
WAIT_S = 30
# Short, so that what hangs on heartbeats and sweeps takes seconds.
ENV = {"DOCKET_CELERY_LEASE_SECONDS": "2", "DOCKET_CELERY_THREADS": "4"}
OPEN = {"open": True}


@pytest.fixture(scope="module", autouse=True)
def worker(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """A prefork worker with three children."""
    with serving(paced.app, urls, tmp_path_factory.mktemp("worker"), concurrency=3, env=ENV) as started:
        yield started


@pytest.fixture
def store(urls: Urls) -> Generator[SQLStore]:
    """The store, to look into it."""
    opened = SQLStore(urls.database)
    yield opened
    opened.close()


def state_of(urls: Urls, run: str) -> str | None:
    """Return the state of a run, or None."""
    rows = query(urls, "SELECT state FROM docket_runs WHERE execution_id = %s", run)
    return rows[0][0] if rows else None


# --- max_concurrency ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_more_items_are_under_way_than_may(journals: Journals, limit: int) -> None:
    """Over all processes of all workers, whatever the size of chunks; and all of them come back."""
    journal = unique("limit")
    items = movies(journal, 30)
    sent = paced.look_at_all.apply_async(
        (items,), context=OPEN, max_concurrency=limit, chunk_size=3, execution_id=journal
    )
    assert [each.original for each in sent.get(timeout=WAIT_S)] == items
    most = max(map(int, journals.read(f"{journal}/at-once")))
    assert 1 <= most <= limit


def test_the_limit_is_reached(journals: Journals, urls: Urls) -> None:
    """Five items wait for leave at one moment, in three processes; a sixth does not begin before one ends."""
    journal = unique("reached")
    sent = paced.look_at_all.apply_async((movies(journal, 12),), max_concurrency=5, chunk_size=2)
    assert len(journals.wait(f"{journal}/began", 5)) == 5
    let_go(urls, journal, 12)
    assert len(sent.get(timeout=WAIT_S)) == 12
    assert max(map(int, journals.read(f"{journal}/at-once"))) == 5


def test_a_limited_batch_goes_on_after_a_failure(journals: Journals) -> None:
    """A lane ends where the stage fails; resubmitting takes up what is missing, under the limit too."""
    run = unique("lanes")
    items = movies(run, 12)
    with pytest.raises(StepFailed):
        paced.look_at_all.apply_async(
            (items,), context={"open": True, "fails": "5"}, max_concurrency=2, execution_id=run
        ).get(timeout=WAIT_S)
    ended = journals.read(f"{run}/ended")
    assert len(ended) < 12
    found = paced.look_at_all.apply_async((items,), context=OPEN, max_concurrency=2, execution_id=run)
    assert [each.original for each in found.get(timeout=WAIT_S)] == items
    assert max(map(int, journals.read(f"{run}/at-once"))) <= 2
    assert set(ended).isdisjoint(journals.read(f"{run}/ended")[len(ended) :])


def test_a_second_submission_waits_for_the_first(journals: Journals, urls: Urls) -> None:
    """Without the limit of the first it would open the stage beside, and work on all its chunks at once."""
    run = unique("twice")
    items = movies(run, 8)
    first = paced.look_at_all.apply_async((items,), max_concurrency=1, execution_id=run)
    assert len(journals.wait(f"{run}/began", 1)) == 1
    second = paced.look_at_all.apply_async((items,), execution_id=run)
    wait_until(lambda: second.state == "STARTED", within_s=WAIT_S, what="the second task")
    let_go(urls, run, 8)
    assert [each.original for each in first.get(timeout=WAIT_S)] == items
    assert [each.original for each in second.get(timeout=WAIT_S)] == items
    assert set(journals.read(f"{run}/at-once")) == {"1"}
    assert len(journals.read(f"{run}/began")) == 8


def test_a_stage_is_opened_again_in_the_lanes_that_it_has(journals: Journals, urls: Urls) -> None:
    """The copy that goes on with a batch asks for no limit any more; that of the stage holds."""
    run = unique("again")
    items = movies(run, 8)
    first = paced.look_at_all.apply_async((items,), max_concurrency=1, execution_id=run)
    assert len(journals.wait(f"{run}/began", 1)) == 1
    with redis.Redis.from_url(urls.results) as client:
        client.delete(*chord_keys(client))
    message = json.loads(query(urls, "SELECT message FROM docket_runs WHERE execution_id = %s", run)[0][0])
    assert message["options"]["headers"]["docket_batch"].pop("max_concurrency") == 1
    lost = LostRun(
        graph="pacing",
        execution_id=run,
        task_name=paced.look_at_all.name,
        retries=0,
        stage=1,
        message=json.dumps(message).encode(),
    )
    revive(paced.app, lost)
    opened = "SELECT count(*) FROM docket_runs WHERE execution_id = %s AND state = 'WAITING' AND epoch = 2"
    wait_until(lambda: query(urls, opened, run) == [(1,)], within_s=WAIT_S, what="the stage, opened again")
    let_go(urls, run, 8)
    assert [each.original for each in first.get(timeout=WAIT_S)] == items
    assert set(journals.read(f"{run}/at-once")) == {"1"}


def test_a_rate_limit_counts_each_task_of_a_batch() -> None:
    """At four a second, five tasks (three chunks, a job and a body) cannot take less than a second."""
    journal = unique("slowly")
    began = time.monotonic()
    sent = paced.look_slowly.apply_async((movies(journal, 3),), context=OPEN)
    assert len(sent.get(timeout=WAIT_S)) == 3
    # The bucket holds one, and the limiter's clock is another one: a little less than the four quarters.
    assert time.monotonic() - began > 0.9


# --- failing soon ------------------------------------------------------------------------------------------------


def await_heartbeats(urls: Urls, run: str, beats: int = 4) -> None:
    """Wait until the chunks of a run that are under way have been extended so often."""
    seen: dict[int, set[Any]] = {}

    def extended() -> bool:
        running = query(
            urls,
            "SELECT lo, lease_until FROM docket_chunks WHERE execution_id = %s AND state = 'RUNNING'",
            run,
        )
        for lo, until in running:
            seen.setdefault(lo, set()).add(until)
        # One that was seen and has ended since is extended no more.
        return bool(running) and all(len(seen[lo]) > beats for lo, _ in running)

    wait_until(extended, within_s=WAIT_S, what=f"{beats} heartbeats of the chunks of {run}")


def test_running_chunks_begin_nothing_more_when_another_one_fails(journals: Journals, urls: Urls) -> None:
    """What is under way finishes and is saved; the rest of those chunks waits for another submission."""
    run = unique("soon")
    items = movies(run, 60)
    sent = paced.look_at_all.apply_async(
        (items,), execution_id=run, chunk_size=20, max_concurrency=3, context={"fails": "0"}
    )
    assert sorted(journals.wait(f"{run}/began", 3)) == ["0", "20", "40"]
    let_go(urls, run, 1)
    journals.wait(f"{run}/stopped", 1)
    await_heartbeats(urls, run)
    let_go(urls, run, 60)
    with pytest.raises(StepFailed, match="step 'look' of item 0 failed"):
        sent.get(timeout=WAIT_S)
    assert len(journals.read(f"{run}/began")) == 3
    found = paced.look_at_all.apply_async((items,), context=OPEN, execution_id=run).get(timeout=WAIT_S)
    assert [each.original for each in found] == items
    assert sorted(map(int, journals.read(f"{run}/began"))) == sorted([*range(60), 0])


def documented_query() -> str:
    """Return the query that the page about batches shows."""
    page = (ROOT / "docs" / "batches.md").read_text(encoding="utf-8")
    return page.split("```sql\n")[1].split("```")[0]


# --- progress ----------------------------------------------------------------------------------------------------


def test_the_promise_tells_how_far_the_batch_is(journals: Journals, urls: Urls) -> None:
    """From the run's row, in any process; the result backend knows which stage was opened."""
    run = unique("progress")
    sent = paced.look_at_all.apply_async(
        (movies(run, 6),), chunk_size=2, max_concurrency=1, execution_id=run, countdown=0.5
    )
    assert sent.progress() is None
    journals.wait(f"{run}/began", 1)
    assert (sent.state, sent.info) == ("PROGRESS", {"done": 0, "total": 6, "stage": 1, "stages": 1})
    assert sent.progress() == Progress(done=0, total=6)
    let_go(urls, run, 2)
    journals.wait(f"{run}/began", 3)
    assert sent.progress() == Progress(done=2, total=6)
    elsewhere = paced.look_at_all.AsyncResult(sent.id)
    assert elsewhere.progress(run) == Progress(done=2, total=6)
    assert elsewhere.progress() is None
    assert (run, "2", "6") in query(urls, documented_query())
    let_go(urls, run, 4)
    assert len(sent.get(timeout=WAIT_S)) == 6
    assert sent.state == "SUCCESS"
    assert sent.progress() == Progress(done=6, total=6)
    pickled: Any = pickle.loads(pickle.dumps(sent))  # noqa: S301 -- our own bytes
    with pytest.raises(InvalidArguments, match="pickled"):
        pickled.progress()


def test_a_waiting_caller_hears_of_each_stage(journals: Journals) -> None:
    """Where the result backend tells of states (Redis); nothing is said of single chunks."""
    told: list[Any] = []
    sent = paced.look_at_all.apply_async(
        (movies(unique("heard"), 6),), context=OPEN, chunk_size=2, countdown=0.5
    )
    found = sent.get(timeout=WAIT_S, on_message=lambda meta: told.append((meta["status"], meta["result"])))
    assert len(found) == 6
    assert [result["done"] for status, result in told if status == "PROGRESS"] == [0]
    assert told[-1][0] == "SUCCESS"


def test_the_row_tells_it_too(journals: Journals, urls: Urls) -> None:
    """For those who read the database."""
    run = unique("row")
    paced.gather_all.apply_async((movies(run, 5),), context=OPEN, execution_id=run).get(timeout=WAIT_S)
    rows = query(urls, "SELECT progress FROM docket_runs WHERE execution_id = %s", run)
    assert rows == [({"done": 5, "total": 5, "stage": 1, "stages": 1},)]


# --- cancelling --------------------------------------------------------------------------------------------------


def test_a_cancelled_batch_stops(journals: Journals, urls: Urls) -> None:
    """Running items see it, queued chunks do not start, and the caller gets `RunCancelled` with the reason."""
    run = unique("cancelled")
    sent = paced.look_at_all.apply_async((movies(run, 20),), execution_id=run, max_concurrency=3)
    journals.wait(f"{run}/began", 3)
    handle = paced.look_at_all.handle(run)
    assert handle.cancel("nobody wants it any more")
    with pytest.raises(RunCancelled, match="nobody wants it any more"):
        sent.get(timeout=WAIT_S)
    assert len(journals.wait(f"{run}/stopped", 3)) == 3
    assert len(journals.read(f"{run}/began")) == 3
    assert journals.read(f"{run}/ended") == []
    assert state_of(urls, run) == "CANCELLED"
    assert handle.cancel()
    with pytest.raises(RunCancelled):
        paced.look_at_all.apply_async((movies(run, 20),), execution_id=run).get(timeout=WAIT_S)


def test_what_cannot_be_cancelled_says_so() -> None:
    """A run that has ended stays what it is; one that nobody knows is named."""
    run = unique("over")
    paced.look_at_all.apply_async((movies(run, 1),), execution_id=run, context=OPEN).get(timeout=WAIT_S)
    assert not paced.look_at_all.handle(run).cancel()
    with pytest.raises(RunNotFound, match="never-submitted"):
        paced.look_at_all.handle("never-submitted").cancel()
    with pytest.raises(InvalidArguments, match="execution_id"):
        paced.look_at_all.handle("")


# --- streams -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stream_of_items_becomes_a_batch(journals: Journals, urls: Urls) -> None:
    """Read one by one, stored in pages, named like any batch; only a reference travels."""
    run = unique("stream")
    taken: list[int] = []

    def source() -> Iterator[Movie]:
        for movie in movies(run, 2500):
            taken.append(1)
            yield movie

    control: Any = paced.app.control
    parked = unique("parked")
    sent = paced.look_at_all.submit_batch(
        source(), execution_id=run, context=OPEN, chunk_size=500, queue=parked
    )
    assert len(taken) == 2500
    assert state_of(urls, run) == "QUEUED"
    with redis.Redis.from_url(urls.broker) as client:
        (message,) = client.lrange(parked, 0, -1)  # type: ignore[misc, unused-ignore]
    assert len(message) < 3000
    assert control.add_consumer(parked, reply=True)
    try:
        assert [each.original.rating for each in sent.stream(WAIT_S)] == list(range(2500))
    finally:
        control.cancel_consumer(parked, reply=True)
        drop_queue(urls.broker, parked)
    # The whole list at once is the same job: nothing runs again.
    again = paced.look_at_all.apply_async((movies(run, 2500),), execution_id=run, context=OPEN)
    assert len(again.get(timeout=WAIT_S)) == 2500
    assert len(journals.read(f"{run}/began")) == 2500
    with pytest.raises(RunConflict):
        paced.look_at_all.submit_batch(iter(movies(run, 2499)), execution_id=run)


@pytest.mark.slow
def test_a_result_is_that_of_its_own_batch(journals: Journals, urls: Urls, store: SQLStore) -> None:
    """The name of a purged run is free: whoever still holds its result must not get the items of another batch."""
    run = unique("renamed")

    def send(count: int) -> Any:
        items = movies(run, count)
        return paced.look_at_all.submit_batch(items, execution_id=run, context=OPEN, chunk_size=500)

    held = send(1900)
    stream = held.stream(WAIT_S)
    assert next(stream).original.rating == 0
    query(urls, "UPDATE docket_runs SET expires_at = now() WHERE execution_id = %s RETURNING 1", run)
    while store.find_run("pacing", run) is not None:
        store.purge(1000)
    with pytest.raises(PayloadUnavailable, match="its row is gone"):
        held.get(timeout=WAIT_S)
    assert len(send(3).get(timeout=WAIT_S)) == 3
    with pytest.raises(PayloadUnavailable, match="its name has another job now"):
        held.get(timeout=WAIT_S)
    # The page that was read is right; the next one would be of the other batch.
    seen: list[int] = []
    with pytest.raises(PayloadUnavailable, match="its name has another job now"):
        seen.extend(each.original.rating for each in stream)
    assert seen == list(range(1, 1000))


def test_dicts_and_no_items_can_be_streamed(journals: Journals) -> None:
    """Protobuf's JSON form of each; an empty stream is an empty batch."""
    journal = unique("dicts")
    sent = paced.gather_all.submit_batch(({"title": journal, "rating": n} for n in range(3)), context=OPEN)
    assert sent.get(timeout=WAIT_S).count == 3
    assert paced.gather_all.submit_batch([]).get(timeout=WAIT_S).count == 0
    assert list(paced.look_at_all.submit_batch(()).stream(WAIT_S)) == []


def test_what_failed_is_a_gap_in_the_stream(journals: Journals) -> None:
    """Of a `BatchResult`; a task with one message has nothing to stream."""
    journal = unique("gaps")
    context = {"open": True, "fails": "1"}
    sent = paced.look_at_some.submit_batch(movies(journal, 3), context=context)
    assert [each is None for each in sent.stream(WAIT_S)] == [False, True, False]
    one: Any = paced.gather_all.submit_batch([])
    with pytest.raises(InvalidArguments, match="one message"):
        list(one.stream(WAIT_S))


def test_a_stream_that_breaks_off_can_be_submitted_again(urls: Urls, store: SQLStore) -> None:
    """Nothing was sent, nothing of it counts; meanwhile nobody else may submit under the name."""
    run = unique("broken")

    def source() -> Iterator[Movie]:
        yield from movies(run, 1200)
        raise OSError("the file ends here")

    with pytest.raises(OSError, match="the file ends here"):
        paced.look_at_all.submit_batch(source(), execution_id=run)
    row = store.find_run("pacing", run)
    assert row is not None
    assert row.job_digest == UNFINISHED
    assert len(store.read_items("pacing", run, [""], 0, 5000)) == 1000
    with pytest.raises(RunConflict, match="has a submission under way; wait for it"):
        paced.look_at_all.submit_batch(movies(run, 3), execution_id=run)
    query(
        urls,
        "UPDATE docket_runs SET lease_until = clock_timestamp() WHERE execution_id = %s RETURNING 1",
        run,
    )
    sent = paced.look_at_all.submit_batch(movies(run, 3), execution_id=run, context=OPEN)
    assert [each.original.rating for each in sent.get(timeout=WAIT_S)] == [0, 1, 2]
    assert len(store.read_items("pacing", run, [""], 0, 5000)) == 3


def test_a_wrong_item_names_itself() -> None:
    """Which one it is, and what it should be."""
    mixed: list[Any] = [Movie(), Movie(), BatchStats()]
    with pytest.raises(InvalidArguments, match=r"movies\[2\].* must be a docket.examples.movies.Movie"):
        paced.look_at_all.submit_batch(mixed)
    large = Movie(title="x" * (1024 * 1024 + 1))
    with pytest.raises(PayloadTooLarge):
        paced.look_at_all.submit_batch([Movie(), large])
    with pytest.raises(InvalidArguments, match="takes the items, then nothing; got 1 beside the items"):
        paced.look_at_all.submit_batch([Movie()], BatchStats())


def test_streaming_needs_a_database(urls: Urls) -> None:
    """In the process that submits."""
    without = Urls(broker=urls.broker, results=urls.results, database="")
    with connected(paced.app, without):
        paced.app.conf.docket_database_url = None
        with pytest.raises(InvalidSettings, match="docket_database_url"):
            paced.look_at_some.submit_batch([Movie()])


# --- lost joins --------------------------------------------------------------------------------------------------


def chord_keys(client: Any, suffixes: str = "jtsdc") -> list[Any]:
    """Return Celery's keys of open chords: parts returned, their number, and the claim of the body."""
    return [key for suffix in suffixes for key in client.keys(f"celery-taskset-meta-*.{suffix}")]


def gathered(journals: Journals, urls: Urls, run: str) -> None:
    """Check that the aggregate was made once, and is stored once."""
    assert len(journals.read(f"gather/{run}")) == 1
    rows = query(
        urls, "SELECT count(*) FROM docket_cache WHERE execution_id = %s AND step_name = 'gather'", run
    )
    assert rows == [(1,)]


def test_a_deleted_counter_does_not_lose_the_join(journals: Journals, urls: Urls) -> None:
    """Redis has forgotten the chord in mid-flight: a sweep sends the body, the caller gets the result, once."""
    run = unique("counter")
    job: Any = paced.gather_all.s(movies(run, 6))
    chained: Any = job.set(execution_id=run) | paced.add_one.s()
    sent = chained.apply_async()
    journals.wait(f"{run}/began", 3)
    with redis.Redis.from_url(urls.results) as client:
        keys = chord_keys(client)
        assert keys
        client.delete(*keys)
    let_go(urls, run, 6)
    assert sent.get(timeout=WAIT_S) == 7
    gathered(journals, urls, run)


def test_a_lost_body_is_sent_again(journals: Journals, urls: Urls, worker: WorkerProcess) -> None:
    """All chunks have ended, the message of the body is gone from the queue."""
    run, queue = unique("body"), unique("lane")
    control: Any = paced.app.control
    assert control.add_consumer(queue, reply=True)
    sent = paced.gather_all.apply_async((movies(run, 4),), execution_id=run, queue=queue)
    journals.wait(f"{run}/began", 3)
    # What is sent to the queue from now on stays there.
    assert control.cancel_consumer(queue, reply=True)
    let_go(urls, run, 4)
    with redis.Redis.from_url(urls.broker) as client:
        wait_until(lambda: client.llen(queue) == 1, within_s=WAIT_S, what="the message of the body")
        client.delete(queue)
    assert control.add_consumer(queue, reply=True)
    try:
        assert sent.get(timeout=WAIT_S).count == 4
    finally:
        control.cancel_consumer(queue, reply=True)
    gathered(journals, urls, run)
    assert f"run {run!r} of graph 'pacing' is not advanced by any worker" in worker.read_log()


def test_a_killed_worker_does_not_lose_its_chunks(
    journals: Journals, urls: Urls, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The broker gives its messages back after hours only; the sweep of another worker does not wait for that."""
    run, queue = unique("killed"), unique("doomed")
    directory = tmp_path_factory.mktemp("doomed")
    with serving(paced.app, urls, directory, concurrency=2, env=ENV, args=["-Q", queue]) as doomed:
        sent = paced.gather_all.apply_async((movies(run, 8),), execution_id=run, queue=queue)
        journals.wait(f"{run}/began", 4)
        doomed.kill()
    control: Any = paced.app.control
    assert control.add_consumer(queue, reply=True)
    try:
        let_go(urls, run, 8)
        assert sent.get(timeout=WAIT_S * 2).count == 8
    finally:
        control.cancel_consumer(queue, reply=True)
        drop_queue(urls.broker, queue)
    gathered(journals, urls, run)


def test_a_batch_without_its_chord_is_cancelled_for_its_caller_too(journals: Journals, urls: Urls) -> None:
    """Nothing of it comes any more by itself; the caller hears of the end all the same."""
    run = unique("orphan")
    sent = paced.gather_all.apply_async((movies(run, 6),), execution_id=run)
    journals.wait(f"{run}/began", 3)
    with redis.Redis.from_url(urls.results) as client:
        client.delete(*chord_keys(client))
    assert paced.gather_all.handle(run).cancel("gone wrong")
    with pytest.raises(RunCancelled, match="gone wrong"):
        sent.get(timeout=WAIT_S)
    journals.wait(f"{run}/stopped", len(journals.read(f"{run}/began")))
    # Chunks do not replace how their batch ended, whenever they end themselves.
    assert sent.state == "FAILURE"
    assert journals.read(f"gather/{run}") == []


def test_a_result_is_typed(journals: Journals) -> None:
    """What comes back of a stream are messages."""
    journal = unique("typed")
    found = paced.look_at_all.submit_batch(movies(journal, 1), context=OPEN).get(timeout=WAIT_S)
    assert type(found[0]) is EnrichedMovie
