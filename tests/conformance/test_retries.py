"""What Celery's retry counts say of a run's holder, with copies of one task on their way."""

from __future__ import annotations

import pytest

from docket_celery.store.records import RunState
from tests.conformance.samples import GRAPH, RUN, Bench, ending

pytestmark = pytest.mark.leaves_lease


def test_a_redelivery_after_a_released_one_is_a_crash(bench: Bench) -> None:
    """The delivery that took the lease says itself that the one *before* it ended in order."""
    bench.store.end(bench.take(task_id="t1"), ending(RunState.WAITING, wake_in_s=1.0))
    bench.take(owner="second", task_id="t1", retries=1, ended_cleanly=True)
    bench.pass_time(31)  # its whole worker died: the broker delivers the same message again
    lease = bench.take(owner="third", task_id="t1", retries=1, ended_cleanly=True)
    assert (lease.epoch, lease.lost) == (3, 1)


def test_another_task_s_released_delivery_says_nothing_of_the_holder(bench: Bench) -> None:
    """Only the holder's own next retry knows that the holder ended in order."""
    bench.take(task_id="t1")
    bench.pass_time(31)
    assert bench.take(owner="second", task_id="t2", retries=1, ended_cleanly=True).lost == 1


def test_the_retry_of_a_parked_run_does_not_steal_it_from_a_quicker_copy(bench: Bench) -> None:
    """A copy took the parked run; the retry that was promised it finds a live holder and waits."""
    bench.store.end(bench.take(task_id="t1"), ending(RunState.WAITING, wake_in_s=1.0))
    bench.take(owner="copy", task_id="t1", retries=0, waits_for_other=True)
    assert bench.refused(owner="retry", task_id="t1", retries=1, ended_cleanly=True).epoch == 2
    # The copy is killed: Celery sends it again, and its lease must run out, since two lines of retries exist.
    assert bench.refused(owner="copy again", task_id="t1", retries=1, waits_for_other=True).epoch == 2


def test_an_older_copy_does_not_make_known_retries_new(bench: Bench) -> None:
    """The retries that a run has seen of one task only grow."""
    bench.take(task_id="t1", retries=2)
    bench.pass_time(31)
    bench.take(owner="copy", task_id="t1", retries=0)
    row = bench.store.find_run(GRAPH, RUN)
    assert row is not None
    assert row.retries == 2
    assert bench.refused(owner="late", task_id="t1", retries=2).epoch == 2
    assert bench.take(owner="next", task_id="t1", retries=3).epoch == 3


def test_another_task_starts_its_own_count(bench: Bench) -> None:
    """Retries of different tasks are not compared."""
    bench.take(task_id="t1", retries=5)
    bench.pass_time(31)
    bench.take(owner="second", task_id="t2", retries=0)
    assert bench.take(owner="third", task_id="t2", retries=1).epoch == 3
