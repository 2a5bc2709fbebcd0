"""Items on their way into the store: each call extends the lease of the run under which it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as upsert  # SQLite's compiler takes it too

from docket_celery.errors import LeaseLost, StoreUnavailable
from docket_celery.store.records import UNFINISHED, Checkpoint, Lease, RunRequest, RunRow, RunState
from docket_celery.store.rows import clean_text, fence_values, lease_from, request_values
from docket_celery.store.sql.binds import LEASE_S, NAME, OF_RUN, bound, is_state, matches
from docket_celery.store.sql.clock import after, now
from docket_celery.store.sql.fenced import PUT_CHECKPOINTS, Fenced
from docket_celery.store.sql.runs import find_run
from docket_celery.store.sql.schema import docket_cache, docket_runs

_RUNS, _CACHE = docket_runs.c, docket_cache.c
_TRIES = 3  # for a run that is deleted between two statements: twice in a row is no accident
# Once an upload is finished, no lease holds its run.
_HOLDS = sa.and_(
    matches(docket_runs, *NAME, "epoch", "owner"),
    is_state(docket_runs, "RUNNING", "QUEUED"),
    _RUNS.lease_until.is_not(None),
)
_EXTEND = sa.update(docket_runs).where(_HOLDS).values(lease_until=after(LEASE_S))
_SURPLUS = sa.and_(OF_RUN, matches(docket_cache, "step_name"), _CACHE.item_index >= sa.bindparam("p_count"))
_PUT = Fenced([_EXTEND])
_CLOSE = Fenced([_EXTEND], [sa.delete(docket_cache).where(_SURPLUS)])


def begin_upload(connection: sa.Connection, request: RunRequest, keep_s: float) -> Lease | RunRow:
    """See `BatchStore.begin_upload`."""
    run = request_values(request) | {"job_digest": UNFINISHED, "updated_at": now()}
    run |= {"lease_until": after(request.lease_s), "expires_at": after(keep_s)}
    new = {"state": RunState.QUEUED, "epoch": 1, "created_at": now(), "stage": 0, "lost": 0, "failures": 0}
    insert: Any = upsert(docket_runs).values(run | new)
    is_ours = _RUNS.owner == insert.excluded.owner
    is_free = sa.or_(_RUNS.lease_until <= now(), is_ours)
    changed = {name: insert.excluded[name] for name in run}
    begun = insert.on_conflict_do_update(
        index_elements=NAME,
        set_=changed | {"epoch": sa.case((is_ours, _RUNS.epoch), else_=_RUNS.epoch + 1)},
        where=sa.and_(_RUNS.state == RunState.QUEUED, _RUNS.job_digest == UNFINISHED, is_free),
    ).execution_options(preserve_rowcount=True)
    values = bound(run)
    for _ in range(_TRIES):
        if connection.execute(begun).rowcount:
            found = sa.select(_RUNS.epoch).where(matches(docket_runs, *NAME, "owner"))
            epoch = connection.execute(found, values).scalar()
            if epoch is not None:
                if epoch > 1:
                    rest = sa.delete(docket_cache).where(OF_RUN, sa.exists().where(_HOLDS))
                    connection.execute(rest, values | {"p_epoch": epoch})
                return lease_from(request, request.target, epoch=epoch)
        row = find_run(connection, request.graph, request.execution_id)
        if row is not None:
            return row
    raise StoreUnavailable("reserve the run", "the run is being deleted")


def put_items(connection: sa.Connection, lease: Lease, items: Sequence[Checkpoint]) -> None:
    """See `BatchStore.put_items`."""
    _write(connection, lease, _PUT, items)


def close_items(
    connection: sa.Connection, lease: Lease, name: str, count: int, rows: Sequence[Checkpoint]
) -> None:
    """See `BatchStore.close_items`."""
    _write(connection, lease, _CLOSE, rows, step_name=clean_text(name), count=count)


def _write(
    connection: sa.Connection, lease: Lease, statement: Fenced, rows: Sequence[Checkpoint], **values: Any
) -> None:
    values |= fence_values(lease) | {"lease_s": lease.lease_s}
    if statement.run(connection, bound(values), {PUT_CHECKPOINTS: rows}) is None:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


def finish_upload(connection: sa.Connection, lease: Lease, digest: bytes, keep_s: float) -> None:
    """See `BatchStore.finish_upload`."""
    changes: dict[str, Any] = {"job_digest": digest, "lease_until": None, "epoch": 0}
    times = {"updated_at": now(), "expires_at": after(keep_s)}
    finished = sa.update(docket_runs).where(_HOLDS, is_state(docket_runs, "QUEUED")).values(changes | times)
    values = bound(fence_values(lease))
    if connection.execute(finished, values).rowcount:
        return
    is_finished = sa.and_(matches(docket_runs, *NAME, "owner"), _RUNS.job_digest == digest)
    if connection.execute(sa.select(1).where(is_finished), values).first() is None:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
