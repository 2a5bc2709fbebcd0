"""``python -m examples.movies``: five movies in process; the figures are over all of them."""

from __future__ import annotations

from examples.movies.graph import MOVIES, movie_graph
from examples.movies.movies_pb2 import BatchStats, EnrichedMovie, Movie


def main() -> None:
    """Print the plan, the figures and the movies in their order."""
    print("plan:", " -> ".join(movie_graph.plan(list[EnrichedMovie], list[Movie])))
    stats = movie_graph.execute(BatchStats, MOVIES)
    hours = stats.total_runtime_minutes / 60
    print(f"count:          {stats.count} movies")
    print(f"average rating: {stats.average_rating:.2f}")
    print(f"total runtime:  {stats.total_runtime_minutes} min ({hours:.1f} hours)")
    for movie in movie_graph.execute_batch(EnrichedMovie, MOVIES, max_concurrency=3):
        mark = "+" if movie.above_average else " "
        rating, percentile = movie.original.rating, movie.rating_percentile
        print(f"{mark} {movie.original.title} ({rating:.1f} rating, percentile: {percentile:.0f}%)")


if __name__ == "__main__":
    main()
