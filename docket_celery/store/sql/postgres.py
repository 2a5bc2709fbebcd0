"""The calls of `Store` on Postgres: one statement each on the happy path.

Each may be repeated after a lost answer, because a repeated statement finds what it wrote: acquire and lookup
by owner, save and publish by key, end by owner and state; the others do nothing twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from docket_celery.errors import LeaseLost, StoreUnavailable
from docket_celery.store.records import (
    Checkpoint,
    Halt,
    Lease,
    RunEnd,
    RunRequest,
    RunRow,
    RunState,
    StepExecution,
)
from docket_celery.store.rows import (
    EXECUTION_COLUMNS,
    check_owner,
    checkpoint_values,
    clean_checkpoint,
    clean_text,
    end_values,
    execution_values,
    fence_values,
    lease_from,
    read_checkpoint,
    read_run,
    request_values,
    without_view,
)
from docket_celery.store.rules import halt
from docket_celery.store.sql import postgres_sql as sql
from docket_celery.store.sql import schema
from docket_celery.store.sql.faults import sqlstate

_LOCKED_S = 1.0  # of a heartbeat, for all locked rows together
_LOCK_TIMEOUT = "55P03"
_TRIES = 3  # for a row that goes away between two statements: twice in a row is no accident


def enqueue(connection: Connection, request: RunRequest, keep_s: float) -> RunRow | None:
    """See `Store.enqueue`."""
    values = request_values(request) | {"keep_s": keep_s}
    for _ in range(_TRIES):
        if connection.execute(sql.ENQUEUE, values).first() is not None:
            return None
        found = find_run(connection, request.graph, request.execution_id)
        if found is not None:
            return found
    raise StoreUnavailable("queue the run", "the run is being deleted")


def acquire(connection: Connection, request: RunRequest) -> Lease | RunRow:
    """See `Store.acquire`."""
    values = request_values(request) | {
        "lease_s": request.lease_s,
        "ended_cleanly": request.ended_cleanly,
        "waits_for_other": request.waits_for_other,
        "celery_retry": request.celery_retry,
        "max_deliveries": request.max_deliveries,
    }
    for _ in range(_TRIES):
        row = connection.execute(sql.ACQUIRE, values).mappings().first()
        if row is None:
            found = find_run(connection, request.graph, request.execution_id)
            if found is not None:
                return found
        elif row["state"] == RunState.RUNNING:
            return lease_from(request, epoch=row["epoch"], lost=row["lost"], failures=row["failures"])
        else:
            return read_run(row)
    raise StoreUnavailable("acquire the run", "the run is being deleted")


def restore(
    connection: Connection, lease: Lease, keys: Sequence[bytes], items: bool = False
) -> list[Checkpoint]:
    """See `Store.restore`."""
    fence = fence_values(lease)
    wanted = {**fence, "keys": list(keys), "items": items}
    rows = connection.execute(sql.RESTORE, wanted).mappings().all()
    checkpoints = [check_owner(read_checkpoint(row), fence["graph"], fence["execution_id"]) for row in rows]
    if any(row["dated"] for row in rows):
        while connection.execute(sql.UNDATE, fence).rowcount == sql.DATED_AT_ONCE:
            pass
    return checkpoints


def save(
    connection: Connection, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None
) -> Checkpoint:
    """See `Store.save`."""
    ours = clean_checkpoint(checkpoint)
    fence = fence_values(lease)
    values = checkpoint_values(ours) | fence | _execution_values(execution)
    statement = sql.SAVE[lease.chunk is not None, execution is not None]
    for _ in range(_TRIES):
        fenced, saved = connection.execute(statement, values).one()
        if not fenced:
            raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
        if saved:
            return without_view(ours)
        row = connection.execute(sql.FIND_CHECKPOINT, {"cache_key": ours.key}).mappings().first()
        if row is not None:
            return check_owner(read_checkpoint(row), fence["graph"], fence["execution_id"])
    raise StoreUnavailable("save the checkpoint", "another's row is being deleted")


def lookup(connection: Connection, key: bytes, owner: str, lease_s: float) -> Checkpoint | bool:
    """See `Store.lookup`."""
    values = {"cache_key": key, "owner": clean_text(owner), "lease_s": lease_s}
    row = connection.execute(sql.LOOKUP, values).mappings().one()
    if row["cache_key"] is not None:
        return check_owner(read_checkpoint(row), "", None)
    return bool(row["won"])


def publish(
    connection: Connection,
    checkpoint: Checkpoint,
    owner: str,
    execution: StepExecution | None,
    *,
    replace: bool = False,
) -> Checkpoint:
    """See `Store.publish`."""
    ours = clean_checkpoint(checkpoint)
    values = checkpoint_values(ours) | _execution_values(execution)
    values |= {"owner": clean_text(owner), "replace": replace}
    statement = sql.PUBLISH if execution is None else sql.PUBLISH_EXECUTION
    for _ in range(_TRIES):
        if connection.execute(statement, values).scalar_one():
            return without_view(ours)
        row = connection.execute(sql.FIND_LIVE, {"cache_key": ours.key}).mappings().first()
        if row is not None:
            return check_owner(read_checkpoint(row), "", None)
    raise StoreUnavailable("publish the checkpoint", "another's row is being deleted")


def forget(connection: Connection, key: bytes) -> bool:
    """See `Store.forget`."""
    return bool(connection.execute(sql.FORGET, {"cache_key": key}).scalar())


def release_claim(connection: Connection, key: bytes, owner: str) -> None:
    """See `Store.release_claim`."""
    connection.execute(sql.RELEASE_CLAIM, {"cache_key": key, "owner": clean_text(owner)})


def extend(
    connection: Connection, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]]
) -> dict[tuple[str | int, ...], Halt | None]:
    """See `Store.extend`."""
    if not leases and not claims:
        return {}
    chunks = [(lease, lease.chunk) for lease in leases if lease.chunk is not None]
    values = _lease_arrays("", [lease for lease in leases if lease.chunk is None])
    if chunks:
        values |= _lease_arrays("c_", [lease for lease, _ in chunks])
        values["c_stages"] = [chunk.stage for _, chunk in chunks]
        values["c_los"] = [chunk.lo for _, chunk in chunks]
    if claims:
        values["keys"] = [key for key, _, _ in claims]
        values["claimants"] = [clean_text(owner) for _, owner, _ in claims]
        values["claims_s"] = [float(lease_s) for _, _, lease_s in claims]
    rows = connection.execute(sql.EXTEND[bool(claims), bool(chunks)], values).all()
    held: dict[tuple[str | int, ...], Halt | None] = {}
    by_name = {lease.name: lease for lease in leases}
    give_up_at = time.monotonic() + _LOCKED_S
    for *parts, failing, stopped, extended in rows:
        name = tuple(part for part in parts if part is not None)
        if extended:
            held[name] = halt(failing=failing, stopped=stopped)
        else:
            waited = _extend_locked(connection, by_name[name], give_up_at)
            if waited is not False:
                held[name] = Halt.LOCKED if waited is None else halt(failing=failing, stopped=stopped)
    return held


def _extend_locked(connection: Connection, lease: Lease, give_up_at: float) -> bool | None:
    """Extend *lease*, whose row another transaction has locked; None: it stayed locked, False: it is gone."""
    left_ms = int((give_up_at - time.monotonic()) * 1000)
    if left_ms <= 0:
        return None
    values = fence_values(lease) | {"lease_s": lease.lease_s, "wait_ms": str(left_ms)}
    statement = sql.EXTEND_RUN if lease.chunk is None else sql.EXTEND_CHUNK
    try:
        return bool(connection.execute(statement, values).rowcount)
    except DBAPIError as error:
        if sqlstate(error) != _LOCK_TIMEOUT:
            raise
        return None


def _lease_arrays(prefix: str, leases: Sequence[Lease]) -> dict[str, Any]:
    return {
        f"{prefix}graphs": [clean_text(lease.graph) for lease in leases],
        f"{prefix}execution_ids": [clean_text(lease.execution_id) for lease in leases],
        f"{prefix}owners": [clean_text(lease.owner) for lease in leases],
        f"{prefix}epochs": [lease.epoch for lease in leases],
        f"{prefix}leases_s": [float(lease.lease_s) for lease in leases],
    }


def end(connection: Connection, lease: Lease, ending: RunEnd) -> None:
    """See `Store.end`."""
    values = end_values(lease, ending) | {"wake_in_s": ending.wake_in_s, "retention_s": ending.retention_s}
    values |= execution_arrays(ending.executions)
    statement = sql.END[ending.state.ended, bool(ending.executions)]
    found = connection.execute(statement, values).mappings().one()
    if not found["fenced"]:
        row = connection.execute(sql.FIND_RUN, values).mappings().first()
        ours = (values["owner"], values["epoch"], values["state"])
        if row is None or (row["owner"], row["epoch"], row["state"]) != ours:
            raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
    if ending.state.ended and (not found["fenced"] or found["dated"] == sql.DATED_AT_ONCE):
        date_rest(connection, values)


def date_rest(connection: Connection, run: Mapping[str, Any]) -> None:
    """Date what one statement could not of the checkpoints of a run that has ended."""
    while connection.execute(sql.DATE_REST, run).rowcount == sql.DATED_AT_ONCE:
        pass


def find_run(connection: Connection, graph: str, execution_id: str) -> RunRow | None:
    """See `Store.find_run`."""
    values = {"graph": clean_text(graph), "execution_id": clean_text(execution_id)}
    row = connection.execute(sql.FIND_RUN, values).mappings().first()
    return None if row is None else read_run(row)


def find_job(connection: Connection, graph: str, execution_id: str) -> bytes | None:
    """See `Store.find_job`."""
    values = {"graph": clean_text(graph), "execution_id": clean_text(execution_id)}
    job = connection.execute(sql.FIND_JOB, values).scalar_one_or_none()
    return None if job is None else bytes(job)


def execution_arrays(executions: Sequence[StepExecution]) -> dict[str, Any]:
    """Return the columns of *executions* as arrays; nothing where there are none."""
    if not executions:
        return {}
    listed = [execution_values(execution) for execution in executions]
    return {f"x_{name}": [row[name] for row in listed] for name in EXECUTION_COLUMNS}


def _execution_values(execution: StepExecution | None) -> dict[str, Any]:
    if execution is None:
        return {}
    return {f"x_{name}": value for name, value in execution_values(execution).items()}


def migrate(connection: Connection) -> int:
    """See `Store.migrate`; all in one transaction."""
    connection = connection.execution_options(isolation_level="READ COMMITTED")
    with connection.begin():
        return schema.upgrade(connection)
