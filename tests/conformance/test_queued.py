"""Runs that are written before anybody advances them, and their jobs."""

from __future__ import annotations

import threading

import pytest

from docket_celery.store.records import RunRow, RunState
from tests.conformance.samples import GRAPH, RUN, Bench, SQLBench, ending, request

pytestmark = pytest.mark.leaves_lease


def test_a_queued_run_waits_for_its_first_delivery(bench: Bench) -> None:
    """Its job is there; the delivery that takes it is the first one, whatever job it brings along."""
    assert bench.store.enqueue(request("", job=b"the job", task_id="t-1"), 60.0) is None
    assert bench.state() is RunState.QUEUED
    assert bench.store.find_job(GRAPH, RUN) == b"the job"
    lease = bench.take(job=b"the job again", task_id="t-1")
    assert (lease.epoch, lease.lost, lease.failures) == (1, 0, 0)
    assert bench.state() is RunState.RUNNING


def test_a_run_that_nobody_wrote_has_no_job(bench: Bench) -> None:
    """Neither the run nor its job."""
    assert bench.store.find_job(GRAPH, RUN) is None
    bench.store.enqueue(request(execution_id="order-18"), 60.0)
    assert bench.store.find_job(GRAPH, RUN) is None


def test_queueing_again_changes_nothing(bench: Bench) -> None:
    """In whatever state the run is by then."""
    for _ in range(2):
        assert bench.store.enqueue(request(""), 60.0) is None
    lease = bench.take()
    assert bench.store.enqueue(request(""), 60.0) is None
    assert bench.state() is RunState.RUNNING
    bench.store.end(lease, ending(retention_s=60.0))
    assert bench.store.enqueue(request(""), 60.0) is None
    row = bench.store.find_run(GRAPH, RUN)
    assert row is not None
    assert (row.state, row.epoch, row.result) == (RunState.SUCCEEDED, 1, ending().result)


def test_a_queued_run_whose_message_never_came_is_purged(bench: Bench) -> None:
    """Not before its date; then its name is free."""
    bench.store.enqueue(request("", job=b"first"), 60.0)
    assert bench.store.purge(10).runs == 0
    bench.pass_time(61)
    assert bench.store.purge(10).runs == 1
    assert bench.store.find_job(GRAPH, RUN) is None
    assert bench.store.enqueue(request("", job_digest=b"e" * 32), 60.0) is None


@pytest.mark.parametrize("change", [{"target": "shop.Label"}, {"job_digest": b"e" * 32}])
@pytest.mark.parametrize("state", [RunState.QUEUED, RunState.RUNNING, RunState.FAILED])
def test_another_job_under_the_name_is_not_queued(
    bench: Bench, change: dict[str, object], state: RunState
) -> None:
    """The run that is there is returned, as it stands, and keeps its job."""
    bench.store.enqueue(request("", job=b"first"), 60.0)
    if state is not RunState.QUEUED:
        lease = bench.take(job=b"first")
        if state.ended:
            bench.store.end(lease, ending(state))
    found = bench.store.enqueue(request("", job=b"second", **change), 60.0)
    assert isinstance(found, RunRow)
    assert (found.state, found.target, found.job_digest) == (state, "shop.Shipment", b"d" * 32)
    assert bench.store.find_job(GRAPH, RUN) == b"first"


def test_of_many_that_queue_one_run_all_agree(bench: Bench) -> None:
    """Two jobs race for one name: one of them has it, and each of its senders is told so."""
    start, told = threading.Barrier(8), list[tuple[bytes, bool]]()

    def send(digest: bytes) -> None:
        start.wait()
        found = bench.store.enqueue(request("", job=digest[:4], job_digest=digest), 60.0)
        told.append((digest, found is None))

    threads = [threading.Thread(target=send, args=(b"ab"[n % 2 : n % 2 + 1] * 32,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    job = bench.store.find_job(GRAPH, RUN)
    assert sorted(told) == sorted([(b"a" * 32, job == b"aaaa"), (b"b" * 32, job == b"bbbb")] * 4)


def dates(bench: SQLBench) -> list[float]:
    """Return in how many seconds purging may delete each run; none: never."""
    if bench.sql("SELECT 1 FROM docket_runs WHERE expires_at IS NOT NULL"):
        left = "(julianday(expires_at) - julianday('now')) * 86400.0"
        if bench.dialect == "postgresql":
            left = "EXTRACT(EPOCH FROM expires_at - clock_timestamp())"
        return [float(row[0]) for row in bench.sql(f"SELECT {left} FROM docket_runs")]  # noqa: S608 -- ours
    return []


def test_a_queued_run_may_be_purged_in_the_end(sql_bench: SQLBench) -> None:
    """Its message may never come; a later submission keeps it for longer, an earlier date shortens nothing."""
    sql_bench.store.enqueue(request(""), 100.0)
    assert dates(sql_bench) == pytest.approx([100.0], abs=5)
    sql_bench.store.enqueue(request(""), 300.0)
    sql_bench.store.enqueue(request(""), 200.0)
    assert dates(sql_bench) == pytest.approx([300.0], abs=5)


def test_a_run_that_is_advanced_has_no_date(sql_bench: SQLBench) -> None:
    """Taken, it stays; ended, it is kept for as long as whoever asks for it may need it."""
    sql_bench.store.enqueue(request(""), 100.0)
    lease = sql_bench.take()
    assert dates(sql_bench) == []
    sql_bench.store.enqueue(request(""), 100.0)
    assert dates(sql_bench) == []
    sql_bench.store.end(lease, ending(retention_s=50.0))
    sql_bench.store.enqueue(request(""), 100.0)
    assert dates(sql_bench) == pytest.approx([100.0], abs=5)


def test_a_run_that_is_kept_for_ever_stays_so(sql_bench: SQLBench) -> None:
    """No date is made for it."""
    sql_bench.store.end(sql_bench.take(), ending())
    sql_bench.store.enqueue(request(""), 100.0)
    assert dates(sql_bench) == []
