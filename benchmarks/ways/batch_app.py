"""A batch of no-op items, and the same as a plain chord."""

from __future__ import annotations

from celery import Celery

from benchmarks.ways import celery_ready
from docket_celery import Graph, graph_task
from examples.movies.movies_pb2 import EnrichedMovie, Movie

app = Celery("benchmarks.ways.batch_app")
app.conf.worker_prefetch_multiplier = 16
celery_ready.prepare(app)
graph = Graph("benchmark-batch")


@graph.step
def look_at(movie: Movie) -> EnrichedMovie:
    """Do nothing with an item."""
    return EnrichedMovie(above_average=movie.rating > 5)


@graph_task(app, graph)
def look_at_all(movies: list[Movie]) -> list[EnrichedMovie]:
    """The batch."""
    raise NotImplementedError


@app.task
def look_at_one(rating: float) -> bool:
    """The same as a plain task."""
    return rating > 5


@app.task
def count(found: list[bool]) -> int:
    """The plain chord's body."""
    return len(found)
