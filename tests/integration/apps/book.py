"""What the steps of the tests' apps did, kept in Postgres: rows outlive whoever is killed."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import class_row
from sqlalchemy import make_url

from docket_celery import StepContext

CREATE = """
DROP TABLE IF EXISTS test_acts, test_ledger, test_gates;
CREATE TABLE test_acts (
    act bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    execution_id text NOT NULL,
    step text NOT NULL,
    delivery bigint NOT NULL,
    pid bigint NOT NULL,
    began_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz
);
CREATE TABLE test_ledger (
    idempotency_key text PRIMARY KEY,
    order_id text NOT NULL,
    calls integer NOT NULL DEFAULT 1
);
CREATE TABLE test_gates (execution_id text PRIMARY KEY);
"""
_BEGIN = """
INSERT INTO test_acts (execution_id, step, delivery, pid)
VALUES (%(execution_id)s, %(step)s, %(delivery)s, %(pid)s) RETURNING act
"""
_CHARGE = """
INSERT INTO test_ledger (idempotency_key, order_id) VALUES (%s, %s)
ON CONFLICT (idempotency_key) DO UPDATE SET calls = test_ledger.calls + 1
"""


def note(execution_id: str, step: str) -> None:
    """Write that something began which is no call of a step."""
    with open_database() as connection:
        values = {"execution_id": execution_id, "step": step, "delivery": 1, "pid": os.getpid()}
        connection.execute(_BEGIN, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One call of a step's body.

    Attributes:
        ended_at: None: it did not come to its end, or has not yet.
    """

    execution_id: str
    step: str
    delivery: int
    pid: int
    began_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a test asks of a row of ``docket_runs``."""

    state: str
    epoch: int
    lost: int
    failures: int
    retries: int
    task_id: str | None


class Book:
    """The test's view of the database."""

    def __init__(self, url: str) -> None:
        self.url = url

    def create(self) -> None:
        """Start with empty tables."""
        with open_database(self.url) as connection:
            connection.execute(CREATE)

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of *query*."""
        with open_database(self.url) as connection:
            return connection.execute(query.encode(), values or None).fetchall()

    def acts(self, execution_id: str | None = None, step: str | None = None) -> list[Act]:
        """Return the calls of steps, in the order in which they began."""
        with open_database(self.url) as connection, connection.cursor(row_factory=class_row(Act)) as cursor:
            cursor.execute(
                "SELECT execution_id, step, delivery, pid, began_at, ended_at FROM test_acts"
                " WHERE (%(run)s::text IS NULL OR execution_id = %(run)s)"
                " AND (%(step)s::text IS NULL OR step = %(step)s) ORDER BY act",
                {"run": execution_id, "step": step},
            )
            return cursor.fetchall()

    def run(self, execution_id: str) -> RunFacts | None:
        """Return the run's row, or None."""
        with (
            open_database(self.url) as connection,
            connection.cursor(row_factory=class_row(RunFacts)) as cursor,
        ):
            cursor.execute(
                "SELECT state, epoch, lost, failures, retries, task_id FROM docket_runs"
                " WHERE execution_id = %s",
                [execution_id],
            )
            return cursor.fetchone()

    def open_gate(self, execution_id: str) -> None:
        """Let the steps of a run go on that wait at its gate."""
        with open_database(self.url) as connection:
            connection.execute("INSERT INTO test_gates VALUES (%s)", [execution_id])

    def charges(self) -> dict[str, int]:
        """Return how many charges the ledger holds for each order."""
        return dict(self.rows("SELECT order_id, count(*) FROM test_ledger GROUP BY order_id"))


@contextmanager
def open_database(url: str | None = None) -> Generator[psycopg.Connection[tuple[Any, ...]]]:
    """Open an autocommit connection; without *url* to the worker's own database, or to the book's."""
    own = os.environ.get("LEASE_APP_BOOK_URL") or os.environ.get("DOCKET_CELERY_DATABASE_URL", "")
    chosen = make_url(own if url is None else url)
    plain = chosen.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True, application_name="docket-test-book") as connection:
        yield connection


@contextmanager
def act(ctx: StepContext) -> Generator[None]:
    """Write down that the step's body begins, and when it ends."""
    facts = {
        "execution_id": ctx.execution_id,
        "step": ctx.step,
        "delivery": ctx.delivery,
        "pid": os.getpid(),
    }
    with open_database() as connection:
        number = connection.execute(_BEGIN, facts).fetchone()
    try:
        yield
    finally:
        with open_database() as connection:
            connection.execute("UPDATE test_acts SET ended_at = clock_timestamp() WHERE act = %s", number)


def await_gate(ctx: StepContext) -> None:
    """Wait until the test opens the run's gate, or the step is to stop."""
    with open_database() as connection:
        wanted = [ctx.execution_id]
        while not connection.execute("SELECT 1 FROM test_gates WHERE execution_id = %s", wanted).fetchone():
            ctx.sleep(0.05)


def charge(ctx: StepContext, order_id: str) -> None:
    """Charge a card at a provider that honours idempotency keys."""
    with open_database() as connection:
        connection.execute(_CHARGE, [ctx.idempotency_key, order_id])
