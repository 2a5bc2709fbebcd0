"""Values that statements bind, named ``p_`` and their column, those of a step execution ``x_`` and theirs.

Without a prefix SQLAlchemy would take a value for one to set in the column of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from docket_celery.store.records import StepExecution
from docket_celery.store.rows import EXECUTION_COLUMNS, clean_text, execution_values
from docket_celery.store.sql.constructs import as_json
from docket_celery.store.sql.schema import docket_cache, docket_chunks, docket_runs

ONE: sa.Label[int] = sa.literal_column("1", sa.Integer).label("one")
"""What a statement selects that tells of a row."""
JSON = frozenset({"output_json", "error", "errors", "progress", "lanes"})
"""Columns that are bound as text."""


def given(table: sa.Table, name: str, prefix: str = "p_") -> sa.ColumnElement[Any]:
    """Return the bound value for a column of *table*; JSON is bound as text."""
    if name in JSON:
        return as_json(sa.bindparam(prefix + name, type_=sa.Text()))
    return sa.bindparam(prefix + name, type_=table.c[name].type)


def typed(table: sa.Table, name: str, prefix: str = "p_") -> sa.ColumnElement[Any]:
    """Return the bound value as a column of a SELECT; of texts, numbers and times the driver tells the type."""
    value, kind = given(table, name, prefix), table.c[name].type
    is_told = name in JSON or isinstance(kind, (sa.Text, sa.Integer, sa.DateTime))
    return value if is_told else sa.cast(value, kind)


def matches(table: sa.Table, *names: str, prefix: str = "p_") -> sa.ColumnElement[bool]:
    """Return whether these columns of *table* have the bound values."""
    return sa.and_(*(table.c[name] == given(table, name, prefix) for name in names))


def is_state(table: sa.Table, *states: str) -> sa.ColumnElement[bool]:
    """Return whether the state of a row is one of these."""
    found: list[sa.ColumnElement[Any]] = [sa.literal_column(f"'{state}'") for state in states]
    return table.c.state == found[0] if len(found) == 1 else table.c.state.in_(found)


NAME = ("graph", "execution_id")
"""The columns that name a run."""
IS_RUN = matches(docket_runs, *NAME)
OF_RUN = matches(docket_cache, *NAME)
LEASE_S: sa.ColumnElement[float] = sa.bindparam("p_lease_s", type_=sa.Double())
_EXECUTION = tuple(f"x_{name}" for name in EXECUTION_COLUMNS)
_FENCE = (*NAME, "epoch", "owner")
HOLDS_RUN = sa.and_(matches(docket_runs, *_FENCE), is_state(docket_runs, "RUNNING"))
"""Whether a lease holds its run."""
HOLDS_CHUNK = sa.and_(
    matches(docket_chunks, *_FENCE, "stage", "lo"),
    is_state(docket_chunks, "RUNNING"),
    sa.exists().where(
        docket_runs.c.graph == docket_chunks.c.graph,
        docket_runs.c.execution_id == docket_chunks.c.execution_id,
        docket_runs.c.stage == docket_chunks.c.stage,
        is_state(docket_runs, "RUNNING", "WAITING"),
    ),
)
"""Whether a lease holds its chunk, and its stage is open."""


def bound(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return *values* under the names by which statements bind them."""
    return {f"p_{name}": value for name, value in values.items()}


def named(graph: str, execution_id: str) -> dict[str, str]:
    """Return the name of a run as statements bind it."""
    return {"p_graph": clean_text(graph), "p_execution_id": clean_text(execution_id)}


def execution_binds(execution: StepExecution | None) -> dict[str, Any]:
    """Return the values of a step execution; none without one."""
    if execution is None:
        return {}
    return dict(zip(_EXECUTION, execution_values(execution).values(), strict=True))
