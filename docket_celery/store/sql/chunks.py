"""The work of a batch: its items, its stages, and the leases of chunks.

What each chunk calls is one statement on Postgres, built once: `read_items`, `lease_chunk`, `save_many`, `end_chunk`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, fields
from functools import cache
from typing import Any

import sqlalchemy as sa

from docket_celery.errors import LeaseLost
from docket_celery.store.records import (
    Checkpoint,
    Chunk,
    ChunkEnd,
    ChunkRefusal,
    ChunkRequest,
    ChunkRow,
    ChunkStop,
    Lanes,
    Lease,
    Progress,
    RunState,
    StepExecution,
)
from docket_celery.store.rows import (
    CHECKPOINT_COLUMNS,
    clean_text,
    cleaned_values,
    dump_json,
    fence_values,
    lease_from,
    read_chunk,
    read_in_order,
    read_progress,
)
from docket_celery.store.rules import STAGE_PATIENCE, refusal
from docket_celery.store.sql.binds import (
    HOLDS_CHUNK,
    HOLDS_RUN,
    IS_RUN,
    LEASE_S,
    NAME,
    OF_RUN,
    bound,
    given,
    is_state,
    matches,
    named,
)
from docket_celery.store.sql.checkpoints import HELD
from docket_celery.store.sql.clock import after, now, seconds_left
from docket_celery.store.sql.constructs import add_done, as_json
from docket_celery.store.sql.fenced import (
    ADD_CHECKPOINTS,
    ADD_CHUNKS,
    ADD_EXECUTIONS,
    Fenced,
)
from docket_celery.store.sql.schema import docket_cache, docket_chunks, docket_runs

_CHUNKS, _RUNS, _CACHE = docket_chunks.c, docket_runs.c, docket_cache.c
_IS_OPEN = sa.and_(matches(docket_runs, "stage"), is_state(docket_runs, "RUNNING", "WAITING"))
_IS_CHUNK = matches(docket_chunks, *NAME, "stage", "lo")


# --- items ----------------------------------------------------------------------------------------------------------

_SAVE_MANY = {of_chunk: Fenced([held]) for of_chunk, held in HELD.items()}


def save_many(connection: sa.Connection, lease: Lease, checkpoints: Sequence[Checkpoint]) -> None:
    """See `BatchStore.save_many`."""
    save, rows = _SAVE_MANY[lease.chunk is not None], {ADD_CHECKPOINTS: checkpoints}
    if save.run(connection, bound(fence_values(lease)), rows) is None:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


@cache
def _read_items(*, by_key: bool, of_job: bool) -> Any:
    wanted: list[sa.ColumnElement[bool]] = [
        sa.and_(
            _CACHE.step_name.in_(sa.bindparam("p_names", expanding=True)),
            _CACHE.item_index >= sa.bindparam("p_first"),
            _CACHE.item_index < sa.bindparam("p_before"),
        )
    ]
    if by_key:
        wanted.append(_CACHE.cache_key.in_(sa.bindparam("p_keys", expanding=True)))
    # In the statement that reads: no other run can come between.
    is_its_job = [sa.exists().where(IS_RUN, matches(docket_runs, "job_digest"))] if of_job else []
    rows = sa.select(*(_CACHE[name] for name in CHECKPOINT_COLUMNS)).where(OF_RUN)
    return sa.union_all(*(rows.where(which, *is_its_job) for which in wanted))


def read_items(
    connection: sa.Connection,
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
    wanted = {"names": list(map(clean_text, names)), "first": lo, "before": hi, "keys": keys}
    statement = _read_items(by_key=bool(keys), of_job=job_digest is not None)
    rows = connection.execute(statement, bound(run | wanted | {"job_digest": job_digest}))
    return read_in_order(rows.mappings().all(), **run)


def find_names(connection: sa.Connection, graph: str, execution_id: str) -> set[str]:
    """See `BatchStore.find_names`."""
    least = sa.select(sa.func.min(_CACHE.step_name).label("name")).where(OF_RUN)
    # One step into the index for each name, however many items there are.
    names = least.cte("names", recursive=True)
    following = least.where(_CACHE.step_name > names.c.name).scalar_subquery()
    names = names.union_all(sa.select(following).where(names.c.name.is_not(None)))
    found = sa.select(names.c.name).where(names.c.name.is_not(None))
    return set(connection.execute(found, named(graph, execution_id)).scalars())


# --- stages ---------------------------------------------------------------------------------------------------------


def open_stage(
    connection: sa.Connection,
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
    run = {"graph": clean_text(lease.graph), "execution_id": clean_text(lease.execution_id), "stage": stage}
    of_stage = matches(docket_chunks, *NAME, "stage")
    failed = sa.select(sa.func.coalesce(sa.func.sum(_CHUNKS.failed), 0)).where(of_stage).scalar_subquery()
    new = {
        _RUNS.progress: as_json(None if progress is None else json.dumps(asdict(progress))),
        _RUNS.lanes: as_json(None if lanes is None else json.dumps(astuple(lanes))),
        _RUNS.items_allowed: sa.literal(allowed),
        _RUNS.items_failed: failed,
    }
    # Opened again by a copy: its chunks have counted meanwhile, and one may have stopped the rest.
    is_open = sa.and_(matches(docket_runs, "stage"), _RUNS.items_allowed.is_not(None))
    kept = {column.key: sa.case((is_open, column), else_=value) for column, value in new.items()}
    keeps_s = None if message is None else lease.lease_s
    opened = (
        sa.update(docket_runs)
        .where(HOLDS_RUN)
        .values(
            state=RunState.WAITING,
            stage=stage,
            message=message,
            updated_at=now(),
            wake_at=after(keeps_s),
            lease_until=after(None if keeps_s is None else keeps_s * STAGE_PATIENCE),
            **kept,
        )
    )
    rows = {
        ADD_CHUNKS: [run | {"lo": chunk.lo, "hi": chunk.hi} for chunk in chunks],
        ADD_EXECUTIONS: executions,
    }
    told, values = sa.select(sa.cast(_RUNS.lanes, sa.Text).label("lanes")), bound(fence_values(lease) | run)
    row = Fenced([opened], tells=told.where(IS_RUN)).run(connection, values, rows)
    if row is None:
        is_ours = sa.and_(IS_RUN, matches(docket_runs, "owner", "epoch"), _RUNS.state == RunState.WAITING)
        row = connection.execute(told.where(is_ours), values).mappings().first()
    if row is None:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
    return None if row["lanes"] is None else Lanes(*json.loads(row["lanes"]))


def find_chunks(connection: sa.Connection, graph: str, execution_id: str) -> list[ChunkRow]:
    """See `BatchStore.find_chunks`."""
    return _find_chunks(connection, graph, execution_id)


def find_failed(connection: sa.Connection, graph: str, execution_id: str, lo: int, hi: int) -> list[ChunkRow]:
    """See `BatchStore.find_failed`."""
    is_near = sa.and_(_CHUNKS.lo < hi, _CHUNKS.hi > lo, _CHUNKS.failed > 0)
    return _find_chunks(connection, graph, execution_id, is_near)


def _find_chunks(
    connection: sa.Connection, graph: str, execution_id: str, *which: sa.ColumnElement[bool]
) -> list[ChunkRow]:
    names, errors = ("stage", "lo", "hi", "state", "failed"), sa.cast(_CHUNKS.errors, sa.Text).label("errors")
    statement = sa.select(*(_CHUNKS[name] for name in names), errors).where(
        matches(docket_chunks, *NAME), *which
    )
    ordered = statement.order_by(_CHUNKS.stage, _CHUNKS.lo)
    return [read_chunk(row) for row in connection.execute(ordered, named(graph, execution_id)).mappings()]


# --- chunks ---------------------------------------------------------------------------------------------------------


def _take_chunk() -> Fenced:
    """Return the statement that takes a chunk's lease if its request may have it."""
    owner, task_id, retries = (given(docket_chunks, name) for name in ("owner", "task_id", "retries"))
    running, ours = _CHUNKS.state == RunState.RUNNING, _CHUNKS.owner == owner
    same, ended_cleanly = _CHUNKS.task_id == task_id, sa.bindparam("p_ended_cleanly", type_=sa.Boolean())
    newer = sa.and_(same, retries > _CHUNKS.retries)
    # A delivery that comes again after it took the lease itself died with it.
    crash = sa.and_(
        running, sa.not_(ours), sa.not_(sa.and_(ended_cleanly, sa.func.coalesce(newer, sa.false())))
    )
    poison = sa.and_(crash, _CHUNKS.lost + 1 >= sa.bindparam("p_max_deliveries", type_=sa.Integer()))
    is_over = sa.or_(_CHUNKS.lease_until <= now(), ours, newer)
    is_free = sa.or_(_CHUNKS.state == RunState.QUEUED, sa.and_(running, is_over))
    may_start = sa.exists().where(IS_RUN, _IS_OPEN, _RUNS.items_failed <= _RUNS.items_allowed)
    taken = (
        sa.update(docket_chunks)
        .where(_IS_CHUNK, is_free, may_start)
        .values(
            state=sa.case((poison, RunState.QUARANTINED), else_=RunState.RUNNING),
            lease_until=sa.case((sa.not_(poison), after(LEASE_S))),
            lost=_CHUNKS.lost + sa.case((crash, 1), else_=0),
            epoch=_CHUNKS.epoch + sa.case((sa.and_(running, ours), 0), else_=1),
            owner=owner,
            task_id=task_id,
            # An older copy of a task must not make its next retry look new.
            retries=sa.case((sa.and_(same, _CHUNKS.retries > retries), _CHUNKS.retries), else_=retries),
        )
    )
    target = sa.select(_RUNS.target).where(IS_RUN).scalar_subquery().label("target")
    told = sa.select(_CHUNKS.state, _CHUNKS.epoch, _CHUNKS.hi, _CHUNKS.lost, target).where(_IS_CHUNK)
    return Fenced([taken], tells=told)


_TAKE_CHUNK = _take_chunk()
_LOOK_AT_CHUNK = (
    sa.select(
        _CHUNKS.state,
        seconds_left(_CHUNKS.lease_until).label("lease_left_s"),
        _IS_OPEN.label("is_open"),
        (_RUNS.items_failed > _RUNS.items_allowed).label("failing"),
    )
    .join_from(docket_chunks, docket_runs, IS_RUN)
    .where(_IS_CHUNK)
)
_STOP = (
    sa.update(docket_runs)
    .where(IS_RUN, matches(docket_runs, "stage"), _RUNS.items_allowed >= 0)
    .values(items_allowed=-1)
)


def lease_chunk(connection: sa.Connection, request: ChunkRequest) -> Lease | ChunkRefusal:
    """See `BatchStore.lease_chunk`."""
    values = bound(cleaned_values(request, tuple(field.name for field in fields(request))))
    taken = _TAKE_CHUNK.run(connection, values)
    if taken is not None and taken["state"] == RunState.RUNNING:
        chunk = Chunk(request.stage, request.lo, taken["hi"])
        return lease_from(request, taken["target"], epoch=taken["epoch"], lost=taken["lost"], chunk=chunk)
    row = connection.execute(_LOOK_AT_CHUNK, values).mappings().first()
    if row is None:
        return ChunkRefusal(reason=ChunkStop.STALE)
    if row["state"] == RunState.QUARANTINED:
        # A statement of its own: all others lock the run before its chunk.
        connection.execute(_STOP, values)
    return refusal(**row)


def _end_chunk() -> Fenced:
    state, failed = given(docket_chunks, "state"), given(docket_chunks, "failed")
    wake_in_s: sa.ColumnElement[float] = sa.bindparam("p_wake_in_s", type_=sa.Double())
    # The run is locked before its chunk, as by all statements that lock both.
    lock = sa.select(_RUNS.graph).where(IS_RUN, _IS_OPEN).with_for_update()
    ended = (
        sa.update(docket_chunks)
        .where(HOLDS_CHUNK)
        .values(
            state=state,
            failed=failed,
            errors=given(docket_chunks, "errors"),
            lease_until=sa.case((wake_in_s > 0, after(wake_in_s))),
        )
    )
    items = sa.select(_CHUNKS.hi - _CHUNKS.lo).where(_IS_CHUNK).scalar_subquery()
    done = sa.and_(state == RunState.SUCCEEDED, _RUNS.progress.is_not(None))
    kept_until = after(wake_in_s + LEASE_S * STAGE_PATIENCE)
    is_kept = sa.and_(_RUNS.state == RunState.WAITING, _RUNS.lease_until < kept_until)
    noted = (
        sa.update(docket_runs)
        .where(IS_RUN)
        .values(
            updated_at=now(),
            lease_until=sa.case((is_kept, kept_until), else_=_RUNS.lease_until),
            items_failed=_RUNS.items_failed + failed,
            items_allowed=sa.case(
                (sa.bindparam("p_stops", type_=sa.Boolean()), -1), else_=_RUNS.items_allowed
            ),
            progress=sa.case((done, add_done(_RUNS.progress, items)), else_=_RUNS.progress),
        )
    )
    told = sa.select(sa.cast(_RUNS.progress, sa.Text).label("progress")).where(IS_RUN)
    return Fenced([lock, ended], [noted], told)


_END_CHUNK = _end_chunk()


def end_chunk(connection: sa.Connection, lease: Lease, ending: ChunkEnd) -> Progress | None:
    """See `BatchStore.end_chunk`."""
    values = fence_values(lease) | {
        "state": ending.state.value,
        "failed": ending.failed,
        "stops": ending.stops,
        "wake_in_s": ending.wake_in_s,
        "lease_s": lease.lease_s,
        "errors": dump_json(dict(ending.errors)) if ending.errors else None,
    }
    rows = {
        ADD_CHECKPOINTS: ending.checkpoints,
        ADD_EXECUTIONS: ending.executions,
    }
    row = _END_CHUNK.run(connection, bound(values), rows)
    if row is not None:
        return read_progress(row["progress"])
    ours = sa.select(_CHUNKS.lo).where(_IS_CHUNK, matches(docket_chunks, "owner", "epoch", "state"))
    if connection.execute(ours, bound(values)).first() is None:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
    return None
