"""Items on their way into SQLite: each call holds the run's row, and extends the lease under which it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, text

from docket_celery.errors import LeaseLost
from docket_celery.store.records import UNFINISHED, Checkpoint, Lease, RunRequest, RunRow, RunState
from docket_celery.store.rows import clean_text, fence_values, lease_from, read_run, request_values
from docket_celery.store.sql.sqlite import FIND_RUN, NOW, after, put_checkpoint, writing

_IS_RUN = "graph = :graph AND execution_id = :execution_id"
_IS_OURS = (
    f"{_IS_RUN} AND epoch = :epoch AND owner = :owner AND state IN ('RUNNING', 'QUEUED') "
    "AND lease_until IS NOT NULL"
)
_ADD = text(f"""
INSERT INTO docket_runs (
    graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, owner,
    lease_until, lost, failures, created_at, updated_at, expires_at)
VALUES (
    :graph, :execution_id, :task_name, :task_id, :retries, :target, :job, :job_digest, 'QUEUED', 0, 1, :owner,
    {after(":lease_s")}, 0, 0, {NOW}, {NOW}, {after(":keep_s")})
""")
_TAKE = text(f"""
UPDATE docket_runs SET epoch = :epoch, owner = :owner, lease_until = {after(":lease_s")}, target = :target,
    job = :job, task_name = :task_name, task_id = :task_id, retries = :retries, updated_at = {NOW},
    expires_at = {after(":keep_s")}
WHERE {_IS_RUN}
""")
_CLEAR = text(f"DELETE FROM docket_cache WHERE {_IS_RUN}")
_EXTEND = text(f"UPDATE docket_runs SET lease_until = {after(':lease_s')} WHERE {_IS_OURS}")
_DROP = text(f"DELETE FROM docket_cache WHERE {_IS_RUN} AND step_name = :name AND item_index >= :count")
_FINISH = text(f"""
UPDATE docket_runs SET job_digest = :job_digest, lease_until = NULL, epoch = 0, updated_at = {NOW},
    expires_at = {after(":keep_s")}
WHERE {_IS_OURS} AND state = 'QUEUED'
""")
_FIND_UPLOAD = text(f"SELECT owner, job_digest FROM docket_runs WHERE {_IS_RUN}")


def begin_upload(connection: Connection, request: RunRequest, keep_s: float) -> Lease | RunRow:
    """See `BatchStore.begin_upload`."""
    values: dict[str, Any] = request_values(request)
    values |= {"lease_s": request.lease_s, "keep_s": keep_s, "job_digest": UNFINISHED}
    epoch = 1
    with writing(connection):
        row = connection.execute(FIND_RUN, values).mappings().first()
        if row is None:
            connection.execute(_ADD, values)
        else:
            ours = row["owner"] == values["owner"]
            given_up = row["state"] == RunState.QUEUED and bytes(row["job_digest"]) == UNFINISHED
            if not given_up or not (ours or row["expired"]):
                return read_run(row)
            epoch = row["epoch"] + (not ours)
            connection.execute(_TAKE, values | {"epoch": epoch})
            connection.execute(_CLEAR, values)
    return lease_from(request, epoch=epoch, lost=0, failures=0)


def put_items(connection: Connection, lease: Lease, items: Sequence[Checkpoint]) -> None:
    """See `BatchStore.put_items`."""
    with writing(connection):
        _extend(connection, lease)
        for item in items:
            put_checkpoint(connection, item)


def close_items(
    connection: Connection, lease: Lease, name: str, count: int, rows: Sequence[Checkpoint]
) -> None:
    """See `BatchStore.close_items`."""
    with writing(connection):
        _extend(connection, lease)
        connection.execute(_DROP, fence_values(lease) | {"name": clean_text(name), "count": count})
        for row in rows:
            put_checkpoint(connection, row)


def finish_upload(connection: Connection, lease: Lease, digest: bytes, keep_s: float) -> None:
    """See `BatchStore.finish_upload`."""
    values = fence_values(lease) | {"job_digest": digest, "keep_s": keep_s}
    with writing(connection):
        if connection.execute(_FINISH, values).rowcount:
            return
        row = connection.execute(_FIND_UPLOAD, values).first()
    if row is None or (row[0], bytes(row[1])) != (values["owner"], digest):
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


def _extend(connection: Connection, lease: Lease) -> None:
    if not connection.execute(_EXTEND, fence_values(lease) | {"lease_s": lease.lease_s}).rowcount:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
