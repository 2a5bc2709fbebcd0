"""What is done to a run by others than its holder: it is cancelled, or found lost and looked at again later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, Integer, and_, bindparam, case, func, or_, select, union_all, update

from docket_celery.store.records import LostRun, RunRow, RunState
from docket_celery.store.rows import Row, clean_text, dump_json
from docket_celery.store.rules import CANCEL_LOOK_S, LONGEST_LOOK_S, QUEUE_PATIENCE, STAGE_PATIENCE, is_lost
from docket_celery.store.sql.binds import IS_RUN, NAME, is_state, matches, named
from docket_celery.store.sql.checkpoints import PAGE, date_checkpoints, date_page
from docket_celery.store.sql.clock import after, began, now, seconds_left, writing
from docket_celery.store.sql.constructs import as_json
from docket_celery.store.sql.runs import find_run
from docket_celery.store.sql.schema import docket_chunks, docket_runs

_CHUNKS, _RUNS = docket_chunks.c, docket_runs.c
_OF_RUN = matches(docket_chunks, *NAME)


def cancel(
    connection: Connection, graph: str, execution_id: str, error: dict[str, Any], retention_s: float
) -> RunRow | None:
    """See `Store.cancel`."""
    alive = [RunState.QUEUED, RunState.RUNNING, RunState.WAITING]
    cancelled = {"state": RunState.CANCELLED, "lease_until": None}
    ended = (
        update(docket_runs)
        .where(IS_RUN, _RUNS.state.in_(alive))
        .values(
            **cancelled,
            error=as_json(dump_json(error)),
            # A caller may wait for the task, and its messages may be lost.
            wake_at=case((_RUNS.message.is_not(None), after(CANCEL_LOOK_S))),
            ended_at=now(),
            updated_at=now(),
            expires_at=after(retention_s),
        )
    )
    chunks = update(docket_chunks).where(_OF_RUN, _CHUNKS.state.in_(alive)).values(cancelled)
    name = named(graph, execution_id)
    with writing(connection):
        if connection.execute(ended, name).rowcount:
            connection.execute(chunks, name)
        dated = date_page(connection, graph, execution_id)
    if dated == PAGE:
        date_checkpoints(connection, graph, execution_id)
    return find_run(connection, graph, execution_id)


# States are in the text: of bound values the planner cannot tell that `ix_docket_runs_due` has the rows.
_IS_WATCHED = and_(_RUNS.message.is_not(None), _RUNS.task_name.in_(bindparam("p_task_names", expanding=True)))
_IS_OVER = and_(is_state(docket_runs, "RUNNING"), _RUNS.lease_until <= began())
_IS_TIME = and_(
    _IS_WATCHED, _RUNS.wake_at <= began(), or_(is_state(docket_runs, "WAITING", "CANCELLED"), _IS_OVER)
)
_NEVER_LOOKED = and_(_IS_WATCHED, _RUNS.wake_at.is_(None), _IS_OVER)


def _look() -> Any:
    """Return the statement that finds what is due: two ranges of the index, however many runs there are."""
    name, most = select(_RUNS.graph, _RUNS.execution_id), bindparam("p_most", type_=Integer())
    over = name.where(_NEVER_LOOKED).limit(most).subquery("over")
    timely = name.where(_IS_TIME).order_by(_RUNS.wake_at).limit(most).subquery("timely")
    return union_all(select(over), select(timely)).limit(most)


_LOOK = _look()
_SHOWN = tuple(field.name for field in fields(LostRun))
_LOCK = (
    select(
        *(_RUNS[name] for name in _SHOWN),
        _RUNS.state,
        (_RUNS.items_failed > _RUNS.items_allowed).label("failing"),
        (-seconds_left(_RUNS.updated_at)).label("idle_s"),
    )
    .where(IS_RUN, or_(_NEVER_LOOKED, _IS_TIME))
    .with_for_update(skip_locked=True)
)


def find_lost(
    connection: Connection, task_names: Sequence[str], lease_s: float, max_deliveries: int, limit: int
) -> list[LostRun]:
    """See `BatchStore.find_lost`."""
    asked = {"p_task_names": list(map(clean_text, task_names)), "p_most": limit}
    lost = list[Row]()
    for name in connection.execute(_LOOK, asked).all():
        # One run in each transaction: the others are not locked for long. Another process may have been faster.
        with writing(connection):
            row = connection.execute(_LOCK, asked | named(*name)).mappings().first()
            if row is not None and _look_at(connection, row, lease_s, max_deliveries):
                lost.append(row)
    return [LostRun(**{name: row[name] for name in _SHOWN}) for row in lost]


def _look_at(connection: Connection, run: Row, lease_s: float, max_deliveries: int) -> bool:
    """Free the chunks of a locked *run* whose leases are over and set the next look; tell whether it is lost."""
    failing, idle_s = bool(run["failing"]), float(run["idle_s"])
    stage, name = and_(_OF_RUN, _CHUNKS.stage == run["stage"]), named(run["graph"], run["execution_id"])
    is_poison = _CHUNKS.lost + 1 >= max_deliveries
    freed = (
        update(docket_chunks)
        .where(stage, _CHUNKS.state == RunState.RUNNING, _CHUNKS.lease_until <= began())
        .values(
            lost=_CHUNKS.lost + 1,
            lease_until=None,
            state=case((is_poison, RunState.QUARANTINED), else_=RunState.QUEUED),
        )
    )
    died = connection.execute(freed, name).rowcount > 0
    counts = dict[str, int]()
    # A chunk that is to be tried again counts until its message may have been in a queue long enough.
    is_delayed = _CHUNKS.lease_until > after(-QUEUE_PATIENCE * lease_s)
    delayed = func.count(case((is_delayed, 1)))
    by_state = select(_CHUNKS.state, func.count(), delayed).where(stage).group_by(_CHUNKS.state)
    for state, count, late in connection.execute(by_state, name).all():
        counts |= {state: count, f"{state} later": late}
    waits = not failing and counts.get(RunState.QUEUED, 0) > 0
    lost = died or is_lost(
        state=run["state"],
        is_busy=RunState.RUNNING in counts or (waits and counts[f"{RunState.QUEUED} later"] > 0),
        is_queued=waits,
        idle_s=idle_s,
        lease_s=lease_s,
    )
    # The longer nothing helps, the rarer a run is sent again.
    next_s = min(LONGEST_LOOK_S, max(lease_s, idle_s)) if lost and not died else lease_s
    changes: dict[str, Any] = {"wake_at": after(None if run["state"] == RunState.CANCELLED else next_s)}
    if died:
        kept_until = after(lease_s * STAGE_PATIENCE)
        is_kept = and_(_RUNS.state == RunState.WAITING, _RUNS.lease_until < kept_until)
        changes |= {"updated_at": now(), "lease_until": case((is_kept, kept_until), else_=_RUNS.lease_until)}
    if RunState.QUARANTINED in counts:
        changes["items_allowed"] = case((_RUNS.items_allowed.is_not(None), -1))
    connection.execute(update(docket_runs).where(IS_RUN).values(changes), name)
    return lost
