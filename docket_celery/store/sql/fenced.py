"""Fenced writes of batches, uploads and upkeep: nothing is written unless a lease holds.

One statement on Postgres, a transaction on SQLite.

A gate is a statement that finds or changes one row, or none. Each gate is joined to the one before it, and all writes
to the last one, so nothing is written where a gate has no row. On Postgres they are common table expressions of one
statement: one round trip, and rows are locked in the order of the gates; none sees what another has changed. On
SQLite they run one after the other under the write lock.

Parameters are named as in `binds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import insert as upsert  # SQLite's compiler takes it too

from docket_celery.store.records import Checkpoint
from docket_celery.store.rows import (
    CHECKPOINT_COLUMNS,
    EXECUTION_COLUMNS,
    Row,
    checkpoint_values,
    clean_checkpoint,
    execution_values,
)
from docket_celery.store.sql.binds import JSON, given
from docket_celery.store.sql.clock import now, writing
from docket_celery.store.sql.constructs import as_array, as_json
from docket_celery.store.sql.schema import docket_cache, docket_chunks, docket_executions

Values = Mapping[str, Any]
_POSTGRES: Any = postgresql.dialect  # names types


def _keep(insert: Any) -> Any:
    return insert.on_conflict_do_nothing()


def _replace(insert: Any) -> Any:
    names = ("output_type", "output_data", "checksum", "output_shape", "output_json", "created_at")
    new = {name: insert.excluded[name] for name in names}
    differs = docket_cache.c.checksum != insert.excluded.checksum
    return insert.on_conflict_do_update(index_elements=["cache_key"], set_=new, where=differs)


@dataclass(frozen=True, eq=False)
class Rows:
    """How any number of records go into a table at once.

    *read* returns the values of one by column, *others* are the same for all. *resolve* says in an insert what
    happens to a row that is there already.
    """

    table: sa.Table
    columns: Sequence[str]
    read: Callable[[Any], Values]
    others: Mapping[str, sa.ColumnElement[Any]] = field(default_factory=dict[str, sa.ColumnElement[Any]])
    resolve: Callable[[Any], Any] = _keep

    @cached_property
    def one(self) -> Any:
        """The insert of one row, for SQLite."""
        values = {name: given(self.table, name, "") for name in self.columns}
        added = self.resolve(upsert(self.table).values(values | dict(self.others)))
        return added.execution_options(preserve_rowcount=True)

    def after(self, gate: sa.CTE) -> Any:
        """Return the insert of all rows if *gate* has one, for Postgres."""
        arrays = (self._array(name) for name in self.columns)
        new = (
            sa.func.unnest(*arrays)
            .table_valued(*self.columns, name=f"new_{self.table.name}")
            .render_derived()
        )
        values = [as_json(new.c[name]) if name in JSON else new.c[name] for name in self.columns]
        rows = sa.select(*values, *self.others.values()).select_from(new.join(gate, sa.true()))
        return self.resolve(upsert(self.table).from_select([*self.columns, *self.others], rows))

    def arrays(self, records: Sequence[Any]) -> dict[str, Any]:
        """Return the parameters of `after`."""
        rows = list(map(self.read, records))
        return {f"{self.table.name}_{name}": [row[name] for row in rows] for name in self.columns}

    def add_each(self, connection: sa.Connection, records: Sequence[Any]) -> None:
        """Insert all *records*, on SQLite."""
        if records:
            connection.execute(self.one, list(map(self.read, records)))

    def _array(self, name: str) -> sa.ColumnElement[Any]:
        kind: str = "TEXT" if name in JSON else self.table.c[name].type.compile(_POSTGRES())
        return as_array(sa.bindparam(f"{self.table.name}_{name}"), sa.literal_column(kind))


def _clean_values(checkpoint: Checkpoint) -> Values:
    return checkpoint_values(clean_checkpoint(checkpoint))


_STORED = (docket_cache, (*CHECKPOINT_COLUMNS, "output_json"), _clean_values, {"created_at": now()})
ADD_CHECKPOINTS, PUT_CHECKPOINTS = Rows(*_STORED), Rows(*_STORED, _replace)
ADD_EXECUTIONS = Rows(docket_executions, EXECUTION_COLUMNS, execution_values)
_NEW_CHUNK = {"state": "'QUEUED'"} | dict.fromkeys(("epoch", "retries", "lost", "failed"), "0")
ADD_CHUNKS = Rows(
    docket_chunks,
    ("graph", "execution_id", "stage", "lo", "hi"),
    dict[str, Any],
    {name: sa.literal_column(value) for name, value in _NEW_CHUNK.items()},
)


@dataclass(frozen=True, eq=False)
class Fenced:
    """Gates, and what is written if all of them have a row; each gate after the first changes something.

    *tells* selects columns of the row that the last of gates and writes has changed; on SQLite they are read with it.
    """

    gates: Sequence[Any]
    writes: Sequence[sa.Update | sa.Delete] = ()
    tells: Any = None
    _joined: dict[tuple[Rows, ...], Any] = field(default_factory=dict[tuple[Rows, ...], Any])

    def run(
        self,
        connection: sa.Connection,
        values: Values | None = None,
        rows: Mapping[Rows, Sequence[Any]] | None = None,
    ) -> Row | None:
        """Run it on a connection in autocommit and insert the records *rows*.

        Returned is what it tells by name, or None: a gate had no row and nothing was written.
        """
        values = dict(values or {})
        filled = {table: each for table, each in (rows or {}).items() if each}
        if connection.dialect.name == "sqlite":
            return self._run_each(connection, values, filled)
        tables = tuple(filled)
        if tables not in self._joined:
            self._joined[tables] = self._join(tables)
        for table, each in filled.items():
            values |= table.arrays(each)
        return connection.execute(self._joined[tables], values).mappings().first()

    def _run_each(
        self, connection: sa.Connection, values: Values, rows: Mapping[Rows, Sequence[Any]]
    ) -> Row | None:
        with writing(connection):
            for gate in self.gates:
                result = connection.execute(gate, values)
                if (result.first() is None) if result.returns_rows else not result.rowcount:
                    return None
            for write in self.writes:
                connection.execute(write, values)
            for table, each in rows.items():
                table.add_each(connection, each)
            return {} if self.tells is None else connection.execute(self.tells, values).mappings().first()

    def _join(self, tables: Sequence[Rows]) -> Any:
        told = () if self.tells is None else tuple(self.tells.selected_columns)
        statements, parts = [*self.gates, *self.writes], list[sa.CTE]()
        for number, statement in enumerate(statements):
            gate = parts[min(number, len(self.gates)) - 1] if number else None
            parts.append(
                _after(gate, statement, told if statement is statements[-1] else ()).cte(f"part_{number}")
            )
        gate = parts[len(self.gates) - 1]
        last = parts[-1] if told else gate  # a write that tells nothing may have changed very many rows
        inserts = [table.after(gate).cte(f"rows_{number}") for number, table in enumerate(tables)]
        shown: list[Any] = [last.c[column.key] for column in told] or [gate.c.graph]
        joined: Any = sa.select(*shown).select_from(gate if last is gate else gate.outerjoin(last, sa.true()))
        return joined.add_cte(*parts, *inserts)


def _after(gate: sa.CTE | None, statement: Any, told: Sequence[Any]) -> Any:
    if isinstance(statement, sa.Select):
        return statement  # pyright: ignore[reportUnknownVariableType]
    graph = statement.table.c.graph
    changed = statement.returning(graph, *told)
    return changed if gate is None else changed.where(graph == gate.c.graph)
