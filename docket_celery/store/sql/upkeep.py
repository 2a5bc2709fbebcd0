"""What is done to a run by others than its holder: it is cancelled, or found lost and looked at again later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, and_, case, func, or_, select, update

from docket_celery.store.records import LostRun, RunRow, RunState
from docket_celery.store.rows import Row, clean_text, dump_json
from docket_celery.store.rules import CANCEL_LOOK_S, LONGEST_LOOK_S, QUEUE_PATIENCE, STAGE_PATIENCE, is_lost
from docket_celery.store.sql.binds import IS_RUN, NAME, matches, named
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


def find_lost(
    connection: Connection, task_names: Sequence[str], lease_s: float, max_deliveries: int, limit: int
) -> list[LostRun]:
    """See `BatchStore.find_lost`."""
    names = tuple(field.name for field in fields(LostRun))
    woken = _RUNS.wake_at <= began()
    is_over = and_(_RUNS.state == RunState.RUNNING, _RUNS.lease_until <= began())
    is_due = or_(
        and_(_RUNS.state.in_([RunState.WAITING, RunState.CANCELLED]), woken),
        and_(is_over, or_(_RUNS.wake_at.is_(None), woken)),
    )
    failing, idle_s = _RUNS.items_failed > _RUNS.items_allowed, -seconds_left(_RUNS.updated_at)
    shown = (*(_RUNS[name] for name in names), _RUNS.state, failing.label("failing"), idle_s.label("idle_s"))
    due = (
        select(*shown)
        .where(_RUNS.message.is_not(None), _RUNS.task_name.in_(list(map(clean_text, task_names))), is_due)
        .order_by(_RUNS.wake_at.is_not(None), _RUNS.wake_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    lost = list[Row]()
    for _ in range(limit):
        # One run in each transaction: a look takes it off the list, and the others are not locked for long.
        with writing(connection):
            row = connection.execute(due).mappings().first()
            if row is None:
                break
            if _look_at(connection, row, lease_s, max_deliveries):
                lost.append(row)
    return [LostRun(**{name: row[name] for name in names}) for row in lost]


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
