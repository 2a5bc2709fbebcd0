from __future__ import annotations

from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

from docket_celery import (
    AbortError,
    FixedBackoff,
    Graph,
    GraphTask,
    RetryPolicy,
    RunTimedOut,
    StepFailed,
    StoreUnavailable,
)
from docket_celery.store.records import Lease
from docket_celery.task.retries import backoff_s, matches, park_s, with_causes
from tests.unit.protos.shop_pb2 import Label, Order, Shipment

steps = Graph("retrying")


@steps.step(retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0), redeliver=True))
def ship(order: Order) -> Shipment:
    """A step that asks for another delivery."""
    return Shipment(tracking_id=order.order_id)


@steps.step
def write(shipment: Shipment) -> Label:
    """A step that does not."""
    return Label(text=shipment.tracking_id)


def task_with(**options: Any) -> Any:
    """Return a task's class with these retry options."""

    class Write(GraphTask[[Order], Label]):
        graph = steps
        default_retry_delay = 7
        retry_jitter = False

    for name, value in options.items():
        setattr(Write, name, value)
    return Write


def failed(cause: BaseException, step: str = "write", *, retriable: bool = True) -> StepFailed:
    """Return a step's failure."""
    return StepFailed.from_cause(step, 1, retriable, cause)


def lease(failures: int) -> Lease:
    """Return the lease of a run that was retried so often."""
    fields: dict[str, Any] = dict.fromkeys(Lease.__dataclass_fields__, 0)
    texts = {"graph": "g", "execution_id": "x", "owner": "o"}
    return Lease(**{**fields, **{k: v for k, v in texts.items() if k in fields}, "failures": failures})


BUSY = task_with(autoretry_for=(OSError,))


@pytest.mark.parametrize(
    ("error", "wait_s"),
    [
        (failed(BrokenPipeError()), 7.0),
        (failed(OSError(), retriable=False), 7.0),
        (OSError(), 7.0),
        (failed(ValueError()), None),
        (ValueError(), None),
        (AbortError("no", OSError()), None),
        (failed(ValueError(), "ship"), 7.0),
        (failed(ValueError(), "ship", retriable=False), None),
        (RunTimedOut("x", 1.0), None),
    ],
)
def test_an_error_or_its_cause_decides(error: BaseException, wait_s: float | None) -> None:
    """autoretry_for, the step's own policy, and never an AbortError."""
    assert park_s(BUSY, error, None) == wait_s


@pytest.mark.parametrize("error", [Ignore(), Reject(), Retry()])
def test_celerys_own_words_are_no_failures(error: Exception) -> None:
    """A step that raises them has decided, whatever autoretry_for names."""
    assert park_s(task_with(autoretry_for=(Exception,)), error, None) is None


def test_what_shall_not_be_retried_wins() -> None:
    """Over autoretry_for and over the step's policy."""
    task = task_with(autoretry_for=(Exception,), dont_autoretry_for=(OSError,))
    assert park_s(task, failed(BrokenPipeError()), None) is None
    assert park_s(task, failed(BrokenPipeError(), "ship"), None) is None
    assert park_s(task, failed(ValueError()), None) == 7.0


def test_a_passed_limit_reads_as_celerys_error() -> None:
    """Where the run enforces the limit, autoretry_for names Celery's exception all the same."""
    task = task_with(autoretry_for=(SoftTimeLimitExceeded,))
    assert park_s(task, RunTimedOut("x", 1.0), None) == 7.0
    assert park_s(task, SoftTimeLimitExceeded(), None) == 7.0


@pytest.mark.parametrize(
    ("options", "last"),
    [({}, 2), ({"declared_max_retries": 1}, 0), ({"retry_kwargs": {"max_retries": 5, "countdown": 7}}, 4)],
)
def test_the_row_counts_the_retries(options: dict[str, Any], last: int) -> None:
    """With a lease, the declared number bounds what its row has counted."""
    task = task_with(autoretry_for=(OSError,), **options)
    assert park_s(task, OSError(), lease(last)) == 7.0
    assert park_s(task, OSError(), lease(last + 1)) is None


def test_without_a_row_celerys_count_bounds_the_retries() -> None:
    """A job that only caches has none; deliveries that did not reach the database do not count."""
    task = task_with(autoretry_for=(OSError,))
    assert park_s(task, OSError(), None, retries=6, outages=4) == 7.0
    assert park_s(task, OSError(), None, retries=7, outages=4) is None


def test_no_number_is_no_bound() -> None:
    """max_retries=None means what it means to Celery."""
    task = task_with(autoretry_for=(OSError,), declared_max_retries=None)
    assert park_s(task, OSError(), lease(10_000)) == 7.0


def test_a_database_that_does_not_answer_uses_up_no_retry() -> None:
    """However often, in growing waits up to a bound."""
    error = StoreUnavailable("save", "gone")
    task = task_with(declared_max_retries=0, default_retry_delay=1)
    first, late = park_s(task, error, lease(99)), park_s(task, error, None, outages=99)
    assert first is not None
    assert late is not None
    assert 0.5 <= first <= 1.0
    assert 7.5 <= late <= 15.0


@pytest.mark.parametrize(
    ("options", "waits_s"),
    [
        ({"retry_backoff": True}, [1, 2, 4]),
        ({"retry_backoff": 3}, [3, 6, 12]),
        ({"retry_backoff": True, "retry_backoff_max": 3}, [1, 2, 3]),
        ({}, [7, 7, 7]),
        ({"retry_kwargs": {"countdown": 0}}, [0, 0, 0]),
    ],
)
def test_waits_are_celerys_own(options: dict[str, Any], waits_s: list[float]) -> None:
    """Counted by Celery without a lease, and by the row with one."""
    task = task_with(autoretry_for=(OSError,), declared_max_retries=None, **options)
    assert [backoff_s(task, n) for n in range(3)] == waits_s
    assert [park_s(task, OSError(), None, retries=n) for n in range(3)] == waits_s
    assert [park_s(task, OSError(), lease(n), retries=50) for n in range(3)] == waits_s


def test_jitter_stays_within_the_wait() -> None:
    """As Celery draws it."""
    task = task_with(retry_backoff=8, retry_jitter=True)
    assert all(0 <= backoff_s(task, 2) <= 32 for _ in range(100))


def test_causes_are_matched_after_transport() -> None:
    """By importable name, when the exception itself is gone."""
    error = failed(BrokenPipeError())
    error.__cause__ = None
    assert matches(error, (OSError,))
    assert isinstance(error, with_causes((OSError,)))
    assert not isinstance(error, with_causes((ValueError,)))
