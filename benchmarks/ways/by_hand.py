"""The same work without any library: a thread pool, direct calls, statements on psycopg."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
from google.protobuf.wrappers_pb2 import Int64Value
from sqlalchemy.engine import make_url

from benchmarks.host import Run, repeat
from benchmarks.ways import steps
from examples.parallel.parallel_pb2 import EnrichedUser, UserID

THREADS = 8

TABLES: tuple[LiteralString, ...] = (
    "CREATE TABLE run (id text PRIMARY KEY, state text NOT NULL, job bytea NOT NULL, result bytea)",
    "CREATE TABLE checkpoint (run text, step text, output bytea NOT NULL, PRIMARY KEY (run, step))",
)
BEGIN_RUN: LiteralString = (
    "INSERT INTO run (id, state, job) VALUES (%s, 'RUNNING', %s) ON CONFLICT DO NOTHING"
)
RESTORE: LiteralString = "SELECT step, output FROM checkpoint WHERE run = %s"
SAVE: LiteralString = "INSERT INTO checkpoint (run, step, output) VALUES (%s, %s, %s)"
END_RUN: LiteralString = "UPDATE run SET state = 'SUCCEEDED', result = %s WHERE id = %s"
FIND: LiteralString = "SELECT state, result FROM run WHERE id = %s"
FIND_OUTPUT: LiteralString = "SELECT output FROM checkpoint WHERE run = %s AND step = %s"
OUTPUT = Int64Value(value=1).SerializeToString()


@contextmanager
def pool(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Futures on a pool that is kept, each awaited where its value is needed."""
    user = UserID(id="u")
    with ThreadPoolExecutor(THREADS) as executor:

        def fan(fetches: tuple[Callable[[UserID], Any], ...]) -> EnrichedUser:
            made = [executor.submit(fetch, user) for fetch in fetches]
            return executor.submit(steps.enrich_user, *(each.result() for each in made)).result()

        yield {
            "fan": repeat(lambda: fan(steps.FETCHES)),
            "sleeps": repeat(lambda: fan(steps.SLOW_FETCHES)),
        }


@contextmanager
def direct(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Functions that call one another: what the steps themselves cost."""
    user, value = UserID(id="u"), Int64Value()

    def chain(length: int) -> Callable[[], Int64Value]:
        def call() -> Int64Value:
            made = value
            for _ in range(length):
                made = steps.pass_on(made)
            return made

        return call

    def one_after_another() -> EnrichedUser:
        return steps.enrich_user(
            steps.slow_profile(user), steps.slow_preferences(user), steps.slow_activity(user)
        )

    graphs = {size: steps.random_graph(size) for size in (1000, 10_000)}
    yield {
        "chain_10": repeat(chain(10)),
        "chain_100": repeat(chain(100)),
        "sleeps": repeat(one_after_another),
        "run_1000": repeat(lambda: steps.run_in_order(graphs[1000], value)),
        "run_10000": repeat(lambda: steps.run_in_order(graphs[10_000], value)),
    }


def connect(options: Mapping[str, Any]) -> psycopg.Connection[tuple[Any, ...]]:
    """Return a connection on which each statement is a transaction of its own; psycopg prepares the repeated ones."""
    address = make_url(options["database"]).set(drivername="postgresql")
    return psycopg.connect(address.render_as_string(hide_password=False), autocommit=True)


def make_tables(options: Mapping[str, Any]) -> psycopg.Connection[tuple[Any, ...]]:
    """Make the tables; return the connection on which they were made."""
    connection = connect(options)
    for table in TABLES:
        connection.execute(table)
    return connection


def run_seven(on: psycopg.Connection[tuple[Any, ...]], name: str) -> None:
    """Run the seven statements of a run of four steps on a connection of `connect`."""
    on.execute(BEGIN_RUN, (name, OUTPUT))
    on.execute(RESTORE, (name,)).fetchall()
    for step in ("v1", "v2", "v3", "v4"):
        on.execute(SAVE, (name, step, OUTPUT))
    on.execute(END_RUN, (OUTPUT, name))


@contextmanager
def seven_statements(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """A run row, a look for checkpoints, four saves, the end: what the durability itself takes."""
    names = itertools.count()
    local = threading.local()
    with make_tables(options) as connection:

        def run(on: psycopg.Connection[tuple[Any, ...]] = connection) -> None:
            run_seven(on, f"run-{next(names)}")

        def run_on_own_connection() -> None:
            if not hasattr(local, "connection"):
                local.connection = connect(options)
            run(local.connection)

        with ThreadPoolExecutor(THREADS) as callers:

            def run_on_8(count: int) -> None:
                for made in [callers.submit(run_on_own_connection) for _ in range(count)]:
                    made.result()

            yield {"chain": repeat(run), "threads_8": run_on_8}


@contextmanager
def inserts(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """As many INSERTs as steps, each committed."""
    names = itertools.count()
    with make_tables(options) as connection:

        def run(count: int) -> None:
            name = f"run-{next(names)}"
            for number in range(count):
                connection.execute(SAVE, (name, f"v{number}", OUTPUT))

        yield {
            "chain": repeat(lambda: run(4)),
            "fan": repeat(lambda: run(4)),
            "one_step": repeat(lambda: run(1)),
        }


@contextmanager
def selects(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """A stored row by its key."""
    with make_tables(options) as connection:
        connection.execute(BEGIN_RUN, ("again", OUTPUT))
        for step in range(8):
            connection.execute(SAVE, ("again", f"v{step}", OUTPUT))

        def find(count: int) -> None:
            for step in range(count):
                connection.execute(FIND_OUTPUT, ("again", f"v{step}")).fetchone()

        yield {
            "again": repeat(lambda: connection.execute(FIND, ("again",)).fetchone()),
            "hits_1": repeat(lambda: find(1)),
            "hits_4": repeat(lambda: find(4)),
            "hits_8": repeat(lambda: find(8)),
        }
