"""Items on their way into Postgres: each statement extends the lease under which it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, text

from docket_celery.errors import LeaseLost, StoreUnavailable
from docket_celery.store.records import UNFINISHED, Checkpoint, Lease, RunRequest, RunRow
from docket_celery.store.rows import clean_text, fence_values, lease_from, request_values
from docket_celery.store.sql.postgres import find_run
from docket_celery.store.sql.postgres_sql import ADD_MANY, checkpoint_arrays

_TRIES = 3  # as for an acquired run that is deleted meanwhile
_UNTIL = "clock_timestamp() + CAST(:lease_s AS double precision) * interval '1 second'"
_KEPT = "clock_timestamp() + CAST(:keep_s AS double precision) * interval '1 second'"
# An upload that is finished has no lease: its last words come too late.
_IS_OURS = """graph = :graph AND execution_id = :execution_id AND epoch = :epoch AND owner = :owner
    AND state IN ('RUNNING', 'QUEUED') AND lease_until IS NOT NULL"""
_FENCE = f"UPDATE docket_runs SET lease_until = {_UNTIL} WHERE {_IS_OURS} RETURNING 1"

_BEGIN = text(f"""
INSERT INTO docket_runs AS r (
    graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, owner,
    lease_until, lost, failures, created_at, updated_at, expires_at)
VALUES (
    :graph, :execution_id, :task_name, :task_id, :retries, :target, :job, :job_digest, 'QUEUED', 0, 1, :owner,
    {_UNTIL}, 0, 0, clock_timestamp(), clock_timestamp(), {_KEPT})
ON CONFLICT (graph, execution_id) DO UPDATE SET
    epoch = CASE WHEN r.owner = excluded.owner THEN r.epoch ELSE r.epoch + 1 END,
    owner = excluded.owner, lease_until = excluded.lease_until, target = excluded.target, job = excluded.job,
    task_name = excluded.task_name, task_id = excluded.task_id, retries = excluded.retries,
    updated_at = excluded.updated_at, expires_at = excluded.expires_at
WHERE r.state = 'QUEUED' AND r.job_digest = excluded.job_digest
    AND (r.lease_until <= clock_timestamp() OR r.owner = excluded.owner)
RETURNING epoch
""")
_CLEAR = text(f"""
DELETE FROM docket_cache WHERE execution_id = :execution_id AND graph = :graph
    AND EXISTS (SELECT 1 FROM docket_runs WHERE {_IS_OURS})
""")
_REPLACES = ", ".join(
    f"{name} = excluded.{name}"
    for name in ("output_type", "output_data", "checksum", "output_shape", "output_json", "created_at")
)
_PUT = f"""{ADD_MANY}
    ON CONFLICT (cache_key) DO UPDATE SET {_REPLACES} WHERE c.checksum <> excluded.checksum)"""
_PUT_ITEMS = text(f"WITH f AS ({_FENCE}){_PUT} SELECT count(*) FROM f")
_CLOSE_ITEMS = text(f"""
WITH f AS ({_FENCE}),
d AS (
    DELETE FROM docket_cache USING f
    WHERE execution_id = :execution_id AND graph = :graph AND step_name = :name AND item_index >= :count){_PUT}
SELECT count(*) FROM f
""")
_FINISH = text(f"""
UPDATE docket_runs SET
    job_digest = :job_digest, lease_until = NULL, epoch = 0, updated_at = clock_timestamp(), expires_at = {_KEPT}
WHERE {_IS_OURS} AND state = 'QUEUED'
RETURNING 1
""")
_FIND_UPLOAD = text(
    "SELECT owner, job_digest FROM docket_runs WHERE graph = :graph AND execution_id = :execution_id"
)


def begin_upload(connection: Connection, request: RunRequest, keep_s: float) -> Lease | RunRow:
    """See `BatchStore.begin_upload`."""
    values = request_values(request)
    values |= {"lease_s": request.lease_s, "keep_s": keep_s, "job_digest": UNFINISHED}
    for _ in range(_TRIES):
        epoch = connection.execute(_BEGIN, values).scalar()
        if epoch is not None:
            if epoch > 1:
                connection.execute(_CLEAR, values | {"epoch": epoch})
            return lease_from(request, epoch=epoch, lost=0, failures=0)
        found = find_run(connection, request.graph, request.execution_id)
        if found is not None:
            return found
    raise StoreUnavailable("reserve the run", "the run is being deleted")


def put_items(connection: Connection, lease: Lease, items: Sequence[Checkpoint]) -> None:
    """See `BatchStore.put_items`."""
    values = _fence(lease) | checkpoint_arrays(items)
    if not connection.execute(_PUT_ITEMS, values).scalar_one():
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


def close_items(
    connection: Connection, lease: Lease, name: str, count: int, rows: Sequence[Checkpoint]
) -> None:
    """See `BatchStore.close_items`."""
    values = _fence(lease) | checkpoint_arrays(rows) | {"name": clean_text(name), "count": count}
    if not connection.execute(_CLOSE_ITEMS, values).scalar_one():
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


def finish_upload(connection: Connection, lease: Lease, digest: bytes, keep_s: float) -> None:
    """See `BatchStore.finish_upload`."""
    values = _fence(lease) | {"job_digest": digest, "keep_s": keep_s}
    if connection.execute(_FINISH, values).scalar() is not None:
        return
    row = connection.execute(_FIND_UPLOAD, values).first()
    if row is None or (row[0], bytes(row[1])) != (values["owner"], digest):
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


def _fence(lease: Lease) -> dict[str, Any]:
    return fence_values(lease) | {"lease_s": lease.lease_s}
