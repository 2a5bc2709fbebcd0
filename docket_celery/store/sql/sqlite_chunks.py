"""The calls of `BatchStore` on SQLite: one small transaction each."""

from __future__ import annotations

from collections.abc import Sequence

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
from docket_celery.store.rules import STAGE_PATIENCE, is_crash, refusal
from docket_celery.store.sql.sqlite import (
    CHUNK_FENCE,
    NOW,
    add_executions,
    after,
    check_held,
    insert_checkpoint,
    writing,
)

_COLUMNS = ", ".join(CHECKPOINT_COLUMNS)
_IS_RUN = "graph = :graph AND execution_id = :execution_id"
_IS_CHUNK = f"{_IS_RUN} AND stage = :stage AND lo = :lo"

_IS_ITS_JOB = f"""(:job_digest IS NULL
    OR EXISTS (SELECT 1 FROM docket_runs WHERE {_IS_RUN} AND job_digest = :job_digest))"""
_OF_STEP = text(f"""
SELECT {_COLUMNS} FROM docket_cache
WHERE {_IS_RUN} AND step_name = :name AND item_index >= :lo AND item_index < :hi AND {_IS_ITS_JOB}
""")
_OF_KEY = text(f"SELECT {_COLUMNS} FROM docket_cache WHERE cache_key = :key AND {_IS_RUN} AND {_IS_ITS_JOB}")
_MEASURE = text(f"""
SELECT count(*), COALESCE(sum(length(output_data)), 0) FROM docket_cache
WHERE {_IS_RUN} AND step_name = :name AND item_index IS NOT NULL AND item = CAST(item_index AS text)
""")
# Opened again by a copy: its chunks have counted meanwhile, and one may have stopped the rest.
_IS_OPEN = "(stage = :stage AND items_allowed IS NOT NULL)"
_OPEN_STAGE = text(f"""
UPDATE docket_runs SET
    state = 'WAITING', stage = :stage, updated_at = {NOW}, message = :message,
    wake_at = {after("CASE WHEN :message IS NOT NULL THEN :lease_s END")},
    lease_until = {after(f"CASE WHEN :message IS NOT NULL THEN :lease_s * {STAGE_PATIENCE} END")},
    progress = CASE WHEN {_IS_OPEN} THEN progress ELSE :progress END,
    lanes = CASE WHEN {_IS_OPEN} THEN lanes ELSE :lanes END,
    items_allowed = CASE WHEN {_IS_OPEN} THEN items_allowed ELSE :allowed END,
    items_failed = CASE WHEN {_IS_OPEN} THEN items_failed ELSE (
        SELECT COALESCE(sum(failed), 0) FROM docket_chunks WHERE {_IS_RUN} AND stage = :stage) END
WHERE {_IS_RUN} AND epoch = :epoch AND owner = :owner AND state = 'RUNNING'
""")
_ADD_CHUNK = text("""
INSERT OR IGNORE INTO docket_chunks (graph, execution_id, stage, lo, hi, state, epoch, retries, lost, failed)
VALUES (:graph, :execution_id, :stage, :lo, :hi, 'QUEUED', 0, 0, 0, 0)
""")
_FIND_STATE = text(f"SELECT owner, epoch, state, lanes FROM docket_runs WHERE {_IS_RUN}")
_FIND_CHUNKS = text(f"""
SELECT stage, lo, hi, state, failed, errors FROM docket_chunks WHERE {_IS_RUN} ORDER BY stage, lo
""")
_FIND_FAILED = text(f"""
SELECT stage, lo, hi, state, failed, errors FROM docket_chunks
WHERE {_IS_RUN} AND lo < :before AND hi > :first AND failed > 0 ORDER BY stage, lo
""")
_FIND_CHUNK = text(f"""
SELECT stage, lo, hi, state, failed, errors, owner, epoch, lost, task_id, retries,
    (julianday(lease_until) - julianday({NOW})) * 86400.0 AS lease_left_s, lease_until <= {NOW} AS expired
FROM docket_chunks WHERE {_IS_CHUNK}
""")
_FIND_RUN = text(f"""
SELECT target, state IN ('WAITING', 'RUNNING') AND stage = :stage AS is_open, items_failed > items_allowed AS failing
FROM docket_runs WHERE {_IS_RUN}
""")
_STOP = text(f"""
UPDATE docket_runs SET items_allowed = -1 WHERE {_IS_RUN} AND stage = :stage AND items_allowed >= 0
""")
_TAKE = text(f"""
UPDATE docket_chunks SET state = :state, lease_until = {after(":lease_s")}, lost = :lost, epoch = :epoch,
    owner = :owner, task_id = :task_id, retries = :retries
WHERE {_IS_CHUNK}
""")
_END_CHUNK = text(f"""
UPDATE docket_chunks SET state = :state, failed = :failed, errors = :errors,
    lease_until = {after("CASE WHEN :wake_in_s > 0 THEN :wake_in_s END")}
WHERE {CHUNK_FENCE}
""")
_NOTE_CHUNK = text(f"""
UPDATE docket_runs SET updated_at = {NOW}, items_failed = items_failed + :failed,
    lease_until = CASE WHEN state = 'WAITING' AND lease_until IS NOT NULL
        THEN MAX(lease_until, {after(f":wake_in_s + :lease_s * {STAGE_PATIENCE}")}) ELSE lease_until END,
    items_allowed = CASE WHEN :stops THEN -1 ELSE items_allowed END,
    progress = CASE WHEN :state = 'SUCCEEDED' AND progress IS NOT NULL THEN json_set(
        progress, '$.done', json_extract(progress, '$.done') + (
            SELECT hi - lo FROM docket_chunks WHERE {_IS_CHUNK})) ELSE progress END
WHERE {_IS_RUN} AND stage = :stage
""")
_FIND_PROGRESS = text(f"SELECT progress FROM docket_runs WHERE {_IS_RUN} AND stage = :stage")
_FIND_NAMES = text(f"SELECT DISTINCT step_name FROM docket_cache WHERE {_IS_RUN}")


def save_many(connection: Connection, lease: Lease, checkpoints: Sequence[Checkpoint]) -> None:
    """See `BatchStore.save_many`."""
    with writing(connection):
        check_held(connection, lease)
        for checkpoint in checkpoints:
            insert_checkpoint(connection, checkpoint)


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
    its = {**run, "job_digest": job_digest}
    rows = [
        row
        for name in names
        for row in connection.execute(
            _OF_STEP, {**its, "name": clean_text(name), "lo": lo, "hi": hi}
        ).mappings()
    ]
    rows += [row for key in keys for row in connection.execute(_OF_KEY, {**its, "key": key}).mappings()]
    return read_in_order(rows, **run)


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
    values = fence_values(lease) | {"stage": stage, "allowed": allowed}
    values |= {"message": message, "progress": progress_values(progress), "lease_s": lease.lease_s}
    values["lanes"] = lanes_values(lanes)
    with writing(connection):
        if connection.execute(_OPEN_STAGE, values).rowcount:
            for chunk in chunks:
                connection.execute(_ADD_CHUNK, {**values, "lo": chunk.lo, "hi": chunk.hi})
            add_executions(connection, executions)
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
    with writing(connection):
        run = connection.execute(_FIND_RUN, values).mappings().first()
        row = connection.execute(_FIND_CHUNK, values).mappings().first()
        if run is None or row is None:
            return refusal(None, is_open=None, failing=None, lease_left_s=None)
        state, task_id, retries = row["state"], row["task_id"], row["retries"]
        same = request.task_id is not None and task_id == request.task_id
        ours = row["owner"] == values["owner"]
        free = state == RunState.QUEUED or (
            state == RunState.RUNNING and (row["expired"] or ours or (same and request.retries > retries))
        )
        if not (free and run["is_open"] and run["failing"] == 0):
            if state == RunState.QUARANTINED:
                connection.execute(_STOP, values)
            is_open, failing = bool(run["is_open"]), bool(run["failing"])
            return refusal(state, is_open=is_open, failing=failing, lease_left_s=row["lease_left_s"])
        crashed = is_crash(request, state=state, owner=row["owner"], task_id=task_id, retries=retries)
        lost = row["lost"] + crashed
        poison = crashed and lost >= request.max_deliveries
        taken = {
            "state": "QUARANTINED" if poison else "RUNNING",
            "lease_s": None if poison else request.lease_s,
            "lost": lost,
            "epoch": row["epoch"] + (not (state == RunState.RUNNING and ours)),
            "retries": max(retries, request.retries) if same else request.retries,
        }
        connection.execute(_TAKE, values | taken)
        if poison:
            connection.execute(_STOP, values)
    if poison:
        return refusal("QUARANTINED", is_open=True, failing=False, lease_left_s=None)
    return chunk_lease(request, {**row, **taken, "target": run["target"]})


def end_chunk(connection: Connection, lease: Lease, ending: ChunkEnd) -> Progress | None:
    """See `BatchStore.end_chunk`."""
    values = fence_values(lease) | {
        "state": ending.state.value,
        "failed": ending.failed,
        "stops": ending.stops,
        "wake_in_s": ending.wake_in_s,
        "lease_s": lease.lease_s,
        "errors": dump_json(dict(ending.errors)) if ending.errors else None,
    }
    with writing(connection):
        if connection.execute(_END_CHUNK, values).rowcount:
            for checkpoint in ending.checkpoints:
                insert_checkpoint(connection, checkpoint)
            add_executions(connection, ending.executions)
            connection.execute(_NOTE_CHUNK, values)
            return read_progress(connection.execute(_FIND_PROGRESS, values).scalar())
        row = connection.execute(_FIND_CHUNK, values).mappings().first()
    ours = (values["owner"], values["epoch"], values["state"])
    if row is None or (row["owner"], row["epoch"], row["state"]) != ours:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
    return None
