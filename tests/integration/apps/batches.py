"""Batch tasks whose items do what their titles say, and note that they were worked on.

A title is ``JOURNAL:WHAT:NAME``; WHAT may be ``fail``, ``fail-once``, ``abort``, ``kill-once`` or ``kill`` (the
process that runs the item), or ``fall-once`` (the whole worker at once).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from typing import Any

from celery import Celery, current_task

from docket_celery import AbortError, BatchResult, Graph, GraphTask, Scope, StepContext, graph_task
from examples.documents.documents_pb2 import Document, DocumentSummary
from examples.documents.graph import document_graph
from examples.movies.graph import movie_graph
from examples.movies.movies_pb2 import BatchStats, EnrichedMovie, Movie
from tests.integration.apps.journal import note

app = Celery("tests.integration.apps.batches")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1

acting = Graph("acting")


def act(movie: Movie, ctx: StepContext) -> None:
    """Do what the title says."""
    journal, what, name = movie.title.split(":")
    times = note(f"{journal}/{ctx.step}/{name}", os.getpid())
    note(f"{journal}/{ctx.step}", name)
    if what == "fail" or (what == "fail-once" and times == 1):
        raise ConnectionError("the service is away")
    if what == "abort":
        raise AbortError("stop it all")
    if what == "kill" or (what == "kill-once" and times == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fall-once" and times == 1:
        os.killpg(0, signal.SIGKILL)


@acting.step
def rate(movie: Movie, ctx: StepContext) -> EnrichedMovie:
    """The first stage."""
    act(movie, ctx)
    return EnrichedMovie(original=movie, rating_percentile=movie.rating)


@acting.aggregate
def sum_up(rated: Iterable[EnrichedMovie], ctx: StepContext) -> BatchStats:
    """Between the stages."""
    ratings = [each.rating_percentile for each in rated]
    note(f"sum_up/{ctx.execution_id}", len(ratings))
    return BatchStats(count=len(ratings), max_rating=max(ratings, default=0.0))


@acting.step(persist=Scope.WORKFLOW)
def place(rated: EnrichedMovie, stats: BatchStats, ctx: StepContext) -> Document:
    """The second stage; each item is saved by itself."""
    note(f"place/{ctx.execution_id}", f"{ctx.item} {ctx.idempotency_key}")
    return Document(
        title=f"{ctx.item}: {rated.rating_percentile:g} of {stats.max_rating:g} {rated.original.title}"
    )


@graph_task(app, movie_graph)
def enrich(movies: list[Movie]) -> list[EnrichedMovie]:
    """The guide's example."""
    raise NotImplementedError


@graph_task(app, document_graph, chunk_size=1)
def summarize(document: Document) -> DocumentSummary:
    """A value that is split in mid-graph."""
    raise NotImplementedError


@graph_task(
    app, acting, name="batches.rate_again", autoretry_for=(ConnectionError,), retry_kwargs={"countdown": 0.2}
)
def rate_again(movie: Movie) -> EnrichedMovie:
    """One movie, once more after a failure, at once."""
    raise NotImplementedError


@graph_task(app, acting, chunk_size=2)
def rate_all(movies: list[Movie]) -> list[EnrichedMovie]:
    """One stage."""
    raise NotImplementedError


@graph_task(app, acting, chunk_size=2)
def rate_some(movies: list[Movie]) -> BatchResult[EnrichedMovie]:
    """One stage whose items may fail."""
    raise NotImplementedError


@graph_task(app, acting, chunk_size=2)
def sum_all(movies: list[Movie]) -> BatchStats:
    """One stage, then one message."""
    raise NotImplementedError


@graph_task(app, acting, name="batches.sum_rated")
def sum_rated(rated: list[EnrichedMovie]) -> BatchStats:
    """No stage: the result of another batch is summed up."""
    raise NotImplementedError


@graph_task(app, acting, chunk_size=2)
def place_all(movies: list[Movie]) -> list[Document]:
    """Two stages with an aggregate between."""
    raise NotImplementedError


@graph_task(app, acting, chunk_size=2)
def place_some(movies: list[Movie]) -> BatchResult[Document]:
    """Two stages whose items may fail."""
    raise NotImplementedError


class SumSome(GraphTask[[list[Movie]], BatchStats]):
    """One stage whose items may fail, then one message."""

    graph = acting
    on_error = "collect"
    max_failed = 0.5
    chunk_size = 2


sum_some = app.register_task(SumSome())


telling = Graph("telling")


@telling.step
def tell(movie: Movie, ctx: StepContext) -> Document:
    """What the task that runs an item knows."""
    request = current_task.request
    tenant = (request.headers or {}).get("tenant")
    info: Any = request.delivery_info
    way = f"{info['routing_key']} {info['priority']}"
    return Document(
        title=f"{ctx.execution_id} {ctx.values['user']} {tenant} {current_task.name} {request.root_id} {way}"
    )


@graph_task(app, telling, name="batches.context_of")
def context_of(movies: list[Movie]) -> list[Document]:
    """What parts of a batch know."""
    raise NotImplementedError


@app.task
def count_them(found: list[EnrichedMovie]) -> int:
    """A plain task that takes a batch's result."""
    return len(found)
