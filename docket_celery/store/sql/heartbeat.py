"""`Store.extend`: the leases of a process and its claims, extended together.

Rows that another transaction has locked are skipped first: waiting for one of them would cost all other runs of the
process their leases. Then each is waited for, for a limited time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Connection, TextClause, bindparam, select, text, update
from sqlalchemy.exc import DBAPIError

from docket_celery.store.records import Halt, Lease
from docket_celery.store.rows import clean_text, fence_values
from docket_celery.store.rules import halt
from docket_celery.store.sql.binds import HOLDS_RUN, bound, is_state, matches
from docket_celery.store.sql.clock import after, now, writing
from docket_celery.store.sql.faults import sqlstate
from docket_celery.store.sql.schema import docket_chunks, docket_claims, docket_runs

Name = tuple[str | int, ...]
_LOCKED_S = 1.0  # of a heartbeat, for all locked rows together
_LOCK_TIMEOUT = "55P03"
_TYPES = {
    "cache_key": "bytea",
    "epoch": "bigint",
    "lease_s": "double precision",
    "stage": "integer",
    "lo": "bigint",
}
_RUN, _CHUNK = ("graph", "execution_id"), ("graph", "execution_id", "stage", "lo")


def _joined(left: str, right: str, names: Sequence[str]) -> str:
    return " AND ".join(f"{left}.{name} = {right}.{name}" for name in names)


def _given(table: str, names: Sequence[str], condition: str) -> str:
    """Return the rows of *table*, called t, that match bound arrays, called u."""
    arrays = ", ".join(
        f"CAST(:{table}_{name} AS {_TYPES.get(name, 'text')}[])" for name in (*names, "lease_s")
    )
    bound_rows = f"unnest({arrays}) AS u ({', '.join(names)}, lease_s)"
    return f"{table} AS t JOIN {bound_rows} ON {_joined('t', 'u', names)} AND t.{condition}"


def _extended(table: str, names: Sequence[str], condition: str, key: Sequence[str]) -> str:
    """Return the expressions that extend those rows of *table* that no other transaction has locked."""
    keys = ", ".join(f"t.{name}" for name in key)
    return f"""
free_{table} AS (
    SELECT {keys}, u.lease_s FROM {_given(table, names, condition)} FOR NO KEY UPDATE OF t SKIP LOCKED),
done_{table} AS (
    UPDATE {table} AS t SET lease_until = clock_timestamp() + free.lease_s * interval '1 second'
    FROM free_{table} AS free WHERE {_joined("t", "free", key)} RETURNING {keys})"""


_HELD_RUN, _HELD_CHUNK = (*_RUN, "owner", "epoch"), (*_CHUNK, "owner", "epoch")
_RUNNING, _LIVE = "state = 'RUNNING'", "lease_until > clock_timestamp()"
_RUNS = f"""
SELECT t.graph, t.execution_id, NULL AS stage, NULL AS lo, NULL AS failing, NULL AS stopped, done.graph IS NOT NULL
FROM {_given("docket_runs", _HELD_RUN, _RUNNING)}
    LEFT JOIN done_docket_runs AS done ON {_joined("t", "done", _RUN)}"""
_CHUNKS = f"""
UNION ALL
SELECT t.graph, t.execution_id, t.stage, t.lo, r.items_failed > r.items_allowed, r.items_allowed < 0,
    done.graph IS NOT NULL
FROM {_given("docket_chunks", _HELD_CHUNK, _RUNNING)} JOIN docket_runs AS r ON {_joined("t", "r", _RUN)}
    LEFT JOIN done_docket_chunks AS done ON {_joined("t", "done", _CHUNK)}"""


@cache
def _extend_all(*, claims: bool, chunks: bool) -> TextClause:
    """Return the statement of Postgres that extends all; a spent claim stays spent."""
    parts = [_extended("docket_runs", _HELD_RUN, _RUNNING, _RUN)]
    if claims:
        parts.append(_extended("docket_claims", ("cache_key", "owner"), _LIVE, ("cache_key",)))
    if chunks:
        parts.append(_extended("docket_chunks", _HELD_CHUNK, _RUNNING, _CHUNK))
    return text(f"WITH {','.join(parts)}{_RUNS}{_CHUNKS if chunks else ''}")


def _arrays(table: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{table}_{name}": [row[name] for row in rows] for name in (*names, "lease_s")}


_WAIT = text("SELECT set_config('lock_timeout', :wait, true)")

_UNTIL = after(bindparam("p_lease_s"))
_ONE_RUN = update(docket_runs).where(HOLDS_RUN).values(lease_until=_UNTIL)
_ONE_CHUNK = (
    update(docket_chunks)
    .where(matches(docket_chunks, *_HELD_CHUNK), is_state(docket_chunks, "RUNNING"))
    .values(lease_until=_UNTIL)
)
_ONE_CLAIM = (
    update(docket_claims)
    .where(matches(docket_claims, "cache_key", "owner"), docket_claims.c.lease_until > now())
    .values(lease_until=_UNTIL)
)
_FIND_HALT = select(
    (docket_runs.c.items_failed > docket_runs.c.items_allowed).label("failing"),
    (docket_runs.c.items_allowed < 0).label("stopped"),
).where(matches(docket_runs, *_RUN))


def extend(
    connection: Connection, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]]
) -> dict[Name, Halt | None]:
    """See `Store.extend`."""
    if not leases and not claims:
        return {}
    if connection.dialect.name == "postgresql":
        return _extend_at_once(connection, leases, claims)
    held: dict[Name, Halt | None] = {}
    with writing(connection):
        for lease in leases:
            if _extend_one(connection, lease):
                held[lease.name] = None if lease.chunk is None else _find_halt(connection, lease)
        for key, owner, lease_s in claims:
            values = {"p_cache_key": key, "p_owner": clean_text(owner), "p_lease_s": lease_s}
            connection.execute(_ONE_CLAIM, values)
    return held


def _extend_at_once(
    connection: Connection, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]]
) -> dict[Name, Halt | None]:
    rows = [fence_values(lease) | {"lease_s": float(lease.lease_s)} for lease in leases]
    runs, chunks = [row for row in rows if "lo" not in row], [row for row in rows if "lo" in row]
    values = _arrays("docket_runs", _HELD_RUN, runs)
    if chunks:
        values |= _arrays("docket_chunks", _HELD_CHUNK, chunks)
    if claims:
        named = [
            {"cache_key": key, "owner": clean_text(owner), "lease_s": float(s)} for key, owner, s in claims
        ]
        values |= _arrays("docket_claims", ("cache_key", "owner"), named)
    found = connection.execute(_extend_all(claims=bool(claims), chunks=bool(chunks)), values).all()
    held: dict[Name, Halt | None] = {}
    by_name = {lease.name: lease for lease in leases}
    give_up_at = time.monotonic() + _LOCKED_S
    for *parts, failing, stopped, extended in found:
        name = tuple(part for part in parts if part is not None)
        if extended:
            held[name] = halt(failing=failing, stopped=stopped)
        else:
            waited = _extend_locked(connection, by_name[name], give_up_at)
            if waited is not False:
                held[name] = Halt.LOCKED if waited is None else halt(failing=failing, stopped=stopped)
    return held


def _extend_one(connection: Connection, lease: Lease) -> bool:
    values = bound(fence_values(lease)) | {"p_lease_s": lease.lease_s}
    return connection.execute(_ONE_RUN if lease.chunk is None else _ONE_CHUNK, values).rowcount > 0


def _find_halt(connection: Connection, lease: Lease) -> Halt | None:
    return halt(**connection.execute(_FIND_HALT, bound(fence_values(lease))).mappings().one())


def _extend_locked(connection: Connection, lease: Lease, give_up_at: float) -> bool | None:
    """Extend *lease*, whose row another transaction has locked; None: it stayed locked, False: it is gone."""
    left_ms = int((give_up_at - time.monotonic()) * 1000)
    if left_ms <= 0:
        return None
    try:
        with writing(connection):
            connection.execute(_WAIT, {"wait": f"{left_ms}ms"})
            return _extend_one(connection, lease)
    except DBAPIError as error:
        if sqlstate(error) != _LOCK_TIMEOUT:
            raise
        return None
