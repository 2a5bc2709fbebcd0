"""The calls of `BatchStore` on Postgres: one statement each, for any number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, text

from docket_celery.errors import LeaseLost
from docket_celery.store.records import (
    Checkpoint,
    Chunk,
    ChunkEnd,
    ChunkRefusal,
    ChunkRequest,
    ChunkRow,
    Lanes,
    Lease,
    Progress,
    RunState,
    StepExecution,
)
from docket_celery.store.rows import (
    CHECKPOINT_COLUMNS,
    chunk_lease,
    chunk_values,
    clean_text,
    dump_json,
    fence_values,
    lanes_values,
    progress_values,
    read_chunk,
    read_in_order,
    read_lanes,
    read_progress,
)
from docket_celery.store.rules import STAGE_PATIENCE, refusal
from docket_celery.store.sql.postgres import execution_arrays
from docket_celery.store.sql.postgres_sql import ADD_EXECUTIONS, ADD_MANY, FENCES, IS_CHUNK, checkpoint_arrays

_COLUMNS = ", ".join(CHECKPOINT_COLUMNS)
_ADD_MANY = f"{ADD_MANY}\n    ON CONFLICT (cache_key) DO NOTHING)"
_IS_RUN = "graph = :graph AND execution_id = :execution_id"
_UNTIL = "clock_timestamp() + CAST(:lease_s AS double precision) * interval '1 second'"

_SAVE_MANY = {
    chunk: text(f"WITH f AS ({fence}){_ADD_MANY} SELECT count(*) FROM f") for chunk, fence in FENCES.items()
}
# Looked at once, and in the statement that reads: no other run can come between.
_IS_ITS_JOB = f"""(CAST(:job_digest AS bytea) IS NULL
    OR EXISTS (SELECT 1 FROM docket_runs WHERE {_IS_RUN} AND job_digest = CAST(:job_digest AS bytea)))"""
_READ_ITEMS = text(f"""
SELECT {_COLUMNS} FROM docket_cache
WHERE {_IS_RUN} AND step_name = ANY(CAST(:names AS text[])) AND item_index >= :lo AND item_index < :hi
    AND {_IS_ITS_JOB}
UNION ALL
SELECT {_COLUMNS} FROM docket_cache WHERE cache_key = ANY(CAST(:keys AS bytea[])) AND {_IS_RUN} AND {_IS_ITS_JOB}
""")
# One step into the index for each name, however many items there are.
_FIND_NAMES = text(f"""
WITH RECURSIVE names AS (
    (SELECT step_name FROM docket_cache WHERE {_IS_RUN} ORDER BY step_name LIMIT 1)
    UNION ALL
    SELECT (SELECT c.step_name FROM docket_cache AS c
        WHERE c.graph = :graph AND c.execution_id = :execution_id AND c.step_name > names.step_name
        ORDER BY c.step_name LIMIT 1)
    FROM names WHERE names.step_name IS NOT NULL)
SELECT step_name FROM names WHERE step_name IS NOT NULL
""")
_MEASURE = text(f"""
SELECT count(*), COALESCE(sum(octet_length(output_data)), 0) FROM docket_cache
WHERE {_IS_RUN} AND step_name = :name AND item_index IS NOT NULL AND item = item_index::text
""")
_STAGE_UNTIL = f"{_UNTIL} * {STAGE_PATIENCE}"
_IS_OPEN = "(stage = :stage AND items_allowed IS NOT NULL)"


def _open_stage(executions: str) -> Any:
    return text(f"""
WITH f AS (
    UPDATE docket_runs SET
        state = 'WAITING', stage = :stage, updated_at = clock_timestamp(),
        wake_at = CASE WHEN CAST(:message AS bytea) IS NOT NULL THEN {_UNTIL} END,
        lease_until = CASE WHEN CAST(:message AS bytea) IS NOT NULL THEN {_STAGE_UNTIL} END,
        message = CAST(:message AS bytea),
        -- Opened again by a copy: its chunks have counted meanwhile, and one may have stopped the rest.
        progress = CASE WHEN {_IS_OPEN} THEN progress ELSE CAST(:progress AS jsonb) END,
        lanes = CASE WHEN {_IS_OPEN} THEN lanes ELSE CAST(:lanes AS jsonb) END,
        items_allowed = CASE WHEN {_IS_OPEN} THEN items_allowed ELSE :allowed END,
        items_failed = CASE WHEN {_IS_OPEN} THEN items_failed ELSE (
            SELECT COALESCE(sum(failed), 0) FROM docket_chunks WHERE {_IS_RUN} AND stage = :stage) END
    WHERE {_IS_RUN} AND epoch = :epoch AND owner = :owner AND state = 'RUNNING'
    RETURNING CAST(lanes AS text) AS lanes),
c AS (
    INSERT INTO docket_chunks (graph, execution_id, stage, lo, hi, state, epoch, retries, lost, failed)
    SELECT CAST(:graph AS text), CAST(:execution_id AS text), CAST(:stage AS integer), u.lo, u.hi, 'QUEUED',
        0, 0, 0, 0
    FROM unnest(CAST(:los AS bigint[]), CAST(:his AS bigint[])) AS u (lo, hi), f
    ON CONFLICT (graph, execution_id, stage, lo) DO NOTHING){executions}
SELECT lanes FROM f
""")


_OPEN_STAGE = {False: _open_stage(""), True: _open_stage(ADD_EXECUTIONS)}
_FIND_STATE = text(
    f"SELECT owner, epoch, state, CAST(lanes AS text) AS lanes FROM docket_runs WHERE {_IS_RUN}"
)
_FIND_CHUNKS = text(f"""
SELECT stage, lo, hi, state, failed, CAST(errors AS text) AS errors FROM docket_chunks
WHERE {_IS_RUN} ORDER BY stage, lo
""")
_FIND_FAILED = text(f"""
SELECT stage, lo, hi, state, failed, CAST(errors AS text) AS errors FROM docket_chunks
WHERE {_IS_RUN} AND lo < :before AND hi > :first AND failed > 0 ORDER BY stage, lo
""")
_NEWER = "(c.task_id = CAST(:task_id AS text) AND CAST(:retries AS integer) > c.retries)"
_CRASH = f"""(c.state = 'RUNNING' AND c.owner <> :owner
    AND NOT (CAST(:ended_cleanly AS boolean) AND COALESCE({_NEWER}, false)))"""
_POISON = f"({_CRASH} AND c.lost + 1 >= CAST(:max_deliveries AS integer))"
_LEASE_CHUNK = text(f"""
WITH run AS (
    SELECT target, state IN ('WAITING', 'RUNNING') AND stage = :stage AS open, items_failed > items_allowed AS failing
    FROM docket_runs WHERE {_IS_RUN}),
old AS (
    SELECT state, EXTRACT(EPOCH FROM lease_until - clock_timestamp()) AS lease_left_s FROM docket_chunks
    WHERE {_IS_RUN} AND stage = :stage AND lo = :lo),
taken AS (
    UPDATE docket_chunks AS c SET
        state = CASE WHEN {_POISON} THEN 'QUARANTINED' ELSE 'RUNNING' END,
        lease_until = CASE WHEN NOT {_POISON} THEN {_UNTIL} END,
        lost = c.lost + CASE WHEN {_CRASH} THEN 1 ELSE 0 END,
        epoch = c.epoch + CASE WHEN c.state = 'RUNNING' AND c.owner = :owner THEN 0 ELSE 1 END,
        owner = :owner, task_id = CAST(:task_id AS text),
        retries = CASE WHEN c.task_id = CAST(:task_id AS text) THEN GREATEST(c.retries, :retries) ELSE :retries END
    FROM run
    WHERE c.graph = :graph AND c.execution_id = :execution_id AND c.stage = :stage AND c.lo = :lo
        AND run.open AND NOT run.failing AND (c.state = 'QUEUED' OR (c.state = 'RUNNING'
            AND (c.lease_until <= clock_timestamp() OR c.owner = :owner OR {_NEWER})))
    RETURNING c.state, c.epoch, c.hi, c.lost)
SELECT run.target, run.open, run.failing, old.state AS was, old.lease_left_s,
    taken.state, taken.epoch, taken.hi, taken.lost
FROM (SELECT 1) AS one LEFT JOIN run ON true LEFT JOIN old ON true LEFT JOIN taken ON true
""")


_DUE = "clock_timestamp() + CAST(:wake_in_s AS double precision) * interval '1 second'"
_PATIENCE = f"CAST(:lease_s AS double precision) * {STAGE_PATIENCE} * interval '1 second'"
# A statement of its own: together they would lock the run after its chunk.
_STOP = text(f"""
UPDATE docket_runs SET items_allowed = -1 WHERE {_IS_RUN} AND stage = :stage AND items_allowed >= 0
""")


def _end_chunk(checkpoints: str, executions: str) -> Any:
    # The run is locked before its chunk, as by all who touch both: ending, cancelling and opening it.
    return text(f"""
WITH run AS (
    SELECT 1 FROM docket_runs WHERE {_IS_RUN} FOR UPDATE),
f AS (
    UPDATE docket_chunks AS c SET state = :state, failed = :failed, errors = CAST(:errors AS jsonb),
        lease_until = CASE WHEN CAST(:wake_in_s AS double precision) > 0 THEN {_DUE} END
    FROM run WHERE {IS_CHUNK} RETURNING c.hi - c.lo AS items),
r AS (
    UPDATE docket_runs AS r SET updated_at = clock_timestamp(),
        lease_until = CASE WHEN r.state = 'WAITING' AND r.lease_until IS NOT NULL
            THEN GREATEST(r.lease_until, {_STAGE_UNTIL}, {_DUE} + {_PATIENCE}) ELSE r.lease_until END,
        items_failed = items_failed + CAST(:failed AS bigint),
        items_allowed = CASE WHEN CAST(:stops AS boolean) THEN -1 ELSE items_allowed END,
        progress = CASE WHEN :state = 'SUCCEEDED' THEN jsonb_set(
            progress, '{{done}}', to_jsonb(CAST(progress ->> 'done' AS bigint) + f.items)) ELSE progress END
    FROM f WHERE r.graph = :graph AND r.execution_id = :execution_id AND r.stage = :stage
    RETURNING CAST(r.progress AS text) AS progress)
{checkpoints}{executions}
SELECT (SELECT count(*) FROM f) AS fenced, (SELECT progress FROM r) AS progress
""")


_END_CHUNK = {
    (checkpoints, executions): _end_chunk(
        _ADD_MANY if checkpoints else "", ADD_EXECUTIONS if executions else ""
    )
    for checkpoints in (False, True)
    for executions in (False, True)
}
_FIND_CHUNK = text(
    f"SELECT owner, epoch, state FROM docket_chunks WHERE {_IS_RUN} AND stage = :stage AND lo = :lo"
)


def save_many(connection: Connection, lease: Lease, checkpoints: Sequence[Checkpoint]) -> None:
    """See `BatchStore.save_many`."""
    values = fence_values(lease) | checkpoint_arrays(checkpoints)
    if not connection.execute(_SAVE_MANY[lease.chunk is not None], values).scalar_one():
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


def read_items(
    connection: Connection,
    graph: str,
    execution_id: str,
    names: Sequence[str],
    lo: int,
    hi: int,
    keys: Sequence[bytes],
    job_digest: bytes | None,
) -> list[Checkpoint]:
    """See `BatchStore.read_items`."""
    run = {"graph": clean_text(graph), "execution_id": clean_text(execution_id)}
    listed = [clean_text(name) for name in names]
    values = {**run, "names": listed, "lo": lo, "hi": hi, "keys": list(keys), "job_digest": job_digest}
    return read_in_order(connection.execute(_READ_ITEMS, values).mappings().all(), **run)


def find_names(connection: Connection, graph: str, execution_id: str) -> set[str]:
    """See `BatchStore.find_names`."""
    values = {"graph": clean_text(graph), "execution_id": clean_text(execution_id)}
    return set(connection.execute(_FIND_NAMES, values).scalars())


def measure_items(connection: Connection, graph: str, execution_id: str, name: str) -> tuple[int, int]:
    """See `BatchStore.measure_items`."""
    values = {"graph": clean_text(graph), "execution_id": clean_text(execution_id), "name": clean_text(name)}
    count, size = connection.execute(_MEASURE, values).one()
    return int(count), int(size)


def open_stage(
    connection: Connection,
    lease: Lease,
    stage: int,
    chunks: Sequence[Chunk],
    allowed: int,
    executions: Sequence[StepExecution],
    progress: Progress | None,
    lanes: Lanes | None,
    message: bytes | None,
) -> Lanes | None:
    """See `BatchStore.open_stage`."""
    values = fence_values(lease) | execution_arrays(executions) | {"lease_s": lease.lease_s}
    values |= {"stage": stage, "allowed": allowed, "message": message}
    values |= {"progress": progress_values(progress), "lanes": lanes_values(lanes)}
    values |= {"los": [chunk.lo for chunk in chunks], "his": [chunk.hi for chunk in chunks]}
    row = connection.execute(_OPEN_STAGE[bool(executions)], values).first()
    if row is None:
        row = connection.execute(_FIND_STATE, values).first()
        if row is None or tuple(row[:3]) != (values["owner"], values["epoch"], RunState.WAITING):
            raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
    return read_lanes(row.lanes)


def find_chunks(connection: Connection, graph: str, execution_id: str) -> list[ChunkRow]:
    """See `BatchStore.find_chunks`."""
    values = {"graph": clean_text(graph), "execution_id": clean_text(execution_id)}
    return [read_chunk(row) for row in connection.execute(_FIND_CHUNKS, values).mappings()]


def find_failed(connection: Connection, graph: str, execution_id: str, lo: int, hi: int) -> list[ChunkRow]:
    """See `BatchStore.find_failed`."""
    values = {"graph": clean_text(graph), "execution_id": clean_text(execution_id), "first": lo, "before": hi}
    return [read_chunk(row) for row in connection.execute(_FIND_FAILED, values).mappings()]


def lease_chunk(connection: Connection, request: ChunkRequest) -> Lease | ChunkRefusal:
    """See `BatchStore.lease_chunk`."""
    values = chunk_values(request)
    row = connection.execute(_LEASE_CHUNK, values).mappings().one()
    if row["state"] == RunState.RUNNING:
        return chunk_lease(request, row)
    state = row["state"] or row["was"]
    if state == RunState.QUARANTINED:
        connection.execute(_STOP, values)
    return refusal(state, is_open=row["open"], failing=row["failing"], lease_left_s=row["lease_left_s"])


def end_chunk(connection: Connection, lease: Lease, ending: ChunkEnd) -> Progress | None:
    """See `BatchStore.end_chunk`."""
    values = fence_values(lease) | execution_arrays(ending.executions)
    if ending.checkpoints:
        values |= checkpoint_arrays(ending.checkpoints)
    values |= {"state": ending.state.value, "failed": ending.failed, "stops": ending.stops}
    values |= {"wake_in_s": ending.wake_in_s, "lease_s": lease.lease_s}
    values["errors"] = dump_json(dict(ending.errors)) if ending.errors else None
    statement = _END_CHUNK[bool(ending.checkpoints), bool(ending.executions)]
    found = connection.execute(statement, values).mappings().one()
    if found["fenced"]:
        return read_progress(found["progress"])
    row = connection.execute(_FIND_CHUNK, values).first()
    if row is None or tuple(row) != (values["owner"], values["epoch"], values["state"]):
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
    return None
