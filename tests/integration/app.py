"""The Celery app of the tests' workers.

Broker, results and database come from the environment: CELERY_BROKER_URL, CELERY_RESULT_BACKEND and
DOCKET_CELERY_DATABASE_URL, which Celery and this library read by themselves.
"""

from __future__ import annotations

from celery import Celery

app = Celery("tests.integration.app")
app.conf.broker_connection_retry_on_startup = True


@app.task
def ping(word: str = "pong") -> str:
    """Answer with *word*."""
    return word
