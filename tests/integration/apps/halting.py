"""A batch of which one item stops all others, and whose aggregate waits until a test lets it go.

A movie's title is the journal. The item that ``context={"aborts": ...}`` names stops the batch once the journal
``JOURNAL/go`` has a line; the others work until they are stopped, or until it has one where none is named.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import redis
from celery import Celery

from docket_celery import AbortError, Graph, StepContext, graph_task
from examples.movies.movies_pb2 import BatchStats, EnrichedMovie, Movie
from tests.integration.apps.journal import RESULTS, note

app = Celery("tests.integration.apps.halting")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1

halting = Graph("halting")


@halting.step
def work(movie: Movie, ctx: StepContext) -> EnrichedMovie:
    """Work until it is over."""
    aborts = ctx.values.get("aborts")
    note(f"{movie.title}/began", ctx.item)
    with redis.Redis.from_url(os.environ[RESULTS]) as client:
        while not client.exists(f"journal:{movie.title}/go") or aborts not in {None, ctx.item}:
            if ctx.cancelled.wait(0.02):
                note(f"{movie.title}/cancelled", ctx.item)
                break
    if aborts == ctx.item:
        raise AbortError("stop it all")
    return EnrichedMovie(original=movie)


@halting.aggregate
def gather(worked: Iterable[EnrichedMovie], ctx: StepContext) -> BatchStats:
    """What is made of all, once a test lets it."""
    note(f"{ctx.execution_id}/gathering", os.getpid())
    with redis.Redis.from_url(os.environ[RESULTS]) as client:
        while not client.exists(f"journal:{ctx.execution_id}/gather"):
            ctx.sleep(0.02)
    return BatchStats(count=sum(1 for _ in worked))


@graph_task(app, halting, chunk_size=2)
def work_on_all(movies: list[Movie]) -> list[EnrichedMovie]:
    """One stage."""
    raise NotImplementedError


@graph_task(app, halting, chunk_size=2)
def gather_all(movies: list[Movie]) -> BatchStats:
    """One stage, then one message."""
    raise NotImplementedError
