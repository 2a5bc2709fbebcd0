"""Batches whose children die while a chord counts its parts, where the execution id says so.

``uncounted-...``: when its second part is to be counted; ``unwoken-...``: when all parts of its first stage are
counted and the body is to be published.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

from celery import Celery, signals
from celery.backends.redis import RedisBackend
from celery.canvas import Signature

from docket_celery import graph_task
from examples.documents.documents_pb2 import Document
from examples.movies.movies_pb2 import Movie
from tests.integration.apps.batches import acting
from tests.integration.apps.journal import RESULTS, note

app = Celery("tests.integration.apps.joins")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1


@graph_task(app, acting, name="joins.place_all", chunk_size=2)
def place_all(movies: list[Movie]) -> list[Document]:
    """Two stages with an aggregate between."""
    raise NotImplementedError


def _die(headers: Mapping[str, Any] | None, when: str, at: int) -> None:
    run = str((headers or {}).get("docket_execution_id", ""))
    if run.startswith(when) and note(f"joins/{run}", os.getpid()) == at:
        os.kill(os.getpid(), signal.SIGKILL)


class _Dying:
    """Celery's own way of joining, with a death before it."""

    count: Any = RedisBackend.on_chord_part_return
    publish: Any = Signature.delay


def _count(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    _die(request.headers, "uncounted", 2)
    return _Dying.count(self, request, *args, **kwargs)


def _publish(self: Any, *args: Any, **kwargs: Any) -> Any:
    _die(self.options.get("headers"), "unwoken", 1)
    return _Dying.publish(self, *args, **kwargs)


@signals.worker_init.connect(weak=False)
def _arm(**_: Any) -> None:
    """In the worker alone: the test's own process imports this module too, and may run a worker in a thread."""
    if RESULTS not in os.environ:
        return
    RedisBackend.on_chord_part_return = _count  # type: ignore[method-assign, unused-ignore]
    Signature.delay = _publish  # type: ignore[method-assign, unused-ignore]
