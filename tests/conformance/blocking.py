"""Statements that wait for each other's locks on Postgres."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from tests.conformance.samples import SQLBench

T = TypeVar("T")


@contextmanager
def blocked(bench: SQLBench, work: Callable[[], T]) -> Generator[Future[T]]:
    """Start *work* in a thread and go on when its statement waits for the rival's lock; join it at the end."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with ThreadPoolExecutor(max_workers=1) as pool:
        outcome = pool.submit(work)
        deadline = time.monotonic() + 10
        while not bench.sql(waiting)[0][0]:
            assert time.monotonic() < deadline, "nothing waits for a lock"
            assert not outcome.done(), outcome.result()
            time.sleep(0.005)
        yield outcome
