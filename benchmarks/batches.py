"""A batch of no-op items against a plain Celery chord of as many tasks: ``python -m benchmarks.batches [ITEMS ...]``.

Servers and a prefork worker with two children are started for it. Times are from submit to the caller's result; the
ratio is what counts, since both use the same worker one after the other.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import redis
from celery import Celery, chord

from docket_celery import Graph, graph_task
from docket_celery.store import SQLStore
from examples.movies.movies_pb2 import EnrichedMovie, Movie

app = Celery("benchmarks.batches")
app.conf.worker_prefetch_multiplier = 16
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


def run_batch(items: int) -> int:
    """Run *items* as a batch and return how many came back."""
    return len(look_at_all.delay([Movie(rating=n % 10) for n in range(items)]).get(timeout=600))


def run_chord(items: int) -> int:
    """Run *items* as a plain chord and return how many came back."""
    made: int = (
        chord((look_at_one.s(float(n % 10)) for n in range(items)), count.s()).delay().get(timeout=3600)
    )
    return made


def broker() -> Any:
    """Return a client of the broker."""
    clients: Any = redis.Redis
    return clients.from_url(os.environ["CELERY_BROKER_URL"])


def measure(run: Callable[[int], int], items: int, worker: psutil.Process) -> tuple[float, float, float]:
    """Return seconds, the largest child's peak RSS in MB, and the broker's peak memory in MB."""
    with broker() as client:
        client.config_resetstat()
        began = time.perf_counter()
        assert run(items) == items
        took = time.perf_counter() - began
        memory = int(client.info("memory")["used_memory_peak"])
    peaks = [_peak_bytes(process) for process in (worker, *worker.children(recursive=True))]
    return took, max(peaks) / 2**20, memory / 2**20


def _peak_bytes(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return process.memory_info().rss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(sizes: Sequence[int]) -> None:
    """Print a line for each size, with a worker of its own, and the ratio to the plain chord."""
    SQLStore(os.environ["DOCKET_CELERY_DATABASE_URL"]).migrate()
    for items in sizes:
        for name, run in (("batch", run_batch), ("chord", run_chord)):
            if name == "chord" and items > int(os.environ.get("MOST_OF_CHORD", "10000")):
                continue
            with broker() as client:
                client.flushall()
            with tempfile.TemporaryFile() as log:
                command = [sys.executable, "-m", "celery", "-A", "benchmarks.batches", "worker", "-c", "2"]
                with subprocess.Popen(command, stdout=log, stderr=log) as started:
                    try:
                        run(2)
                        took, worker_mb, broker_mb = measure(run, items, psutil.Process(started.pid))
                    finally:
                        started.terminate()
                        started.wait(30)
            own_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{name:6} {items:7} items: {took:7.2f} s, {items / took:8.0f} items/s, worker {worker_mb:6.1f} MB, "
                f"broker {broker_mb:6.1f} MB, caller {own_mb:6.1f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [1000, 10000])
