"""Celery's own options mean on a GraphTask what they mean on any task."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded

from docket_celery import StepFailed
from tests.infra import servers
from tests.infra.processes import ROOT, wait_until
from tests.infra.workers import WorkerProcess
from tests.integration.apps import options
from tests.integration.apps.journal import Journals
from tests.integration.apps.options import BusyError, app
from tests.integration.apps.serving import Urls, queue_length, serving, unique
from tests.unit.protos.shop_pb2 import Label, Order, Shipment

pytestmark = pytest.mark.integration
WAIT_S = 20
JOB = (Order(order_id="17"),)


@pytest.fixture(scope="module", autouse=True)
def worker(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """One worker for this module."""
    with serving(app, urls, tmp_path_factory.mktemp("worker"), args=["-Q", "celery,special"]) as started:
        yield started


@pytest.fixture
def journals(urls: Urls) -> Journals:
    """What the steps noted."""
    return Journals(urls.results)


@pytest.fixture
def journal(request: pytest.FixtureRequest) -> str:
    """A journal of the test's own."""
    return unique(request.node.name)


def submit(task: Any, journal: str, failures: int = 0, **more: Any) -> Any:
    """Submit a job whose first *failures* calls fail."""
    context = {"journal": journal, "failures": failures}
    return task.apply_async(JOB, context=context, execution_id=journal, **more)


def calls(journals: Journals, journal: str) -> list[str]:
    """Return delivery and attempt of each call."""
    return [line.split()[1] for line in journals.read(journal)]


def run_row(urls: Urls, execution_id: str) -> tuple[object, ...]:
    """Return how a run stands in the database."""
    with servers.connect(urls.database) as connection:
        row = connection.execute(
            "SELECT state, failures, lost, error->>'code', lease_until FROM docket_runs WHERE execution_id = %s",
            [execution_id],
        ).fetchone()
    assert row is not None
    return row


@pytest.mark.parametrize("task", [options.retried, options.retried_kept], ids=["no store", "store"])
def test_autoretry_matches_the_steps_own_exception(task: Any, journals: Journals, journal: str) -> None:
    """A subclass of what autoretry_for names, raised in a step, has Celery deliver the run again."""
    assert submit(task, journal, failures=2).get(timeout=WAIT_S) == Shipment(tracking_id="call 3")
    assert calls(journals, journal) == ["1/1", "2/1", "3/1"]


def test_what_only_a_restored_step_needed_does_not_run_again(journals: Journals, journal: str) -> None:
    """The second delivery goes from the target down, and meets what is kept before what that was made of."""
    assert submit(options.narrowed, journal).get(timeout=WAIT_S) == Shipment(tracking_id="17")
    assert calls(journals, journal) == ["prepare", "keep", "finish", "finish"]


def test_a_task_that_asks_for_what_it_is_given_runs_nothing(journals: Journals, journal: str) -> None:
    """The plan is empty and the job comes back."""
    assert submit(options.unchanged, journal).get(timeout=WAIT_S) == JOB[0]
    assert calls(journals, journal) == []


def test_without_autoretry_a_failure_ends_the_run(journals: Journals, journal: str) -> None:
    """One call, and the step's failure."""
    with pytest.raises(StepFailed) as caught:
        submit(options.never, journal, failures=9).get(timeout=WAIT_S)
    assert caught.value.caused_by(BusyError)
    assert calls(journals, journal) == ["1/1"]


def test_dont_autoretry_wins_over_autoretry(journals: Journals, journal: str) -> None:
    """dont_autoretry_for is matched against the cause as well."""
    with pytest.raises(StepFailed):
        submit(options.excepted, journal, failures=9).get(timeout=WAIT_S)
    assert calls(journals, journal) == ["1/1"]


def test_throws_is_logged_as_expected(worker: WorkerProcess, journal: str) -> None:
    """An expected cause is information, without a traceback; another is an error, with one."""
    result = submit(options.expected, journal, failures=9)
    with pytest.raises(StepFailed):
        result.get(timeout=WAIT_S)
    worker.wait_for_log(f"options.expected[{result.id}] raised expected")
    log = worker.read_log().partition(f"options.expected[{result.id}] raised expected")
    assert "INFO" in log[0].splitlines()[-1]
    assert not log[2].splitlines()[1:2] or "Traceback" not in log[2].splitlines()[1]
    other = submit(options.never, journal, failures=9)
    with pytest.raises(StepFailed):
        other.get(timeout=WAIT_S)
    worker.wait_for_log(f"options.never[{other.id}] raised unexpected")
    shown = worker.read_log().partition(f"options.never[{other.id}] raised unexpected")
    assert "ERROR" in shown[0].splitlines()[-1]
    assert "Traceback" in shown[2]


def test_results_and_logs_show_the_step_and_not_the_engine(worker: WorkerProcess, journal: str) -> None:
    """In the result's traceback and in the worker's log the cause starts in the step's function."""
    result = submit(options.never, journal, failures=9)
    with pytest.raises(StepFailed):
        result.get(timeout=WAIT_S)
    worker.wait_for_log(f"options.never[{result.id}] raised unexpected")
    logged = worker.read_log().partition(f"options.never[{result.id}] raised unexpected")[2]
    for text in (str(result.traceback), logged):
        cause = text.partition("Traceback (most recent call last):\n")[2].partition("direct cause")[0]
        first, *others = [line for line in cause.splitlines() if line.startswith("  File ")]
        assert first.endswith("in call_once")
        assert "options.py" in first
        assert [line.rpartition(" in ")[2] for line in others] == ["fail_at_first"]


def test_results_and_logs_show_every_branch_that_failed(worker: WorkerProcess, journal: str) -> None:
    """Both tracebacks, one as the cause and one as a note."""
    result = options.both.apply_async(JOB, execution_id=journal)
    with pytest.raises(StepFailed):
        result.get(timeout=WAIT_S)
    worker.wait_for_log(f"options.both[{result.id}] raised unexpected")
    logged = worker.read_log().partition(f"options.both[{result.id}] raised unexpected")[2]
    for text in (str(result.traceback), logged):
        for wanted in ("in break_one", "BusyError: one", "in break_two", "BusierError: two"):
            assert wanted in text
        assert "attempt.py" not in text


@pytest.mark.parametrize(
    ("task", "deliveries"),
    [(options.limited, 3), (options.limited_by_kwargs, 2), (options.retried_kept, 3)],
    ids=["max_retries", "retry_kwargs", "store"],
)
def test_retries_end_after_the_declared_number(
    task: Any, deliveries: int, journals: Journals, journal: str
) -> None:
    """max_retries=2 is three deliveries; then the promise raises the step's own failure."""
    result = submit(task, journal, failures=9)
    with pytest.raises(StepFailed, match=f"call {deliveries}"):
        result.get(timeout=WAIT_S)
    assert result.state == "FAILURE"
    assert calls(journals, journal) == [f"{n}/1" for n in range(1, deliveries + 1)]


def test_the_row_and_celery_end_alike(urls: Urls, journal: str) -> None:
    """When the retries are used up, the run's row is FAILED with the same error."""
    result = submit(options.retried_kept, journal, failures=9)
    with pytest.raises(StepFailed):
        result.get(timeout=WAIT_S)
    assert run_row(urls, journal) == ("FAILED", 2, 0, "DC201", None)


def test_retry_backoff_grows(journals: Journals, journal: str) -> None:
    """Celery's exponential backoff: a second, then two."""
    assert submit(options.backed_off, journal, failures=2).get(timeout=WAIT_S).tracking_id == "call 3"
    first, second, third = (float(line.split()[0]) for line in journals.read(journal))
    assert second - first >= 1.0
    assert third - second >= 2.0


def test_a_policy_asks_for_another_delivery(journals: Journals, journal: str) -> None:
    """redeliver=True frees the worker when the attempts are used up, within max_retries."""
    assert submit(options.redelivered, journal, failures=2).get(timeout=WAIT_S).tracking_id == "call 3"
    assert calls(journals, journal) == ["1/1", "1/2", "2/1"]
    with pytest.raises(StepFailed) as caught:
        submit(options.redelivered, unique("exhausted"), failures=9).get(timeout=WAIT_S)
    assert caught.value.attempts == 2


def test_a_hard_limit_kills_the_child_alone(worker: WorkerProcess, journals: Journals, journal: str) -> None:
    """The task fails, the child that ran it is gone, and the worker goes on."""
    with pytest.raises(TimeLimitExceeded):
        submit(options.hard, journal).get(timeout=WAIT_S)
    killed = int(journals.wait(journal, 1)[0].split()[-1])
    wait_until(
        lambda: killed not in {child.pid for child in worker.children()}, within_s=10, what="the child ends"
    )
    assert worker.running
    assert submit(options.never, unique("next")).get(timeout=WAIT_S) == Shipment(tracking_id="call 1")


def test_a_soft_limit_interrupts_the_task_and_stops_its_steps(
    worker: WorkerProcess, journals: Journals, journal: str
) -> None:
    """The waiting thread gets Celery's exception while the step runs on the pool, and the step is told."""
    # A test before this one may have had a child killed: its replacement comes in its own time.
    wait_until(lambda: len(worker.children()) == worker.spec.concurrency, within_s=10, what="all children")
    children = {child.pid for child in worker.children()}
    with pytest.raises(SoftTimeLimitExceeded):
        submit(options.soft, journal).get(timeout=WAIT_S)
    assert journals.wait(journal, 2)[1] == "stopped"
    assert {child.pid for child in worker.children()} == children


@pytest.mark.parametrize("task", [options.soft_retried, options.soft_retried_kept], ids=["no store", "store"])
def test_a_soft_limit_may_be_retried(task: Any, urls: Urls, journals: Journals, journal: str) -> None:
    """autoretry_for matches it, as on any task, and the row ends with Celery."""
    with pytest.raises(SoftTimeLimitExceeded):
        submit(task, journal).get(timeout=WAIT_S)
    lines = journals.wait(journal, 4)
    # The next delivery may begin, in the other child, before the step of this one has written that it was stopped.
    assert sorted(line.split()[0] for line in lines) == ["started", "started", "stopped", "stopped"]
    if task is options.soft_retried_kept:
        assert run_row(urls, journal)[:3] == ("FAILED", 1, 0)


def test_limits_are_the_callers_too(journals: Journals, journal: str) -> None:
    """soft_time_limit= of one submission."""
    with pytest.raises(SoftTimeLimitExceeded):
        submit(options.unlimited, journal, soft_time_limit=1).get(timeout=WAIT_S)
    assert journals.wait(journal, 2)[1] == "stopped"


def test_queue_routes_the_task() -> None:
    """queue= of the declaration, and of one submission."""
    assert options.routed.delay(*JOB).get(timeout=WAIT_S).text.startswith("special ")
    assert options.plain.delay(*JOB).get(timeout=WAIT_S).text.startswith("celery ")
    assert options.plain.apply_async(JOB, queue="special").get(timeout=WAIT_S).text.startswith("special ")


def test_a_queue_that_nobody_serves_keeps_the_job(urls: Urls) -> None:
    """The job waits where it was sent."""
    options.routed.apply_async(JOB, queue="later")
    assert queue_length(urls.broker, "later") == 1


def test_rate_limit_spaces_the_starts(journals: Journals, journal: str) -> None:
    """Two a second: the third start comes a second after the first."""
    for result in [submit(options.rated, journal) for _ in range(3)]:
        result.get(timeout=WAIT_S)
    first, _, third = (float(line) for line in journals.read(journal))
    assert third - first >= 0.9


def test_an_expired_job_is_revoked() -> None:
    """expires= in the past: the worker does not start it, and the promise says so."""
    result = options.plain.apply_async(JOB, expires=datetime.now(UTC) - timedelta(seconds=5))
    with pytest.raises(TaskRevokedError, match="expired"):
        result.get(timeout=WAIT_S)
    assert options.plain.apply_async(JOB, expires=60).get(timeout=WAIT_S).text.startswith("celery ")


def test_ignore_result_stores_nothing(journals: Journals, journal: str) -> None:
    """The job runs, and its promise stays empty."""
    result = submit(options.silent, journal)
    journals.wait(journal, 1)
    assert result.state == "PENDING"
    assert result.get(timeout=WAIT_S) is None


def test_priority_travels() -> None:
    """As with any task of the Redis transport."""
    assert options.plain.apply_async(JOB, priority=3).get(timeout=WAIT_S) == Label(text="celery 3")


def test_a_countdown_delays_the_start(journals: Journals, journal: str) -> None:
    """countdown= waits before the first delivery."""
    before = datetime.now(UTC).timestamp()
    submit(options.plain, journal, countdown=1).get(timeout=WAIT_S)
    assert float(journals.read(journal)[0]) - before >= 1.0


def test_a_revoked_job_never_starts(worker: WorkerProcess, journals: Journals, journal: str) -> None:
    """revoke() before the start, as with any task."""
    result = submit(options.plain, journal, countdown=1)
    result.revoke()
    with pytest.raises(TaskRevokedError):
        result.get(timeout=WAIT_S)
    assert journals.read(journal) == []


def test_declaring_and_serving_warns_of_nothing(worker: WorkerProcess, urls: Urls) -> None:
    """No deprecation of ours or of what we call reaches users."""
    code = "from tests.integration.apps import options; options.app.finalize(); options.routed.name"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=urls.environment,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "DeprecationWarning" not in worker.read_log()


@pytest.fixture(scope="module")
def threads_worker(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """A worker with threads, on a queue of its own."""
    directory = tmp_path_factory.mktemp("threads")
    with serving(app, urls, directory, pool="threads", args=["-Q", "threads"]) as started:
        yield started


@pytest.mark.parametrize("task", [options.soft, options.hard], ids=["soft", "hard"])
def test_a_limit_is_enforced_where_celery_ignores_it(
    task: Any, threads_worker: WorkerProcess, journals: Journals, journal: str
) -> None:
    """On threads the run's own deadline ends the task with Celery's exception, and stops its step."""
    with pytest.raises(SoftTimeLimitExceeded):
        submit(task, journal, queue="threads").get(timeout=WAIT_S)
    assert journals.wait(journal, 2)[1] == "stopped"
    assert options.plain.apply_async(JOB, queue="threads").get(timeout=WAIT_S).text.startswith("threads ")
    assert threads_worker.running
