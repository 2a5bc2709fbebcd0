"""GraphTasks with lists, without a worker: what is declared, what is refused, and what runs here and now."""

from __future__ import annotations

import base64
import itertools
import sys
import types
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state
from sqlalchemy import text

from docket_celery import BatchResult, Graph, GraphTask, Scope, SQLStore, StepContext, graph_task
from docket_celery.batch.options import BatchOptions
from docket_celery.engine.process.state import process
from docket_celery.errors import (
    InvalidArguments,
    InvalidDeclaration,
    LeaseLost,
    PayloadTooLarge,
    RunCancelled,
    RunConflict,
    StepFailed,
)
from docket_celery.store.records import UNFINISHED, Chunk, Lanes
from docket_celery.task import app_settings, checks, chords, upload
from docket_celery.task.headers import PREPARED, WAITS_FOR_OTHER
from docket_celery.task.options import read_batch_options
from examples.movies.graph import MOVIES, movie_graph
from examples.movies.movies_pb2 import BatchStats, EnrichedMovie, Movie
from tests.codecs import Encryption

picky = Graph("picky-task")


@picky.step
def check(movie: Movie, ctx: StepContext) -> EnrichedMovie:
    """Refuse what is old."""
    if movie.year < 1960:
        raise ValueError("too old")
    return EnrichedMovie(original=movie)


@pytest.fixture
def app() -> Generator[Celery]:
    """An app of its own; whichever was current is so again."""
    state: Any = _state
    before, shared = getattr(state._tls, "current_app", None), set(state._on_app_finalizers)
    state._on_app_finalizers.intersection_update(
        {one for one in shared if one.__module__ == "celery.app.builtins"}
    )
    made = Celery("cinema", broker="memory://", backend="cache+memory://")
    # The broker in memory is one for all tests of the process.
    made.conf.task_default_queue = f"cinema-{uuid.uuid4()}"
    yield made
    state._tls.current_app = before
    state._on_app_finalizers.clear()
    state._on_app_finalizers.update(shared)
    process.close_stores()


def test_a_list_makes_a_batch_here_and_now(app: Celery) -> None:
    """Called, applied, and declared by its types; the declared forms come back."""

    @graph_task(app, picky)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    class CheckSome(GraphTask[[list[Movie]], BatchResult[EnrichedMovie]]):
        graph = picky

    recent = MOVIES[:4]
    assert [each.original for each in check_all(recent)] == recent
    assert [each.original for each in check_all.apply((recent,)).get()] == recent
    some: CheckSome = app.register_task(CheckSome())
    found = some(MOVIES)
    assert [each is None for each in found.results] == [False] * 4 + [True]
    assert found.errors[4].caused_by(ValueError)
    with pytest.raises(StepFailed, match="item 4"):
        check_all(MOVIES)


def test_what_is_no_batch_is_refused(app: Celery) -> None:
    """Two lists, a lazy result, one message instead of many, an item of another type, an option out of range."""
    with pytest.raises(InvalidDeclaration, match="it takes 2 lists"):

        @graph_task(app, picky)
        def two(movies: list[Movie], others: list[EnrichedMovie]) -> list[EnrichedMovie]:
            raise NotImplementedError

    with pytest.raises(InvalidArguments, match="chunk_size"):

        @graph_task(app, picky, chunk_size=0)
        def none(movies: list[Movie]) -> list[EnrichedMovie]:
            raise NotImplementedError

    @graph_task(app, picky)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    task: Any = check_all
    with pytest.raises(InvalidArguments, match="must be a list of"):
        task.delay(MOVIES[0])
    with pytest.raises(InvalidArguments, match=r"movies\[1\]"):
        task.delay([MOVIES[0], EnrichedMovie()])
    with pytest.raises(InvalidArguments, match="max_failed"):
        task.apply_async((MOVIES,), max_failed=2)
    with pytest.raises(PayloadTooLarge, match="the list of task"):
        task.delay([Movie(title="x" * 1000 * 1000)] * 68)


def test_a_slip_of_the_pen_is_no_option(app: Celery) -> None:
    """Celery takes and drops whatever it does not know; a limit that is none would be noticed too late."""
    with pytest.raises(
        InvalidArguments, match=r"max_concurency: is not known; did you mean max_concurrency\?"
    ):

        @graph_task(app, picky, max_concurency=2)
        def limited(movies: list[Movie]) -> list[EnrichedMovie]:
            raise NotImplementedError

    @graph_task(app, picky, rate_limit="2/s")
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    with pytest.raises(InvalidArguments, match="did you mean chunk_size"):
        check_all.apply_async((MOVIES,), chunksize=2)
    with pytest.raises(InvalidArguments, match="did you mean execution_id"):
        check_all.submit_batch(MOVIES, executionid="x")


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("disabled://", "need a result backend, and the app has none"),
        ("rpc://", "the rpc"),
        ("cache+memory://", "the in-memory"),
    ],
)
def test_a_backend_without_chords_is_a_fault(app: Celery, tmp_path: Path, backend: str, words: str) -> None:
    """Nobody would ever join the chunks. Threads of one process do share its memory."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    store = SQLStore(url)
    store.migrate()
    store.close()
    app.conf.update(result_backend=backend, docket_database_url=url)

    @graph_task(app, movie_graph)
    def enrich(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    (fault,) = checks.find_faults(app, "prefork")
    assert words in fault
    assert "set result_backend" in fault
    assert (checks.find_faults(app, "threads") == []) == (backend == "cache+memory://")


@pytest.mark.parametrize(
    ("size", "count", "first", "number"),
    [(None, 1, 1, 1), (None, 64, 1, 64), (None, 10_000, 157, 64), (None, 100_000, 500, 200), (3, 7, 3, 3)],
)
def test_stages_are_cut_into_chunks(size: int | None, count: int, first: int, number: int) -> None:
    """About 64 without a size, of at most 500 items; no item is left out or in two."""
    chunks = BatchOptions(chunk_size=size).cut(2, count)
    assert (chunks[0], len(chunks)) == (Chunk(2, 0, first), number)
    assert [c.lo for c in chunks] + [count] == [0] + [c.hi for c in chunks]
    assert BatchOptions(chunk_size=size).cut(2, 0) == []


# --- submitting --------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(app: Celery, tmp_path: Path) -> Generator[SQLStore]:
    """The app with a database, and what it holds."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    store = SQLStore(url)
    store.migrate()
    app.conf.docket_database_url = url
    yield store
    store.close()


def waiting(app: Celery) -> tuple[Any, dict[str, Any]]:
    """Return arguments and headers of the one message in the app's queue."""
    with app.connection_for_read() as connection:
        queue: Any = connection.SimpleQueue(app.conf.task_default_queue)
        try:
            message = queue.get_nowait()
            message.ack()
            assert queue.qsize() == 0
        finally:
            queue.close()
    return message.payload[0], message.headers


def test_a_small_list_travels_and_a_big_one_is_stored(app: Celery, stored: SQLStore) -> None:
    """The weight of what would travel decides; the digest of the job is the same either way."""

    @graph_task(app, picky)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    small, big = MOVIES, MOVIES * 500
    check_all.apply_async((small,), execution_id="small")
    args, headers = waiting(app)
    assert args == [small]
    assert headers["argsrepr"] == "(<5 messages>)"
    assert stored.find_run("picky-task", "small") is None
    check_all.apply_async((big,), execution_id="big")
    args, headers = waiting(app)
    assert [(each.kind, each.type_name, each.size) for each in args] == [
        ("items", "docket.examples.movies.Movie", 2500)
    ]
    assert headers["argsrepr"] == "(<2500 messages>)"
    row = stored.find_run("picky-task", "big")
    assert row is not None
    assert (row.state.value, base64.b64encode(row.job_digest).decode()) == (
        "QUEUED",
        headers["docket_job_digest"],
    )
    assert len(stored.read_items("picky-task", "big", [""], 0, 9999)) == 2500
    check_all.submit_batch(iter(big), execution_id="big")
    assert waiting(app)[1]["docket_job_digest"] == headers["docket_job_digest"]
    with pytest.raises(RunConflict, match="another job"):
        check_all.apply_async((big[1:],), execution_id="big")


def test_without_a_database_a_list_travels(app: Celery) -> None:
    """Up to what might be stored."""

    @graph_task(app, picky)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    check_all.delay(MOVIES * 200)
    assert waiting(app)[0] == [MOVIES * 200]


def test_what_items_share_is_stored_with_them(app: Celery, stored: SQLStore) -> None:
    """By position; what is missing or too much is named."""
    pair = Graph("pair")

    @pair.step
    def compare(movie: Movie, stats: BatchStats) -> EnrichedMovie:
        return EnrichedMovie(original=movie, above_average=movie.rating > stats.average_rating)

    @graph_task(app, pair)
    def compare_all(stats: BatchStats, movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    compare_all.submit_batch(MOVIES, BatchStats(average_rating=9.1), execution_id="pair")
    args, _ = waiting(app)
    assert [(each.kind, each.type_name) for each in args] == [
        ("job", "docket.examples.movies.BatchStats"),
        ("items", "docket.examples.movies.Movie"),
    ]
    assert stored.find_job("pair", "pair") is not None
    with pytest.raises(InvalidArguments, match="takes the items, then stats; got 0 beside the items"):
        compare_all.submit_batch(MOVIES)
    with pytest.raises(InvalidArguments, match=r"'stats' must be a docket\.examples\.movies\.BatchStats"):
        compare_all.submit_batch(MOVIES, Movie())


def test_an_eager_app_streams_into_a_list(app: Celery, stored: SQLStore) -> None:
    """There is no worker to read the store for; a limit counts in process."""
    app.conf.task_always_eager = True
    gauge, under_way, most = Graph("gauge"), list[str](), list[int]()

    @gauge.step
    def look(movie: Movie, ctx: StepContext) -> EnrichedMovie:
        under_way.append(ctx.item)
        most.append(len(under_way))
        under_way.remove(ctx.item)
        return EnrichedMovie(original=movie)

    @graph_task(app, gauge, max_concurrency=1)
    def look_at_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    found = look_at_all.submit_batch(iter(MOVIES * 300), execution_id="eager")
    assert [each.original for each in found.get()] == MOVIES * 300
    assert max(most) == 1
    assert stored.find_run("gauge", "eager") is None


def test_a_task_without_items_has_no_batch(app: Celery, stored: SQLStore) -> None:
    """Options for batches mean nothing to it, and nothing can be streamed into it."""
    single = Graph("single")

    @single.step
    def one(movie: Movie) -> EnrichedMovie:
        return EnrichedMovie(original=movie)

    @graph_task(app, single)
    def enrich_one(movie: Movie) -> EnrichedMovie:
        raise NotImplementedError

    with pytest.raises(
        InvalidArguments, match=r"chunk_size: is about batches, and task .*enrich_one has none"
    ):
        enrich_one.apply_async((MOVIES[0],), chunk_size=3)
    with pytest.raises(InvalidArguments, match=r"it takes no list\[...\]"):
        enrich_one.submit_batch(MOVIES)


def test_a_stream_must_be_named_where_items_name_the_run(app: Celery, stored: SQLStore) -> None:
    """The function that names runs takes the whole list, which is never there."""

    @graph_task(app, picky, execution_id=lambda movies: f"batch-{len(movies)}")
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    with pytest.raises(InvalidArguments, match="names its runs by their items; name this one"):
        check_all.submit_batch(MOVIES)
    check_all.submit_batch(MOVIES, execution_id="batch-5")
    assert waiting(app)[1]["docket_execution_id"] == "batch-5"
    with pytest.raises(InvalidArguments, match="max_failed"):
        check_all.submit_batch(MOVIES, execution_id="batch-6", max_failed=1)
    assert stored.find_run("picky-task", "batch-6") is None


def test_a_batch_does_not_grow_for_ever(
    app: Celery, stored: SQLStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that never ends is stopped; nothing is sent."""
    monkeypatch.setattr(upload, "MOST_ITEMS", 1500)

    @graph_task(app, picky)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    with pytest.raises(InvalidArguments, match="has at most 1500 of them"):
        check_all.submit_batch((Movie() for _ in itertools.count()), execution_id="endless")
    row = stored.find_run("picky-task", "endless")
    assert row is not None
    assert row.job_digest == UNFINISHED


def test_parts_keep_to_the_lanes_of_the_worker_that_began(app: Celery) -> None:
    """Another worker, which runs more tasks at once, would cut the stage into other lanes."""

    @graph_task(app, picky, max_concurrency=8)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    here = read_batch_options(check_all)
    begun = read_batch_options(check_all, {"slots": 3, "threads": 4, "max_concurrency": 6}, threads=1)
    assert (here.slots, here.max_concurrency) == (app_settings.this_worker.slots, 8)
    assert begun.lanes(64) == Lanes(6, 3)


def test_a_batch_keeps_its_order_until_the_commit(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked of it travels with the job of then; a slip of the pen is told here and now."""
    hooks: list[Any] = []
    django: Any = types.ModuleType("django.db.transaction")
    django.on_commit = hooks.append
    monkeypatch.setitem(sys.modules, "django.db.transaction", django)

    @graph_task(app, picky)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    with pytest.raises(InvalidArguments, match="did you mean chunk_size"):
        check_all.apply_async_on_commit((MOVIES,), chunksize=3)
    check_all.apply_async_on_commit((MOVIES,), max_concurrency=1, chunk_size=3)
    (hook,) = hooks
    hook()
    assert waiting(app)[1]["docket_batch"] == {"chunk_size": 3, "max_concurrency": 1}


def test_a_batch_that_is_submitted_again_is_kept_for_its_worker(app: Celery, stored: SQLStore) -> None:
    """Its retention may be about to end: what is stored must be there when its message is delivered."""

    @graph_task(app, picky)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    def kept_days() -> float:
        with stored.engine.connect() as connection:
            query = "SELECT julianday(expires_at) - julianday('now') FROM docket_runs"
            return float(connection.execute(text(query)).scalar_one())

    check_all.submit_batch(MOVIES, execution_id="again")
    with stored.engine.connect() as connection:
        connection.execute(text("UPDATE docket_runs SET expires_at = datetime('now', '+1 minute')"))
    assert kept_days() < 1
    check_all.submit_batch(MOVIES, execution_id="again")
    assert kept_days() > 29


def test_an_upload_that_was_cancelled_says_so(app: Celery, stored: SQLStore) -> None:
    """Nobody is submitting it any more."""

    @graph_task(app, picky)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    def source() -> Iterator[Movie]:
        yield MOVIES[0]
        assert check_all.handle("stopped").cancel()

    with pytest.raises(LeaseLost):
        check_all.submit_batch(source(), execution_id="stopped")
    with pytest.raises(RunCancelled, match="cancelled while its items were submitted"):
        check_all.submit_batch(MOVIES, execution_id="stopped")


def test_a_copy_that_waits_carries_its_list(app: Celery, stored: SQLStore) -> None:
    """It came from a process without a database: only a run that is there has its items stored."""

    @graph_task(app, picky)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    big = MOVIES * 200
    again: Any = check_all
    again.apply_async(
        (big,), headers={WAITS_FOR_OTHER: True, "docket_execution_id": "copy"}, **{PREPARED: True}
    )
    assert waiting(app)[0] == [big]
    assert stored.find_run("picky-task", "copy") is None


def test_the_text_of_a_failed_chunk_reads_after_celerys_succeeded() -> None:
    """Celery logs "succeeded in 0.1s: ..." for a chunk's task, which reports failures instead of failing."""
    assert repr(chords.Receipt({"lo": 50, "state": "FAILED", "failed": 2})) == (
        "<chunk from item 50: 2 items failed, the batch ends>"
    )
    assert repr(chords.Receipt({"lo": 0, "state": "SUCCEEDED", "failed": 0})) == "<chunk from item 0: done>"
    assert chords.Receipt({"lo": 0, "state": "BUSY"}).__json__() == {"lo": 0, "state": "BUSY"}


def counting(app: Celery, checking: Graph) -> Any:
    """Return a task that counts what *checking* has checked, whatever else fails."""

    @checking.aggregate
    def count(checked: list[EnrichedMovie]) -> BatchStats:
        return BatchStats(count=len(checked))

    class CountSome(GraphTask[[list[Movie]], BatchStats]):
        graph = checking
        on_error = "collect"

    return app.register_task(CountSome())


def test_items_that_an_aggregate_does_not_see_are_logged(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with the first of them; a result that has its errors itself needs no line."""
    graph_of_both = Graph("unseen")
    graph_of_both.step(check)
    count_some = counting(app, graph_of_both)

    class CheckSome(GraphTask[[list[Movie]], BatchResult[EnrichedMovie]]):
        graph = graph_of_both

    with caplog.at_level("WARNING", "docket_celery"):
        assert app.register_task(CheckSome())(MOVIES).errors
        assert not caplog.records
        assert count_some(MOVIES).count == 4
    (record,) = caplog.records
    assert "of graph 'unseen' succeeded, failed items left out: 1 (" in record.getMessage()
    assert "step 'check' of item 4 failed" in record.getMessage()


def test_a_codec_hides_the_errors_of_failed_items_from_the_log_too(
    app: Celery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is not readable in the database is not readable in a log: the codes alone are shown."""
    store = SQLStore(f"sqlite:///{tmp_path / 'store.db'}", codec=Encryption({1: bytes(32)}, 1))
    store.migrate()
    hidden = Graph("hidden", store=store)
    hidden.register(check, persist=Scope.WORKFLOW)
    count_hidden = counting(app, hidden)
    with caplog.at_level("WARNING", "docket_celery"):
        assert count_hidden(MOVIES).count == 4
    (record,) = caplog.records
    assert record.getMessage().endswith("failed items left out: 1 (item 4: DC201)")
