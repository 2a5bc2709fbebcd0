"""What differs between the databases in SQL: moments by the database's clock, and a transaction that writes.

Postgres keeps times as ``timestamptz``. SQLite keeps text in UTC with six decimals, '2026-01-31 12:00:00.123000',
which its own date functions, plain comparison and SQLAlchemy's `DateTime` read; its clock counts milliseconds.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, Connection, DateTime, Double

from docket_celery.store.sql.constructs import construct

_TIME = DateTime(timezone=True)
_NOW = "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"
# printf reads NULL as 0, so NULL is kept out of it.
_LATER = """(CASE WHEN {1} IS NOT NULL
    THEN strftime('%Y-%m-%d %H:%M:%f', {0}, printf('%+.3f seconds', {1})) || '000' END)"""

now = construct("now", "clock_timestamp()", _NOW, _TIME)
"""The present moment; a later one at each call in a statement."""
began = construct("began", "statement_timestamp()", _NOW, _TIME)
"""The moment at which the statement began: unlike `now`, Postgres can look it up in an index."""
later = construct("later", "({0} + CAST({1} AS double precision) * interval '1 second')", _LATER, _TIME)
"""The moment some seconds after another one; negative: before it. NULL for NULL."""
seconds_left = construct(
    "seconds_left",
    "EXTRACT(EPOCH FROM {0} - clock_timestamp())",
    "((julianday({0}) - julianday('now')) * 86400.0)",
    Double[float](),
)
"""The seconds from now until a moment; negative: it is over."""


def after(seconds: ColumnElement[Any] | float | None) -> ColumnElement[Any]:
    """Return the moment some seconds from now; NULL for NULL."""
    return later(now(), seconds)


@contextmanager
def writing(connection: Connection) -> Generator[None]:
    """Hold a transaction that may write, in SQLite with the write lock; commit it, or roll it back on an error.

    The connection is in autocommit, outside of a transaction.
    """
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.dialect.name == "sqlite" else "BEGIN")
        yield
        connection.exec_driver_sql("COMMIT")
    except BaseException:
        roll_back(connection)
        raise


def roll_back(connection: Connection) -> None:
    """End the transaction and the statement that an error has left open, if any; close the connection if that fails.

    A signal may raise in the middle of a statement, after the database has begun a transaction.
    """
    driver = None if connection.invalidated else connection.connection.dbapi_connection
    if driver is not None:
        try:
            driver.rollback()  # both drivers send nothing outside of a transaction
        except BaseException:  # noqa: BLE001 -- the caller raises the error of which it is a consequence
            connection.invalidate()
