"""Deleting what nobody needs any more, a bounded number of rows in each short transaction.

A run goes together with all that it has, or its name would mean half of it. Where the runs of a batch have more than
one statement may delete, the FAILED ones are CANCELLED first: nobody may resume one from a part of its checkpoints.

Postgres: rows that another one holds are skipped, so any number of processes may purge side by side. The statements
lead the planner to the indexes: ``= ANY(ARRAY(...))`` and lateral joins cannot become hash joins, and unlike
``clock_timestamp()`` does ``statement_timestamp()`` not change while a statement runs. With a limit like 100,000 rows
it may read whole tables all the same, so the command takes 10,000 at most.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import Connection, text

from docket_celery.errors import RunCancelled, to_record
from docket_celery.store.records import Purged, RunState
from docket_celery.store.rows import dump_json

RUNS_OF_ROWS = 10
"""One run for so many rows of the limit: few have more, so mostly a statement takes whole runs."""
CLAIM_KEPT_S = 60
"""A dead claim stays that long for look-ups that began before its result was there."""
PURGING = "it was kept for as long as docket_retention says and is being deleted; submit it again"

_ENDED = ", ".join(f"'{state.value}'" for state in RunState if state.ended)
# A queued run has a date if its message may never come.
_DUE = f"{_ENDED}, '{RunState.QUEUED.value}'"
_OF_RUN = "t.execution_id = due.execution_id AND t.graph = due.graph"

_RUNS = text(f"""
WITH due AS (
    SELECT graph, execution_id, state FROM docket_runs
    WHERE expires_at <= statement_timestamp() AND state IN ({_DUE})
    ORDER BY expires_at LIMIT :runs FOR UPDATE SKIP LOCKED),
executions AS (
    DELETE FROM docket_executions WHERE id = ANY(ARRAY(
        SELECT t.id FROM due JOIN docket_executions AS t ON {_OF_RUN} LIMIT :rows)) RETURNING 1),
checkpoints AS (
    DELETE FROM docket_cache WHERE cache_key = ANY(ARRAY(
        SELECT t.cache_key FROM due JOIN docket_cache AS t ON {_OF_RUN} LIMIT :rows)) RETURNING 1),
chunks AS (
    DELETE FROM docket_chunks WHERE (graph, execution_id, stage, lo) IN (
        SELECT t.graph, t.execution_id, t.stage, t.lo FROM due JOIN docket_chunks AS t ON {_OF_RUN} LIMIT :rows)
    RETURNING 1),
deleted AS (
    SELECT (SELECT count(*) FROM executions) AS executions, (SELECT count(*) FROM checkpoints) AS checkpoints,
        (SELECT count(*) FROM chunks) AS chunks),
runs AS (
    DELETE FROM docket_runs AS t USING due, deleted
    WHERE {_OF_RUN} AND GREATEST(deleted.executions, deleted.checkpoints, deleted.chunks) < :rows RETURNING 1),
closed AS (
    UPDATE docket_runs AS t SET state = 'CANCELLED', updated_at = clock_timestamp(), error = jsonb_build_object(
        'code', '{RunCancelled.code}', 'args', jsonb_build_array(t.execution_id, CAST(:why AS text)))
    FROM due, deleted
    WHERE {_OF_RUN} AND due.state = 'FAILED'
        AND GREATEST(deleted.executions, deleted.checkpoints, deleted.chunks) >= :rows)
SELECT (SELECT count(*) FROM runs) AS runs, checkpoints, executions, chunks FROM deleted
""")
# The run is locked too: one that is being resumed at this moment keeps what it has. A date from before its end is
# that of an earlier one: it is being replaced, or goes with the run.
_DATED = text(f"""
DELETE FROM docket_cache WHERE cache_key = ANY(ARRAY(
    SELECT c.cache_key FROM docket_cache AS c
    CROSS JOIN LATERAL (
        SELECT 1 FROM docket_runs AS r
        WHERE r.graph = c.graph AND r.execution_id = c.execution_id AND r.state IN ({_ENDED})
            AND c.expires_at >= r.ended_at
        FOR SHARE SKIP LOCKED) AS ended
    WHERE c.expires_at <= statement_timestamp()
    ORDER BY c.expires_at LIMIT :rows FOR UPDATE OF c SKIP LOCKED))
""")
# A subquery and not NOT EXISTS, for which all runs may be read; without an execution id it finds none.
_EXPIRED = text("""
DELETE FROM docket_cache WHERE cache_key = ANY(ARRAY(
    SELECT c.cache_key FROM docket_cache AS c
    WHERE c.expires_at <= statement_timestamp() AND (
        SELECT 1 FROM docket_runs AS r WHERE r.graph = c.graph AND r.execution_id = c.execution_id) IS NULL
    ORDER BY c.expires_at LIMIT :rows FOR UPDATE OF c SKIP LOCKED))
""")
_CLAIMS = text(f"""
DELETE FROM docket_claims WHERE cache_key = ANY(ARRAY(
    SELECT cache_key FROM docket_claims
    WHERE lease_until < statement_timestamp() - {CLAIM_KEPT_S} * interval '1 second'
    ORDER BY lease_until LIMIT :rows FOR UPDATE SKIP LOCKED))
""")


def purge_postgres(connection: Connection, limit: int) -> Purged:
    """See `Store.purge`."""
    values = {"rows": limit, "runs": max(1, limit // RUNS_OF_ROWS), "why": PURGING}
    found = connection.execute(_RUNS, values).mappings().one()
    dated, expired, claims = (
        connection.execute(statement, {"rows": limit}).rowcount for statement in (_DATED, _EXPIRED, _CLAIMS)
    )
    return Purged(
        runs=found["runs"],
        checkpoints=found["checkpoints"] + dated + expired,
        executions=found["executions"],
        chunks=found["chunks"],
        claims=claims,
    )


_NOW = "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"
_LITE_DUE = text(f"""
SELECT graph, execution_id FROM docket_runs WHERE expires_at <= {_NOW} AND state IN ({_DUE})
ORDER BY expires_at LIMIT :runs
""")
_LITE_OF_RUN = {
    table: text(
        f"DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table} "
        "WHERE execution_id = :execution_id AND graph = :graph LIMIT :rows)"
    )
    for table in ("docket_executions", "docket_cache", "docket_chunks")
}
_LITE_RUN = text("DELETE FROM docket_runs WHERE graph = :graph AND execution_id = :execution_id")
_LITE_CLOSE = text(f"""
UPDATE docket_runs SET state = 'CANCELLED', updated_at = {_NOW},
    error = :error
WHERE graph = :graph AND execution_id = :execution_id AND state = 'FAILED'
""")
_LITE_EXPIRED = text(f"""
DELETE FROM docket_cache WHERE rowid IN (
    SELECT c.rowid FROM docket_cache AS c WHERE c.expires_at <= {_NOW} AND NOT EXISTS (
        SELECT 1 FROM docket_runs AS r
        WHERE r.graph = c.graph AND r.execution_id = c.execution_id AND r.state NOT IN ({_ENDED}))
    ORDER BY c.expires_at LIMIT :rows)
""")
_LITE_CLAIMS = text(f"""
DELETE FROM docket_claims WHERE rowid IN (
    SELECT rowid FROM docket_claims
    WHERE lease_until < strftime('%Y-%m-%d %H:%M:%f', 'now', '-{CLAIM_KEPT_S} seconds') || '000'
    ORDER BY lease_until LIMIT :rows)
""")


def purge_sqlite(
    connection: Connection, limit: int, writing: Callable[[Connection], AbstractContextManager[None]]
) -> Purged:
    """See `Store.purge`; *writing* begins a transaction with the write lock."""
    values = {"rows": limit, "runs": max(1, limit // RUNS_OF_ROWS)}
    runs, gone = 0, dict.fromkeys(_LITE_OF_RUN, 0)
    with writing(connection):
        for row in connection.execute(_LITE_DUE, values).mappings().all():
            error = to_record(RunCancelled(row["execution_id"], PURGING))
            run: dict[str, Any] = {**row, "error": dump_json(error)}
            for table, statement in _LITE_OF_RUN.items():
                left = limit - gone[table]
                gone[table] += connection.execute(statement, {**run, "rows": left}).rowcount
            if max(gone.values()) >= limit:
                connection.execute(_LITE_CLOSE, run)
                break
            runs += connection.execute(_LITE_RUN, run).rowcount
    with writing(connection):
        expired = connection.execute(_LITE_EXPIRED, values).rowcount
        claims = connection.execute(_LITE_CLAIMS, values).rowcount
    return Purged(
        runs=runs,
        checkpoints=gone["docket_cache"] + expired,
        executions=gone["docket_executions"],
        chunks=gone["docket_chunks"],
        claims=claims,
    )
