"""Deletion of what is past its date, a bounded number of rows in each short transaction.

A run is deleted together with all that it has. Where the runs of a batch have more than one transaction may delete,
the FAILED ones are CANCELLED first: resuming one would find a part of its checkpoints.

Postgres: rows that another transaction has locked are skipped, so any number of processes may purge side by side.
The rows to delete are collected in an array, and moments are those of the statement's beginning, so that the planner
finds them through the indexes. With a limit like 100,000 rows it may read whole tables all the same, so the command
takes 10,000 at most.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from docket_celery.errors import RunCancelled, to_record
from docket_celery.store.records import Purged, RunState
from docket_celery.store.rows import dump_json
from docket_celery.store.sql.clock import began, later, now, writing
from docket_celery.store.sql.constructs import as_json, one_of, row_id
from docket_celery.store.sql.schema import (
    docket_cache,
    docket_chunks,
    docket_claims,
    docket_executions,
    docket_runs,
)

RUNS_OF_ROWS = 10
"""How many rows of the limit there are for each run: few runs have more, so most go whole."""
CLAIM_KEPT_S = 60
"""How long a dead claim is kept for look-ups that began before its result was there."""
PURGING = "it was kept for as long as docket_retention says and is being deleted; submit it again"

_ENDED = [state for state in RunState if state.ended]
_OWNED = (docket_executions, docket_cache, docket_chunks)
# A queued run has a date if its message may never come.
_IS_DUE = sa.and_(docket_runs.c.expires_at <= began(), docket_runs.c.state.in_([*_ENDED, RunState.QUEUED]))
# Ordered, or a planner without statistics reads the table until it finds one.
_ANY_DUE = sa.select(1).where(_IS_DUE).order_by(docket_runs.c.expires_at).limit(1)
_ROW, _CLAIM, _RUN = docket_cache.alias("expired"), docket_claims.alias("dead"), docket_runs.alias("run")


def purge(connection: sa.Connection, limit: int) -> Purged:
    """See `Store.purge`."""
    # Asked first, and alone: the statements that delete name four tables.
    is_due = connection.execute(_ANY_DUE).first() is not None
    deleted = _purge_runs(connection, limit) if is_due else Purged()
    expired = connection.execute(_delete_expired(limit)).rowcount
    claims = connection.execute(_delete_claims(limit)).rowcount
    return deleted + Purged(checkpoints=expired, claims=claims)


def _purge_runs(connection: sa.Connection, limit: int) -> Purged:
    due = _due_runs(max(1, limit // RUNS_OF_ROWS))
    left = [sa.select(1).where(_of(table, due)).limit(1).correlate(due).scalar_subquery() for table in _OWNED]
    # Subqueries that are NULL and not NOT EXISTS, for which Postgres may read whole tables.
    is_empty = sa.and_(*(row.is_(None) for row in left))
    with writing(connection):
        gone = [connection.execute(_delete_owned(table, due, limit)).rowcount for table in _OWNED]
        halves = sa.select(due.c.graph, due.c.execution_id).where(
            due.c.state == RunState.FAILED, sa.not_(is_empty)
        )
        for graph, execution_id in connection.execute(halves).all():
            connection.execute(_close(graph, execution_id))
        empty = sa.select(row_id(_RUN)).join_from(due, _RUN, _of(_RUN, due)).where(is_empty)
        runs = connection.execute(_delete(docket_runs, empty)).rowcount
    executions, checkpoints, chunks = gone
    return Purged(runs=runs, checkpoints=checkpoints, executions=executions, chunks=chunks)


def _due_runs(limit: int) -> Any:
    run = docket_runs.c
    due = sa.select(run.graph, run.execution_id, run.state).where(_IS_DUE).order_by(run.expires_at)
    return due.limit(limit).with_for_update(skip_locked=True).subquery("due")


def _delete_owned(table: sa.Table, due: Any, limit: int) -> sa.Delete:
    row = table.alias("owned")
    return _delete(table, sa.select(row_id(row)).join_from(due, row, _of(row, due)).limit(limit))


def _close(graph: str, execution_id: str) -> sa.Update:
    """Return what keeps a FAILED run of which a part is deleted from being resumed."""
    error = dump_json(to_record(RunCancelled(execution_id, PURGING)))
    closed = {"state": RunState.CANCELLED, "updated_at": now(), "error": as_json(error)}
    run = docket_runs.c
    return sa.update(docket_runs).where(run.graph == graph, run.execution_id == execution_id).values(closed)


def _delete_expired(limit: int) -> sa.Delete:
    its_run = sa.select(_RUN.c.ended_at).where(_of(_ROW, _RUN)).correlate(_ROW)
    # The run is locked too: one that is being resumed at this moment keeps what it has. A date from before its end
    # is that of an earlier end: it is being replaced, or the row is deleted with the run.
    ended_at = its_run.where(_RUN.c.state.in_(_ENDED)).with_for_update(read=True, skip_locked=True)
    is_alone = its_run.with_only_columns(sa.literal(1)).scalar_subquery().is_(None)
    rows = (
        sa.select(row_id(_ROW))
        .where(
            _ROW.c.expires_at <= began(), sa.or_(is_alone, ended_at.scalar_subquery() <= _ROW.c.expires_at)
        )
        .order_by(_ROW.c.expires_at)
        .limit(limit)
    )
    return _delete(docket_cache, rows.with_for_update(of=_ROW, skip_locked=True))


def _delete_claims(limit: int) -> sa.Delete:
    is_dead = _CLAIM.c.lease_until < later(began(), -CLAIM_KEPT_S)
    rows = sa.select(row_id(_CLAIM)).where(is_dead).order_by(_CLAIM.c.lease_until).limit(limit)
    return _delete(docket_claims, rows.with_for_update(skip_locked=True))


def _delete(table: sa.Table, rows: sa.Select[Any]) -> sa.Delete:
    return sa.delete(table).where(one_of(row_id(table), rows.scalar_subquery()))


def _of(row: Any, run: Any) -> sa.ColumnElement[bool]:
    return sa.and_(row.c.graph == run.c.graph, row.c.execution_id == run.c.execution_id)
