"""A batch of no-op items against a plain Celery chord of as many tasks: ``python -m benchmarks.batches``.

It needs a broker and a database in the environment; ``make bench-batches`` starts both for it.
Each measurement has a prefork worker with two children of its own. Times are from submit to the caller's result; the
ratio is what counts, since both ways use the same machine one after the other.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis
from celery import Celery, chord

from docket_celery import Graph, graph_task
from docket_celery.devserver.processes import signal_on_parent_death
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of one way.

    Attributes:
        took_s: From submit to the caller's result.
        worker_mb: Peak of resident memory of the largest process of the worker.
        broker_mb: Peak of the memory of Redis, which is broker and result backend.
    """

    took_s: float
    worker_mb: float
    broker_mb: float

    def line(self, name: str, items: int) -> str:
        """Return it as text."""
        rate = items / self.took_s
        return (
            f"{name:6} {items:7} items: {self.took_s:7.2f} s, {rate:8.0f} items/s, "
            f"worker {self.worker_mb:6.1f} MB, broker {self.broker_mb:6.1f} MB"
        )


def measure(run: Callable[[int], int], items: int, worker: psutil.Process) -> Measured:
    """Run *items* once and look at what it took."""
    with broker() as client:
        client.config_resetstat()
        began = time.perf_counter()
        made = run(items)
        took_s = time.perf_counter() - began
        if made != items:
            raise AssertionError(f"{made} of {items} items came back")
        memory = int(client.info("memory")["used_memory_peak"])
    peaks = [_peak_bytes(process) for process in (worker, *worker.children(recursive=True))]
    return Measured(took_s=took_s, worker_mb=max(peaks) / 2**20, broker_mb=memory / 2**20)


def _peak_bytes(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return process.memory_info().rss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_alone(run: Callable[[int], int], items: int) -> Measured:
    """Measure with a worker of its own and an empty broker."""
    with broker() as client:
        client.flushall()
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.batches", "worker", "-c", "2"]
        with subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            preexec_fn=signal_on_parent_death(signal.SIGTERM),  # noqa: PLW1509 -- no thread runs yet
        ) as started:
            try:
                run(2)
                return measure(run, items, psutil.Process(started.pid))
            finally:
                started.terminate()
                started.wait(30)


def main(sizes: Sequence[int], chords: Sequence[int]) -> None:
    """Print what each size takes as a batch, what some take as a plain chord, and the ratios."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load average {load}")
    SQLStore(os.environ["DOCKET_CELERY_DATABASE_URL"]).migrate()
    batches: dict[int, Measured] = {}
    for items in sizes:
        batches[items] = found = measure_alone(run_batch, items)
        print(found.line("batch", items), flush=True)
    first = batches[sizes[0]]
    for items, found in batches.items():
        worker, broker_ = found.worker_mb / first.worker_mb, found.broker_mb / first.broker_mb
        print(
            f"{items} items against {sizes[0]}: worker memory {worker:.2f} x, broker memory {broker_:.2f} x"
        )
    for items in chords:
        plain = measure_alone(run_chord, items)
        print(plain.line("chord", items), flush=True)
        if items in batches:
            print(f"{items} items: the batch is {plain.took_s / batches[items].took_s:.1f} x as fast")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--chords", nargs="*", type=int, default=[1000], help="sizes of plain chords")
    options = parser.parse_args()
    main(options.sizes, options.chords)
