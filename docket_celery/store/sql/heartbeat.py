"""`Store.extend`: the leases of a process and its claims, extended together.

Rows that another transaction has locked are skipped first: waiting for one of them would cost all other runs of the
process their leases. Then each is waited for, for a limited time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, select, text, update
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
_SECOND = "interval '1 second'"
_UNTIL_S = f"clock_timestamp() + CAST(:lease_s AS double precision) * {_SECOND}"

_RUN_LEASES = """
    docket_runs AS r JOIN unnest(CAST(:graphs AS text[]), CAST(:execution_ids AS text[]), CAST(:owners AS text[]),
        CAST(:epochs AS bigint[]), CAST(:leases_s AS double precision[]))
        AS u (graph, execution_id, owner, epoch, lease_s)
    ON r.graph = u.graph AND r.execution_id = u.execution_id AND r.owner = u.owner AND r.epoch = u.epoch
        AND r.state = 'RUNNING'"""
_CHUNK_LEASES = """
    docket_chunks AS c JOIN unnest(CAST(:c_graphs AS text[]), CAST(:c_execution_ids AS text[]),
        CAST(:c_owners AS text[]), CAST(:c_epochs AS bigint[]), CAST(:c_leases_s AS double precision[]),
        CAST(:c_stages AS integer[]), CAST(:c_los AS bigint[]))
        AS u (graph, execution_id, owner, epoch, lease_s, stage, lo)
    ON c.graph = u.graph AND c.execution_id = u.execution_id AND c.owner = u.owner AND c.epoch = u.epoch
        AND c.stage = u.stage AND c.lo = u.lo AND c.state = 'RUNNING'"""


_EXTEND = f"""
WITH free AS (
    SELECT r.graph, r.execution_id, u.lease_s FROM {_RUN_LEASES} FOR NO KEY UPDATE OF r SKIP LOCKED),
l AS (
    UPDATE docket_runs AS r SET lease_until = clock_timestamp() + free.lease_s * {_SECOND} FROM free
    WHERE r.graph = free.graph AND r.execution_id = free.execution_id
    RETURNING r.graph, r.execution_id)"""
_HELD = f"""
SELECT r.graph, r.execution_id, NULL AS stage, NULL AS lo, NULL AS failing, NULL AS stopped,
    l.graph IS NOT NULL AS extended
FROM {_RUN_LEASES} LEFT JOIN l ON l.graph = r.graph AND l.execution_id = r.execution_id"""
_HELD_CHUNKS = f"""
UNION ALL
SELECT c.graph, c.execution_id, c.stage, c.lo, r.items_failed > r.items_allowed, r.items_allowed < 0,
    h.graph IS NOT NULL
FROM {_CHUNK_LEASES} JOIN docket_runs AS r ON r.graph = c.graph AND r.execution_id = c.execution_id
    LEFT JOIN h ON h.graph = c.graph AND h.execution_id = c.execution_id AND h.stage = c.stage AND h.lo = c.lo"""
# A spent claim stays spent: only one that is alive is extended.
_EXTEND_CLAIMS = f""",
free_claims AS (
    SELECT c.cache_key, u.lease_s FROM docket_claims AS c
    JOIN unnest(CAST(:keys AS bytea[]), CAST(:claimants AS text[]), CAST(:claims_s AS double precision[]))
        AS u (cache_key, owner, lease_s)
    ON c.cache_key = u.cache_key AND c.owner = u.owner AND c.lease_until > clock_timestamp()
    FOR NO KEY UPDATE OF c SKIP LOCKED),
k AS (
    UPDATE docket_claims AS c SET lease_until = clock_timestamp() + free_claims.lease_s * {_SECOND}
    FROM free_claims WHERE c.cache_key = free_claims.cache_key)"""
_EXTEND_CHUNKS = f""",
free_chunks AS (
    SELECT c.graph, c.execution_id, c.stage, c.lo, u.lease_s FROM {_CHUNK_LEASES}
    FOR NO KEY UPDATE OF c SKIP LOCKED),
h AS (
    UPDATE docket_chunks AS c SET lease_until = clock_timestamp() + free_chunks.lease_s * {_SECOND}
    FROM free_chunks WHERE c.graph = free_chunks.graph AND c.execution_id = free_chunks.execution_id
        AND c.stage = free_chunks.stage AND c.lo = free_chunks.lo
    RETURNING c.graph, c.execution_id, c.stage, c.lo)"""
_EXTEND_ALL = {
    (claims, chunks): text(
        _EXTEND
        + (_EXTEND_CLAIMS if claims else "")
        + (_EXTEND_CHUNKS if chunks else "")
        + _HELD
        + (_HELD_CHUNKS if chunks else "")
    )
    for claims in (False, True)
    for chunks in (False, True)
}
"""By whether claims are extended, and whether chunks are."""
_WAIT = "WITH wait AS (SELECT set_config('lock_timeout', CAST(:wait_ms AS text), true) AS ms)"
_EXTEND_RUN = text(f"""
{_WAIT}
UPDATE docket_runs SET lease_until = {_UNTIL_S} FROM wait
WHERE graph = :graph AND execution_id = :execution_id AND epoch = :epoch AND owner = :owner AND state = 'RUNNING'
    AND wait.ms IS NOT NULL
""")
_EXTEND_CHUNK = text(f"""
{_WAIT}
UPDATE docket_chunks AS c SET lease_until = {_UNTIL_S} FROM wait
WHERE c.graph = :graph AND c.execution_id = :execution_id AND c.stage = :stage AND c.lo = :lo
    AND c.epoch = :epoch AND c.owner = :owner AND c.state = 'RUNNING' AND wait.ms IS NOT NULL
""")
"""Wait for a locked row, for a limited time that holds in this statement alone."""

_UNTIL = after(bindparam("p_lease_s"))
_IS_RUN = matches(docket_runs, "graph", "execution_id")
_HELD_CHUNK = matches(docket_chunks, "graph", "execution_id", "epoch", "owner", "stage", "lo")
_LITE_RUN = update(docket_runs).where(HOLDS_RUN).values(lease_until=_UNTIL)
_LITE_CHUNK = (
    update(docket_chunks).where(_HELD_CHUNK, is_state(docket_chunks, "RUNNING")).values(lease_until=_UNTIL)
)
_LITE_CLAIM = (
    update(docket_claims)
    .where(matches(docket_claims, "cache_key", "owner"), docket_claims.c.lease_until > now())
    .values(lease_until=_UNTIL)
)
_LITE_HALT = select(
    (docket_runs.c.items_failed > docket_runs.c.items_allowed).label("failing"),
    (docket_runs.c.items_allowed < 0).label("stopped"),
).where(_IS_RUN)


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
            values = bound(fence_values(lease)) | {"p_lease_s": lease.lease_s}
            if lease.chunk is None and connection.execute(_LITE_RUN, values).rowcount:
                held[lease.name] = None
            elif lease.chunk is not None and connection.execute(_LITE_CHUNK, values).rowcount:
                held[lease.name] = halt(**connection.execute(_LITE_HALT, values).mappings().one())
        for key, owner, lease_s in claims:
            values = {"p_cache_key": key, "p_owner": clean_text(owner), "p_lease_s": lease_s}
            connection.execute(_LITE_CLAIM, values)
    return held


def _extend_at_once(
    connection: Connection, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]]
) -> dict[Name, Halt | None]:
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
    rows = connection.execute(_EXTEND_ALL[bool(claims), bool(chunks)], values).all()
    held: dict[Name, Halt | None] = {}
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
    statement = _EXTEND_RUN if lease.chunk is None else _EXTEND_CHUNK
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
