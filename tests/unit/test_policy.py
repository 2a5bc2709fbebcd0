from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from docket_celery.plan.options import ExponentialBackoff, FixedBackoff, RetryPolicy, to_seconds

SECONDS = st.floats(0, 1e6, allow_nan=False)


@given(
    initial=SECONDS,
    factor=st.floats(1, 1e6, allow_nan=False),
    maximum=SECONDS,
    attempt=st.integers(1, 10_000),
    jitter=st.booleans(),
)
def test_exponential_waits_stay_within_bounds(
    initial: float, factor: float, maximum: float, attempt: int, jitter: bool
) -> None:
    """No wait is negative or over the maximum, however often was tried."""
    backoff = ExponentialBackoff(initial=initial, factor=factor, maximum=maximum, jitter=jitter)
    assert 0 <= backoff.delay_s(attempt) <= maximum


@given(initial=SECONDS, attempt=st.integers(1, 60), share=st.floats(0, 1, allow_nan=False))
def test_jitter_draws_evenly_from_zero_to_the_full_wait(initial: float, attempt: int, share: float) -> None:
    """The bounds that are drawn from are 0 and the wait without jitter."""
    plain = ExponentialBackoff(initial=initial, jitter=False).delay_s(attempt)
    drawn = ExponentialBackoff(initial=initial).delay_s(attempt, lambda low, high: low + (high - low) * share)
    assert drawn == pytest.approx(plain * share)


def test_exponential_waits_double_up_to_the_maximum() -> None:
    """0.1, 0.2, 0.4 seconds and so on: four waits for five attempts."""
    backoff = ExponentialBackoff(jitter=False, maximum=timedelta(seconds=0.5))
    assert [backoff.delay_s(attempt) for attempt in (1, 2, 3, 4)] == pytest.approx([0.1, 0.2, 0.4, 0.5])


@pytest.mark.parametrize("delay", [0, 1.5, timedelta(milliseconds=1500)])
def test_fixed_waits_are_all_alike(delay: Any) -> None:
    """Seconds or a timedelta; 0 is legal."""
    assert {FixedBackoff(delay).delay_s(attempt) for attempt in (1, 7, 100)} == {to_seconds(delay, "delay")}


@pytest.mark.parametrize(
    "value", [-1, float("nan"), float("inf"), True, "5", None, timedelta(seconds=-1), 1e12]
)
def test_what_is_no_length_of_time_is_refused(value: Any) -> None:
    """The error names the option."""
    with pytest.raises(ValueError, match="the timeout must"):
        to_seconds(value, "the timeout")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_attempts": 0}, "counts the first call, so at least 1; got 0"),
        ({"max_attempts": True}, "counts the first call"),
        ({"max_attempts": 2.5}, "counts the first call"),
        ({"backoff": 5}, "backoff must be FixedBackoff"),
    ],
)
def test_policies_that_cannot_be_followed_are_refused(options: dict[str, Any], text: str) -> None:
    """At once, not at the first retry."""
    with pytest.raises(ValueError, match=text):
        RetryPolicy(**options)


@pytest.mark.parametrize("options", [{"initial": -1}, {"maximum": float("inf")}, {"factor": 0.5}])
def test_backoffs_that_cannot_be_followed_are_refused(options: dict[str, Any]) -> None:
    """At once, with the name of the option."""
    with pytest.raises(ValueError, match=f"ExponentialBackoff.{next(iter(options))}"):
        ExponentialBackoff(**options)
