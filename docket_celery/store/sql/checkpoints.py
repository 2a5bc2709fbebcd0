"""The calls of `Store` about checkpoints: a run's own, and those that all runs share.

On Postgres each is one statement on its happy path, whose common table expressions are the statements that SQLite
runs one after the other in a transaction. Each may be repeated after a lost answer, because a repeated statement
finds what it wrote: save and publish by key, lookup by owner; the others do nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as upsert  # SQLite's compiler takes it too

from docket_celery.errors import LeaseLost, StoreUnavailable
from docket_celery.store.records import Checkpoint, Lease, RunRequest, StepExecution
from docket_celery.store.rows import (
    CHECKPOINT_COLUMNS,
    EXECUTION_COLUMNS,
    checkpoint_values,
    clean_checkpoint,
    clean_text,
    fence_values,
    read_checkpoint,
)
from docket_celery.store.sql.binds import (
    HOLDS_CHUNK,
    HOLDS_RUN,
    IS_RUN,
    OF_RUN,
    ONE,
    bound,
    execution_binds,
    given,
    matches,
    named,
    typed,
)
from docket_celery.store.sql.clock import after, began, later, now, writing
from docket_celery.store.sql.constructs import among, one_of
from docket_celery.store.sql.fenced import ADD_CHECKPOINTS, ADD_EXECUTIONS
from docket_celery.store.sql.schema import (
    docket_cache,
    docket_chunks,
    docket_claims,
    docket_executions,
    docket_runs,
)
from docket_celery.store.sql.statement import Found, Statement, Values

_TRIES = 3  # for a row that goes away between two statements: twice in a row is no accident
_KEYS_AT_ONCE = 500  # SQLite before 3.32 binds at most 999 values

_CACHE, _CLAIMS = docket_cache.c, docket_claims.c
_COLUMNS = [_CACHE[name] for name in CHECKPOINT_COLUMNS]
_FIND_ROW = sa.select(*_COLUMNS).where(matches(docket_cache, "cache_key"))
_FIND = Statement(_FIND_ROW)
_IS_LIVE = sa.or_(_CACHE.expires_at.is_(None), _CACHE.expires_at > now())
_FIND_LIVE_ROW = _FIND_ROW.where(_IS_LIVE)
_FIND_LIVE = Statement(_FIND_LIVE_ROW)
_INSERTED = (*CHECKPOINT_COLUMNS, "output_json")


def _count(source: sa.CTE) -> Any:
    return sa.select(sa.func.count()).select_from(source).scalar_subquery()


def add_execution(source: sa.CTE | None = None, *where: sa.ColumnElement[bool]) -> sa.Insert:
    """Return what writes the row of a step, if *source* has a row and under these conditions."""
    values = sa.select(*(typed(docket_executions, name, "x_") for name in EXECUTION_COLUMNS)).where(*where)
    chosen = values if source is None else values.select_from(source)
    return sa.insert(docket_executions).from_select(EXECUTION_COLUMNS, chosen)


# --- a run's own ---------------------------------------------------------------------------------------------------

_KEYS = among(_CACHE.cache_key, "p_keys")
_FOUND = sa.select(*_COLUMNS, _CACHE.expires_at.is_not(None).label("dated"))
_RESTORE = {
    (items, keys): Statement(
        _FOUND.where(
            sa.or_(OF_RUN if items else sa.and_(OF_RUN, _CACHE.item == ""), *((_KEYS,) if keys else ()))
        )
    )
    for items in (False, True)
    for keys in (False, True)
}
_RESTORE_KEYS = Statement(_FOUND.where(_KEYS))
PAGE = 20_000
"""Most checkpoints that one statement dates: a batch has very many, and a statement 15 seconds."""
_DATED = (
    sa.select(_CACHE.cache_key).where(OF_RUN, _CACHE.expires_at.is_not(None)).limit(PAGE).scalar_subquery()
)
_UNDATE = (
    sa.update(docket_cache)
    .where(one_of(_CACHE.cache_key, _DATED), sa.exists().where(HOLDS_RUN))
    .values(expires_at=None)
)


def restore(
    connection: sa.Connection, lease: Lease, keys: Sequence[bytes], items: bool = False
) -> list[Checkpoint]:
    """See `Store.restore`."""
    statement, values = restoring(lease, keys, items)
    return read_restored(connection, lease, keys, statement.run(connection, values))


def restoring(run: Lease | RunRequest, keys: Sequence[bytes], items: bool) -> tuple[Statement, Values]:
    """Return the first statement of `restore` with its values; `read_restored` reads what it finds."""
    first = list(keys[:_KEYS_AT_ONCE])
    return _RESTORE[items, bool(first)], named(run.graph, run.execution_id) | {"p_keys": first}


def read_restored(
    connection: sa.Connection, lease: Lease, keys: Sequence[bytes], found: Found
) -> list[Checkpoint]:
    """Return the checkpoints of a run, those under further *keys* too, and take back until when they are kept."""
    values, rest = bound(fence_values(lease)), keys[_KEYS_AT_ONCE:]
    rows = {bytes(row["cache_key"]): row for row in found.rows}
    for start in range(0, len(rest), _KEYS_AT_ONCE):
        more = {"p_keys": list(rest[start : start + _KEYS_AT_ONCE])}
        rows |= {bytes(row["cache_key"]): row for row in _RESTORE_KEYS.run(connection, more).rows}
    checkpoints = [read_checkpoint(row, values["p_graph"], values["p_execution_id"]) for row in rows.values()]
    if any(row["dated"] for row in rows.values()):
        while connection.execute(_UNDATE, values).rowcount == PAGE:
            pass
    return checkpoints


# The run is locked: one that is being resumed at this moment keeps its checkpoints without a date.
_ENDED_AT = (
    sa.select(docket_runs.c.ended_at)
    .where(IS_RUN, docket_runs.c.ended_at.is_not(None))
    .with_for_update(read=True)
    .scalar_subquery()
)
_EXPIRES_AT = later(_ENDED_AT, _CACHE.ttl)
_UNDATED = sa.select(_CACHE.cache_key).where(
    OF_RUN, _EXPIRES_AT.is_not(None), _CACHE.expires_at.is_distinct_from(_EXPIRES_AT)
)
_DATE = (
    sa.update(docket_cache)
    .where(one_of(_CACHE.cache_key, _UNDATED.limit(PAGE).scalar_subquery()))
    .values(expires_at=_EXPIRES_AT)
)


def date_checkpoints(connection: sa.Connection, graph: str, execution_id: str) -> None:
    """Write until when the checkpoints of a run that has ended are kept."""
    while date_page(connection, graph, execution_id) == PAGE:
        pass


def date_page(connection: sa.Connection, graph: str, execution_id: str) -> int:
    """Do so for at most `PAGE` of them; return how many."""
    return connection.execute(_DATE, named(graph, execution_id)).rowcount


_EXPIRES = after(sa.bindparam("p_ttl"))
_NEW = {name: given(docket_cache, name) for name in _INSERTED} | {"created_at": now(), "expires_at": _EXPIRES}
ADD_LAST = sa.insert(docket_cache).values(_NEW)
"""What adds the checkpoint of a run that ends; a ttl counts from now.

The holder of the lease has restored what there was, so there is none; else the end fails as a whole.
"""


def add_last(ended: sa.CTE) -> sa.Insert:
    """Return the same as a part of a statement of Postgres, if *ended* has a row."""
    values = sa.select(*(typed(docket_cache, name) for name in _INSERTED), now(), _EXPIRES)
    return sa.insert(docket_cache).from_select([*_NEW], values.select_from(ended))


HELD = {
    False: sa.select(docket_runs.c.graph).where(HOLDS_RUN).with_for_update(read=True),
    True: sa.select(docket_chunks.c.graph).where(HOLDS_CHUNK).with_for_update(read=True),
}
"""What finds the row of a lease that still holds, and locks it; by whether it is a chunk's."""


@cache
def _save(*, chunk: bool, execution: bool) -> Statement:
    """Return the statement of Postgres that tells whether the lease holds, and whether the row was new."""
    held = HELD[chunk].cte("f")
    values = sa.select(*(typed(docket_cache, name) for name in _INSERTED), now()).select_from(held)
    saved = (
        upsert(docket_cache)
        .from_select([*_INSERTED, "created_at"], values)
        .on_conflict_do_nothing(index_elements=["cache_key"])
        .returning(ONE)
        .cte("s")
    )
    found = sa.select(_count(held).label("fenced"), _count(saved).label("saved"))
    # From s, not from f: a repeated save finds its own row and must not count the step twice.
    return Statement(found.add_cte(add_execution(saved).cte("e")) if execution else found)


def save(
    connection: sa.Connection, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None
) -> Checkpoint | None:
    """See `Store.save`; None: the given checkpoint counts."""
    row = checkpoint_values(clean_checkpoint(checkpoint))
    values = bound(row | fence_values(lease)) | execution_binds(execution)
    chunk = lease.chunk is not None
    for _ in range(_TRIES):
        if connection.dialect.name == "postgresql":
            statement = _save(chunk=chunk, execution=execution is not None)
            found = statement.run(connection, values).one
            fenced, saved = found["fenced"], found["saved"]
        else:
            with writing(connection):
                fenced = connection.execute(HELD[chunk], values).first()
                saved = fenced and connection.execute(ADD_CHECKPOINTS.one, row).rowcount
                if saved and execution is not None:
                    ADD_EXECUTIONS.add_each(connection, [execution])
        if not fenced:
            raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
        if saved:
            return None
        winner = _FIND.run(connection, values).first
        if winner is not None:
            return read_checkpoint(winner, values["p_graph"], values["p_execution_id"])
    raise StoreUnavailable("save the checkpoint", "another's row is being deleted")


# --- shared by all runs --------------------------------------------------------------------------------------------

_IS_WRITTEN = sa.exists().where(
    matches(
        docket_executions, "execution_id", "graph", "step_name", "item", "delivery", "started_at", prefix="x_"
    )
)
"""Whether the step's row is there: a call that is repeated after a lost answer adds none."""
# A step that did run has its row even where another's output counts.
_ADD_NEW_EXECUTION = add_execution(None, sa.not_(_IS_WRITTEN))

_CLAIMED = matches(docket_claims, "cache_key", "owner")
_IS_CLAIM = sa.and_(_CLAIMED, _CLAIMS.lease_until > now())


def _claim(live: Any) -> sa.Insert:
    """Return what claims the right to compute, unless *live* has a row or another owner a live claim.

    A published claim is spent, not deleted: a statement that looked before the result was there must not find
    the claim gone and compute again. A dead claim is taken only if the statement's snapshot shows the same one.
    """
    values = sa.select(
        typed(docket_claims, "cache_key"), typed(docket_claims, "owner"), after(sa.bindparam("p_lease_s"))
    ).where(sa.not_(sa.exists(live)))
    claim: Any = upsert(docket_claims).from_select(["cache_key", "owner", "lease_until"], values)
    new, seen = claim.excluded, docket_claims.alias("seen")
    # Not the columns themselves: SQLAlchemy would add their table to the subquery.
    same = (column == sa.literal_column(f"docket_claims.{column.name}") for column in seen.c[:3])
    # With an offset Postgres looks it up by key; else it may hash all claims.
    is_same = sa.select(ONE).where(*same).offset(sa.literal_column("0"))
    statement: sa.Insert = claim.on_conflict_do_update(
        index_elements=["cache_key"],
        set_={"owner": new.owner, "lease_until": new.lease_until},
        where=sa.or_(
            sa.and_(_CLAIMS.owner == new.owner, _CLAIMS.lease_until > now()),
            sa.and_(_CLAIMS.lease_until <= now(), sa.exists(is_same)),
        ),
    )
    return statement.execution_options(preserve_rowcount=True)


@cache
def _lookup(*, execution: bool) -> Statement:
    """Return the statement of Postgres that looks and claims, and adds the step's row to what it finds."""
    live = _FIND_LIVE_ROW.cte("live")
    claimed = _claim(sa.select(ONE).select_from(live)).returning(ONE).cte("claimed")
    claims = sa.select(sa.func.count().label("won")).select_from(claimed).subquery("claims")
    found = sa.select(claims.c.won, *live.c).select_from(claims.outerjoin(live, sa.true()))
    hit = add_execution(live, sa.not_(_IS_WRITTEN)).cte("e")
    return Statement(found.add_cte(hit) if execution else found)


_CLAIM = _claim(_FIND_LIVE_ROW)


def lookup(
    connection: sa.Connection, key: bytes, owner: str, lease_s: float, hit: StepExecution | None = None
) -> Checkpoint | bool:
    """See `Store.lookup`."""
    values = {"p_cache_key": key, "p_owner": clean_text(owner), "p_lease_s": lease_s} | execution_binds(hit)
    if connection.dialect.name == "postgresql":
        found = _lookup(execution=hit is not None).run(connection, values).one
        row, won = (None if found["cache_key"] is None else found), bool(found["won"])
    else:
        row, won = _FIND_LIVE.run(connection, values).first, False
        if row is None:
            won = connection.execute(_CLAIM, values).rowcount > 0
            row = None if won else _FIND_LIVE.run(connection, values).first
        if row is not None and hit is not None:
            connection.execute(_ADD_NEW_EXECUTION, values)
    return won if row is None else read_checkpoint(row, "", None)


def _put(insert: Any, *, replace: bool) -> sa.Insert:
    new = insert.excluded
    changed = {name: new[name] for name in (*_INSERTED, "created_at", "expires_at") if name != "cache_key"}
    where = None if replace else _CACHE.expires_at <= now()
    put: sa.Insert = insert.on_conflict_do_update(index_elements=["cache_key"], set_=changed, where=where)
    return put.execution_options(preserve_rowcount=True)


_PUT = {replace: _put(upsert(docket_cache).values(_NEW), replace=replace) for replace in (False, True)}
_RELEASE = sa.delete(docket_claims).where(_CLAIMED)
_RELEASE_LIVE = Statement(sa.delete(docket_claims).where(_IS_CLAIM))
_SPEND = sa.update(docket_claims).where(_IS_CLAIM).values(lease_until=now())
_DEAD = (
    sa.select(_CLAIMS.cache_key)
    .where(_CLAIMS.lease_until < later(began(), sa.literal_column("-60")))
    .limit(sa.literal_column("2"))
    .with_for_update(skip_locked=True)
)
_SWEEP = sa.delete(docket_claims).where(one_of(_CLAIMS.cache_key, _DEAD.scalar_subquery()))


@cache
def _publish(*, replace: bool, execution: bool) -> Statement:
    """Return the statement of Postgres that stores, spends the claim, sweeps dead ones and adds the step's row."""
    values = sa.select(*(typed(docket_cache, name) for name in _INSERTED), now(), _EXPIRES)
    put = _put(upsert(docket_cache).from_select([*_NEW], values), replace=replace)
    stored = _count(put.returning(ONE).cte("s")).label("stored")
    found = sa.select(stored).add_cte(_SPEND.cte("spent"), _SWEEP.cte("swept"))
    return Statement(found.add_cte(_ADD_NEW_EXECUTION.cte("e")) if execution else found)


def usual_statements() -> list[Statement]:
    """Return those that save a step's output, and find and store a shared one."""
    return [
        _save(chunk=False, execution=True),
        _lookup(execution=True),
        _publish(replace=False, execution=True),
    ]


def publish(
    connection: sa.Connection,
    checkpoint: Checkpoint,
    owner: str,
    execution: StepExecution | None,
    *,
    replace: bool = False,
) -> Checkpoint | None:
    """See `Store.publish`; None: the given checkpoint counts."""
    values = bound(checkpoint_values(clean_checkpoint(checkpoint))) | execution_binds(execution)
    values["p_owner"] = clean_text(owner)
    for _ in range(_TRIES):
        if connection.dialect.name == "postgresql":
            statement = _publish(replace=replace, execution=execution is not None)
            stored = statement.run(connection, values).one["stored"]
        else:
            with writing(connection):
                connection.execute(_RELEASE, values)
                if execution is not None:
                    connection.execute(_ADD_NEW_EXECUTION, values)
                stored = connection.execute(_PUT[replace], values).rowcount
        if stored:
            return None
        row = _FIND_LIVE.run(connection, values).first
        if row is not None:
            return read_checkpoint(row, "", None)
    raise StoreUnavailable("publish the checkpoint", "another's row is being deleted")


_FORGET = sa.delete(docket_cache).where(matches(docket_cache, "cache_key"), _CACHE.execution_id.is_(None))
_FORGET_LIVE, _FORGET_AND_TELL = _FORGET.where(_IS_LIVE), _FORGET.returning(_IS_LIVE)


def forget(connection: sa.Connection, key: bytes) -> bool:
    """See `Store.forget`."""
    values = {"p_cache_key": key}
    if connection.dialect.name == "postgresql":
        return bool(connection.execute(_FORGET_AND_TELL, values).scalar())
    with writing(connection):
        live = connection.execute(_FORGET_LIVE, values).rowcount > 0
        connection.execute(_FORGET, values)
    return live


def release_claim(connection: sa.Connection, key: bytes, owner: str) -> None:
    """See `Store.release_claim`."""
    _RELEASE_LIVE.run(connection, {"p_cache_key": key, "p_owner": clean_text(owner)})
