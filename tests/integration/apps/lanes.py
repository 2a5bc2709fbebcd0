"""A batch in lanes whose children die around the message with which a lane goes on, where the execution id says so.

``unsent-...``: a chunk is done, and the message of the lane's next one is not published yet; ``sent-...``: it is, and
Celery has not heard that the chunk's task was replaced. The second chunk that gets there is hit; items wait then
until that chunk was delivered again.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import redis
from celery import Celery, Task, signals
from celery.exceptions import Ignore

from docket_celery import Graph, StepContext, graph_task
from examples.movies.movies_pb2 import EnrichedMovie, Movie
from tests.integration.apps.journal import RESULTS, note

app = Celery("tests.integration.apps.lanes")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1

moving = Graph("moving")


@moving.step
def move(movie: Movie, ctx: StepContext) -> EnrichedMovie:
    """Note that an item was worked on, and how many were at once."""
    run = ctx.execution_id
    with redis.Redis.from_url(os.environ[RESULTS]) as client:
        note(f"{run}/at-once", client.incr(f"counter:{run}"))
        try:
            while client.exists(f"journal:{run}/died") and not client.exists(f"journal:{run}/again"):
                ctx.sleep(0.02)
        finally:
            client.decr(f"counter:{run}")
    note(f"{run}/moved", ctx.item)
    return EnrichedMovie(original=movie)


@graph_task(app, moving, name="lanes.move_all", chunk_size=1, max_concurrency=2)
def move_all(movies: list[Movie]) -> list[EnrichedMovie]:
    """One stage."""
    raise NotImplementedError


_replace: Any = Task.replace


def _replace_or_die(self: Any, sig: Any) -> Any:
    """Replace a task as Celery does, with a death before or after it."""
    headers = self.request.headers or {}
    run, part = str(headers.get("docket_execution_id", "")), headers.get("docket_part") or {}
    dies = "lo" in part and run.startswith(("unsent", "sent")) and note(f"{run}/replaced", part["lo"]) == 2
    if dies:
        note(f"{run}/died", part["lo"])
    if dies and run.startswith("unsent"):
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        _replace(self, sig)
    except Ignore:
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if "lo" in part and self.request.retries:
            note(f"{run}/again", part["lo"])
        raise


@signals.worker_init.connect(weak=False)
def _arm(**_: Any) -> None:
    """In the worker alone: the test's own process imports this module too, and may run a worker in a thread."""
    if RESULTS not in os.environ:
        return
    Task.replace = _replace_or_die  # type: ignore[method-assign, unused-ignore]
