"""What an open stage keeps: its run to its task, its lanes, and chunks that are due later."""

from __future__ import annotations

from typing import Any

import pytest

from docket_celery.store.contract import BatchStore
from docket_celery.store.records import (
    Chunk,
    ChunkEnd,
    ChunkRefusal,
    ChunkRequest,
    ChunkStop,
    Halt,
    Lanes,
    Lease,
    Progress,
    RunState,
)
from tests.conformance.samples import GRAPH, RUN, Bench, SQLBench, ending

pytestmark = pytest.mark.leaves_lease
ERROR = {"code": "DC200", "args": ["sold out", None]}
LEASE_S = 30.0
KEPT_S = 12 * LEASE_S
"""For so long the stage keeps its run after the last sign of life."""
STANDS = Progress(done=0, total=4)
TASK = "shop.rate_all"
DONE = ChunkEnd(state=RunState.SUCCEEDED)


def opened(
    bench: Bench, batches: BatchStore, lanes: Lanes | None = None, *, stage: int = 1, **changes: Any
) -> Lanes | None:
    """Open a stage of the sample run, with two chunks of two items; return its lanes."""
    lease = bench.take(**({"task_id": "t1", "task_name": TASK} | changes))
    chunks = [Chunk(stage, 0, 2), Chunk(stage, 2, 4)]
    return batches.open_stage(lease, stage, chunks, 9, progress=STANDS, lanes=lanes, message=b"go on")


def ask(batches: BatchStore, lo: int = 0, owner: str = "chunk", stage: int = 1) -> Lease | ChunkRefusal:
    """Ask for a chunk of the sample run."""
    return batches.lease_chunk(
        ChunkRequest(
            graph=GRAPH,
            execution_id=RUN,
            stage=stage,
            lo=lo,
            owner=owner,
            lease_s=LEASE_S,
            max_deliveries=2,
        )
    )


def take(batches: BatchStore, lo: int = 0, owner: str = "chunk", stage: int = 1) -> Lease:
    """Lease a chunk that must be free."""
    lease = ask(batches, lo, owner, stage)
    assert isinstance(lease, Lease)
    return lease


def is_lost(batches: BatchStore) -> bool:
    """Tell whether the sample run is found lost."""
    return bool(batches.find_lost([TASK], LEASE_S, 9, 10))


def test_an_open_stage_keeps_its_run_to_its_task(bench: Bench, batches: BatchStore) -> None:
    """Another submission of the job would open it beside; later deliveries of its own task go on with it."""
    opened(bench, batches)
    row = bench.refused(owner="rival", task_id="t2")
    assert row.state is RunState.WAITING
    assert row.lease_left_s == pytest.approx(KEPT_S, abs=5)
    assert bench.refused(owner="script", task_id=None).task_id == "t1"
    assert bench.take(owner="body", task_id="t1", retries=1).epoch == 2


def test_a_stage_keeps_its_run_while_a_chunk_is_at_work(bench: Bench, batches: BatchStore) -> None:
    """However long that takes; no chunk may end for hours."""
    opened(bench, batches)
    chunk = take(batches)
    for _ in range(20):
        bench.pass_time(25)
        batches.extend([chunk])
    bench.refused(owner="rival", task_id="t2")
    bench.pass_time(31)
    assert bench.take(owner="rival", task_id="t2").epoch == 2


def test_the_death_of_a_chunk_is_a_sign_of_life(bench: Bench, batches: BatchStore) -> None:
    """Somebody had it; the copies that work on it now may have to wait in a queue."""
    opened(bench, batches)
    bench.pass_time(KEPT_S - 60)
    take(batches)
    bench.pass_time(31)
    assert is_lost(batches)
    bench.pass_time(KEPT_S - 5)
    bench.refused(owner="rival", task_id="t2")
    bench.pass_time(10)
    assert bench.take(owner="rival", task_id="t2").epoch == 2


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_that_has_come_to_its_end_is_given_up_soon(
    bench: Bench, batches: BatchStore, *, fails: bool
) -> None:
    """Only its body is missing, which a sweep has sent by then; it may have been revoked."""
    opened(bench, batches)
    batches.end_chunk(take(batches), ChunkEnd(state=RunState.FAILED, stops=True) if fails else DONE)
    if not fails:
        batches.end_chunk(take(batches, 2), DONE)
    bench.pass_time(3 * LEASE_S - 5)
    bench.refused(owner="rival", task_id="t2")
    bench.pass_time(10)
    assert bench.take(owner="rival", task_id="t2").epoch == 2


def test_a_stage_that_shows_no_life_is_given_up(bench: Bench, batches: BatchStore) -> None:
    """Each chunk that ends is a sign of life."""
    opened(bench, batches)
    bench.pass_time(KEPT_S - 5)
    batches.end_chunk(take(batches), DONE)
    bench.pass_time(KEPT_S - 5)
    bench.refused(owner="rival", task_id="t2")
    bench.pass_time(10)
    assert bench.take(owner="rival", task_id="t2").epoch == 2


def test_a_parked_run_is_not_kept(bench: Bench, batches: BatchStore) -> None:
    """Between its stages it is free for whoever comes first."""
    opened(bench, batches)
    body = bench.take(owner="body", task_id="t1", task_name=TASK, retries=1)
    batches.end(body, ending(RunState.WAITING))
    assert bench.take(owner="rival", task_id="t2").epoch == 3


def test_the_end_of_a_chunk_does_not_touch_the_lease_of_a_body(bench: Bench, batches: BatchStore) -> None:
    """The body came early, as that of another chord does; its lease is its own."""
    opened(bench, batches)
    chunk = take(batches)
    bench.take(owner="body", task_id="t1", retries=1)
    bench.pass_time(20)
    batches.end_chunk(chunk, DONE)
    bench.pass_time(11)
    assert bench.take(owner="rival", task_id="t2").lost == 1


def test_a_stage_keeps_its_lanes(bench: Bench, batches: BatchStore) -> None:
    """Whoever opens it again, from a worker of another size or with another limit, walks the same ones."""
    assert opened(bench, batches, Lanes(5, 3)) == Lanes(5, 3)
    assert opened(bench, batches, Lanes(7, 7), owner="again", retries=1) == Lanes(5, 3)
    assert opened(bench, batches, None, owner="bare", retries=2) == Lanes(5, 3)
    assert batches.end_chunk(take(batches), DONE) == Progress(done=2, total=4)


def test_a_stage_without_a_limit_keeps_to_that(bench: Bench, batches: BatchStore) -> None:
    """Lanes beside chunks that all may be under way at once would limit nothing."""
    assert opened(bench, batches) is None
    assert opened(bench, batches, Lanes(5, 3), owner="again", retries=1) is None


def test_the_next_stage_has_lanes_of_its_own(bench: Bench, batches: BatchStore) -> None:
    """Repeating the call after a lost answer tells the same."""
    opened(bench, batches, Lanes(5, 3))
    lease = bench.take(owner="body", task_id="t1", retries=1)
    for _ in range(2):
        found = batches.open_stage(lease, 2, [Chunk(2, 0, 4)], 9, progress=STANDS, lanes=Lanes(2, 2))
        assert found == Lanes(2, 2)


def test_a_chunk_that_is_due_later_is_not_lost(bench: Bench, batches: BatchStore) -> None:
    """Its retry may be an hour away, and its message then lie in a queue for as long as any."""
    opened(bench, batches)
    batches.end_chunk(take(batches, 2), DONE)
    batches.end_chunk(take(batches), ChunkEnd(state=RunState.QUEUED, wake_in_s=3600.0))
    bench.refused(owner="rival", task_id="t2")
    bench.pass_time(3600 + 10 * LEASE_S - 5)
    assert not is_lost(batches)
    bench.refused(owner="rival", task_id="t2")
    bench.pass_time(LEASE_S + 10)
    assert is_lost(batches)


@pytest.mark.parametrize("how", ["fails", "kills its workers"])
def test_a_stage_that_failed_waits_for_no_retry(bench: Bench, batches: BatchStore, how: str) -> None:
    """The chunk would not be worked on when it is due: only the body is missing."""
    opened(bench, batches)
    batches.end_chunk(take(batches), ChunkEnd(state=RunState.QUEUED, wake_in_s=3600.0))
    if how == "fails":
        batches.end_chunk(take(batches, 2), ChunkEnd(state=RunState.FAILED, stops=True))
    else:
        for owner in ("dies", "dies too"):
            take(batches, 2, owner=owner)
            bench.pass_time(31)
        assert ask(batches, 2, owner="next") == ChunkRefusal(reason=ChunkStop.QUARANTINED)
    bench.pass_time(LEASE_S + 5)
    assert is_lost(batches)


def test_a_chunk_that_is_due_later_may_be_taken_now(bench: Bench, batches: BatchStore) -> None:
    """By a copy of the body, if it comes to that."""
    opened(bench, batches)
    batches.end_chunk(take(batches), ChunkEnd(state=RunState.QUEUED, wake_in_s=3600.0))
    assert take(batches, owner="again").lost == 0


def test_a_chunk_of_a_failed_run_is_due_no_more(bench: Bench, batches: BatchStore) -> None:
    """The next submission puts it back: whoever looks for lost runs must not wait for its retry of then."""
    assert isinstance(bench, SQLBench)
    opened(bench, batches)
    batches.end_chunk(take(batches), ChunkEnd(state=RunState.QUEUED, wake_in_s=3600.0))
    body = bench.take(owner="body", task_id="t1", retries=1)
    batches.end(body, ending(RunState.FAILED, error=ERROR))
    assert bench.sql("SELECT count(*) FROM docket_chunks WHERE lease_until IS NOT NULL") == [(0,)]


def test_a_quarantined_chunk_stops_its_stage(bench: Bench, batches: BatchStore) -> None:
    """The batch has come to nothing: nothing more of it starts, what runs is told to stop."""
    opened(bench, batches)
    for owner in ("dies", "dies too"):
        take(batches, owner=owner)
        bench.pass_time(31)
    running = take(batches, 2, owner="runs")
    assert ask(batches, owner="next") == ChunkRefusal(reason=ChunkStop.QUARANTINED)
    assert batches.extend([running]) == {running.name: Halt.STOPPED}
    batches.end_chunk(running, ChunkEnd(state=RunState.QUEUED))
    assert ask(batches, 2) == ChunkRefusal(reason=ChunkStop.FAILING)


def test_a_chunk_that_a_sweep_quarantines_stops_its_stage_too(bench: Bench, batches: BatchStore) -> None:
    """Its worker died for the last time, and nobody has asked for it since."""
    opened(bench, batches)
    take(batches)
    bench.pass_time(31)
    assert batches.find_lost([TASK], LEASE_S, 2, 10)
    take(batches, owner="dies too")
    bench.pass_time(31)
    running = take(batches, 2)
    assert batches.find_lost([TASK], LEASE_S, 2, 10)
    assert batches.extend([running]) == {running.name: Halt.STOPPED}
    batches.end_chunk(running, ChunkEnd(state=RunState.QUEUED))
    assert ask(batches, 2) == ChunkRefusal(reason=ChunkStop.FAILING)


def test_failed_chunks_are_found_by_their_items(bench: Bench, batches: BatchStore) -> None:
    """Only those: a stage of very many chunks would be read whole for each chunk of the next one."""
    opened(bench, batches)
    failed = ChunkEnd(state=RunState.SUCCEEDED, errors={"3": ERROR})
    batches.end_chunk(take(batches), DONE)
    batches.end_chunk(take(batches, 2), failed)
    found = batches.find_failed(GRAPH, RUN, 3, 9)
    assert [(row.chunk, row.errors) for row in found] == [(Chunk(1, 2, 4), {"3": ERROR})]
    assert batches.find_failed(GRAPH, RUN, 0, 2) == batches.find_failed(GRAPH, RUN, 4, 9) == []
    assert batches.find_failed(GRAPH, "another", 0, 9) == []
