"""``python -m examples.movies``: five movies in process and on a worker, then two thousand that are streamed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress

from examples import local
from examples.movies.graph import MOVIES, movie_graph
from examples.movies.movies_pb2 import BatchStats, EnrichedMovie, Movie

CATALOGUE = 2000


def show_in_process() -> list[EnrichedMovie]:
    """Print the plan, the figures and the movies in their order."""
    print("plan:", " -> ".join(movie_graph.plan(list[EnrichedMovie], list[Movie])))
    stats = movie_graph.execute(BatchStats, MOVIES)
    hours = stats.total_runtime_minutes / 60
    print(f"count:          {stats.count} movies")
    print(f"average rating: {stats.average_rating:.2f}")
    print(f"total runtime:  {stats.total_runtime_minutes} min ({hours:.1f} hours)")
    movies = movie_graph.execute_batch(EnrichedMovie, MOVIES, max_concurrency=3)
    for movie in movies:
        mark = "+" if movie.above_average else " "
        rating, percentile = movie.original.rating, movie.rating_percentile
        print(f"{mark} {movie.original.title} ({rating:.1f} rating, percentile: {percentile:.0f}%)")
    return movies


def catalogue() -> Iterator[Movie]:
    """Yield movies one by one, as if they were read from a file: there is never a list of all."""
    for number in range(CATALOGUE):
        yield Movie(title=f"Movie {number}", year=1950 + number % 75, rating=number * 7 % 100 / 10)


def show_on_workers(expected: list[EnrichedMovie]) -> bool:
    """Do the same on a worker, then stream a bigger batch through it, with a progress bar; tell whether all came."""
    from examples.movies.tasks import enrich, review_catalogue

    same = enrich.delay(MOVIES).get(timeout=60) == expected
    print(f"on a worker:    {'the same' if same else 'something else'}")

    sent = review_catalogue.submit_batch(catalogue(), execution_id="catalogue-2026")
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reviewing", total=CATALOGUE)

        until = time.monotonic() + 120
        while not sent.ready() and time.monotonic() < until:
            # The database tells of each chunk that ends.
            stands = sent.progress()
            progress.update(bar, completed=0 if stands is None else stands.done)
            time.sleep(0.2)
        results = sent.stream(timeout=120)
        progress.update(bar, completed=CATALOGUE)

    count, best = 0, EnrichedMovie()
    for movie in results:
        count += 1
        best = max(best, movie, key=lambda each: each.original.rating)
    print(f"catalogue:      {count} movies, the best is {best.original.title} ({best.original.rating:.1f})")
    return same and count == CATALOGUE


def main() -> bool:
    """Show both, and tell whether they agree."""
    expected = show_in_process()
    with local.local_worker("examples.movies.tasks"):
        return show_on_workers(expected)


if __name__ == "__main__":
    sys.exit(local.run(main))
