"""Waits of messages where the broker itself delays them: in whole seconds, of which it needs at least one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from celery import Celery
from celery.utils import time as celery_time
from celery.utils.quorum_queues import detect_quorum_queues

_MARGIN_S = 2.0
"""An ``eta`` nearer than this may be less than a second away when Celery looks at it."""


def whole_seconds(app: Celery, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a submission with a wait that the broker of *app* can take.

    On quorum queues Celery has RabbitMQ delay a message by whole seconds, cuts off the fraction, and fails to publish
    where nothing is left. The wait is rounded up there; elsewhere nothing changes.

    Args:
        app: Whose broker and queues they are.
        options: Celery's, with ``countdown`` in seconds or ``eta``.
    """
    found = dict(options)
    times: Any = celery_time  # the stubs leave a function out
    countdown, eta = found.get("countdown"), times.maybe_iso8601(found.get("eta"))
    if not (countdown or eta) or not delays_in_broker(app):
        return found
    if eta is None:
        return found | {"countdown": math.ceil(float(countdown or 0))}
    left_s = float(times.subtract_datetimes(eta, app.now()).total_seconds())
    return found | {"countdown": math.ceil(left_s), "eta": None} if 0 < left_s < _MARGIN_S else found


def delays_in_broker(app: Celery) -> bool:
    """Tell whether Celery leaves the waits of *app*'s messages to the broker, as it finds out for each of them."""
    pool: Any = app.producer_pool
    return bool(detect_quorum_queues(app, pool.connections.connection.transport.driver_type)[0])
