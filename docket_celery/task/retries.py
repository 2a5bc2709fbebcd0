"""When Celery delivers a run again, and how failures are matched: an error, or the cause of a step's failure."""

from __future__ import annotations

import logging
import math
import random
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from celery import Celery
from celery.exceptions import Reject, SoftTimeLimitExceeded, TaskPredicate
from celery.utils import time as celery_time
from celery.utils.quorum_queues import detect_quorum_queues
from celery.utils.time import get_exponential_backoff_interval

from docket_celery.errors import AbortError, RunTimedOut, StepFailed, StoreUnavailable
from docket_celery.store.records import Lease
from docket_celery.task.headers import PREPARED

if TYPE_CHECKING:
    from docket_celery.task.task import AnyTask

_logger = logging.getLogger("docket_celery.retries")
Kinds = tuple[type[BaseException], ...]
LONGEST_WAIT_S: Final = 15.0
"""Most seconds before a delivery that only waits: for the database, for another delivery, to tell an outcome."""
_MARGIN_S = 2.0
"""An ``eta`` nearer than this may be less than a second away when Celery looks at it."""


class _CausedBy(type):
    """Classes whose instances are errors of one kind and step failures caused by it."""

    kind: type[BaseException]

    def __instancecheck__(cls, error: object) -> bool:
        return matches(error, (cls.kind,))


def with_causes(kinds: Iterable[type[BaseException]]) -> tuple[Any, ...]:
    """Return classes for Celery's ``throws``, which it only uses with ``isinstance``."""
    return tuple(_CausedBy("CausedBy", (), {"kind": kind}) for kind in kinds)


def matches(error: object, kinds: Kinds) -> bool:
    """Tell whether *error* is of one of *kinds*, or is a step's failure caused by one."""
    if isinstance(error, kinds):
        return True
    return isinstance(error, StepFailed) and any(error.caused_by(kind) for kind in kinds)


def park_s(
    task: AnyTask,
    error: BaseException,
    lease: Lease | None,
    *,
    retries: int = 0,
    outages: int = 0,
) -> float | None:
    """Return in how many seconds Celery delivers a run again that *error* ended, or None to end it.

    Its lease counts its ordinary retries; without one they are Celery's *retries* but for *outages*: deliveries that
    did not reach the database.
    """
    if isinstance(error, StoreUnavailable):
        # Growing and spread, as all tasks wait for the database.
        longest_s = min(LONGEST_WAIT_S, task.default_retry_delay * 2.0 ** min(outages, 10))
        return longest_s * random.uniform(0.5, 1.0)  # noqa: S311 -- spreads load, keeps no secret
    failures = retries - outages if lease is None else lease.failures
    limit = task.retry_kwargs.get("max_retries", task.declared_max_retries)
    is_last = limit is not None and failures >= limit
    return None if is_last or not _may_retry(task, error) else backoff_s(task, failures)


def most_retries(task: AnyTask, error: BaseException, *, eager: bool, outages: int) -> int | None:
    """Return up to which count Celery may retry the task, counted as in `park_s`; None: the run's lease counts."""
    if isinstance(error, StoreUnavailable):
        # An outage ends, but not while an eager task tries.
        return task.declared_max_retries if eager else sys.maxsize
    if task.max_retries is None:
        return None
    limit: int | None = task.retry_kwargs.get("max_retries", task.max_retries)
    return None if limit is None else limit + outages


def backoff_s(task: AnyTask, retries: int) -> float:
    """Return Celery's own wait in seconds before retry number *retries* (from 0), from the task's options."""
    if task.retry_backoff:
        factor = int(max(1.0, float(task.retry_backoff)))
        return get_exponential_backoff_interval(
            factor, retries, int(task.retry_backoff_max), task.retry_jitter
        )
    return float(task.retry_kwargs.get("countdown", task.default_retry_delay))


def _may_retry(task: AnyTask, error: BaseException) -> bool:
    if isinstance(error, (TaskPredicate, AbortError)):
        # A step that raised Celery's own Ignore, Reject or Retry has decided itself.
        return False
    # Where Celery enforces no soft limit, passing it shows as RunTimedOut here and as Celery's error outside.
    shown = SoftTimeLimitExceeded() if isinstance(error, RunTimedOut) else error
    if matches(shown, tuple(task.dont_autoretry_for)):
        return False
    if isinstance(shown, StepFailed) and shown.retriable:
        failed = (
            planned.step.options.retry for planned in task.plan().steps if planned.step.name == shown.step
        )
        if any(policy is not None and policy.redeliver for policy in failed):
            return True
    return matches(shown, tuple(task.autoretry_for))


def keep(task_id: str | None, problem: Any) -> Reject:
    """Return what has the broker keep a delivery that could not be published again; not in a hot loop."""
    _logger.warning("task %s could not be published again, the broker keeps it: %s", task_id, problem)
    time.sleep(1.0)
    return Reject(problem, requeue=True)


def longest_wait_s(app: Celery) -> float:
    """Return how many seconds a delivery may wait: a third of the time for which Redis leaves it alone, at most.

    A longer countdown would multiply the message.
    """
    options = cast("dict[str, Any]", app.conf.broker_transport_options or {})
    return min(LONGEST_WAIT_S, float(options.get("visibility_timeout", 3600)) / 3)


def send_copy(task: Any, request: Any, countdown_s: float, headers: Mapping[str, Any]) -> None:
    """Publish a copy of a delivery, which uses up no retry. The worker took it in time: it expires no more."""
    changed: dict[str, Any] = {**(request.headers or {}), **headers}
    copy = task.signature_from_request(
        request, countdown=countdown_s, retries=request.retries, headers=changed, expires=None
    )
    copy.apply_async(add_to_parent=False, **{PREPARED: True})


def whole_seconds(app: Celery, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a submission with a wait that the broker of *app* can take.

    On quorum queues Celery has RabbitMQ delay a message by whole seconds, cuts off the fraction, and fails to publish
    where nothing is left. The wait is rounded up there; elsewhere nothing changes.
    """
    found = dict(options)
    times: Any = celery_time  # the stubs leave a function out
    countdown, eta = found.get("countdown"), times.maybe_iso8601(found.get("eta"))
    pool: Any = app.producer_pool
    if (
        not (countdown or eta)
        or not detect_quorum_queues(app, pool.connections.connection.transport.driver_type)[0]
    ):
        return found
    if eta is None:
        return found | {"countdown": math.ceil(float(countdown or 0))}
    left_s = float(times.subtract_datetimes(eta, app.now()).total_seconds())
    return found | {"countdown": math.ceil(left_s), "eta": None} if 0 < left_s < _MARGIN_S else found
