"""Writes that happen only while a lease holds: one statement on Postgres, a transaction on SQLite.

A gate is a statement that finds or changes one row, or none. Each gate is joined to the one before it, and all writes
to the last one, so nothing is written where a gate has no row. On Postgres they are common table expressions of one
statement: one round trip, and rows are locked in the order of the gates; none sees what another has changed. On
SQLite they run one after the other under the write lock.

A parameter must not have the name of a column: SQLAlchemy would set the column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from functools import cached_property
from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Delete,
    Select,
    Table,
    Text,
    Update,
    bindparam,
    func,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects import postgresql, sqlite

from docket_celery.store.records import Checkpoint, StepExecution
from docket_celery.store.rows import (
    CHECKPOINT_COLUMNS,
    EXECUTION_COLUMNS,
    Row,
    checkpoint_values,
    clean_checkpoint,
    execution_values,
)
from docket_celery.store.sql.clock import now, writing
from docket_celery.store.sql.constructs import as_array, as_json
from docket_celery.store.sql.schema import docket_cache, docket_chunks, docket_executions

Values = Mapping[str, Any]
_POSTGRES: Any = postgresql.dialect  # names types


@dataclass(frozen=True, eq=False)
class Rows:
    """How any number of rows go into a table at once.

    Attributes:
        columns: The columns that each row gives.
        others: The same for all rows.
        key: What is unique, if a row may be there already.
        replaced: The columns to replace then, with the checksum; none: the row that is there stays.
    """

    table: Table
    columns: Sequence[str]
    others: Mapping[str, ColumnElement[Any]] = field(default_factory=dict[str, ColumnElement[Any]])
    key: Sequence[str] = ()
    replaced: Sequence[str] = ()

    @cached_property
    def one(self) -> Any:
        """The insert of one row, for SQLite."""
        given = {
            name: self._as_stored(name, bindparam(name, type_=self._type(name))) for name in self.columns
        }
        return self._resolve(sqlite.insert(self.table).values(given | dict(self.others)))

    def after(self, gate: CTE) -> Any:
        """Return the insert of all rows if *gate* has one, for Postgres."""
        arrays = [self._array(name) for name in self.columns]
        new = func.unnest(*arrays).table_valued(*self.columns, name=f"new_{self.table.name}").render_derived()
        given = [self._as_stored(name, new.c[name]) for name in self.columns]
        rows = select(*given, *self.others.values()).select_from(new.join(gate, true()))
        return self._resolve(postgresql.insert(self.table).from_select([*self.columns, *self.others], rows))

    def arrays(self, rows: Sequence[Values]) -> dict[str, Any]:
        """Return the parameters of `after`."""
        return {self._bind(name): [row[name] for row in rows] for name in self.columns}

    def _bind(self, name: str) -> str:
        return f"{self.table.name}_{name}"

    def _array(self, name: str) -> ColumnElement[Any]:
        kind: str = self._type(name).compile(_POSTGRES())
        return as_array(bindparam(self._bind(name)), literal_column(kind))

    def _type(self, name: str) -> Any:
        return Text() if name == "output_json" else self.table.c[name].type

    def _as_stored(self, name: str, value: ColumnElement[Any]) -> ColumnElement[Any]:
        return as_json(value) if name == "output_json" else value

    def _resolve(self, insert: Any) -> Any:
        if self.replaced:
            new = {name: insert.excluded[name] for name in self.replaced}
            differs = self.table.c.checksum != insert.excluded.checksum
            return insert.on_conflict_do_update(index_elements=self.key, set_=new, where=differs)
        return insert.on_conflict_do_nothing(index_elements=self.key) if self.key else insert


_STORED = (docket_cache, (*CHECKPOINT_COLUMNS, "output_json"), {"created_at": now()}, ["cache_key"])
_OUTPUT = ["output_type", "output_data", "checksum", "output_shape", "output_json", "created_at"]
_NEW_CHUNK = {"state": "'QUEUED'"} | dict.fromkeys(("epoch", "retries", "lost", "failed"), "0")
_CHUNK_KEY = ["graph", "execution_id", "stage", "lo"]

ADD_CHECKPOINTS, PUT_CHECKPOINTS = Rows(*_STORED), Rows(*_STORED, _OUTPUT)
ADD_EXECUTIONS = Rows(docket_executions, EXECUTION_COLUMNS)
ADD_CHUNKS = Rows(
    docket_chunks,
    [*_CHUNK_KEY, "hi"],
    {name: literal_column(value) for name, value in _NEW_CHUNK.items()},
    _CHUNK_KEY,
)


@dataclass(frozen=True, eq=False)
class Fenced:
    """Gates, and what is written if all of them have a row.

    Attributes:
        gates: At least one; those after the first change something.
        writes: What else is changed.
        tells: Columns of the row that the last of all of them has changed; on SQLite they are read with it.
    """

    gates: Sequence[Any]
    writes: Sequence[Update | Delete] = ()
    tells: Any = None
    _joined: dict[tuple[Rows, ...], Any] = field(default_factory=dict[tuple[Rows, ...], Any])

    def run(
        self,
        connection: Connection,
        values: Values | None = None,
        rows: Mapping[Rows, Sequence[Values]] | None = None,
    ) -> Row | None:
        """Run it; return what it tells by name, or None: a gate had no row and nothing was written.

        Args:
            connection: In autocommit.
            values: The parameters.
            rows: What is inserted then.
        """
        values = dict(values or {})
        filled = {table: given for table, given in (rows or {}).items() if given}
        if connection.dialect.name == "sqlite":
            return self._run_each(connection, values, filled)
        tables = tuple(filled)
        if tables not in self._joined:
            self._joined[tables] = self._join(tables)
        for table, given in filled.items():
            values |= table.arrays(given)
        return connection.execute(self._joined[tables], values).mappings().first()

    def _run_each(
        self, connection: Connection, values: Values, rows: Mapping[Rows, Sequence[Values]]
    ) -> Row | None:
        with writing(connection):
            for gate in self.gates:
                result = connection.execute(gate, values)
                if (result.first() is None) if result.returns_rows else not result.rowcount:
                    return None
            for write in self.writes:
                connection.execute(write, values)
            for table, given in rows.items():
                connection.execute(table.one, list(given))
            return {} if self.tells is None else connection.execute(self.tells, values).mappings().first()

    def _join(self, tables: Sequence[Rows]) -> Any:
        told = () if self.tells is None else tuple(self.tells.selected_columns)
        statements, parts = [*self.gates, *self.writes], list[CTE]()
        for number, statement in enumerate(statements):
            gate = parts[min(number, len(self.gates)) - 1] if number else None
            parts.append(
                _after(gate, statement, told if statement is statements[-1] else ()).cte(f"part_{number}")
            )
        gate, last = parts[len(self.gates) - 1], parts[-1]
        inserts = [table.after(gate).cte(f"rows_{number}") for number, table in enumerate(tables)]
        shown: list[Any] = [last.c[column.key] for column in told] or [gate.c.graph]
        joined: Any = select(*shown).select_from(gate if last is gate else gate.outerjoin(last, true()))
        return joined.add_cte(*parts, *inserts)


def _after(gate: CTE | None, statement: Any, told: Sequence[Any]) -> Any:
    if isinstance(statement, Select):
        return statement  # pyright: ignore[reportUnknownVariableType]
    graph = statement.table.c.graph
    changed = statement.returning(graph, *told)
    return changed if gate is None else changed.where(graph == gate.c.graph)


def checkpoint_rows(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Return *checkpoints* for `ADD_CHECKPOINTS` and `PUT_CHECKPOINTS`."""
    return [checkpoint_values(clean_checkpoint(checkpoint)) for checkpoint in checkpoints]


def execution_rows(executions: Sequence[StepExecution]) -> list[dict[str, Any]]:
    """Return *executions* for `ADD_EXECUTIONS`."""
    # SQLite keeps the hour of the day as it is given.
    return [
        execution_values(execution) | {"started_at": execution.started_at.astimezone(UTC)}
        for execution in executions
    ]
