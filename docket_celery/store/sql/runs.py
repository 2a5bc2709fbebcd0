"""The calls of `Store` that take a run, leave it, and find it.

Who may take a run is decided in `rules.take` over the row as it was read; the row is changed only if it is as it was.
Each call may be repeated after a lost answer: acquire finds its owner, end its owner and state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as upsert  # SQLite's compiler takes it too

from docket_celery.errors import LeaseLost, StoreUnavailable
from docket_celery.store.records import Lease, RunEnd, RunRequest, RunRow, RunState
from docket_celery.store.rows import (
    checkpoint_values,
    clean_checkpoint,
    end_values,
    lease_from,
    read_run,
    request_values,
)
from docket_celery.store.rules import BODY_PATIENCE, KEPT_FOR_DELIVERY, take
from docket_celery.store.sql.binds import (
    HOLDS_RUN,
    IS_RUN,
    LEASE_S,
    NAME,
    OF_RUN,
    ONE,
    bound,
    execution_binds,
    given,
    is_state,
    matches,
    named,
)
from docket_celery.store.sql.checkpoints import (
    ADD_LAST,
    PAGE,
    add_execution,
    add_last,
    date_checkpoints,
    restoring,
)
from docket_celery.store.sql.clock import after, began, later, now, seconds_left, writing
from docket_celery.store.sql.constructs import greatest, one_of
from docket_celery.store.sql.fenced import ADD_EXECUTIONS
from docket_celery.store.sql.schema import docket_cache, docket_chunks, docket_runs
from docket_celery.store.sql.statement import Found, Statement, Values

_TRIES = 5  # for a row that changes or goes between two statements

_RUNS, _CHUNKS, _CACHE = docket_runs.c, docket_chunks.c, docket_cache.c
_MADE = {
    "error": sa.cast(_RUNS.error, sa.Text).label("error"),
    "progress": sa.cast(_RUNS.progress, sa.Text).label("progress"),
    "lease_left_s": seconds_left(_RUNS.lease_until).label("lease_left_s"),
}
_COLUMNS = [
    *(_RUNS[field.name] for field in fields(RunRow) if field.name not in _MADE),
    *(_RUNS.owner, _RUNS.result_checksum, _RUNS.lease_until, *_MADE.values()),
]
_FIND_ROW = sa.select(*_COLUMNS).where(IS_RUN)
_FIND = Statement(_FIND_ROW)
_FIND_JOB = sa.select(_RUNS.job).where(IS_RUN)


def find_run(connection: sa.Connection, graph: str, execution_id: str) -> RunRow | None:
    """See `Store.find_run`."""
    row = _FIND.run(connection, named(graph, execution_id)).first
    return None if row is None else read_run(row)


def find_job(connection: sa.Connection, graph: str, execution_id: str) -> bytes | None:
    """See `Store.find_job`."""
    return connection.execute(_FIND_JOB, named(graph, execution_id)).scalar_one_or_none()


# --- acquire and enqueue -------------------------------------------------------------------------------------------

_ASKED = ("task_name", "task_id", "retries")
_NEW = {
    **{name: given(docket_runs, name) for name in (*NAME, *_ASKED, "target", "job", "job_digest")},
    **dict.fromkeys(("stage", "lost", "failures"), 0),
    **dict.fromkeys(("created_at", "updated_at"), began()),
}
_TAKEN = {"owner": given(docket_runs, "owner"), "lease_until": after(LEASE_S)}
_ADD = (
    upsert(docket_runs)
    .values({**_NEW, **_TAKEN, "state": RunState.RUNNING.value, "epoch": 1, "started_at": began()})
    .on_conflict_do_nothing(index_elements=NAME)
    .execution_options(preserve_rowcount=True)
)
_KEEP_S: sa.ColumnElement[float] = sa.bindparam("p_keep_s", type_=sa.Double())
_ENQUEUE = (
    upsert(docket_runs)
    .values({**_NEW, "state": RunState.QUEUED.value, "epoch": 0, "expires_at": after(_KEEP_S)})
    .on_conflict_do_nothing(index_elements=NAME)
    .execution_options(preserve_rowcount=True)
)
_OF_STAGE = sa.and_(
    _CHUNKS.graph == _RUNS.graph, _CHUNKS.execution_id == _RUNS.execution_id, _CHUNKS.stage == _RUNS.stage
)
_IS_KEPT = sa.or_(
    sa.exists().where(_OF_STAGE, is_state(docket_chunks, "RUNNING"), _CHUNKS.lease_until > now()),
    sa.and_(
        _RUNS.lease_until > now(),
        sa.or_(
            _RUNS.updated_at > after(-BODY_PATIENCE * LEASE_S),
            sa.and_(
                sa.func.coalesce(_RUNS.items_failed <= _RUNS.items_allowed, sa.true()),
                sa.exists().where(_OF_STAGE, is_state(docket_chunks, "QUEUED")),
            ),
        ),
    ),
)
"""Whether an open stage keeps the run for its own task."""
_FIND_KEPT = sa.select(_IS_KEPT).where(IS_RUN)
_FIND_HELD = _FIND_ROW.add_columns((_RUNS.lease_until <= now()).label("expired"))


def _add_or_find() -> sa.Select[*tuple[Any, ...]]:
    """Return the statement of Postgres that adds a run and tells so, or finds it."""
    added = _ADD.returning(ONE).cte("added")
    news = sa.select(sa.func.count().label("new")).select_from(added).subquery("news")
    held = _FIND_HELD.subquery("held")
    return sa.select(news.c.new, *held.c).select_from(news.outerjoin(held, sa.true()))


_ADD_OR_FIND = Statement(_add_or_find())


def _add(connection: sa.Connection, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Add an unknown run and return None, or return the row that is there."""
    row: Mapping[str, Any] | None
    for _ in range(_TRIES):
        if connection.dialect.name == "postgresql":
            row = _ADD_OR_FIND.run(connection, values).one
            added = row["new"] > 0
        else:
            added = connection.execute(_ADD, values).rowcount > 0
            found = None if added else connection.execute(_FIND_HELD, values).mappings().first()
            row = None if found is None else dict(found)
        if added:
            return None
        if row is not None and row["state"] is not None:
            return row
    raise StoreUnavailable("find the run", "it is being deleted")


_WAS = ("state", "epoch", "owner", "retries", "lease_until")
_SAME = [
    _RUNS[name].is_not_distinct_from(sa.bindparam(f"was_{name}", type_=_RUNS[name].type)) for name in _WAS
]
# Each chunk that ends extends the lease of an open stage, which says nothing of who may take it.
_IS_AS_READ = sa.and_(IS_RUN, *_SAME[:-1], sa.or_(is_state(docket_runs, "WAITING"), _SAME[-1]))
_CHANGES = {
    RunState.RUNNING: sa.update(docket_runs)
    .where(_IS_AS_READ)
    .values(
        {name: given(docket_runs, name) for name in ("state", "epoch", "lost", "failures", *_ASKED)}
        | _TAKEN
        | {"started_at": sa.func.coalesce(_RUNS.started_at, now()), "updated_at": now()}
        | dict.fromkeys(
            ("ended_at", "error", "result", "result_checksum", "wake_at", "expires_at"), sa.null()
        )
    ),
    RunState.QUARANTINED: sa.update(docket_runs)
    .where(_IS_AS_READ)
    .values(
        {name: given(docket_runs, name) for name in ("state", "lost")}
        | {"lease_until": None, "wake_at": None, "ended_at": now(), "updated_at": now()}
    ),
}
_TAKE = {state: Statement(change) for state, change in _CHANGES.items()}


def acquire(connection: sa.Connection, request: RunRequest) -> Lease | RunRow:
    """See `Store.acquire`."""
    found = _acquire(connection, request)
    return found[0] if isinstance(found, tuple) else found


def acquire_and_restore(
    connection: sa.Connection, request: RunRequest, keys: Callable[[], Sequence[bytes]], items: bool
) -> tuple[Lease, Found | None] | RunRow:
    """Take the run and read what is restored in the same transaction; None: there is nothing to restore.

    What cannot be read is not taken.
    """
    return _acquire(connection, request, lambda: restoring(request, keys(), items))


def _acquire(
    connection: sa.Connection,
    request: RunRequest,
    restore: Callable[[], tuple[Statement, Values]] | None = None,
) -> tuple[Lease, Found | None] | RunRow:
    """Take the run; of one that was advanced before, also run *restore*."""
    asked = request_values(request)
    values = bound(asked) | {"p_lease_s": request.lease_s}
    for _ in range(_TRIES):
        row = _add(connection, values)
        if row is None:
            return lease_from(request, request.target, epoch=1), None
        waits = row["state"] == RunState.WAITING and row["lease_until"] is not None
        kept = waits and bool(connection.execute(_FIND_KEPT, values).scalar())
        cleaned = replace(request, **{name: asked[name] for name in ("target", "owner", "task_id")})
        changes = take(cleaned, {**row, "kept": kept})
        if changes is None:
            return read_run(row)
        changed = values | bound(changes) | {f"was_{name}": row[name] for name in _WAS}
        calls: list[tuple[Statement, Values]] = [(_TAKE[changes["state"]], changed)]
        if restore is not None and changes.get("epoch", 1) > 1:
            calls.append(restore())
        taken, *read = Statement.run_together(connection, *calls)
        if taken.count:
            if changes["state"] is RunState.QUARANTINED:
                return read_run({**row, **changes, "lease_left_s": None})
            granted = {name: changes[name] for name in ("epoch", "lost", "failures")}
            return lease_from(request, request.target, **granted), read[0] if read else None
    raise StoreUnavailable("acquire the run", "others change it at the same time")


_KEEP = (
    sa.update(docket_runs)
    .where(
        matches(docket_runs, *NAME, "target", "job_digest"),
        is_state(docket_runs, *KEPT_FOR_DELIVERY),
        _RUNS.expires_at.is_not(None),
    )
    .values(expires_at=greatest(_RUNS.expires_at, after(_KEEP_S)))
)


def enqueue(connection: sa.Connection, request: RunRequest, keep_s: float) -> RunRow | None:
    """See `Store.enqueue`."""
    values = bound(request_values(request)) | {"p_keep_s": keep_s}
    for _ in range(_TRIES):
        if connection.execute(_ENQUEUE, values).rowcount or connection.execute(_KEEP, values).rowcount:
            return None
        row = _FIND.run(connection, values).first
        if row is not None:
            same = (row["target"], bytes(row["job_digest"])) == (values["p_target"], values["p_job_digest"])
            return None if same else read_run(row)
    raise StoreUnavailable("queue the run", "the run is being deleted")


# --- end -----------------------------------------------------------------------------------------------------------


@cache
def _leave(*, ended: bool) -> sa.Update:
    """Return what ends the run, or parks it for another delivery."""
    values: dict[str, Any] = {
        **{name: given(docket_runs, name) for name in ("state", "result", "result_checksum", "error")},
        "failures": _RUNS.failures + sa.bindparam("p_failed", type_=sa.Integer()),
        "lease_until": None,
        "updated_at": now(),
    }
    if ended:
        values |= {"items_failed": given(docket_runs, "items_failed"), "items_allowed": None, "wake_at": None}
        values |= {"ended_at": now(), "expires_at": after(sa.bindparam("p_retention_s"))}
    else:
        waits = sa.case((_RUNS.message.is_not(None), LEASE_S), else_=None)
        due_in_s: sa.ColumnElement[float] = sa.func.coalesce(
            sa.bindparam("p_wake_in_s", type_=sa.Double()), waits
        )
        values |= {"wake_at": after(due_in_s), "ended_at": None, "expires_at": None}
        values["retries"] = _RUNS.retries + sa.bindparam("p_owed", type_=sa.Integer())
    return sa.update(docket_runs).where(HOLDS_RUN).values(values)


_HAS_TTL = _CACHE.ttl.is_not(None)
_DATE = sa.update(docket_cache).where(OF_RUN, _HAS_TTL).values(expires_at=after(_CACHE.ttl))
_RESET_CHUNKS = (
    sa.update(docket_chunks)
    .where(
        matches(docket_chunks, *NAME), sa.or_(_CHUNKS.state != RunState.SUCCEEDED.value, _CHUNKS.failed > 0)
    )
    .values(state=RunState.QUEUED.value, failed=0, lost=0, errors=sa.null(), lease_until=None)
)


@cache
def _end(*, ended: bool, failed: bool, checkpoint: bool, one: bool, many: bool) -> Statement:
    """Return the statement of Postgres that ends the run, dates its checkpoints and writes rows.

    The row of *one* step is bound by its values: the driver takes longer over fourteen arrays than over all the rest.
    """
    left = _leave(ended=ended).returning(ONE, _RUNS.ended_at).cte("f")
    found = sa.select(sa.func.count().label("fenced")).select_from(left)
    has_left, ended_at = sa.exists(sa.select(left.c.one)), sa.select(left.c.ended_at).scalar_subquery()
    if ended:
        page = sa.select(_CACHE.cache_key).where(OF_RUN, _HAS_TTL).limit(PAGE).scalar_subquery()
        dated = (
            sa.update(docket_cache)
            .where(has_left, one_of(_CACHE.cache_key, page))
            .values(expires_at=later(ended_at, _CACHE.ttl))
            .returning(ONE)
            .cte("t")
        )
        found = found.add_columns(
            sa.select(sa.func.count()).select_from(dated).scalar_subquery().label("dated")
        )
    if failed:
        found = found.add_cte(_RESET_CHUNKS.where(has_left).cte("c"))
    if checkpoint:
        found = found.add_cte(add_last(left).cte("s"))
    if one or many:
        found = found.add_cte((add_execution(left) if one else ADD_EXECUTIONS.after(left)).cte("e"))
    return Statement(found)


def usual_statements() -> list[Statement]:
    """Return those that take and end an ordinary run."""
    ends = [
        _end(ended=True, failed=False, checkpoint=checkpoint, one=steps == 1, many=steps > 1)
        for steps in range(3)
        for checkpoint in (False, True)
    ]
    return [_ADD_OR_FIND, *ends]


def end(connection: sa.Connection, lease: Lease, ending: RunEnd) -> None:
    """See `Store.end`."""
    last = {} if ending.checkpoint is None else checkpoint_values(clean_checkpoint(ending.checkpoint))
    values = bound(last | end_values(lease, ending))
    ended, failed = ending.state.ended, ending.state is RunState.FAILED
    if connection.dialect.name == "postgresql":
        steps = ending.executions
        one, many = len(steps) == 1, len(steps) > 1
        statement = _end(ended=ended, failed=failed, checkpoint=bool(last), one=one, many=many)
        rows = execution_binds(steps[0]) if one else ADD_EXECUTIONS.arrays(steps)
        found = statement.run(connection, values | rows).one
        fenced, rest = found["fenced"], ended and (not found["fenced"] or found["dated"] == PAGE)
    else:
        with writing(connection):
            fenced, rest = connection.execute(_leave(ended=ended), values).rowcount, False
            if fenced and last:
                connection.execute(ADD_LAST, values)
            if fenced and ended:
                connection.execute(_DATE, values)
            if fenced and failed:
                connection.execute(_RESET_CHUNKS, values)
            if fenced:
                ADD_EXECUTIONS.add_each(connection, ending.executions)
    if not fenced:
        row = _FIND.run(connection, values).first
        ours = (values["p_owner"], values["p_epoch"], values["p_state"])
        if row is None or (row["owner"], row["epoch"], row["state"]) != ours:
            raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
    if rest:
        date_checkpoints(connection, lease.graph, lease.execution_id)
