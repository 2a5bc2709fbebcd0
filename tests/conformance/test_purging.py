"""What a purge deletes, and what it leaves alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from docket_celery.store.records import Purged, RunState
from tests.conformance.samples import GRAPH, RUN, Bench, SQLBench, ending, execution, output, request, shared

pytestmark = pytest.mark.leaves_lease


def end_run(bench: Bench, name: str, state: RunState = RunState.SUCCEEDED, *, steps: int = 1) -> None:
    """Run to an end that is kept for a minute, with so many checkpoints and step executions."""
    lease = bench.take(execution_id=name)
    for number in range(steps):
        row = execution(f"s{number}", execution_id=name)
        bench.store.save(lease, output(f"s{number}", execution_id=name), row)
    bench.store.end(lease, ending(state, retention_s=60.0))


def passes(bench: Bench, limit: int) -> Iterator[Purged]:
    """Purge until nothing is left, yielding what each pass deleted."""
    for _ in range(1000):
        if not (deleted := bench.store.purge(limit)):
            return
        yield deleted
    raise AssertionError("the purge does not come to an end")


def total(bench: Bench, limit: int = 100) -> Purged:
    """Purge until nothing is left and return how many rows went."""
    return sum(passes(bench, limit), Purged())


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED])
def test_an_ended_run_goes_with_all_it_has_when_its_retention_is_over(bench: Bench, state: RunState) -> None:
    """Not before; then it is unknown, and submitting it again starts from nothing."""
    end_run(bench, RUN, state, steps=3)
    bench.pass_time(59)
    assert total(bench) == Purged()
    bench.pass_time(2)
    assert total(bench) == Purged(runs=1, checkpoints=3, executions=3)
    assert bench.store.find_run(GRAPH, RUN) is None
    assert bench.executions() == []
    lease = bench.take(owner="later")
    assert (lease.epoch, bench.store.restore(lease, [])) == (1, [])


def test_a_run_without_a_date_stays(bench: Bench) -> None:
    """No retention, or none yet: quarantined ones wait for somebody to look."""
    bench.store.end(bench.take(), ending())
    bench.take(execution_id="poison", max_deliveries=1)
    bench.pass_time(31)
    bench.refused(execution_id="poison", owner="second", max_deliveries=1)
    bench.pass_time(10**9)
    assert total(bench) == Purged()
    assert bench.state() is RunState.SUCCEEDED


def test_a_run_that_has_not_ended_is_never_touched(bench: Bench) -> None:
    """Running, parked, silent for years, or resumed after its date had passed."""
    for name in ("running", "parked", "resumed"):
        lease = bench.take(execution_id=name)
        row = execution(execution_id=name)
        bench.store.save(lease, output(execution_id=name, ttl_s=1.0), row)
        if name == "parked":
            bench.store.end(lease, ending(RunState.WAITING, wake_in_s=5.0, retention_s=60.0))
        elif name == "resumed":
            bench.store.end(lease, ending(RunState.FAILED, retention_s=60.0))
    bench.pass_time(10**8)
    # It has its lease, and has not read its checkpoints yet: they still bear the date of the end.
    resumed = bench.take(execution_id="resumed", owner="later")
    assert total(bench) == Purged()
    assert len(bench.store.restore(resumed, [])) == 1
    assert len(bench.executions()) == 3


def test_expired_checkpoints_go_without_their_run(bench: Bench) -> None:
    """Shared ones, and those of an ended run that is still kept; whatever is alive stays."""
    bench.store.publish(shared("old", ttl_s=60.0), "a", None)
    bench.store.publish(shared("young", ttl_s=600.0), "a", None)
    bench.store.publish(shared("for ever"), "a", None)
    lease = bench.take()
    bench.store.save(lease, output("brief", ttl_s=60.0), None)
    bench.store.save(lease, output("long"), None)
    bench.store.end(lease, ending(RunState.FAILED, retention_s=3600.0))
    bench.pass_time(61)
    assert total(bench) == Purged(checkpoints=2)
    assert bench.state() is RunState.FAILED
    assert [found.step_name for found in bench.store.restore(bench.take(owner="later"), [])] == ["long"]
    assert bench.store.forget(shared("young").key)
    assert bench.store.forget(shared("for ever").key)


def test_dead_claims_go_and_live_ones_stay(bench: Bench) -> None:
    """A claim is dead once its holder has not extended it; late look-ups have had their minute by then."""
    dead, live = shared("dead").key, shared("live").key
    bench.store.lookup(dead, "a", 30.0)
    bench.store.lookup(live, "a", 300.0)
    bench.pass_time(100)
    assert total(bench) == Purged(claims=1)
    assert bench.store.lookup(live, "b", 30.0) is False
    assert bench.store.lookup(dead, "b", 30.0) is True


def test_many_purge_side_by_side(bench: Bench) -> None:
    """Each row is deleted and counted once, and nobody fails or waits for ever."""
    for number in range(30):
        end_run(bench, f"order-{number}", steps=2)
        bench.store.publish(shared(f"shared-{number}", ttl_s=60.0), "a", None)
    end_run(bench, "kept")
    bench.store.end(bench.take(execution_id="longer"), ending(retention_s=600.0))
    bench.pass_time(61)
    begin, found = threading.Barrier(4), list[Purged]()

    def purge() -> None:
        begin.wait()
        found.append(total(bench, 20))

    threads = [threading.Thread(target=purge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.append(total(bench))
    assert sum(found, Purged()) == Purged(runs=31, checkpoints=61 + 30, executions=61)
    assert bench.store.find_run(GRAPH, "longer") is not None


def test_a_statement_deletes_so_many_rows_and_no_more(sql_bench: SQLBench) -> None:
    """Long transactions hold up others: there are many short ones instead."""
    for number in range(12):
        end_run(sql_bench, f"order-{number}", steps=3)
        sql_bench.store.publish(shared(f"shared-{number}", ttl_s=60.0), "a", None)
        sql_bench.store.lookup(shared(f"dead-{number}").key, "a", 30.0)
    sql_bench.pass_time(120)
    found = list(passes(sql_bench, 5))
    assert sum(found, Purged()) == Purged(runs=12, checkpoints=36 + 12, executions=36, claims=12)
    # Checkpoints go by two statements: with their run, and by their own date.
    most = Purged(runs=5, checkpoints=10, executions=5, claims=5)
    assert all(
        deleted.runs <= most.runs
        and deleted.checkpoints <= most.checkpoints
        and deleted.executions <= most.executions
        and deleted.claims <= most.claims
        for deleted in found
    )


def test_a_failed_run_is_not_resumed_from_half_of_its_checkpoints(sql_bench: SQLBench) -> None:
    """One that has more than a statement deletes is closed first: nothing runs until it is gone, then it starts."""
    end_run(sql_bench, RUN, RunState.FAILED, steps=12)
    sql_bench.pass_time(61)
    assert sql_bench.store.purge(5) == Purged(checkpoints=5, executions=5)
    row = sql_bench.refused(owner="second")
    assert row.state is RunState.CANCELLED
    assert row.error is not None
    assert row.error["code"] == "DC300"
    assert row.error["args"][0] == RUN
    assert "docket_retention" in row.error["args"][1]
    assert total(sql_bench, 5) == Purged(runs=1, checkpoints=7, executions=7)
    lease = sql_bench.take(owner="third")
    assert (lease.epoch, sql_bench.store.restore(lease, [])) == (1, [])


def test_submitting_a_run_that_is_being_purged_does_not_keep_its_rest(sql_bench: SQLBench) -> None:
    """It would be refused for as long as a new run is kept, by an error that says to submit it again."""
    end_run(sql_bench, RUN, RunState.FAILED, steps=12)
    sql_bench.pass_time(61)
    assert sql_bench.store.purge(5)
    assert sql_bench.store.enqueue(request(""), 1000.0) is None
    assert total(sql_bench, 5) == Purged(runs=1, checkpoints=7, executions=7)
    assert sql_bench.store.enqueue(request(""), 1000.0) is None
    assert sql_bench.state() is RunState.QUEUED


@pytest.mark.parametrize(
    ("state", "stays"), [(RunState.FAILED, True), (RunState.SUCCEEDED, True), (RunState.CANCELLED, False)]
)
def test_queueing_a_run_again_keeps_it_if_its_delivery_needs_it(
    bench: Bench, state: RunState, stays: bool
) -> None:
    """A FAILED one is resumed and a SUCCEEDED one has the result; of a CANCELLED one nothing comes any more."""
    end_run(bench, RUN, state)
    assert bench.store.enqueue(request(""), 1000.0) is None
    bench.pass_time(61)
    total(bench)
    assert (bench.store.find_run(GRAPH, RUN) is not None) is stays


def test_chunks_of_a_batch_go_with_their_run(sql_bench: SQLBench) -> None:
    """However many there are."""
    end_run(sql_bench, RUN)
    for lo in range(7):
        sql_bench.sql(
            "INSERT INTO docket_chunks (graph, execution_id, stage, lo, hi, state, epoch, retries, lost, failed) "
            "VALUES (:graph, :run, 1, :lo, :lo + 1, 'SUCCEEDED', 1, 0, 0, 0)",
            graph=GRAPH, run=RUN, lo=lo,
        )  # fmt: skip
    sql_bench.pass_time(61)
    assert total(sql_bench, 3) == Purged(runs=1, checkpoints=1, executions=1, chunks=7)
    assert sql_bench.sql("SELECT 1 FROM docket_chunks") == []
