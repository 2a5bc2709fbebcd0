"""What every app of the benchmarks does: it has a queue of its own, and its worker tells when it is ready."""

from __future__ import annotations

import os

from celery import Celery
from celery.signals import worker_ready

VARIABLE = "BENCH_READY_FD"
QUEUE_VARIABLE = "BENCH_QUEUE"


def prepare(app: Celery) -> None:
    """Name the queue of *app*; write to the pipe of the environment's variable when its worker takes tasks."""
    app.conf.task_default_queue = os.environ.get(QUEUE_VARIABLE, "celery")
    worker_ready.connect(_write, weak=False)


def _write(**_: object) -> None:
    if VARIABLE in os.environ:
        os.write(int(os.environ[VARIABLE]), b"ready")
