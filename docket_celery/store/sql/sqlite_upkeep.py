"""What others than its holder do to a run in SQLite: cancel it, and find out that nobody advances it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, text

from docket_celery.store.records import LostRun, RunRow, RunState
from docket_celery.store.rows import Row, clean_text, dump_json, read_run
from docket_celery.store.rules import CANCEL_LOOK_S, LONGEST_LOOK_S, QUEUE_PATIENCE, STAGE_PATIENCE
from docket_celery.store.sql.sqlite import FIND_RUN, NOW, after, writing

_IS_RUN = "graph = :graph AND execution_id = :execution_id"
_LOOK = f"CASE WHEN message IS NOT NULL THEN {CANCEL_LOOK_S}.0 END"
_CANCEL = text(f"""
UPDATE docket_runs SET state = 'CANCELLED', lease_until = NULL, error = :error,
    wake_at = {after(_LOOK)}, ended_at = {NOW},
    updated_at = {NOW}, expires_at = {after(":retention_s")}
WHERE {_IS_RUN} AND state IN ('QUEUED', 'RUNNING', 'WAITING')
""")
_CANCEL_CHUNKS = text(f"""
UPDATE docket_chunks SET state = 'CANCELLED', lease_until = NULL
WHERE {_IS_RUN} AND state IN ('QUEUED', 'RUNNING')
""")
_DATE = text(f"UPDATE docket_cache SET expires_at = {after('ttl')} WHERE {_IS_RUN} AND ttl IS NOT NULL")
_FIND_DUE = text(f"""
SELECT graph, execution_id, task_name, retries, stage, state, message, items_failed > items_allowed AS failing,
    (julianday({NOW}) - julianday(updated_at)) * 86400.0 AS idle_s
FROM docket_runs
WHERE message IS NOT NULL AND task_name IN :task_names AND ((state IN ('WAITING', 'CANCELLED') AND wake_at <= {NOW})
    OR (state = 'RUNNING' AND lease_until <= {NOW} AND (wake_at IS NULL OR wake_at <= {NOW})))
ORDER BY wake_at LIMIT :limit
""").bindparams(bindparam("task_names", expanding=True))
_COUNT_CHUNKS = text(f"""
SELECT TOTAL(state = 'RUNNING' AND lease_until > {NOW} OR state = 'QUEUED' AND :failing IS NOT 1
        AND lease_until > {after(f"-:lease_s * {QUEUE_PATIENCE}")}) AS alive,
    TOTAL(state = 'RUNNING' AND lease_until <= {NOW} AND lost + 1 >= :max_deliveries) AS poisoned,
    TOTAL(state = 'RUNNING' AND lease_until <= {NOW}) AS dead, TOTAL(state = 'QUEUED') AS queued
FROM docket_chunks WHERE {_IS_RUN} AND stage = :stage
""")
_GIVE_UP = text(f"""
UPDATE docket_chunks SET lost = lost + 1, lease_until = NULL,
    state = CASE WHEN lost + 1 >= :max_deliveries THEN 'QUARANTINED' ELSE 'QUEUED' END
WHERE {_IS_RUN} AND stage = :stage AND state = 'RUNNING' AND lease_until <= {NOW}
""")
_LOOK_LATER = text(f"""
UPDATE docket_runs SET wake_at = {after(":wait_s")}, updated_at = CASE WHEN :died THEN {NOW} ELSE updated_at END,
    lease_until = CASE WHEN :died AND state = 'WAITING' AND lease_until IS NOT NULL
        THEN MAX(lease_until, {after(f":lease_s * {STAGE_PATIENCE}")}) ELSE lease_until END,
    items_allowed = CASE WHEN :poisoned AND items_allowed IS NOT NULL THEN -1 ELSE items_allowed END
WHERE {_IS_RUN}
""")


def cancel(
    connection: Connection, graph: str, execution_id: str, error: dict[str, Any], retention_s: float
) -> RunRow | None:
    """See `Store.cancel`."""
    values = {"graph": clean_text(graph), "execution_id": clean_text(execution_id)}
    with writing(connection):
        if connection.execute(
            _CANCEL, {**values, "error": dump_json(error), "retention_s": retention_s}
        ).rowcount:
            connection.execute(_CANCEL_CHUNKS, values)
            connection.execute(_DATE, values)
        row = connection.execute(FIND_RUN, values).mappings().first()
    return None if row is None else read_run(row)


def find_lost(
    connection: Connection, task_names: Sequence[str], lease_s: float, max_deliveries: int, limit: int
) -> list[LostRun]:
    """See `BatchStore.find_lost`."""
    found: list[LostRun] = []
    values = {"task_names": list(map(clean_text, task_names)), "limit": limit}
    with writing(connection):
        for row in connection.execute(_FIND_DUE, values).mappings().all():
            known = {**row, "lease_s": lease_s, "max_deliveries": max_deliveries}
            chunks = connection.execute(_COUNT_CHUNKS, known).mappings().one()
            lost = _is_lost(row, chunks, lease_s)
            connection.execute(_GIVE_UP, known)
            died = bool(chunks["dead"])
            wait_s = min(LONGEST_LOOK_S, max(lease_s, row["idle_s"])) if lost and not died else lease_s
            if row["state"] == RunState.CANCELLED:
                wait_s = None  # once
            known |= {"wait_s": wait_s, "died": died, "poisoned": bool(chunks["poisoned"])}
            connection.execute(_LOOK_LATER, known)
            if lost:
                names = ("graph", "execution_id", "task_name", "retries", "stage")
                found.append(LostRun(**{name: row[name] for name in names}, message=bytes(row["message"])))
    return found


def _is_lost(run: Row, chunks: Row, lease_s: float) -> bool:
    if run["state"] in {RunState.RUNNING, RunState.CANCELLED} or chunks["dead"]:
        return True
    if chunks["alive"]:
        return False
    idle_s: float = run["idle_s"]
    waits = chunks["queued"] and not run["failing"]
    return idle_s >= (QUEUE_PATIENCE * lease_s if waits else lease_s)
