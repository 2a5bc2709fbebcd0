"""`Statement`: one that runs often, written in SQLAlchemy Core, compiled once, and run by psycopg itself on Postgres.

SQLAlchemy's execution costs more than half of the CPU time of a short statement: 120 us in all, where 55 are enough.
It still makes and pools the connections, and it runs statements on SQLite, on connections that are not in autocommit,
and where they are logged, or listened to by ``before_cursor_execute`` or ``after_cursor_execute``: the log and these
listeners see all of them. ``before_execute`` and ``handle_error`` of an engine do not hear of what psycopg runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from docket_celery.store.sql.clock import writing

PREPARING = "docket_preparing"
"""The execution option of an engine that holds its `Preparing`."""

Row: TypeAlias = Mapping[str, Any]
Values: TypeAlias = Mapping[str, Any]


@dataclass(slots=True)
class Preparing:
    """Whether statements are prepared on the server; one for a store and its clones.

    ``asked``: True: when they first run; None: the driver decides, by its threshold; False: never.
    """

    asked: bool | None


@dataclass(frozen=True, slots=True)
class Found:
    """What a statement gave back: its rows by column name, and how many it has found or changed."""

    rows: Sequence[Any]
    count: int

    @property
    def first(self) -> Row | None:
        """The first row, if any."""
        return self.rows[0] if self.rows else None

    @property
    def one(self) -> Row:
        """The row of a statement that always has one."""
        row: Row = self.rows[0]
        return row


class Statement:
    """A statement that runs often.

    Args:
        core: It, in SQLAlchemy Core. Its columns have different names, and what it binds has a type.
    """

    def __init__(self, core: Any) -> None:
        self.core = core

    def run(self, connection: sa.Connection, values: Values) -> Found:
        """Run it with *values*, which may hold more than it binds."""
        if not _is_direct(connection):
            return _run_in_core(connection, self.core, values)
        driver = _driver(connection)
        cursor, text = driver.RawCursor(_session(connection)), self._text
        try:
            return text.read(text.send(cursor, values, _is_prepared(connection)))
        except driver.Error as error:
            raise _wrapped(connection, error) from error

    def compile(self) -> None:
        """Compile it for Postgres now, instead of when it first runs: processes that are forked later have it."""
        _ = self._text

    @cached_property
    def _text(self) -> _Text:
        return _Text(self.core)

    @staticmethod
    def run_together(connection: sa.Connection, *calls: tuple[Statement, Values]) -> list[Found]:
        """Run statements in one transaction, all or none; where the driver runs them, in one round trip."""
        if len(calls) == 1:
            return [statement.run(connection, values) for statement, values in calls]
        driver = _driver(connection)
        if not (_is_direct(connection) and driver.Pipeline.is_supported()):
            with writing(connection):
                return [_run_in_core(connection, statement.core, values) for statement, values in calls]
        session, prepare, sent = _session(connection), _is_prepared(connection), list[Any]()
        try:
            with session.pipeline():
                for statement, values in calls:
                    sent.append(statement._text.send(driver.RawCursor(session), values, prepare))
        except driver.Error as error:
            # What a signal raises while the pipeline waits would be lost: ending the pipeline fails then, too.
            cause = error.__context__
            if cause is not None and not isinstance(cause, driver.Error):
                raise cause from None
            raise _wrapped(connection, error) from error
        return [statement._text.read(cursor) for (statement, _), cursor in zip(calls, sent, strict=True)]


class _Text:
    """A statement as psycopg sends it: its text, and the names of its numbered parameters and of its columns."""

    def __init__(self, core: Any) -> None:
        of_psycopg: Any = sa.make_url("postgresql+psycopg://").get_dialect()
        dialect = of_psycopg(paramstyle="numeric_dollar")
        compiled = core.compile(dialect=dialect)
        binds: Mapping[str, sa.BindParameter[Any]] = compiled.binds
        self._text = str(compiled).encode()
        self._names: Sequence[str] = compiled.positiontup
        self._fixed = {name: bind.value for name, bind in binds.items() if not bind.required}
        self._columns: Sequence[str] = tuple(core.exported_columns.keys())
        processors = {
            name: bind.type.dialect_impl(dialect).bind_processor(dialect) for name, bind in binds.items()
        }
        self._processors = {name: process for name, process in processors.items() if process is not None}

    def send(self, cursor: Any, values: Values, prepare: bool | None) -> Any:
        """Execute it on *cursor*, which is returned."""
        known = {**self._fixed, **values}
        for name, process in self._processors.items():
            known[name] = process(known[name])
        return cursor.execute(self._text, [known[name] for name in self._names], prepare=prepare)

    def read(self, cursor: Any) -> Found:
        """Return what *cursor* has found."""
        columns = self._columns
        rows = [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()] if columns else []
        return Found(rows, cursor.rowcount)


def _is_direct(connection: sa.Connection) -> bool:
    """Tell whether the driver runs statements on *connection*."""
    if connection.dialect.name != "postgresql" or not _session(connection).autocommit:
        return False
    listeners = connection.engine.dispatch
    is_heard = listeners.before_cursor_execute or listeners.after_cursor_execute
    return not (is_heard or connection.engine.logger.isEnabledFor(logging.INFO))


def _run_in_core(connection: sa.Connection, core: Any, values: Values) -> Found:
    result = connection.execute(core, values)
    rows = result.mappings().all() if result.returns_rows else ()
    return Found(rows, result.rowcount)


def _driver(connection: sa.Connection) -> Any:
    """Return the module psycopg, which only who has such a connection has imported."""
    return connection.dialect.loaded_dbapi


def _session(connection: sa.Connection) -> Any:
    return connection.connection.dbapi_connection


def _is_prepared(connection: sa.Connection) -> bool | None:
    preparing: Preparing | None = connection.get_execution_options().get(PREPARING)
    return None if preparing is None else preparing.asked


def _wrapped(connection: sa.Connection, error: Any) -> Exception:
    """Return what SQLAlchemy would have raised for an error of the driver."""
    is_lost = connection.dialect.is_disconnect(error, _session(connection), None)
    wrap: Any = DBAPIError.instance
    wrapped: Exception = wrap(
        None, None, error, _driver(connection).Error, hide_parameters=True, connection_invalidated=is_lost
    )
    return wrapped
