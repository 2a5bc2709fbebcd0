"""SQL that the databases write differently; `clock` has what is about time."""

from __future__ import annotations

from collections.abc import Callable
from string import Formatter
from typing import Any

from sqlalchemy import Column, ColumnElement, bindparam, literal_column
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NullType, TypeEngine


def construct(
    name: str, on_postgres: str, on_sqlite: str, result: TypeEngine[Any] | None = None
) -> Callable[..., ColumnElement[Any]]:
    """Return a SQL function that each database has its own text for, with '{0}', '{1}' for the arguments.

    An argument that a text leaves out is not bound.
    """
    made = type(name, (FunctionElement,), {"inherit_cache": True, "type": result or NullType()})

    def write(text: str) -> Callable[..., str]:
        used = {int(name) for _, name, _, _ in Formatter().parse(text) if name}

        def compiled(element: FunctionElement[Any], compiler: SQLCompiler, **kw: Any) -> str:
            clauses = enumerate(element.clauses)
            return text.format(
                *(compiler.process(clause, **kw) if n in used else "" for n, clause in clauses)
            )

        return compiled

    compiles(made)(write(on_postgres))
    compiles(made, "sqlite")(write(on_sqlite))
    return made


as_array = construct("as_array", "CAST({0} AS {1}[])", "")
"""A list as an array of a type, on Postgres; SQLAlchemy's own type looks at each of its values."""
as_json = construct("as_json", "CAST({0} AS jsonb)", "{0}")
"""Text as a JSON column takes it."""
add_done = construct(
    "add_done",
    "jsonb_set({0}, '{{done}}', to_jsonb(CAST({0} ->> 'done' AS bigint) + {1}))",
    "json_set({0}, '$.done', json_extract({0}, '$.done') + {1})",
)
"""A stage's progress with more items done; NULL for NULL."""
greatest = construct("greatest", "GREATEST({0}, {1})", "MAX({0}, {1})")
"""The greater of two values."""
one_of = construct("one_of", "{0} = ANY(ARRAY{1})", "{0} IN {1}")
"""Whether a value is among those of a scalar subquery, which Postgres runs first: it cannot become a hash join."""
_POSTGRES: Any = postgresql.dialect  # names types


def among(column: Column[Any], name: str) -> ColumnElement[Any]:
    """Return whether *column* has one of the values that are bound as a list: on Postgres as one array."""
    array = as_array(bindparam(name), literal_column(column.type.compile(_POSTGRES())))
    return _among(column, array, bindparam(name, type_=column.type, expanding=True))


_among = construct("among", "{0} = ANY({1})", "{0} IN {2}")


def row_id(table: Any) -> ColumnElement[Any]:
    """Return the physical address of a row of *table*, by which a statement finds rows that it has looked up."""
    return _row_id(literal_column(table.name))


_row_id = construct("row_id", "{0}.ctid", "{0}.rowid")
