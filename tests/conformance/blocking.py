"""Statements that wait for each other's locks on Postgres, and calls that are stopped within a transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, event

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


def keep_open(rival: Connection) -> None:
    """Make *rival* leave the transactions of calls open; the test ends them."""

    def change(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return ("SELECT 1" if statement == "COMMIT" else statement), parameters

    event.listen(rival, "before_cursor_execute", change, retval=True)


class InterruptedCall(Exception):
    """What a signal raises in the middle of a call, such as Celery's SoftTimeLimitExceeded."""


@contextmanager
def interrupted(engine: Engine, statement: str) -> Generator[None]:
    """Make each call on *engine* raise `InterruptedCall` when *statement* has been executed."""

    def stop(_connection: Any, _cursor: Any, executed: str, *_: Any) -> None:
        if executed.startswith(statement):
            raise InterruptedCall

    event.listen(engine, "after_cursor_execute", stop)
    yield
    event.remove(engine, "after_cursor_execute", stop)
