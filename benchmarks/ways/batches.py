"""Batches on a real worker with two children, from submit to the caller's result, beside plain chords."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from celery import chord

from benchmarks.host import Run
from benchmarks.ways.celery_worker import environment, worker
from docket_celery.store import SQLStore
from examples.movies.movies_pb2 import Movie

SIZES = (1000, 10_000, 100_000)
CHORD_SIZES = (1000,)
"""A plain chord of 10,000 takes a minute."""


@contextmanager
def batch(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """One run, shared by the worker's children."""
    os.environ |= environment(options)
    from benchmarks.ways import batch_app

    def run(items: int) -> int:
        sent = batch_app.look_at_all.delay([Movie(rating=number % 10) for number in range(items)])
        return len(sent.get(timeout=600))

    yield from _figures(options, run, SIZES)


@contextmanager
def plain_chord(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """A task for each item, and one that gets all results."""
    os.environ |= environment(options)
    from benchmarks.ways import batch_app

    def run(items: int) -> int:
        tasks = (batch_app.look_at_one.s(float(number % 10)) for number in range(items))
        made: int = chord(tasks, batch_app.count.s()).delay().get(timeout=600)
        return made

    yield from _figures(options, run, CHORD_SIZES)


def _figures(
    options: Mapping[str, Any], run: Callable[[int], int], sizes: tuple[int, ...]
) -> Generator[Mapping[str, Run]]:
    # Both ways have the same worker, which holds the batch's task.
    SQLStore(options["database"]).migrate()
    with worker("benchmarks.ways.batch_app") as process:

        def measured(items: int) -> Run:
            def once(count: int) -> None:
                for _ in range(count):
                    if (made := run(items)) != items:
                        raise AssertionError(f"{made} of {items} items came back")

            return once

        yield {
            **{f"items_{size}": measured(size) for size in sizes},
            # Of the largest batch until then.
            "worker_peak": lambda _count: _peak_mb(process.pid),
        }


def _peak_mb(pid: int) -> float:
    """Return the peak of resident memory of the largest process of a worker."""
    parent = psutil.Process(pid)
    peaks = [_high_water_kb(each.pid) for each in (parent, *parent.children(recursive=True))]
    return max(peaks) / 1024


def _high_water_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
