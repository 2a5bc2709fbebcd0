from __future__ import annotations

import pytest

from docket_celery.errors import AbortError, LeaseLost, from_record, to_record
from docket_celery.store.records import Lease, RunState
from tests.conformance.samples import GRAPH, RUN, Bench, ending, execution, output, request

pytestmark = pytest.mark.leaves_lease


def test_an_unknown_run_is_taken_with_epoch_1(bench: Bench) -> None:
    """The first delivery of a run counts from 1 and carries what its request said."""
    lease = bench.take(task_id="t1")
    assert lease == Lease(
        graph=GRAPH, execution_id=RUN, target="shop.Shipment", owner="first", epoch=1, lease_s=30.0
    )


def test_a_live_lease_is_not_taken(bench: Bench) -> None:
    """Another owner gets the row, with the time that is left."""
    bench.take(task_id="t1")
    row = bench.refused(owner="second", task_id="t2")
    assert (row.state, row.epoch, row.task_id) == (RunState.RUNNING, 1, "t1")
    assert row.lease_left_s is not None
    # SQLite's days as a float know some 0.04 ms: a lease that is looked at at once may seem that much longer.
    assert 0 < row.lease_left_s < 30.001


def test_the_holder_gets_its_own_lease_again(bench: Bench) -> None:
    """An acquire whose answer was lost may be repeated: same epoch, nothing counted."""
    assert bench.take() == bench.take()


def test_an_expired_lease_is_taken_over_and_counted_as_lost(bench: Bench) -> None:
    """A lease that ran out was never released: its worker is gone."""
    bench.take()
    bench.pass_time(31)
    lease = bench.take(owner="second", retries=0)
    assert (lease.epoch, lease.lost) == (2, 1)


def test_a_released_delivery_is_not_counted_as_lost(bench: Bench) -> None:
    """The delivery before ended in order, so its open lease is no crash."""
    bench.take(task_id="t1")
    lease = bench.take(owner="second", task_id="t1", retries=1, ended_cleanly=True)
    assert (lease.epoch, lease.lost) == (2, 0)


def test_the_same_task_with_greater_retries_takes_a_live_lease(bench: Bench) -> None:
    """Celery saw the holder die and sent the task again."""
    bench.take(task_id="t1", retries=0)
    lease = bench.take(owner="second", task_id="t1", retries=1)
    assert (lease.epoch, lease.lost) == (2, 1)


@pytest.mark.parametrize(("task_id", "retries"), [("t1", 0), ("t2", 1), (None, 1)])
def test_no_other_delivery_takes_a_live_lease(bench: Bench, task_id: str | None, retries: int) -> None:
    """Neither the same retries, nor another task, nor none."""
    bench.take(task_id="t1", retries=0)
    assert bench.refused(owner="second", task_id=task_id, retries=retries).epoch == 1


def test_a_run_without_a_task_is_not_taken_by_retries(bench: Bench) -> None:
    """Two calls in process have no task id; that makes them no deliveries of one task."""
    bench.take()
    assert bench.refused(owner="second", retries=5).state is RunState.RUNNING


def test_a_run_of_another_job_or_target_is_not_taken(bench: Bench) -> None:
    """The caller compares and reports the conflict, also once the lease is dead."""
    bench.take()
    bench.pass_time(31)
    assert bench.refused(owner="second", job_digest=b"e" * 32).job_digest == b"d" * 32
    assert bench.refused(owner="second", target="shop.Refund").target == "shop.Shipment"


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.CANCELLED, RunState.QUARANTINED])
def test_an_ended_run_is_not_taken(bench: Bench, state: RunState) -> None:
    """Its row says how it ended."""
    bench.store.end(bench.take(), ending(state))
    row = bench.refused(owner="second")
    assert (row.state, row.result) == (state, ending(state).result)
    assert row.lease_left_s is None


@pytest.mark.parametrize("task_id", ["t2", None])
def test_a_failed_run_is_resumed_by_another_submission(bench: Bench, task_id: str | None) -> None:
    """It starts a new epoch with no retries used and no error left."""
    bench.store.end(
        bench.take(task_id="t1"), ending(RunState.FAILED, failed_once=True, error=to_record(AbortError("no")))
    )
    lease = bench.take(owner="second", task_id=task_id)
    assert (lease.epoch, lease.lost, lease.failures) == (2, 0, 0)
    row = bench.store.find_run(GRAPH, RUN)
    assert row is not None
    assert (row.state, row.error) == (RunState.RUNNING, None)


def test_a_failed_run_is_not_resumed_by_its_own_task_or_by_who_waited_for_it(bench: Bench) -> None:
    """They report the outcome: the task is the one that failed, the other was promised this run's end."""
    error = AbortError("stolen card", "fraud check")
    bench.store.end(bench.take(task_id="t1"), ending(RunState.FAILED, error=to_record(error)))
    row = bench.refused(owner="second", task_id="t1", retries=1)
    assert row.error is not None
    assert str(from_record(row.error)) == str(error)
    assert bench.refused(owner="third", task_id="t3", waits_for_other=True).state is RunState.FAILED


def test_a_parked_run_is_taken_by_its_next_delivery(bench: Bench) -> None:
    """Parking counts the retry, keeps the error and gives the lease back."""
    bench.store.end(
        bench.take(task_id="t1"),
        ending(RunState.WAITING, failed_once=True, wake_in_s=5.0, error=to_record(AbortError("later"))),
    )
    row = bench.store.find_run(GRAPH, RUN)
    assert row is not None
    assert (row.state, row.failures, row.lease_left_s) == (RunState.WAITING, 1, None)
    assert row.error == to_record(AbortError("later"))
    lease = bench.take(owner="second", task_id="t1", retries=1)
    assert (lease.epoch, lease.lost, lease.failures) == (2, 0, 1)


def test_the_last_lost_delivery_quarantines_the_run(bench: Bench) -> None:
    """At max_deliveries crashes nobody gets the run, and the row says how many there were."""
    for owner in ("first", "second", "third"):
        assert bench.take(owner=owner, max_deliveries=3).lost == {"first": 0, "second": 1, "third": 2}[owner]
        bench.pass_time(31)
    row = bench.refused(owner="fourth", max_deliveries=3)
    assert (row.state, row.lost, row.epoch) == (RunState.QUARANTINED, 3, 3)
    assert bench.refused(owner="fifth", max_deliveries=3).lost == 3


def test_a_quarantined_run_refuses_its_last_holder(bench: Bench) -> None:
    """The worker that was thought dead can neither save nor end."""
    lease = bench.take(max_deliveries=1)
    bench.pass_time(31)
    bench.refused(owner="second", max_deliveries=1)
    with pytest.raises(LeaseLost):
        bench.store.save(lease, output(), None)
    with pytest.raises(LeaseLost):
        bench.store.end(lease, ending())
    assert bench.state() is RunState.QUARANTINED


def test_only_a_retry_of_celerys_takes_a_live_lease(bench: Bench) -> None:
    """The body of a second chord has a greater count too, and its run's holder is well."""
    bench.take(task_id="t1", retries=1)
    row = bench.refused(owner="body", task_id="t1", retries=2, celery_retry=False)
    assert (row.state, row.lost) == (RunState.RUNNING, 0)
    lease = bench.take(owner="retry", task_id="t1", retries=2)
    assert (lease.epoch, lease.lost) == (2, 1)
    bench.pass_time(31)
    assert bench.take(owner="body", task_id="t1", retries=3, celery_retry=False).epoch == 3


def test_heartbeats_extend_only_what_is_held(bench: Bench) -> None:
    """A stale owner's lease, an ended run's and an unknown one's stay as they are."""
    stale = bench.take()
    bench.pass_time(31)
    held = bench.take(owner="second", lease_s=10.0)
    ended = bench.take(execution_id="order-18")
    bench.store.end(ended, ending())
    unknown = bench.take(execution_id="order-19")
    unknown = Lease(
        **{name: getattr(unknown, name) for name in Lease.__slots__} | {"execution_id": "order-20"}
    )
    assert bench.store.extend([stale, ended, unknown]) == {}
    bench.pass_time(8)
    assert bench.store.extend([stale, held, ended, unknown]) == {(GRAPH, RUN): None}
    bench.pass_time(8)
    assert bench.refused(owner="third").epoch == 2


def test_heartbeats_without_leases_do_nothing(bench: Bench) -> None:
    """A process whose runs all ended may still call."""
    assert bench.store.extend([]) == {}


def test_a_lost_lease_ends_nothing(bench: Bench) -> None:
    """The stale owner's state, result and executions are refused whole."""
    stale = bench.take()
    bench.pass_time(31)
    bench.take(owner="second")
    with pytest.raises(LeaseLost):
        bench.store.end(stale, ending(executions=[execution()]))
    assert (bench.state(), bench.executions()) == (RunState.RUNNING, [])


def test_an_end_may_be_repeated(bench: Bench) -> None:
    """An end whose answer was lost is asked for again: no error, and no execution twice."""
    lease = bench.take()
    end = ending(executions=[execution(), execution("ship", started_at=execution().started_at)])
    bench.store.end(lease, end)
    bench.store.end(lease, end)
    assert bench.executions() == [("charge", 1), ("ship", 1)]
    with pytest.raises(LeaseLost):
        bench.store.end(lease, ending(RunState.FAILED))
    assert bench.state() is RunState.SUCCEEDED


def test_an_unknown_run_is_not_found(bench: Bench) -> None:
    """Looking does not create."""
    assert bench.store.find_run(GRAPH, RUN) is None
    assert request().execution_id == RUN


def test_runs_of_two_graphs_are_two_runs(bench: Bench) -> None:
    """One execution id in two graphs names two runs."""
    bench.take()
    assert bench.take(graph="refunds", owner="second").epoch == 1


def test_texts_that_a_database_refuses_do_not_lose_an_end(bench: Bench) -> None:
    """U+0000, lone surrogates and numbers without JSON form are cleaned, not refused."""
    error = {"code": "DC200", "args": ["a\0b\ud800", float("nan"), {"k\0": [float("inf"), 1]}]}
    row = execution(error_message="x\0y\udfff", error_code="DC200", worker="w\0")
    bench.store.end(bench.take(), ending(RunState.FAILED, error=error, executions=[row]))
    found = bench.store.find_run(GRAPH, RUN)
    assert found is not None
    assert found.error == {"code": "DC200", "args": ["ab?", "nan", {"k": ["inf", 1]}]}
