"""Uploads, cancelling and lost runs: what every store keeps to, or every store for several workers."""

from __future__ import annotations

from typing import Any

import pytest

from docket_celery.errors import LeaseLost, RunCancelled, to_record
from docket_celery.store.contract import BatchStore
from docket_celery.store.identity import item_key
from docket_celery.store.records import (
    UNFINISHED,
    Checkpoint,
    Chunk,
    ChunkEnd,
    ChunkRefusal,
    ChunkRequest,
    ChunkStop,
    Lease,
    RunRow,
    RunState,
)
from tests.conformance.samples import GRAPH, RUN, Bench, SQLBench, ending, execution, output, request

pytestmark = pytest.mark.leaves_lease
CANCELLED = to_record(RunCancelled(RUN, "not needed any more"))
DIGEST = b"j" * 32
KEEP_S = 3600.0
LEASE_S = 30.0
MESSAGE = b'{"headers": {"docket_context": {"user": "ann"}}}'
TASKS = ["shop.rate_all"]


def item(index: int, data: bytes = b"\x08\x01") -> Checkpoint:
    """Return an item of the sample run's batch."""
    return output(
        "", data, key=item_key(GRAPH, RUN, "", str(index)), item=str(index), item_index=index, step_version=""
    )


def count_row(count: int) -> Checkpoint:
    """Return the row that says how many items there are."""
    return output("", str(count).encode(), key=item_key(GRAPH, RUN, "", "@count"), item="@count")


def upload(batches: BatchStore, owner: str = "submitter") -> Lease:
    """Begin to upload the sample run's batch."""
    lease = batches.begin_upload(request(owner), KEEP_S)
    assert isinstance(lease, Lease)
    return lease


def stored_items(batches: BatchStore) -> list[tuple[str, bytes]]:
    """Return the items of the sample run with what they hold."""
    return [(one.item, one.output_data) for one in batches.read_items(GRAPH, RUN, [""], 0, 99)]


# --- uploads -----------------------------------------------------------------------------------------------------


def test_an_uploaded_run_waits_for_its_worker(bench: Bench, batches: BatchStore) -> None:
    """Nobody takes it before it is finished, under its real digest; the worker's delivery is the first."""
    lease = upload(batches)
    batches.put_items(lease, [item(0), item(1)])
    assert bench.refused(job_digest=DIGEST).job_digest == UNFINISHED
    batches.close_items(lease, "", 2, [count_row(2)])
    for _ in range(2):
        batches.finish_upload(lease, DIGEST, KEEP_S)
    assert bench.state() is RunState.QUEUED
    assert bench.refused(job_digest=b"o" * 32).job_digest == DIGEST
    taken = bench.take(owner="worker", job_digest=DIGEST)
    assert (taken.epoch, taken.lost) == (1, 0)
    assert [one for one, _ in stored_items(batches)] == ["0", "1"]


def test_a_finished_upload_stores_nothing_more(batches: BatchStore) -> None:
    """Its lease is over with it."""
    lease = upload(batches)
    batches.finish_upload(lease, DIGEST, KEEP_S)
    with pytest.raises(LeaseLost):
        batches.put_items(lease, [item(0)])
    with pytest.raises(LeaseLost):
        batches.finish_upload(lease, b"o" * 32, KEEP_S)
    assert stored_items(batches) == []


def test_one_uploads_at_a_time(batches: BatchStore) -> None:
    """The second one sees that it is being done; the first one may ask again."""
    lease = upload(batches)
    found = batches.begin_upload(request("rival"), KEEP_S)
    assert isinstance(found, RunRow)
    assert (found.state, found.job_digest) == (RunState.QUEUED, UNFINISHED)
    assert upload(batches) == lease


def test_an_upload_that_was_given_up_starts_anew(bench: Bench, batches: BatchStore) -> None:
    """Nothing of it is left, and whoever gave it up writes nothing more."""
    lost = upload(batches)
    batches.put_items(lost, [item(index) for index in range(5)])
    batches.close_items(lost, "", 5, [count_row(5)])
    bench.pass_time(31)
    lease = upload(batches, "second")
    assert batches.find_names(GRAPH, RUN) == set()
    with pytest.raises(LeaseLost):
        batches.put_items(lost, [item(7)])
    with pytest.raises(LeaseLost):
        batches.close_items(lost, "", 0, [])
    with pytest.raises(LeaseLost):
        batches.finish_upload(lost, DIGEST, KEEP_S)
    batches.put_items(lease, [item(0, b"\x08\x09")])
    assert stored_items(batches) == [("0", b"\x08\x09")]


def test_each_page_extends_the_lease(bench: Bench, batches: BatchStore) -> None:
    """A long upload is not taken for one that was given up."""
    lease = upload(batches)
    for index in range(3):
        bench.pass_time(20)
        batches.put_items(lease, [item(index)])
    assert isinstance(batches.begin_upload(request("rival"), KEEP_S), RunRow)


def test_items_are_replaced_until_they_count(bench: Bench, batches: BatchStore) -> None:
    """A split that is made again need not give the same: the newer one stays, and nothing beyond its count."""
    lease = bench.take()
    batches.put_items(lease, [item(index) for index in range(4)])
    batches.put_items(lease, [item(index, b"\x08\x09") for index in range(3)])
    batches.close_items(lease, "", 2, [count_row(2)])
    assert stored_items(batches) == [("0", b"\x08\x09"), ("1", b"\x08\x09")]
    assert batches.find_names(GRAPH, RUN) == {""}


def test_a_run_that_is_there_is_not_reserved(bench: Bench, batches: BatchStore) -> None:
    """Whatever became of it."""
    bench.take()
    assert isinstance(batches.begin_upload(request("submitter"), KEEP_S), RunRow)


def test_an_upload_that_nobody_ends_is_purged(bench: Bench, batches: BatchStore) -> None:
    """With its items."""
    batches.put_items(upload(batches), [item(0), item(1)])
    bench.pass_time(KEEP_S + 1)
    purged = batches.purge(100)
    assert (purged.runs, purged.checkpoints) == (1, 2)
    assert batches.find_run(GRAPH, RUN) is None


def test_names_are_found_however_many_rows_they_have(bench: Bench, batches: BatchStore) -> None:
    """Of this run alone."""
    lease = bench.take()
    rows = [
        output(step, item=str(index), item_index=index) for step in ("b", "a", "c") for index in range(50)
    ]
    batches.save_many(lease, [*rows, output("once")])
    batches.save(bench.take(execution_id="other"), output("foreign", execution_id="other"), None)
    assert batches.find_names(GRAPH, RUN) == {"a", "b", "c", "once"}
    assert batches.find_names(GRAPH, "none") == set()


# --- cancelling --------------------------------------------------------------------------------------------------


def test_a_live_run_is_cancelled(bench: Bench) -> None:
    """Whoever holds it saves nothing more and hears of it at the next heartbeat; nobody takes it again."""
    lease = bench.take()
    row = bench.store.cancel(GRAPH, RUN, CANCELLED, 60.0)
    assert row is not None
    assert (row.state, row.error) == (RunState.CANCELLED, CANCELLED)
    assert bench.store.extend([lease]) == {}
    with pytest.raises(LeaseLost):
        bench.store.save(lease, output(), execution())
    with pytest.raises(LeaseLost):
        bench.store.end(lease, ending())
    assert bench.refused(owner="next").state is RunState.CANCELLED


def test_a_queued_and_a_parked_run_are_cancelled(bench: Bench) -> None:
    """Nothing of them is delivered any more."""
    bench.store.enqueue(request(execution_id="queued"), KEEP_S)
    bench.store.end(bench.take(execution_id="parked"), ending(RunState.WAITING, wake_in_s=5.0))
    for name in ("queued", "parked"):
        row = bench.store.cancel(GRAPH, name, CANCELLED, 60.0)
        assert row is not None
        assert row.state is RunState.CANCELLED


def test_a_run_that_has_ended_stays_what_it_is(bench: Bench) -> None:
    """And one that is unknown stays unknown."""
    bench.store.end(bench.take(), ending())
    row = bench.store.cancel(GRAPH, RUN, CANCELLED, 60.0)
    assert row is not None
    assert row.state is RunState.SUCCEEDED
    assert bench.store.cancel(GRAPH, "none", CANCELLED, 60.0) is None


def test_a_cancelled_run_is_kept_for_its_time(bench: Bench) -> None:
    """Like any that has ended."""
    bench.take()
    bench.store.cancel(GRAPH, RUN, CANCELLED, 60.0)
    bench.pass_time(59)
    assert not bench.store.purge(100).runs
    bench.pass_time(2)
    assert bench.store.purge(100).runs == 1


def opened(bench: Bench, batches: BatchStore, message: bytes | None = MESSAGE) -> Lease:
    """Open the first stage of the sample run, with two chunks of two items."""
    lease = bench.take(task_id="t1", task_name=TASKS[0])
    batches.open_stage(lease, 1, [Chunk(1, 0, 2), Chunk(1, 2, 4)], 0, message=message)
    return lease


def ask(batches: BatchStore, lo: int = 0, owner: str = "chunk") -> Lease | ChunkRefusal:
    """Ask for a chunk of the sample run's first stage."""
    return batches.lease_chunk(
        ChunkRequest(
            graph=GRAPH, execution_id=RUN, stage=1, lo=lo, owner=owner, lease_s=LEASE_S, max_deliveries=9
        )
    )


def take(batches: BatchStore, lo: int = 0, owner: str = "chunk") -> Lease:
    """Lease a chunk that must be free."""
    lease = ask(batches, lo, owner)
    assert isinstance(lease, Lease)
    return lease


def test_the_chunks_of_a_cancelled_run_do_not_start(bench: Bench, batches: BatchStore) -> None:
    """Those that are being worked on are lost to their holders; those that are done stay done."""
    opened(bench, batches)
    running = take(batches)
    batches.cancel(GRAPH, RUN, CANCELLED, 60.0)
    assert batches.extend([running]) == {}
    with pytest.raises(LeaseLost):
        batches.end_chunk(running, ChunkEnd(state=RunState.SUCCEEDED))
    assert ask(batches, 2) == ChunkRefusal(reason=ChunkStop.STALE)
    assert [row.state for row in batches.find_chunks(GRAPH, RUN)] == [RunState.CANCELLED] * 2


# --- lost runs ---------------------------------------------------------------------------------------------------


def find_lost(batches: BatchStore, tasks: list[str] = TASKS) -> list[tuple[str, int, bytes]]:
    """Look for lost runs; return name, stage and message of each."""
    found = batches.find_lost(tasks, LEASE_S, 3, 10)
    return [(one.execution_id, one.stage, one.message) for one in found]


LOST = [(RUN, 1, MESSAGE)]


def test_a_stage_whose_body_does_not_come_is_lost(bench: Bench, batches: BatchStore) -> None:
    """All chunks ended, and for the time of a lease nobody went on; found once, then again later."""
    opened(bench, batches)
    for lo in (0, 2):
        batches.end_chunk(take(batches, lo), ChunkEnd(state=RunState.SUCCEEDED))
    bench.pass_time(29)
    assert find_lost(batches) == []
    bench.pass_time(2)
    assert find_lost(batches) == LOST
    assert find_lost(batches) == []
    bench.pass_time(33)
    assert find_lost(batches) == LOST
    bench.pass_time(33)
    assert find_lost(batches) == []  # as long again as nothing has happened


def test_a_chunk_whose_worker_died_is_lost_once(bench: Bench, batches: BatchStore) -> None:
    """Its lease is over; what others still work on does not matter. Then it waits for its turn like any other."""
    opened(bench, batches)
    dead = take(batches)
    bench.pass_time(31)
    other = take(batches, 2, owner="other")
    assert find_lost(batches) == LOST
    with pytest.raises(LeaseLost):
        batches.end_chunk(dead, ChunkEnd(state=RunState.SUCCEEDED))
    for _ in range(5):
        bench.pass_time(25)
        batches.extend([other])
        assert find_lost(batches) == []
    again = take(batches, owner="again")
    assert (again.epoch, again.lost) == (2, 1)


def test_a_chunk_that_kills_its_workers_is_quarantined(bench: Bench, batches: BatchStore) -> None:
    """By the sweep too; and the run is found lost, so that somebody ends it."""
    opened(bench, batches)
    for _ in range(3):
        take(batches)
        bench.pass_time(31)
        assert find_lost(batches) == LOST
    assert batches.find_chunks(GRAPH, RUN)[0].state is RunState.QUARANTINED
    assert ask(batches, owner="next") == ChunkRefusal(reason=ChunkStop.QUARANTINED)


def test_a_failing_stage_waits_for_nothing_that_is_queued(bench: Bench, batches: BatchStore) -> None:
    """What has not started does not start any more: only the body is missing."""
    opened(bench, batches)
    error = {"code": "DC200", "args": ["sold out", None]}
    batches.end_chunk(take(batches), ChunkEnd(state=RunState.FAILED, errors={"0": error}))
    bench.pass_time(29)
    assert find_lost(batches) == []
    bench.pass_time(2)
    assert find_lost(batches) == LOST


def test_a_stage_at_work_is_not_lost(bench: Bench, batches: BatchStore) -> None:
    """However long its chunks take."""
    opened(bench, batches)
    lease = take(batches)
    for _ in range(20):
        bench.pass_time(25)
        batches.extend([lease])
        assert find_lost(batches) == []


def test_a_queue_may_be_long(bench: Bench, batches: BatchStore) -> None:
    """Chunks that nobody has taken are lost after ten leases without any other having ended."""
    opened(bench, batches)
    bench.pass_time(280)
    batches.end_chunk(take(batches), ChunkEnd(state=RunState.SUCCEEDED))
    bench.pass_time(299)
    assert find_lost(batches) == []
    bench.pass_time(31)
    assert find_lost(batches) == LOST


def test_a_phase_whose_worker_died_is_lost(bench: Bench, batches: BatchStore) -> None:
    """Between two stages the run itself is leased."""
    opened(bench, batches)
    bench.take(owner="body", task_id="t1", task_name=TASKS[0], retries=1)
    assert find_lost(batches) == []
    bench.pass_time(31)
    assert find_lost(batches) == LOST
    assert find_lost(batches) == []


def test_a_phase_that_was_interrupted_is_lost(bench: Bench, batches: BatchStore) -> None:
    """Its worker ended in order; its message should come again, and may not."""
    opened(bench, batches)
    body = bench.take(owner="body", task_id="t1", task_name=TASKS[0], retries=1)
    for lo in (0, 2):
        batches.end_chunk(take(batches, lo), ChunkEnd(state=RunState.SUCCEEDED))
    batches.end(body, ending(RunState.WAITING))
    bench.pass_time(31)
    assert find_lost(batches) == LOST


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED])
def test_a_run_that_has_ended_is_not_lost(bench: Bench, batches: BatchStore, state: RunState) -> None:
    """Neither are those of other apps, and those without a message."""
    opened(bench, batches)
    bench.pass_time(400)
    assert find_lost(batches, ["shop.other"]) == []
    body = bench.take(owner="body", task_id="t1", task_name=TASKS[0], retries=1)
    batches.end(body, ending(state))
    bench.pass_time(4000)
    assert find_lost(batches) == []


def test_a_cancelled_batch_is_found_once_more(bench: Bench, batches: BatchStore) -> None:
    """Its own messages may be lost, and whoever waits for its task must hear how it ended."""
    opened(bench, batches)
    batches.cancel(GRAPH, RUN, CANCELLED, 60.0)
    assert find_lost(batches) == []
    bench.pass_time(6)
    assert find_lost(batches) == LOST
    bench.pass_time(4000)
    assert find_lost(batches) == []
    assert bench.state() is RunState.CANCELLED


def test_nobody_looks_for_a_run_without_a_message(bench: Bench, batches: BatchStore) -> None:
    """There is nothing to send."""
    opened(bench, batches, message=None)
    bench.pass_time(4000)
    assert find_lost(batches) == []


def test_a_message_goes_through_the_codec(bench: Bench, batches: BatchStore) -> None:
    """It holds the caller's context."""
    assert isinstance(bench, SQLBench)
    opened(bench, batches)
    raw: Any = bench.sql("SELECT message FROM docket_runs")[0][0]
    assert (b"ann" in bytes(raw)) is (batches.codec is None)
