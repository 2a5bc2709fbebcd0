"""The app."""

from __future__ import annotations

from celery import Celery

from docket_celery import configure
from workers import settings

app = Celery("workers", include=["workers.orders", "workers.users", "workers.videos"])
app.conf.update(
    broker_url=settings.BROKER_URL,
    result_backend=settings.RESULT_BACKEND,
    docket_database_url=settings.DATABASE_URL,
)
configure(app)
