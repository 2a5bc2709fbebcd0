"""Batches that several workers share, driven by hand: each delivery is one call, the store is a file."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from sqlalchemy import text

from docket_celery import Codec, Graph, SQLStore
from docket_celery.batch.chunk import ChunkRun
from docket_celery.batch.layout import PAGE, PAGE_BYTES, Layout, paged
from docket_celery.batch.options import BatchOptions
from docket_celery.batch.run import BatchRun
from docket_celery.engine.fan_out import ItemGroup
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.run_context import Ending, RunOutcome, Submission
from docket_celery.engine.run_row import digest_job, find_busy_s
from docket_celery.engine.stored_items import ENVELOPE_BYTES, StoredBatch, StoredItems
from docket_celery.engine.waiting import run_here
from docket_celery.errors import (
    CodecFailed,
    GraphChanged,
    InvalidArguments,
    PayloadUnavailable,
    RunNotFound,
    StepFailed,
    to_record,
)
from docket_celery.observe.events import Event, EventKind
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.batch import BatchPolicy, BatchResult
from docket_celery.store.records import Checkpoint, Lease, Progress, RunRow, RunState
from examples.documents.documents_pb2 import Document, DocumentSummary
from examples.documents.graph import document_graph
from examples.movies.graph import movie_graph
from examples.movies.movies_pb2 import BatchStats, EnrichedMovie, Movie
from tests.codecs import CODEC
from tests.conformance.samples import GRAPH, ending, output, request
from tests.unit.graphs import Ended, telling

RUN = "batch-1"
SETTINGS = Settings.read({"docket_threads": 2})
ITEMS = [Movie(title=str(number), rating=number) for number in range(6)]


@pytest.fixture
def store(tmp_path: Path) -> Generator[SQLStore]:
    """An empty store."""
    made = SQLStore(f"sqlite:///{tmp_path / 'store.db'}")
    made.migrate()
    yield made
    process.close_runtimes()
    made.close()


class Hands:
    """Delivers the parts of one batch.

    Args:
        graph: The graph.
        store: Where everything lies.
        target: What to make of each item.
        order: How to work on it.
    """

    def __init__(
        self, graph: Graph, store: SQLStore, target: type[Any], order: BatchOptions | None = None
    ) -> None:
        self.given = (ValueKey(Movie),)
        self.plan = graph.compiled(ValueKey(target), self.given, ValueKey(Movie), collects=True)
        self.store, self.order = store, order or BatchOptions(chunk_size=2)
        self.settings = SETTINGS
        self.told: list[Event] = []
        digest = digest_job(self.given, [ITEMS])
        self.submission = Submission(
            execution_id=RUN, task_id="t1", waits=False, job_digest=digest, listeners=[self.told.append]
        )
        self._number = 0

    def open(self, items: Sequence[Movie] | None = None, **changes: Any) -> RunOutcome:
        """Deliver the job, or with None a later part."""
        self._number += 1
        submission = replace(self.submission, **{"retries": self._number, **changes})
        values = None if items is None else [items]
        return run_here(BatchRun(self.plan, values, submission, self.settings, self.store, self.order))

    def work(self, stage: int, lo: int, **changes: Any) -> RunOutcome:
        """Deliver a chunk."""
        submission = replace(self.submission, task_id=f"c{stage}-{lo}", **changes)
        return run_here(ChunkRun(self.plan, submission, self.settings, self.store, self.order, stage, lo))


def graph_with(*names: str) -> Graph:
    """Return a graph over movies: rate, an aggregate and place, under these names."""
    rate, total, place = names
    graph = Graph("changing")

    def rate_one(movie: Movie) -> EnrichedMovie:
        return EnrichedMovie(original=movie)

    def count(rated: Iterable[EnrichedMovie]) -> BatchStats:
        return BatchStats(count=sum(1 for _ in rated))

    def place_one(rated: EnrichedMovie, stats: BatchStats) -> Document:
        return Document(title=f"{rated.original.title} of {stats.count}")

    graph.register(rate_one, name=rate)
    graph.register_aggregate(count, name=total)
    graph.register(place_one, name=place)
    return graph


def test_a_batch_goes_from_part_to_part(store: SQLStore) -> None:
    """The job opens a stage, chunks tell how far it is, the body goes on, the last one has the result."""
    hands = Hands(graph_with("rate", "total", "place"), store, Document)
    opened = hands.open(ITEMS)
    assert opened.opened is not None
    assert [(c.lo, c.hi) for c in opened.opened.chunks] == [(0, 2), (2, 4), (4, 6)]
    assert opened.opened.progress == Progress(done=0, total=6, stage=1, stages=2)
    for lo in (0, 2, 4):
        hands.work(1, lo)
        row = store.find_run("changing", RUN)
        assert row is not None
        assert row.progress == Progress(done=lo + 2, total=6, stage=1, stages=2)
    assert hands.work(1, 0).receipt == {"lo": 0, "state": "DONE"}
    second = hands.open()
    assert second.opened is not None
    assert second.opened.stage == 3
    assert second.opened.progress == Progress(done=0, total=6, stage=2, stages=2)
    for lo in (0, 2, 4):
        hands.work(3, lo)
    assert [each.title for each in hands.open().value] == [f"{number} of 6" for number in range(6)]
    told = [(event.done, event.total) for event in hands.told if event.kind is EventKind.BATCH_PROGRESS]
    assert told == [(2, 6), (4, 6), (6, 6)] * 2


@pytest.mark.parametrize(
    "names", [("rated", "total", "place"), ("rate", "sum", "place")], ids=["item step", "aggregate"]
)
def test_a_batch_notices_that_a_step_is_gone(store: SQLStore, names: tuple[str, str, str]) -> None:
    """Between two deliveries the code has changed: it would leave items out, or make things twice."""
    hands = Hands(graph_with("rate", "total", "place"), store, Document)
    hands.open(ITEMS)
    for lo in (0, 2, 4):
        hands.work(1, lo)
    hands.open()
    changed = Hands(graph_with(*names), store, Document).open(retries=9)
    assert isinstance(changed.error, GraphChanged)
    gone = next(old for old, new in zip(("rate", "total"), names, strict=False) if old != new)
    assert gone in str(changed.error)


def test_a_later_part_of_an_unknown_batch_fails(store: SQLStore) -> None:
    """Its items are nowhere."""
    outcome = Hands(movie_graph, store, EnrichedMovie).open()
    assert isinstance(outcome.error, RunNotFound)


def test_a_copy_of_the_job_stores_its_items_once(store: SQLStore) -> None:
    """It finds how many there are, and opens the same stage."""
    hands = Hands(graph_with("rate", "total", "place"), store, EnrichedMovie)
    hands.open(ITEMS)
    hands.work(1, 2)
    copy = hands.open(ITEMS)
    assert copy.opened is not None
    assert [chunk.lo for chunk in copy.opened.chunks] == [0, 4]
    assert copy.opened.progress == Progress(done=2, total=6)
    assert len(store.read_items("changing", RUN, [""], 0, 99)) == 6


class Held(Ending):
    """An item between two of its steps: the next one waits for a thread until it is held."""

    def start(self) -> None:
        """Its next step waits for a thread."""

    def hold(self) -> None:
        """Nothing of it starts any more: no error, and no value."""
        self.end()


def test_an_item_that_is_held_between_its_steps_is_not_done() -> None:
    """All of them had begun, and none failed: the chunk must be worked on again all the same."""
    ended: list[Ended] = []
    items = ItemGroup(2, lambda _, on_end: Held(None, on_end), telling(ended.append), limit=2, allowed=0)
    items.start()
    items.hold()
    assert ended == [Ended()]
    assert (items.complete, items.failures) == (False, {})


def test_items_beyond_a_memory_of_one_page_are_stored(store: SQLStore) -> None:
    """In pages; a batch of more items than one page holds comes back whole."""
    many = [Movie(title=str(number)) for number in range(PAGE + 500)]
    hands = Hands(graph_with("rate", "total", "place"), store, EnrichedMovie, BatchOptions(chunk_size=PAGE))
    opened = hands.open(many, job_digest=digest_job(hands.given, [many]))
    assert opened.opened is not None
    assert len(store.read_items("changing", RUN, [""], 0, 9 * PAGE)) == PAGE + 500


def test_pages_end_by_number_by_weight_and_by_time() -> None:
    """Whatever comes first; nothing is lost."""
    layout = Layout.of(Hands(movie_graph, SQLStore("sqlite://"), EnrichedMovie).plan, RUN)

    def rows(sizes: Iterable[int]) -> Iterable[Checkpoint]:
        return layout.item_rows("", (Movie(title="x" * size) for size in sizes))

    assert [len(page) for page in paged(rows([1] * (2 * PAGE + 1)))] == [PAGE, PAGE, 1]
    half = PAGE_BYTES // 2
    assert [len(page) for page in paged(rows([half, half, half, 1]))] == [2, 2]
    assert [len(page) for page in paged(rows([1] * 3), every_s=0.0)] == [1, 1, 1]
    assert list(paged([])) == []


@pytest.mark.parametrize(
    ("most", "chunks", "slots", "threads", "lanes"),
    [
        (None, 64, 4, 8, None),
        (1, 64, 4, 8, [1]),
        (3, 64, 4, 8, [1, 1, 1]),
        (10, 64, 4, 8, [3, 3, 2, 2]),
        (100, 64, 4, 8, [8] * 9 + [7] * 4),
        (100, 5, 4, 8, [20] * 5),
        (1000, 64, 1, 1, [16] * 40 + [15] * 24),
        (5, 0, 4, 8, [5]),
    ],
)
def test_a_limit_is_cut_into_lanes(
    most: int | None, chunks: int, slots: int, threads: int, lanes: list[int] | None
) -> None:
    """As many as run at once, or as the limit takes; together they have the whole limit, and each has some."""
    found = BatchOptions(max_concurrency=most, slots=slots, threads=threads).lanes(chunks)
    shares = None if found is None else found.shares()
    assert shares == lanes
    assert shares is None or (sum(shares) == most and min(shares) >= 1)


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_a_limit_is_a_positive_number(value: Any) -> None:
    """Anything else is refused by name."""
    with pytest.raises(InvalidArguments, match="max_concurrency: must be at least 1"):
        BatchOptions(max_concurrency=value)


def test_a_worker_that_runs_many_tasks_gets_more_chunks() -> None:
    """Else its last tasks would wait for one another."""
    assert len(BatchOptions(slots=100).cut(1, 4000)) == 400


def test_progress_is_told_in_process_too() -> None:
    """Each item of the batch counts, the ones of a fan-out within an item do not."""
    told: list[tuple[int | None, int | None]] = []

    def listen(event: Event) -> None:
        if event.kind is EventKind.BATCH_PROGRESS:
            told.append((event.done, event.total))

    document_graph.listeners.append(listen)
    try:
        documents = [Document(title=str(n), text="one\ftwo") for n in range(3)]
        document_graph.execute_batch(DocumentSummary, documents, max_concurrency=1)
    finally:
        document_graph.listeners.remove(listen)
        process.close_runtimes()
    assert told == [(1, 3), (2, 3), (3, 3)]


# --- nothing is left out in silence ------------------------------------------------------------------------------


def picky(movie: Movie) -> EnrichedMovie:
    """Fail for the first item."""
    if movie.title == "0":
        raise ConnectionError("the service is away")
    return EnrichedMovie(original=movie)


def failing(store: SQLStore, on_error: Literal["fail", "collect"], size: int = 6) -> Hands:
    """Return a batch of one stage whose first item fails, under a policy."""
    graph = Graph("failing")
    graph.register(picky, name="rate")
    policy = BatchPolicy(on_error)
    hands = Hands(graph, store, EnrichedMovie, BatchOptions(chunk_size=size, policy=policy))
    hands.submission = replace(hands.submission, policy=policy)
    return hands


def test_a_stage_that_has_failed_is_not_passed_by_a_laxer_submission(store: SQLStore) -> None:
    """Items of its chunk were never worked on: it fails as its opener said, and the next submission works on them."""
    strict = failing(store, "fail")
    strict.open(ITEMS)
    assert (strict.work(1, 0).receipt or {})["state"] == "FAILED"
    lax = failing(store, "collect")
    outcome = lax.open(ITEMS, task_id="t2")
    assert isinstance(outcome.error, StepFailed)
    again = lax.open(ITEMS, task_id="t3")
    assert again.opened is not None
    assert [chunk.lo for chunk in again.opened.chunks] == [0]
    lax.work(1, 0)
    found = lax.open(task_id="t3", retries=9).value
    assert [each is not None for each in found.results] == [False, *[True] * 5]
    assert list(found.errors) == [0]


@pytest.mark.parametrize("on_error", ["fail", "collect"])
def test_an_item_whose_error_could_not_be_stored_has_failed(
    store: SQLStore, on_error: Literal["fail", "collect"]
) -> None:
    """The codec fails once, as the chunk ends: the failure is known by that then, and not forgotten."""
    hands = failing(store, on_error)
    hands.open(ITEMS)
    hands.work(1, 0)
    record = json.dumps({"0": to_record(CodecFailed("the errors of a chunk", "encode raised"))})
    with store.engine.connect() as connection:
        connection.execute(text("UPDATE docket_chunks SET errors = :errors"), {"errors": record})
    outcome = hands.open()
    if on_error == "fail":
        assert isinstance(outcome.error, StepFailed)
        assert outcome.error.item == "0"
        assert outcome.error.caused_by(CodecFailed)
    else:
        assert [each is None for each in outcome.value.results] == [True, *[False] * 5]
        assert outcome.value.errors[0].caused_by(CodecFailed)


def test_a_stage_that_was_put_in_between_is_noticed(store: SQLStore) -> None:
    """A deploy in mid-batch: chunks that are done did what the old code says, and their new outputs are not there."""
    old = Graph("growing")
    old.register(lambda_free_rate, name="rate")
    before = Hands(old, store, EnrichedMovie)
    before.open(ITEMS)
    before.work(1, 0)

    new = Graph("growing")

    def pre(movie: Movie) -> Document:
        return Document(title=movie.title)

    def total(documents: Iterable[Document]) -> BatchStats:
        return BatchStats(count=sum(1 for _ in documents))

    def rate(movie: Movie, stats: BatchStats) -> EnrichedMovie:
        return EnrichedMovie(original=movie, rating_percentile=stats.count)

    new.register(pre, name="pre")
    new.register_aggregate(total, name="total")
    new.register(rate, name="rate")
    after = Hands(new, store, EnrichedMovie)
    for lo in (2, 4):
        after.work(1, lo)
    error = after.open(retries=9).error
    assert isinstance(error, StepFailed)
    assert error.step == "total"
    assert error.caused_by(PayloadUnavailable)
    assert "item 0 (of 2 such) did not fail and is not there" in str(error)


def lambda_free_rate(movie: Movie) -> EnrichedMovie:
    """What the old code does."""
    return EnrichedMovie(original=movie)


def test_a_missing_item_fails_its_chunk(store: SQLStore) -> None:
    """It is not taken for one that failed before."""
    hands = Hands(graph_with("rate", "total", "place"), store, EnrichedMovie)
    hands.open(ITEMS)
    with store.engine.connect() as connection:
        connection.execute(text("DELETE FROM docket_cache WHERE step_name = '' AND item = '3'"))
    assert (hands.work(1, 2).receipt or {})["state"] == "FAILED"
    assert isinstance(hands.open().error, PayloadUnavailable)


def test_a_purged_result_is_no_empty_one(store: SQLStore) -> None:
    """What a reference stands for is gone: whoever reads it late is told, page by page too."""
    hands = Hands(graph_with("rate", "total", "place"), store, EnrichedMovie)
    hands.open(ITEMS)
    for lo in (0, 2, 4):
        hands.work(1, lo)
    items = StoredItems(
        store=store, graph="changing", execution_id=RUN, names=("rate",), kind=EnrichedMovie, total=6
    )
    batch = StoredBatch(items=items)
    assert len(batch.load()) == 6
    with store.engine.connect() as connection:
        connection.execute(text("DELETE FROM docket_cache"))
    for read in (batch.load, lambda: batch.page(0)):
        with pytest.raises(PayloadUnavailable, match=r"rate of run 'batch-1'.*item 0 \(of 6 such\)"):
            read()


@pytest.mark.parametrize("codec", [None, CODEC])
def test_a_stored_result_names_the_job_as_the_row_does(tmp_path: Path, codec: Codec | None) -> None:
    """Made just now or read from the row of a run that had ended; the codec's key is in the digest or not."""
    with closing(SQLStore(f"sqlite:///{tmp_path / 'store.db'}", codec=codec)) as store:
        store.migrate()
        hands = Hands(graph_with("rate", "total", "place"), store, EnrichedMovie)
        hands.settings = replace(SETTINGS, max_message_bytes=1000)
        hands.open(ITEMS)
        for lo in (0, 2, 4):
            hands.work(1, lo)
        made, again = hands.open().value, hands.open(ITEMS, task_id="t2").value
        row = store.find_run("changing", RUN)
        assert row is not None
        assert (row.job_digest == hands.submission.job_digest) is (codec is None)
        for batch in (made, again):
            assert isinstance(batch, StoredBatch)
            assert batch.items.job_digest == row.job_digest
            assert [each.original for each in cast("list[EnrichedMovie]", batch.load())] == ITEMS


def test_a_page_leaves_out_what_failed_as_the_whole_result_does(store: SQLStore) -> None:
    """An item may have failed in a step beside the one that made its result, which is stored."""
    hands = Hands(graph_with("rate", "total", "place"), store, EnrichedMovie)
    hands.open(ITEMS)
    for lo in (0, 2, 4):
        hands.work(1, lo)
    errors = {1: StepFailed("check", 1, False, ["builtins.ValueError"], "no")}
    items = StoredItems(
        store=store, graph="changing", execution_id=RUN, names=("rate",), kind=EnrichedMovie, total=6
    )
    batch = StoredBatch(items=items, collects=True, errors=errors)
    whole = batch.load()
    assert isinstance(whole, BatchResult)
    for results in (batch.page(0), whole.results):
        assert [each is None for each in results] == [False, True, False, False, False, False]


def test_items_that_failed_count_if_they_have_a_value(store: SQLStore) -> None:
    """As many as are iterated over: a later step of an item may have failed, or the one that makes the value."""
    lease = store.acquire(request(execution_id=RUN))
    assert isinstance(lease, Lease)
    made = [index for index in range(2 * PAGE) if index not in {3, PAGE + 1}]
    kind = Movie.DESCRIPTOR.full_name
    rows = [output("rate", b"", execution_id=RUN, item=str(n), item_index=n, output_type=kind) for n in made]
    store.save_many(lease, rows)
    store.end(lease, ending())
    items = StoredItems(
        store=store,
        graph=GRAPH,
        execution_id=RUN,
        names=("rate",),
        kind=Movie,
        total=2 * PAGE,
        failed={3, 4, PAGE + 1},
    )
    assert (len(items), len(list(items))) == (2 * PAGE - 2, 2 * PAGE - 2)


def test_a_result_is_loaded_if_it_is_small(store: SQLStore) -> None:
    """Its items weigh what they would in a message: their own bytes, and what each has around it."""
    hands = Hands(graph_with("rate", "total", "place"), store, EnrichedMovie)
    hands.open(ITEMS)
    for lo in (0, 2, 4):
        hands.work(1, lo)
    items = StoredItems(
        store=store, graph="changing", execution_id=RUN, names=("rate",), kind=EnrichedMovie, total=6
    )
    batch = StoredBatch(items=items)
    whole = cast("list[EnrichedMovie]", batch.load())
    weight = 6 * ENVELOPE_BYTES + sum(each.ByteSize() for each in whole)
    assert batch.load_within(weight) == whole
    assert batch.load_within(weight - 1) is None


def test_a_page_of_failed_items_is_not_read_from_another_run(store: SQLStore) -> None:
    """There is no item that could be missing: who has the name of the run by now is asked all the same."""
    hands = Hands(graph_with("rate", "total", "place"), store, EnrichedMovie)
    hands.open(ITEMS)
    failed = dict.fromkeys(range(6), StepFailed("rate", 1, False, ["builtins.ValueError"], "no"))
    items = StoredItems(
        store=store,
        graph="changing",
        execution_id=RUN,
        names=("rate",),
        kind=EnrichedMovie,
        total=6,
        failed=failed.keys(),
        job_digest=hands.submission.job_digest,
    )
    batch = StoredBatch(items=items, collects=True, errors=failed)
    assert batch.page(0) == [None] * 6
    other = StoredBatch(items=replace(items, job_digest=b"o" * 32), collects=True, errors=failed)
    for read in (other.load, lambda: other.page(0)):
        with pytest.raises(PayloadUnavailable, match=r"rate of run 'batch-1'.*its name has another job now"):
            read()


def test_a_limit_counts_the_parts_of_an_item(store: SQLStore) -> None:
    """A fan-out within an item has one part under way for each item that the limit allows."""
    under_way, most, lock = [0], [0], threading.Lock()
    graph = Graph("nested")

    def split(movie: Movie) -> list[Document]:
        return [Document(title=str(number)) for number in range(8)]

    async def look(document: Document) -> DocumentSummary:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        await asyncio.sleep(0.01)
        with lock:
            under_way[0] -= 1
        return DocumentSummary()

    def merge(parts: list[DocumentSummary]) -> EnrichedMovie:
        return EnrichedMovie(rating_percentile=len(parts))

    graph.register(split)
    graph.register(look)
    graph.register_aggregate(merge)
    hands = Hands(graph, store, EnrichedMovie, BatchOptions(chunk_size=6, max_concurrency=3))
    hands.open(ITEMS)
    submission = replace(hands.submission, task_id="c")
    settings = Settings.read({"docket_threads": 8})
    run_here(ChunkRun(hands.plan, submission, settings, store, hands.order, 1, 0, 3))
    assert [each.rating_percentile for each in hands.open().value] == [8] * 6
    assert most[0] <= 3


def test_whoever_is_refused_an_open_stage_asks_less_and_less_often() -> None:
    """What keeps it tells nothing of its end, as a lease does of a run that somebody holds."""
    row = RunRow(
        graph="g",
        execution_id="e",
        target="t",
        job_digest=b"d" * 32,
        state=RunState.WAITING,
        epoch=1,
        lost=0,
        failures=0,
        retries=0,
        task_name="t",
        task_id="t1",
        lease_left_s=360.0,
    )
    assert [find_busy_s(row, waited) for waited in (0, 1, 2, 3, 4, 5, 1000)] == [1, 2, 4, 8, 16, 16, 16]
    held = replace(row, state=RunState.RUNNING, lease_left_s=7.0)
    assert [find_busy_s(held, waited) for waited in (0, 5)] == [7.0, 7.0]
    assert find_busy_s(replace(held, lease_left_s=-3.0), 0) == 0.0
