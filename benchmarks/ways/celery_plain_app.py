"""A Celery app that knows nothing of this library."""

from __future__ import annotations

from celery import Celery

from benchmarks.ways import celery_ready

app = Celery("benchmarks.ways.celery_plain_app")
celery_ready.prepare(app)
