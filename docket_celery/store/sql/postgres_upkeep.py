"""What others than its holder do to a run in Postgres: cancel it, and find out that nobody advances it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, text

from docket_celery.store.records import LostRun, RunRow
from docket_celery.store.rows import clean_text, dump_json
from docket_celery.store.rules import CANCEL_LOOK_S, LONGEST_LOOK_S, QUEUE_PATIENCE, STAGE_PATIENCE
from docket_celery.store.sql.postgres import date_rest, find_run
from docket_celery.store.sql.postgres_sql import DATE, DATED, DATED_AT_ONCE

_SECOND = "interval '1 second'"
_LEASE = f"CAST(:lease_s AS double precision) * {_SECOND}"

_CANCEL = text(f"""
WITH f AS (
    UPDATE docket_runs SET
        state = 'CANCELLED', lease_until = NULL, error = CAST(:error AS jsonb),
        -- Whoever waits for the task must hear of it, though its messages may be lost.
        wake_at = CASE WHEN message IS NOT NULL THEN clock_timestamp() + {CANCEL_LOOK_S} * {_SECOND} END,
        ended_at = clock_timestamp(), updated_at = clock_timestamp(),
        expires_at = clock_timestamp() + CAST(:retention_s AS double precision) * {_SECOND}
    WHERE graph = :graph AND execution_id = :execution_id AND state IN ('QUEUED', 'RUNNING', 'WAITING')
    RETURNING ended_at),
c AS (
    UPDATE docket_chunks SET state = 'CANCELLED', lease_until = NULL FROM f
    WHERE graph = :graph AND execution_id = :execution_id AND state IN ('QUEUED', 'RUNNING')),{DATE}
SELECT count(*) AS fenced{DATED} FROM f
""")

# The last sign of life: the stage was opened, one of its chunks ended, or one was found dead, so somebody had it.
_FIND_LOST = text(f"""
WITH due AS (
    SELECT graph, execution_id, stage, state, updated_at, items_failed > items_allowed AS failing FROM docket_runs
    WHERE message IS NOT NULL AND task_name = ANY(CAST(:task_names AS text[])) AND (
        (state IN ('WAITING', 'CANCELLED') AND wake_at <= statement_timestamp())
        OR (state = 'RUNNING' AND lease_until <= statement_timestamp()
            AND (wake_at IS NULL OR wake_at <= statement_timestamp())))
    ORDER BY wake_at NULLS FIRST LIMIT :limit FOR UPDATE SKIP LOCKED),
seen AS (
    SELECT due.*, chunks.* FROM due CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE (c.state = 'RUNNING' AND c.lease_until > statement_timestamp())
                -- To be tried again, until its message may have been in a queue long enough.
                OR (c.state = 'QUEUED' AND due.failing IS NOT TRUE
                    AND c.lease_until > statement_timestamp() - {QUEUE_PATIENCE} * {_LEASE})) AS alive,
            bool_or(c.state = 'RUNNING' AND c.lease_until <= statement_timestamp()
                AND c.lost + 1 >= CAST(:max_deliveries AS integer)) AS poisoned,
            count(*) FILTER (WHERE c.state = 'RUNNING' AND c.lease_until <= statement_timestamp()) AS dead,
            count(*) FILTER (WHERE c.state = 'QUEUED') AS queued
        FROM docket_chunks AS c
        WHERE c.graph = due.graph AND c.execution_id = due.execution_id AND c.stage = due.stage) AS chunks),
judged AS (
    SELECT graph, execution_id, poisoned, dead > 0 AS died, CASE
        WHEN state IN ('RUNNING', 'CANCELLED') OR dead > 0 THEN true
        WHEN alive > 0 THEN false
        WHEN queued > 0 AND failing IS NOT TRUE THEN updated_at <= statement_timestamp() - {QUEUE_PATIENCE} * {_LEASE}
        ELSE updated_at <= statement_timestamp() - {_LEASE} END AS lost
    FROM seen),
dead AS (
    UPDATE docket_chunks AS c SET lost = c.lost + 1, lease_until = NULL, state = CASE
        WHEN c.lost + 1 >= CAST(:max_deliveries AS integer) THEN 'QUARANTINED' ELSE 'QUEUED' END
    FROM due WHERE c.graph = due.graph AND c.execution_id = due.execution_id AND c.stage = due.stage
        AND c.state = 'RUNNING' AND c.lease_until <= statement_timestamp())
UPDATE docket_runs AS r SET
    updated_at = CASE WHEN judged.died THEN clock_timestamp() ELSE r.updated_at END,
    lease_until = CASE WHEN judged.died AND r.state = 'WAITING' AND r.lease_until IS NOT NULL
        THEN GREATEST(r.lease_until, clock_timestamp() + {STAGE_PATIENCE} * {_LEASE}) ELSE r.lease_until END,
    items_allowed = CASE WHEN judged.poisoned AND r.items_allowed IS NOT NULL THEN -1 ELSE r.items_allowed END,
    wake_at = CASE WHEN r.state <> 'CANCELLED' THEN clock_timestamp() END + CASE WHEN judged.lost AND NOT judged.died
        THEN LEAST({LONGEST_LOOK_S} * {_SECOND}, GREATEST({_LEASE}, clock_timestamp() - r.updated_at))
        ELSE {_LEASE} END
FROM judged WHERE r.graph = judged.graph AND r.execution_id = judged.execution_id
RETURNING r.graph, r.execution_id, r.task_name, r.retries, r.stage, r.message, judged.lost
""")


def cancel(
    connection: Connection, graph: str, execution_id: str, error: dict[str, Any], retention_s: float
) -> RunRow | None:
    """See `Store.cancel`."""
    values = {"graph": clean_text(graph), "execution_id": clean_text(execution_id)}
    ending = {**values, "error": dump_json(error), "retention_s": retention_s}
    if connection.execute(_CANCEL, ending).mappings().one()["dated"] == DATED_AT_ONCE:
        date_rest(connection, values)
    return find_run(connection, graph, execution_id)


def find_lost(
    connection: Connection, task_names: Sequence[str], lease_s: float, max_deliveries: int, limit: int
) -> list[LostRun]:
    """See `BatchStore.find_lost`."""
    values = {"task_names": list(map(clean_text, task_names)), "lease_s": lease_s, "limit": limit}
    values["max_deliveries"] = max_deliveries
    return [
        LostRun(
            graph=row["graph"],
            execution_id=row["execution_id"],
            task_name=row["task_name"],
            retries=row["retries"],
            stage=row["stage"],
            message=bytes(row["message"]),
        )
        for row in connection.execute(_FIND_LOST, values).mappings()
        if row["lost"]
    ]
