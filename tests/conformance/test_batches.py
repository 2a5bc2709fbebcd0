"""Stages, chunks and items: what every store for several workers keeps to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from docket_celery.errors import CorruptCheckpoint, LeaseLost
from docket_celery.store import MemoryStore
from docket_celery.store.contract import BatchStore
from docket_celery.store.identity import item_key
from docket_celery.store.records import (
    Checkpoint,
    Chunk,
    ChunkEnd,
    ChunkRefusal,
    ChunkRequest,
    ChunkRow,
    ChunkStop,
    Halt,
    Lease,
    Progress,
    RunState,
)
from tests.conformance.samples import GRAPH, RUN, Bench, SQLBench, ending, execution, output

pytestmark = pytest.mark.leaves_lease
ERROR = {"code": "DC200", "args": ["sold out", None]}


def items(step: str, indexes: Sequence[int]) -> list[Checkpoint]:
    """Return an output of *step* for each index."""
    return [output(step, bytes([8, index]), item=str(index), item_index=index) for index in indexes]


def chunk_request(lo: int = 0, owner: str = "chunk", **changes: Any) -> ChunkRequest:
    """Return a request for a chunk of the sample run's first stage."""
    values: dict[str, Any] = {"stage": 1, "lease_s": 30.0, "max_deliveries": 3, "task_id": "c1"}
    return ChunkRequest(graph=GRAPH, execution_id=RUN, lo=lo, owner=owner, **(values | changes))


def take(batches: BatchStore, lo: int = 0, owner: str = "chunk", **changes: Any) -> Lease:
    """Lease a chunk that must be free."""
    lease = batches.lease_chunk(chunk_request(lo, owner, **changes))
    assert isinstance(lease, Lease)
    return lease


def refused(batches: BatchStore, lo: int = 0, owner: str = "rival", **changes: Any) -> ChunkRefusal:
    """Ask for a chunk that must not be given."""
    found = batches.lease_chunk(chunk_request(lo, owner, **changes))
    assert isinstance(found, ChunkRefusal)
    return found


def opened(bench: Bench, batches: BatchStore, *, allowed: int = 0) -> Lease:
    """Open the first stage of the sample run, with two chunks of two items."""
    lease = bench.take(task_id="t1")
    batches.open_stage(lease, 1, [Chunk(1, 0, 2), Chunk(1, 2, 4)], allowed)
    return lease


def test_memory_serves_no_second_process() -> None:
    """It has no calls for batches over several workers."""
    assert not isinstance(MemoryStore(), BatchStore)


def test_items_are_read_by_range_in_order(bench: Bench, batches: BatchStore) -> None:
    """The steps that were asked for, the items of the range, and what was named by key."""
    lease = bench.take()
    once = output("stats", b"\x08\x63")
    batches.save_many(lease, [*items("rate", range(12)), *items("other", range(12)), once])
    batches.save_many(lease, [output("rate", b"\x08\x7f", item="3", item_index=3)])
    found = batches.read_items(GRAPH, RUN, ["rate"], 2, 11, [once.key, b"\0" * 32])
    assert [one.item for one in found] == ["", *map(str, range(2, 11))]
    assert [one.output_data for one in found][:3] == [b"\x08\x63", b"\x08\x02", b"\x08\x03"]
    assert len(batches.read_items(GRAPH, RUN, ["rate"], 0, 99)) == 12
    assert batches.read_items(GRAPH, "another", ["rate"], 0, 12, [once.key]) == []


def test_items_are_those_of_the_job_that_is_asked_for(bench: Bench, batches: BatchStore) -> None:
    """Nothing is read once the run has another job, or is gone."""
    lease, once = bench.take(), output("stats", b"\x08\x63")
    batches.save_many(lease, [*items("rate", range(3)), once])

    def read(digest: bytes | None) -> list[str]:
        found = batches.read_items(GRAPH, RUN, ["rate"], 0, 9, [once.key], job_digest=digest)
        return [one.item for one in found]

    assert read(b"d" * 32) == read(None) == ["", "0", "1", "2"]
    assert read(b"e" * 32) == read(b"") == []
    assert isinstance(bench, SQLBench)
    bench.sql("DELETE FROM docket_runs")
    assert read(b"d" * 32) == []
    assert len(read(None)) == 4


def test_many_are_saved_under_the_fence_only(bench: Bench, batches: BatchStore) -> None:
    """Whoever lost the run saves nothing."""
    lease = bench.take()
    bench.pass_time(31)
    bench.take(owner="second")
    with pytest.raises(LeaseLost):
        batches.save_many(lease, items("rate", [1]))
    assert batches.read_items(GRAPH, RUN, ["rate"], 0, 9) == []


def test_a_damaged_item_is_not_read(bench: Bench, batches: BatchStore) -> None:
    """Its checksum tells."""
    assert isinstance(bench, SQLBench)
    batches.save_many(bench.take(), items("rate", [1]))
    bench.sql("UPDATE docket_cache SET item_index = 2")
    with pytest.raises(CorruptCheckpoint):
        batches.read_items(GRAPH, RUN, ["rate"], 0, 9)


def test_an_open_stage_leaves_the_run_waiting(bench: Bench, batches: BatchStore) -> None:
    """Its chunks are there, the lease is given back, and repeating the call does nothing more."""
    lease = opened(bench, batches)
    assert bench.state() is RunState.WAITING
    batches.open_stage(lease, 1, [Chunk(1, 0, 2), Chunk(1, 2, 4)], 0, [execution()])
    assert [row.chunk for row in batches.find_chunks(GRAPH, RUN)] == [Chunk(1, 0, 2), Chunk(1, 2, 4)]
    assert bench.take(owner="body", task_id="t1").epoch == 2
    with pytest.raises(LeaseLost):
        batches.open_stage(lease, 2, [], 0)


def test_a_chunk_is_leased_once(bench: Bench, batches: BatchStore) -> None:
    """The holder itself gets it again; another one hears how long to wait; it is extended like a run."""
    opened(bench, batches)
    lease = take(batches)
    assert (lease.chunk, lease.epoch, lease.target) == (Chunk(1, 0, 2), 1, "shop.Shipment")
    assert take(batches) == lease
    found = refused(batches, task_id="c2")
    assert found.reason is ChunkStop.BUSY
    # SQLite reckons in days.
    assert 0 < found.lease_left_s <= 30.001
    assert batches.extend([lease]) == {(GRAPH, RUN, 1, 0): None} == {lease.name: None}
    assert refused(batches, 1).reason is ChunkStop.STALE
    assert refused(batches, stage=2).reason is ChunkStop.STALE


def test_a_dead_chunk_is_taken_over(bench: Bench, batches: BatchStore) -> None:
    """By the retry of its task at once, by others when its lease is over; the dead one writes nothing more."""
    opened(bench, batches)
    dead = take(batches)
    lease = take(batches, owner="second", retries=1)
    assert (lease.epoch, lease.lost) == (2, 1)
    bench.pass_time(31)
    assert take(batches, owner="third", task_id="c9").lost == 2
    for late in (dead, lease):
        with pytest.raises(LeaseLost):
            batches.end_chunk(late, ChunkEnd(state=RunState.SUCCEEDED, checkpoints=items("rate", [0])))
        with pytest.raises(LeaseLost):
            batches.save(late, items("rate", [0])[0], execution())
    assert batches.extend([dead, lease]) == {}
    assert batches.read_items(GRAPH, RUN, ["rate"], 0, 9) == []
    bench.pass_time(31)
    assert refused(batches, owner="fourth").reason is ChunkStop.QUARANTINED
    assert batches.find_chunks(GRAPH, RUN)[0].state is RunState.QUARANTINED


def test_a_chunk_ends_with_its_outputs(bench: Bench, batches: BatchStore) -> None:
    """Outputs, rows and state in one go; again does nothing; then there is nothing left to take."""
    opened(bench, batches)
    lease = take(batches)
    batches.save(lease, items("charge", [0])[0], execution("charge", item="0"))
    end = ChunkEnd(
        state=RunState.SUCCEEDED, checkpoints=items("rate", [0, 1]), executions=[execution("rate", item="0")]
    )
    for _ in range(2):
        batches.end_chunk(lease, end)
    assert bench.executions() == [("charge", 1), ("rate", 1)]
    assert len(batches.read_items(GRAPH, RUN, ["rate", "charge"], 0, 9)) == 3
    assert refused(batches, owner="again").reason is ChunkStop.DONE
    assert take(batches, 2).chunk == Chunk(1, 2, 4)


def test_chunks_tell_how_far_the_stage_is(bench: Bench, batches: BatchStore) -> None:
    """Each one that is worked on adds its items, once."""
    lease = bench.take(task_id="t1")
    stands = Progress(done=1, total=5, stage=2, stages=3)
    batches.open_stage(lease, 1, [Chunk(1, 0, 2), Chunk(1, 2, 4)], 9, progress=stands)
    first = take(batches)
    done = ChunkEnd(state=RunState.SUCCEEDED, errors={"1": ERROR})
    assert batches.end_chunk(first, done) == Progress(done=3, total=5, stage=2, stages=3)
    assert batches.end_chunk(first, done) is None
    parked = batches.end_chunk(take(batches, 2), ChunkEnd(state=RunState.QUEUED))
    assert parked == Progress(done=3, total=5, stage=2, stages=3)
    last = batches.end_chunk(take(batches, 2), ChunkEnd(state=RunState.SUCCEEDED))
    assert last == Progress(done=5, total=5, stage=2, stages=3)


def test_a_parked_chunk_is_taken_again(bench: Bench, batches: BatchStore) -> None:
    """What it had made stays, and nothing counts as lost."""
    opened(bench, batches)
    batches.end_chunk(take(batches), ChunkEnd(state=RunState.QUEUED, checkpoints=items("rate", [0])))
    lease = take(batches, owner="second", retries=1)
    assert (lease.epoch, lease.lost) == (2, 0)
    assert len(batches.read_items(GRAPH, RUN, ["rate"], 0, 9)) == 1


@pytest.mark.parametrize(("allowed", "stops"), [(0, False), (5, True)])
def test_a_failing_stage_starts_no_chunk(
    bench: Bench, batches: BatchStore, allowed: int, stops: bool
) -> None:
    """One item too many, or what stops the whole batch."""
    opened(bench, batches, allowed=allowed)
    failed = ChunkEnd(state=RunState.FAILED, errors={"1": ERROR}, stops=stops)
    other = take(batches, 2)
    batches.end_chunk(take(batches), failed)
    assert batches.extend([other]) == {other.name: Halt.STOPPED if stops else Halt.FAILING}
    batches.end_chunk(other, ChunkEnd(state=RunState.QUEUED))
    assert refused(batches, 2).reason is ChunkStop.FAILING
    assert refused(batches).reason is ChunkStop.FAILING
    first = batches.find_chunks(GRAPH, RUN)[0]
    assert first == ChunkRow(chunk=Chunk(1, 0, 2), state=RunState.FAILED, failed=1, errors={"1": ERROR})


def test_failed_items_count_up_to_what_is_allowed(bench: Bench, batches: BatchStore) -> None:
    """The others go on, also after the stage was opened again."""
    opened(bench, batches, allowed=1)
    batches.end_chunk(take(batches), ChunkEnd(state=RunState.SUCCEEDED, errors={"1": ERROR}))
    batches.open_stage(bench.take(owner="body", task_id="t1", retries=1), 1, [], 1)
    batches.end_chunk(take(batches, 2), ChunkEnd(state=RunState.SUCCEEDED, errors={"2": ERROR, "3": ERROR}))
    batches.open_stage(bench.take(owner="again", task_id="t1", retries=2), 1, [Chunk(1, 4, 6)], 1)
    assert refused(batches, 4).reason is ChunkStop.FAILING


def test_a_stage_that_is_opened_again_stays_stopped(bench: Bench, batches: BatchStore) -> None:
    """A copy opens it with what it has read before; what its chunks did meanwhile counts, until the run has ended."""
    opened(bench, batches, allowed=9)
    stands = Progress(done=0, total=4)
    batches.open_stage(bench.take(owner="body", task_id="t1", retries=1), 1, [], 9, progress=stands)
    chunk, copy = take(batches), bench.take(owner="copy", task_id="t1", retries=2)
    batches.end_chunk(chunk, ChunkEnd(state=RunState.FAILED, errors={"0": ERROR}, stops=True))
    batches.open_stage(copy, 1, [], 9, progress=stands)
    assert refused(batches, 2).reason is ChunkStop.FAILING
    batches.end(bench.take(owner="last", task_id="t1", retries=3), ending(RunState.FAILED, error=ERROR))
    batches.open_stage(bench.take(owner="again", task_id="t2"), 1, [], 9, progress=stands)
    assert take(batches, 2).chunk == Chunk(1, 2, 4)


def test_a_failed_run_leaves_its_chunks_to_be_tried_again(bench: Bench, batches: BatchStore) -> None:
    """Those with failed items too; the ones that are done stay done."""
    opened(bench, batches, allowed=0)
    batches.end_chunk(take(batches, 2), ChunkEnd(state=RunState.SUCCEEDED))
    batches.end_chunk(take(batches), ChunkEnd(state=RunState.FAILED, errors={"1": ERROR}))
    body = bench.take(owner="body", task_id="t1")
    batches.end(body, ending(RunState.FAILED, error=ERROR))
    assert [(row.state, row.failed) for row in batches.find_chunks(GRAPH, RUN)] == [
        (RunState.QUEUED, 0),
        (RunState.SUCCEEDED, 0),
    ]
    assert refused(batches).reason is ChunkStop.STALE
    again = bench.take(owner="again", task_id="t2")
    batches.open_stage(again, 1, [], 0)
    assert take(batches).epoch == 2


def test_items_and_steps_have_names_of_their_own() -> None:
    """No step's checkpoint can be taken for an item."""
    assert item_key(GRAPH, RUN, "", "0") != output("", item="0").key
    assert item_key(GRAPH, RUN, "split", "0") != item_key(GRAPH, RUN, "", "0")
