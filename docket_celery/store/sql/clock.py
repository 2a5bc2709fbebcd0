"""What differs between the databases in SQL: moments by the database's clock, and a transaction that writes.

Postgres keeps times as ``timestamptz``. SQLite keeps text in UTC with six decimals, '2026-01-31 12:00:00.123000',
which its own date functions, plain comparison and SQLAlchemy's `DateTime` read; its clock counts milliseconds.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, Connection, DateTime, Double, cast
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

_TIME: TypeEngine[Any] = DateTime(timezone=True)
_SECONDS: TypeEngine[Any] = Double[float]()


class now(FunctionElement[Any]):  # noqa: N801 -- reads as a SQL function
    """The present moment; a later one at each call in a statement."""

    type = _TIME
    inherit_cache = True


class after(FunctionElement[Any]):  # noqa: N801 -- reads as a SQL function
    """The moment some seconds from now: ``after(bindparam("lease_s"))``; NULL for NULL, negative: the past."""

    type = _TIME
    inherit_cache = True

    def __init__(self, seconds: ColumnElement[Any]) -> None:
        super().__init__(cast(seconds, Double))


class seconds_left(FunctionElement[Any]):  # noqa: N801 -- reads as a SQL function
    """The seconds from now until a moment; negative: it is over."""

    type = _SECONDS
    inherit_cache = True


@compiles(now)
def _now(_element: now, _compiler: SQLCompiler, **_: Any) -> str:
    return "clock_timestamp()"


@compiles(now, "sqlite")
def _now_in_sqlite(_element: now, _compiler: SQLCompiler, **_: Any) -> str:
    return "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"


@compiles(after)
def _after(element: after, compiler: SQLCompiler, **kw: Any) -> str:
    return f"(clock_timestamp() + {compiler.process(element.clauses, **kw)} * interval '1 second')"


@compiles(after, "sqlite")
def _after_in_sqlite(element: after, compiler: SQLCompiler, **kw: Any) -> str:
    # printf reads NULL as 0, so NULL is kept out of it.
    seconds = compiler.process(element.clauses, **kw)
    moment = f"strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', {seconds})) || '000'"
    return f"(CASE WHEN {seconds} IS NOT NULL THEN {moment} END)"


@compiles(seconds_left)
def _seconds_left(element: seconds_left, compiler: SQLCompiler, **kw: Any) -> str:
    return f"EXTRACT(EPOCH FROM {compiler.process(element.clauses, **kw)} - clock_timestamp())"


@compiles(seconds_left, "sqlite")
def _seconds_left_in_sqlite(element: seconds_left, compiler: SQLCompiler, **kw: Any) -> str:
    return f"((julianday({compiler.process(element.clauses, **kw)}) - julianday('now')) * 86400.0)"


@contextmanager
def writing(connection: Connection) -> Generator[None]:
    """Hold a transaction that may write; in SQLite it takes the write lock first."""
    with transaction(connection, "BEGIN IMMEDIATE" if connection.dialect.name == "sqlite" else "BEGIN"):
        yield


@contextmanager
def transaction(connection: Connection, begin: str = "BEGIN") -> Generator[None]:
    """Begin a transaction with the statement *begin*; commit it, or roll it back on an error.

    A connection of the store is in autocommit. Within a transaction of the caller nothing is begun or ended.
    """
    if _is_open(connection):
        yield
        return
    connection.exec_driver_sql(begin)
    try:
        yield
        connection.exec_driver_sql("COMMIT")
    except BaseException:
        # SQLite ends the transaction by itself on some errors, such as a full disk.
        if _is_open(connection):
            connection.exec_driver_sql("ROLLBACK")
        raise


def _is_open(connection: Connection) -> bool:
    driver: Any = None if connection.invalidated else connection.connection.dbapi_connection
    if driver is None:
        return False
    if connection.dialect.name == "sqlite":
        return bool(driver.in_transaction)
    return not driver.closed and (not driver.autocommit or driver.info.transaction_status > 0)
