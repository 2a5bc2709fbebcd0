"""One aggregate sees all movies; one step sees each of them with what the aggregate found."""

from __future__ import annotations

from docket_celery import Graph
from examples.movies.movies_pb2 import BatchStats, EnrichedMovie, Movie

movie_graph = Graph("movies")


@movie_graph.aggregate
def compute_stats(movies: list[Movie]) -> BatchStats:
    """Runs once for the whole batch, which may be empty."""
    ratings = [movie.rating for movie in movies]
    return BatchStats(
        count=len(movies),
        average_rating=sum(ratings) / len(ratings) if ratings else 0.0,
        max_rating=max(ratings, default=0.0),
        min_rating=min(ratings, default=0.0),
        total_runtime_minutes=sum(movie.runtime_minutes for movie in movies),
    )


@movie_graph.step
def enrich_movie(movie: Movie, stats: BatchStats) -> EnrichedMovie:
    """Runs for each movie. Where all ratings are equal there is no range to stand in: all are at its top."""
    rating_range = stats.max_rating - stats.min_rating
    share = (movie.rating - stats.min_rating) / rating_range if rating_range else 1.0
    return EnrichedMovie(
        original=movie, above_average=movie.rating > stats.average_rating, rating_percentile=100 * share
    )


MOVIES = [
    Movie(title="The Shawshank Redemption", year=1994, rating=9.3, runtime_minutes=142),
    Movie(title="The Godfather", year=1972, rating=9.2, runtime_minutes=175),
    Movie(title="The Dark Knight", year=2008, rating=9.0, runtime_minutes=152),
    Movie(title="The Godfather Part II", year=1974, rating=9.0, runtime_minutes=202),
    Movie(title="12 Angry Men", year=1957, rating=9.0, runtime_minutes=96),
]
