"""Batch tasks whose items wait until a test lets them go, and note when they begin and end.

A movie's title is the journal; its rating is its number. Items wait while there are fewer lines in the journal
``JOURNAL/go`` than their number + 1; ``context={"open": true}`` lets all of them pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import redis
from celery import Celery

from docket_celery import BatchResult, Graph, Scope, StepContext, graph_task
from examples.movies.movies_pb2 import BatchStats, EnrichedMovie, Movie
from tests.integration.apps.journal import RESULTS, note

if TYPE_CHECKING:
    from tests.integration.apps.serving import Urls

app = Celery("tests.integration.apps.paced")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1

pacing = Graph("pacing")


@pacing.step
def look(movie: Movie, ctx: StepContext) -> EnrichedMovie:
    """Note the beginning, wait for leave, note the end."""
    note(f"{movie.title}/began", ctx.item)
    with redis.Redis.from_url(os.environ[RESULTS]) as client:
        count = f"counter:{movie.title}"
        note(f"{movie.title}/at-once", client.incr(count))
        try:
            while not ctx.values.get("open") and client.llen(f"journal:{movie.title}/go") <= movie.rating:  # type: ignore[operator, unused-ignore]
                ctx.sleep(0.02)
            if ctx.values.get("fails") == ctx.item:
                raise ConnectionError("the service is away")
        except BaseException as error:
            note(f"{movie.title}/stopped", f"{ctx.item} {type(error).__name__}")
            raise
        finally:
            client.decr(count)
    note(f"{movie.title}/ended", ctx.item)
    return EnrichedMovie(original=movie, rating_percentile=movie.rating)


@pacing.aggregate(persist=Scope.WORKFLOW)
def gather(looked: Iterable[EnrichedMovie], ctx: StepContext) -> BatchStats:
    """What is made of all."""
    count = sum(1 for _ in looked)
    note(f"gather/{ctx.execution_id}", count)
    return BatchStats(count=count)


@graph_task(app, pacing, chunk_size=2)
def look_at_all(movies: list[Movie]) -> list[EnrichedMovie]:
    """One stage."""
    raise NotImplementedError


@graph_task(app, pacing, chunk_size=2)
def look_at_some(movies: list[Movie]) -> BatchResult[EnrichedMovie]:
    """One stage whose items may fail."""
    raise NotImplementedError


@graph_task(app, pacing, chunk_size=2)
def gather_all(movies: list[Movie]) -> BatchStats:
    """One stage, then one message."""
    raise NotImplementedError


@graph_task(app, pacing, chunk_size=1, rate_limit="4/s")
def look_slowly(movies: list[Movie]) -> list[EnrichedMovie]:
    """One stage, few tasks a second."""
    raise NotImplementedError


@app.task
def add_one(stats: BatchStats) -> int:
    """A plain task behind a batch."""
    return stats.count + 1


def movies(journal: str, count: int) -> list[Movie]:
    """Return that many movies, rated by their number."""
    return [Movie(title=journal, rating=number) for number in range(count)]


def let_go(urls: Urls, journal: str, count: int) -> None:
    """Let as many items pass."""
    with redis.Redis.from_url(urls.results) as client:
        client.rpush(f"journal:{journal}/go", *["go"] * count)
