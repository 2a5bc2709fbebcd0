"""Batch tasks on real workers: items spread over chunks, joined by aggregates, resumed where they stood."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import redis
from celery import group
from celery.result import AsyncResult
from sqlalchemy import text

from docket_celery.errors import (
    AbortError,
    BatchFailed,
    PayloadUnavailable,
    RunConflict,
    RunNotFound,
    RunQuarantined,
    StepFailed,
)
from docket_celery.store import SQLStore
from docket_celery.store.identity import idempotency_key
from docket_celery.task.result import GraphResult
from examples.documents.documents_pb2 import Document
from examples.movies.graph import MOVIES, movie_graph
from examples.movies.movies_pb2 import EnrichedMovie, Movie
from tests.infra.workers import WorkerProcess
from tests.integration.apps import batches
from tests.integration.apps.journal import Journals
from tests.integration.apps.serving import Urls, serving, unique

pytestmark = pytest.mark.integration
WAIT_S = 20
# Longer than any test: only the retry of the same task may bring a chunk on, not an expired lease.
ENV = {"DOCKET_CELERY_LEASE_SECONDS": "120", "DOCKET_CELERY_MAX_DELIVERIES": "3"}


@pytest.fixture(scope="module", autouse=True)
def worker(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """A prefork worker with two children."""
    with serving(batches.app, urls, tmp_path_factory.mktemp("worker"), concurrency=2, env=ENV) as started:
        yield started


def movies(journal: str, *deeds: str) -> list[Movie]:
    """Return a movie for each thing to do, rated by its number."""
    return [Movie(title=f"{journal}:{what}:{number}", rating=number) for number, what in enumerate(deeds)]


def run_rows(urls: Urls, execution_id: str) -> tuple[str, list[tuple[int, int, int, str]]]:
    """Return the state of a run, and its chunks with stage, bounds and state."""
    store = SQLStore(urls.database)
    try:
        row = store.find_run("acting", execution_id)
        found = store.find_chunks("acting", execution_id)
    finally:
        store.close()
    assert row is not None
    return row.state.value, [(c.chunk.stage, c.chunk.lo, c.chunk.hi, c.state.value) for c in found]


def test_the_guides_movies_come_back_enriched() -> None:
    """Five movies through real workers are what they are in process."""
    found = batches.enrich.delay(MOVIES).get(timeout=WAIT_S)
    assert found == movie_graph.execute_batch(EnrichedMovie, MOVIES)


def test_dicts_make_a_batch_too() -> None:
    """Protobuf's JSON form of each item, as beat and `celery call` send it."""
    task: Any = batches.enrich
    found = task.delay([{"title": "Heat", "rating": 8.3}, {"title": "Alien"}]).get(timeout=WAIT_S)
    assert [each.original.title for each in found] == ["Heat", "Alien"]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_batches_of_any_size_end(journals: Journals, count: int) -> None:
    """None, one, a full chunk, and a chunk that is not full; the same item twice counts twice."""
    journal = unique("size")
    items = movies(journal, *[""] * count)
    assert batches.sum_all.delay(items).get(timeout=WAIT_S).count == count
    assert [
        each.original for each in batches.rate_all.delay([*items, *items]).get(timeout=WAIT_S)
    ] == items * 2


def test_two_stages_with_an_aggregate_between(journals: Journals, urls: Urls) -> None:
    """The second one sees what the aggregate made of the first, and everything ran once."""
    run = unique("stages")
    found = batches.place_all.apply_async((movies(run, *[""] * 5),), execution_id=run).get(timeout=WAIT_S)
    assert [each.title.split(" ")[:3] for each in found] == [[f"{i}:", f"{i}", "of"] for i in range(5)]
    assert sorted(journals.read(f"{run}/rate")) == ["0", "1", "2", "3", "4"]
    assert journals.read(f"sum_up/{run}") == ["5"]
    noted = sorted(journals.read(f"place/{run}"))
    assert noted == [f"{i} {idempotency_key('acting', run, 'place', str(i))}" for i in range(5)]
    bounds = [(0, 2), (2, 4), (4, 5)]
    assert run_rows(urls, run) == ("SUCCEEDED", [(s, *b, "SUCCEEDED") for s in (1, 3) for b in bounds])


def test_a_value_is_split_and_merged() -> None:
    """A task with one message in and one out, whose graph fans out."""
    text = "one\ftwo words\fthree more words"
    found = batches.summarize.delay(Document(title="Long", text=text)).get(timeout=WAIT_S)
    assert (found.title, found.pages, found.words, found.longest_word) == ("Long", 3, 6, "words")
    assert batches.summarize.delay(Document(title="Blank")).get(timeout=WAIT_S).pages == 0


def test_a_failed_item_fails_the_batch_and_resuming_runs_what_is_missing(
    journals: Journals, urls: Urls
) -> None:
    """The error names step and item; the same execution id goes on where the batch stood."""
    run = unique("resumed")
    items = movies(run, "", "", "fail-once", "", "", "")
    with pytest.raises(StepFailed, match="step 'rate' of item 2 failed after 1 attempt") as failed:
        batches.place_all.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert failed.value.caused_by(ConnectionError)
    assert run_rows(urls, run)[0] == "FAILED"
    before = journals.read(f"{run}/rate")
    assert journals.read(f"sum_up/{run}") == []
    found = batches.place_all.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert len(found) == 6
    assert sorted(journals.read(f"{run}/rate")) == ["0", "1", "2", "2", "3", "4", "5"]
    assert sorted({*before, *journals.read(f"{run}/rate")[len(before) :]}) == ["0", "1", "2", "3", "4", "5"]
    again = batches.place_all.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert again == found
    assert len(journals.read(f"place/{run}")) == 6


def test_another_batch_may_not_use_the_name() -> None:
    """A run is its job."""
    run = unique("conflict")
    batches.rate_all.apply_async((movies(run, "", ""),), execution_id=run).get(timeout=WAIT_S)
    with pytest.raises(RunConflict):
        batches.rate_all.apply_async((movies(run, "", "", ""),), execution_id=run).get(timeout=WAIT_S)


def test_what_failed_is_collected(journals: Journals) -> None:
    """Results in order, errors by index; later stages leave failed items out; the aggregate sees the others."""
    run = unique("collected")
    items = movies(run, "", "fail", "", "", "fail")
    found = batches.place_some.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert [each is None for each in found.results] == [False, True, False, False, True]
    assert sorted(found.errors) == [1, 4]
    assert found.errors[4].item == "4"
    assert found.errors[1].caused_by(ConnectionError)
    assert journals.read(f"sum_up/{run}") == ["3"]
    assert len(journals.read(f"place/{run}")) == 3
    again = batches.place_some.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert again.results == found.results
    assert {index: str(error) for index, error in again.errors.items()} == {
        index: str(error) for index, error in found.errors.items()
    }


def test_too_many_failures_fail_a_collecting_batch(journals: Journals) -> None:
    """As a share of all items; within it the aggregate is made of the others."""
    run = unique("share")
    assert batches.sum_some.delay(movies(run, "", "fail", "fail", "")).get(timeout=WAIT_S).count == 2
    with pytest.raises(BatchFailed, match="3 of 4 items failed, max_failed allows 2"):
        batches.sum_some.delay(movies(run, "fail", "fail", "fail", "")).get(timeout=WAIT_S)
    asked = batches.sum_some.apply_async((movies(run, "fail", "fail", "fail", ""),), max_failed=3)
    assert asked.get(timeout=WAIT_S).count == 1


def test_items_that_an_aggregate_does_not_see_are_told(worker: WorkerProcess, urls: Urls) -> None:
    """In the run's row, in one warning of the worker, and by the caller's promise; in that of another process too."""
    run = unique("unseen")
    promise = batches.sum_some.apply_async(
        (movies(run, "", "fail", "", "", "fail"),), execution_id=run, max_failed=0.9
    )
    assert promise.get(timeout=WAIT_S).count == 3
    found = promise.failed_items()
    assert sorted(found) == [1, 4]
    assert all(found[index].caused_by(ConnectionError) for index in (1, 4))
    elsewhere = batches.sum_some.AsyncResult(promise.id)
    assert {index: str(error) for index, error in elsewhere.failed_items(run).items()} == {
        index: str(error) for index, error in found.items()
    }
    with pytest.raises(RunNotFound):
        elsewhere.failed_items()
    store = SQLStore(urls.database)
    try:
        with store.engine.connect() as connection:
            query = text("SELECT items_failed FROM docket_runs WHERE execution_id = :run")
            assert connection.execute(query, {"run": run}).scalar_one() == 2
    finally:
        store.close()
    worker.wait_for_log(f"run '{run}' of graph 'acting' succeeded, failed items left out: 2 (")
    warnings = [
        line for line in worker.read_log().splitlines() if f"'{run}' of graph" in line and "left out" in line
    ]
    assert len(warnings) == 1
    assert "step 'rate' of item 1 failed after 1 attempt" in warnings[0]
    assert "WARNING" in warnings[0]


def test_a_batch_without_failures_has_no_failed_items(urls: Urls) -> None:
    """Nothing is made up for it."""
    promise = batches.sum_all.delay(movies(unique("whole"), "", ""))
    promise.get(timeout=WAIT_S)
    assert promise.failed_items() == {}


def test_an_abort_stops_the_batch(urls: Urls) -> None:
    """Whatever may fail; what had not started does not."""
    run = unique("aborted")
    items = movies(run, *["abort"] * 4, *[""] * 30)
    with pytest.raises(AbortError, match="stop it all"):
        batches.place_some.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    state, chunks = run_rows(urls, run)
    assert state == "FAILED"
    assert "QUEUED" in {row[3] for row in chunks}


def test_a_killed_child_costs_its_own_chunk_a_retry(journals: Journals, urls: Urls) -> None:
    """The retry of the chunk's task finds the dead lease at once; nothing else runs again."""
    run = unique("killed")
    items = movies(run, "", "", "", "kill-once", "", "")
    found = batches.place_all.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert len(found) == 6
    rated = journals.read(f"{run}/rate")
    assert rated.count("3") == 2
    assert {name: rated.count(name) for name in "0145"} == dict.fromkeys("0145", 1)
    assert journals.read(f"sum_up/{run}") == ["6"]
    assert len(journals.read(f"place/{run}")) == 6
    assert run_rows(urls, run)[0] == "SUCCEEDED"


def test_a_poisonous_item_quarantines_the_batch(urls: Urls) -> None:
    """After so many dead children the batch ends instead of killing workers for ever."""
    run = unique("poison")
    with pytest.raises(RunQuarantined):
        batches.rate_all.apply_async((movies(run, "", "", "kill"),), execution_id=run).get(timeout=WAIT_S)
    state, chunks = run_rows(urls, run)
    assert (state, chunks[1][3]) == ("QUARANTINED", "QUARANTINED")


def test_a_big_result_stays_in_the_database(urls: Urls) -> None:
    """Its place travels; the caller reads it from there; a later task of a chain does too."""
    items = [Movie(title="x" * 900 + str(number), rating=number) for number in range(600)]
    result = batches.enrich.delay(items)
    found = result.get(timeout=WAIT_S)
    assert [each.original for each in found] == items
    with redis.Redis.from_url(urls.results) as client:
        assert len(client.get(f"celery-task-meta-{result.id}") or b"") < 2000  # type: ignore[arg-type, unused-ignore]


@pytest.fixture
def store(urls: Urls) -> Generator[SQLStore]:
    """The store, to purge it."""
    opened = SQLStore(urls.database)
    yield opened
    opened.close()


def purge(store: SQLStore, run: str) -> None:
    """Purge an ended run of the movies' graph, as if its retention were over."""
    with store.engine.begin() as connection:
        due = text("UPDATE docket_runs SET expires_at = created_at WHERE execution_id = :run")
        assert connection.execute(due, {"run": run}).rowcount == 1
    while store.purge(10_000):
        pass
    assert store.find_run(movie_graph.name, run) is None


def submitted(run: str, title: str) -> tuple[GraphResult[list[EnrichedMovie]], list[Movie]]:
    """Run a batch whose result takes three pages in the database; return its promise and its items."""
    items = [Movie(title=f"{title} {number} " + "x" * 100, rating=number) for number in range(2100)]
    result = batches.enrich.apply_async((items,), execution_id=run)
    assert [each.original for each in result.get(timeout=WAIT_S)] == items
    return result, items


@pytest.mark.parametrize("again", [False, True])
def test_a_big_result_is_not_taken_from_another_batch(store: SQLStore, again: bool) -> None:
    """One with as many items as the purged one had: not by a promise, a stream that has begun, or a later task."""
    run = unique("purged")
    first, items = submitted(run, "first")
    reference: Any = AsyncResult(first.id, app=batches.app).get(timeout=WAIT_S)
    assert batches.app.send_task("batches.sum_rated", (reference,)).get(timeout=WAIT_S).count == 2100
    stream = first.stream(WAIT_S)
    seen = [next(stream).original]
    purge(store, run)
    told = "its row is gone"
    if again:
        second, others = submitted(run, "second")
        told = "its name has another job now"
        assert [each.original for each in second.stream(WAIT_S)] == others
    old = batches.enrich.AsyncResult(first.id)
    sent = batches.app.send_task("batches.sum_rated", (reference,))
    for read in (
        lambda: old.get(timeout=WAIT_S),
        lambda: next(old.stream(WAIT_S)),
        lambda: sent.get(timeout=WAIT_S),
        lambda: seen.extend(each.original for each in stream),
    ):
        with pytest.raises(PayloadUnavailable, match=f"of run '{run}' of graph 'movies'.*{told}"):
            read()
    # The page that was read before is right.
    assert seen == items[:1000]
    if not again:
        submitted(run, "first")
        assert [each.original for each in old.get(timeout=WAIT_S)] == items


def test_parts_keep_what_the_job_said(urls: Urls, journals: Journals) -> None:
    """Context, execution id, headers, queue and priority are the same in every part; one name in Flower."""
    run, queue = unique("kept"), unique("side")
    control = batches.app.control
    assert control.add_consumer(queue, reply=True)
    try:
        sent = batches.context_of.apply_async(
            (movies(run, "", "", ""),),
            execution_id=run,
            context={"user": "ann"},
            headers={"tenant": "t1"},
            queue=queue,
            priority=3,
            chunk_size=1,
        )
        found = sent.get(timeout=WAIT_S)
    finally:
        control.cancel_consumer(queue, reply=True)
    assert [each.title for each in found] == [f"{run} ann t1 batches.context_of {sent.id} {queue} 3"] * 3


def test_a_chain_goes_on_after_a_batch() -> None:
    """The next task gets the list, not a chunk's receipt."""
    chained: Any = batches.enrich.s(MOVIES) | batches.count_them.s()
    assert chained.delay().get(timeout=WAIT_S) == 5
    assert group(batches.sum_all.s([]), batches.sum_all.s([])).delay().get(timeout=WAIT_S)[1].count == 0
