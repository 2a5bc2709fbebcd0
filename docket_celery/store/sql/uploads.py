"""Items on their way into the store: each call extends the lease of the run under which it writes."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, Update, and_, case, delete, exists, or_, select, update

from docket_celery.errors import LeaseLost, StoreUnavailable
from docket_celery.store.records import UNFINISHED, Checkpoint, Lease, RunRequest, RunRow, RunState
from docket_celery.store.rows import clean_text, fence_values, lease_from, request_values
from docket_celery.store.sql.clock import after, now
from docket_celery.store.sql.constructs import insert_into
from docket_celery.store.sql.fenced import PUT_CHECKPOINTS, Fenced, checkpoint_rows
from docket_celery.store.sql.runs import find_run
from docket_celery.store.sql.schema import docket_cache, docket_runs

_RUNS, _CACHE = docket_runs.c, docket_cache.c
_TRIES = 3  # for a run that is deleted between two statements: twice in a row is no accident


def begin_upload(connection: Connection, request: RunRequest, keep_s: float) -> Lease | RunRow:
    """See `BatchStore.begin_upload`."""
    run = request_values(request) | {"job_digest": UNFINISHED, "updated_at": now()}
    run |= {"lease_until": after(request.lease_s), "expires_at": after(keep_s)}
    new = {"state": RunState.QUEUED, "epoch": 1, "created_at": now(), "stage": 0, "lost": 0, "failures": 0}
    insert = insert_into(connection, docket_runs).values(run | new)
    is_ours = _RUNS.owner == insert.excluded.owner
    is_free = or_(_RUNS.lease_until <= now(), is_ours)
    begun = insert.on_conflict_do_update(
        index_elements=["graph", "execution_id"],
        set_={name: insert.excluded[name] for name in run}
        | {"epoch": case((is_ours, _RUNS.epoch), else_=_RUNS.epoch + 1)},
        where=and_(_RUNS.state == RunState.QUEUED, _RUNS.job_digest == UNFINISHED, is_free),
    )
    which = [_RUNS[name] == run[name] for name in ("graph", "execution_id", "owner")]
    for _ in range(_TRIES):
        if connection.execute(begun).rowcount:
            epoch = connection.execute(select(_RUNS.epoch).where(*which)).scalar()
            if epoch is not None:
                lease = lease_from(request, epoch=epoch, lost=0, failures=0)
                if epoch > 1:
                    rest = delete(docket_cache).where(_of_run(lease), exists().where(_holds(lease)))
                    connection.execute(rest)
                return lease
        found = find_run(connection, request.graph, request.execution_id)
        if found is not None:
            return found
    raise StoreUnavailable("reserve the run", "the run is being deleted")


def put_items(connection: Connection, lease: Lease, items: Sequence[Checkpoint]) -> None:
    """See `BatchStore.put_items`."""
    if Fenced([_extend(lease)]).run(connection, rows={PUT_CHECKPOINTS: checkpoint_rows(items)}) is None:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


def close_items(
    connection: Connection, lease: Lease, name: str, count: int, rows: Sequence[Checkpoint]
) -> None:
    """See `BatchStore.close_items`."""
    is_surplus = and_(_of_run(lease), _CACHE.step_name == clean_text(name), _CACHE.item_index >= count)
    close = Fenced([_extend(lease)], [delete(docket_cache).where(is_surplus)])
    if close.run(connection, rows={PUT_CHECKPOINTS: checkpoint_rows(rows)}) is None:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


def finish_upload(connection: Connection, lease: Lease, digest: bytes, keep_s: float) -> None:
    """See `BatchStore.finish_upload`."""
    finished = (
        update(docket_runs)
        .where(_holds(lease), _RUNS.state == RunState.QUEUED)
        .values(job_digest=digest, lease_until=None, epoch=0, updated_at=now(), expires_at=after(keep_s))
    )
    if connection.execute(finished).rowcount:
        return
    fence = fence_values(lease)
    ours = [_RUNS[name] == fence[name] for name in ("graph", "execution_id", "owner")]
    if connection.execute(select(1).where(*ours, _RUNS.job_digest == digest)).first() is None:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


def _extend(lease: Lease) -> Update:
    return update(docket_runs).where(_holds(lease)).values(lease_until=after(lease.lease_s))


def _holds(lease: Lease) -> ColumnElement[bool]:
    """Return whether *lease* holds its run; once the upload is finished, none does."""
    same = (_RUNS[name] == value for name, value in fence_values(lease).items())
    states = [RunState.RUNNING, RunState.QUEUED]
    return and_(*same, _RUNS.state.in_(states), _RUNS.lease_until.is_not(None))


def _of_run(lease: Lease) -> ColumnElement[bool]:
    fence = fence_values(lease)
    return and_(_CACHE.graph == fence["graph"], _CACHE.execution_id == fence["execution_id"])
