"""Waits are rounded up to whole seconds where the broker itself delays messages, and nowhere else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery

from docket_celery.task.retries import whole_seconds


def app_on(broker: str, queue_type: str) -> Celery:
    """Return an app whose broker nobody asks."""
    app = Celery("delays", broker=broker, set_as_current=False)
    app.conf.task_default_queue_type = queue_type
    return app


@pytest.mark.parametrize(
    ("given", "wanted"), [(0.01, 1), (1, 1), (1.2, 2), (30.0, 30), (0, 0), (None, None), (-1, -1)]
)
def test_the_broker_waits_whole_seconds(given: float | None, wanted: int | None) -> None:
    """Rounded up, so that nothing comes before its time."""
    assert whole_seconds(app_on("amqp://", "quorum"), {"countdown": given})["countdown"] == wanted


@pytest.mark.parametrize(("broker", "kind"), [("amqp://", "classic"), ("redis://", "quorum")])
def test_other_queues_wait_as_they_are_told(broker: str, kind: str) -> None:
    """There the worker waits."""
    options: dict[str, Any] = {"countdown": 0.2, "eta": datetime.now(UTC)}
    assert whole_seconds(app_on(broker, kind), options) == options


@pytest.mark.parametrize(("left_s", "wanted"), [(0.5, 1), (1.5, 2), (60, None), (-5, None)])
def test_an_eta_close_by_becomes_a_countdown(left_s: float, wanted: int | None) -> None:
    """A far one stays what it is: the worker waits for the rest of a second."""
    eta = datetime.now(UTC) + timedelta(seconds=left_s)
    for each in (eta, eta.isoformat()):
        found = whole_seconds(app_on("amqp://", "quorum"), {"eta": each})
        assert (found.get("countdown"), found["eta"]) == (wanted, each if wanted is None else None)
