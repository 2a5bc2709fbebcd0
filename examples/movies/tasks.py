"""The movies as batch tasks: lists in, lists out, the work in between on all workers of the queue."""

from __future__ import annotations

from celery import Celery

from docket_celery import Graph, StepContext, configure, graph_task
from examples.movies.graph import movie_graph
from examples.movies.movies_pb2 import EnrichedMovie, Movie

app = Celery("examples.movies.tasks")
configure(app)

catalogue_graph = Graph("catalogue")


@catalogue_graph.step
def review(movie: Movie, ctx: StepContext) -> EnrichedMovie:
    """Runs for each movie, and takes as long as a service that answers in 5 ms."""
    ctx.sleep(0.005)
    return EnrichedMovie(original=movie, above_average=movie.rating > 5)


@graph_task(app, movie_graph, chunk_size=2)
def enrich(movies: list[Movie]) -> list[EnrichedMovie]:
    """The five movies: an aggregate over all of them, then a stage of chunks of two."""
    raise NotImplementedError


@graph_task(app, catalogue_graph, max_concurrency=8)
def review_catalogue(movies: list[Movie]) -> list[EnrichedMovie]:
    """A batch of any size, at most eight movies at once over all workers."""
    raise NotImplementedError
