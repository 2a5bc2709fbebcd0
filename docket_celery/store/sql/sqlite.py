"""The calls of `Store` on SQLite: small transactions that take the write lock first (``BEGIN IMMEDIATE``).

Times are text in UTC with six decimals, '2026-01-31 12:00:00.123000', which SQLite's own date functions and
plain comparison read, and SQLAlchemy's `DateTime` too. The clock is SQLite's 'now', to the millisecond.
Nothing here needs a SQLite newer than 3.24.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from docket_celery.errors import LeaseLost
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
    CHECKPOINT_COLUMNS,
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
from docket_celery.store.rules import (
    BODY_PATIENCE,
    KEPT_FOR_DELIVERY,
    halt,
    is_crash,
    known_retries,
    may_take,
)
from docket_celery.store.sql import schema

NOW = "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"
_COLUMNS = ", ".join(CHECKPOINT_COLUMNS)
_IS_RUN = "graph = :graph AND execution_id = :execution_id"
_FENCE = f"{_IS_RUN} AND epoch = :epoch AND owner = :owner AND state = 'RUNNING'"
_LIVE = f"(expires_at IS NULL OR expires_at > {NOW})"
_WAL_WITHIN_S, _WAL_AGAIN_S = 5.0, 0.02
_KEYS_AT_ONCE = 500  # SQLite before 3.32 binds at most 999 values


def after(seconds: str) -> str:
    """Return the SQL for a moment that many seconds from now; NULL stays NULL."""
    # printf reads NULL as 0, so NULL is kept out of it.
    moment = f"strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', {seconds})) || '000'"
    return f"CASE WHEN {seconds} IS NOT NULL THEN {moment} END"


FIND_RUN = text(f"""
SELECT graph, execution_id, target, job_digest, state, epoch, owner, lost, failures, retries, task_name,
    task_id, result, result_checksum, error, progress,
    (julianday(lease_until) - julianday({NOW})) * 86400.0 AS lease_left_s, lease_until <= {NOW} AS expired
FROM docket_runs WHERE {_IS_RUN}
""")
_OPEN_CHUNKS = """
    SELECT 1 FROM docket_chunks AS c
    WHERE c.graph = r.graph AND c.execution_id = r.execution_id AND c.stage = r.stage"""
_IS_KEPT = text(f"""
SELECT EXISTS ({_OPEN_CHUNKS} AND c.state = 'RUNNING' AND c.lease_until > {NOW}) OR (r.lease_until > {NOW} AND (
    r.updated_at > {after(f"-:lease_s * {BODY_PATIENCE}")}
    OR (COALESCE(r.items_failed <= r.items_allowed, true) AND EXISTS ({_OPEN_CHUNKS} AND c.state = 'QUEUED'))))
FROM docket_runs AS r WHERE {_IS_RUN} AND r.lease_until IS NOT NULL
""")
_FIND_JOB = text(f"SELECT job FROM docket_runs WHERE {_IS_RUN}")
_INSERT_RUN = text(f"""
INSERT INTO docket_runs (
    graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, owner,
    lease_until, lost, failures, created_at, started_at, updated_at)
VALUES (
    :graph, :execution_id, :task_name, :task_id, :retries, :target, :job, :job_digest, 'RUNNING', 0, 1,
    :owner, {after(":lease_s")}, 0, 0, {NOW}, {NOW}, {NOW})
""")
_ENQUEUE_RUN = text(f"""
INSERT INTO docket_runs (
    graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, lost, failures,
    created_at, updated_at, expires_at)
VALUES (
    :graph, :execution_id, :task_name, :task_id, :retries, :target, :job, :job_digest, 'QUEUED', 0, 0, 0, 0,
    {NOW}, {NOW}, {after(":keep_s")})
""")
_KEPT = ", ".join(f"'{state.value}'" for state in KEPT_FOR_DELIVERY)
_KEEP_RUN = text(f"""
UPDATE docket_runs SET expires_at = MAX(expires_at, {after(":keep_s")})
WHERE {_IS_RUN} AND expires_at IS NOT NULL AND state IN ({_KEPT})
""")
_TAKE_RUN = text(f"""
UPDATE docket_runs SET
    state = 'RUNNING', epoch = :epoch, lost = :lost, failures = :failures, owner = :owner,
    lease_until = {after(":lease_s")}, task_name = :task_name, task_id = :task_id, retries = :retries,
    started_at = COALESCE(started_at, {NOW}), updated_at = {NOW}, ended_at = NULL, error = NULL,
    result = NULL, result_checksum = NULL, wake_at = NULL, expires_at = NULL
WHERE {_IS_RUN}
""")
_QUARANTINE_RUN = text(f"""
UPDATE docket_runs
SET state = 'QUARANTINED', lost = :lost, lease_until = NULL, ended_at = {NOW}, updated_at = {NOW}
WHERE {_IS_RUN}
""")
_HOLDS = text(f"SELECT 1 FROM docket_runs WHERE {_FENCE}")
CHUNK_FENCE = f"""
{_IS_RUN} AND stage = :stage AND lo = :lo AND epoch = :epoch AND owner = :owner AND state = 'RUNNING' AND EXISTS (
    SELECT 1 FROM docket_runs AS r WHERE r.graph = docket_chunks.graph AND r.stage = docket_chunks.stage
        AND r.execution_id = docket_chunks.execution_id AND r.state IN ('RUNNING', 'WAITING'))
"""
_HOLDS_CHUNK = text(f"SELECT 1 FROM docket_chunks WHERE {CHUNK_FENCE}")
_FIND_HALT = text(
    f"SELECT items_failed > items_allowed AS failing, items_allowed < 0 AS stopped FROM docket_runs WHERE {_IS_RUN}"
)
_EXTEND_CHUNK = text(
    f"UPDATE docket_chunks SET lease_until = {after(':lease_s')} WHERE {_IS_RUN} AND stage = :stage AND lo = :lo "
    "AND epoch = :epoch AND owner = :owner AND state = 'RUNNING'"
)
_RESET_CHUNKS = text(f"""
UPDATE docket_chunks SET state = 'QUEUED', failed = 0, lost = 0, errors = NULL, lease_until = NULL
WHERE {_IS_RUN} AND (state <> 'SUCCEEDED' OR failed > 0)
""")
_EXTEND_RUN = text(f"UPDATE docket_runs SET lease_until = {after(':lease_s')} WHERE {_FENCE}")
_WAKE_IN_S = "COALESCE(:wake_in_s, CASE WHEN :state = 'WAITING' AND message IS NOT NULL THEN :lease_s END)"
_END_RUN = text(f"""
UPDATE docket_runs SET
    state = :state, lease_until = NULL, failures = failures + :failed, result = :result,
    result_checksum = :result_checksum, error = :error, wake_at = {after(_WAKE_IN_S)},
    retries = retries + (:wake_in_s IS NOT NULL),
    items_failed = CASE WHEN :ended THEN :items_failed ELSE items_failed END,
    items_allowed = CASE WHEN NOT :ended THEN items_allowed END,
    ended_at = CASE WHEN :ended THEN {NOW} END,
    expires_at = CASE WHEN :ended THEN {after(":retention_s")} END, updated_at = {NOW}
WHERE {_FENCE}
""")

_FIND_CHECKPOINT = text(f"SELECT {_COLUMNS} FROM docket_cache WHERE cache_key = :cache_key")
_FIND_LIVE = text(f"SELECT {_COLUMNS} FROM docket_cache WHERE cache_key = :cache_key AND {_LIVE}")
_FIND_OF_RUN = text(
    f"SELECT {_COLUMNS}, expires_at IS NOT NULL AS dated FROM docket_cache WHERE {_IS_RUN} "
    "AND (item = '' OR :items)"
)
_UNDATE = text(
    f"UPDATE docket_cache SET expires_at = NULL WHERE {_IS_RUN} "
    f"AND EXISTS (SELECT 1 FROM docket_runs WHERE {_FENCE})"
)
_DATE = text(f"UPDATE docket_cache SET expires_at = {after('ttl')} WHERE {_IS_RUN} AND ttl IS NOT NULL")
_STORED = ", ".join(f":{name}" for name in CHECKPOINT_COLUMNS)
_STORE = (
    f"INTO docket_cache ({_COLUMNS}, output_json, created_at, expires_at) "
    f"VALUES ({_STORED}, :output_json, {NOW}"
)
_INSERT_CHECKPOINT = text(f"INSERT {_STORE}, NULL)")
_PUT_CHECKPOINT = text(f"INSERT OR REPLACE {_STORE}, NULL)")
_REPLACE_CHECKPOINT = text(f"INSERT OR REPLACE {_STORE}, {after(':ttl')})")
_FORGET = text("DELETE FROM docket_cache WHERE cache_key = :cache_key AND execution_id IS NULL")
_ADD_EXECUTION = text(
    f"INSERT INTO docket_executions ({', '.join(EXECUTION_COLUMNS)}) "
    f"VALUES ({', '.join(f':{name}' for name in EXECUTION_COLUMNS)})"
)
_FIND_EXECUTION = text(
    "SELECT 1 FROM docket_executions WHERE graph = :graph AND execution_id = :execution_id "
    "AND step_name = :step_name AND item = :item AND delivery = :delivery AND started_at = :started_at"
)

_CLAIM = text(f"""
INSERT INTO docket_claims (cache_key, owner, lease_until)
VALUES (:cache_key, :owner, {after(":lease_s")})
ON CONFLICT (cache_key) DO UPDATE SET
    owner = excluded.owner, lease_until = excluded.lease_until
WHERE docket_claims.owner = excluded.owner OR docket_claims.lease_until <= {NOW}
""")
_RELEASE_CLAIM = text("DELETE FROM docket_claims WHERE cache_key = :cache_key AND owner = :owner")
_EXTEND_CLAIM = text(
    f"UPDATE docket_claims SET lease_until = {after(':lease_s')} "
    f"WHERE cache_key = :cache_key AND owner = :owner AND lease_until > {NOW}"
)


def enqueue(connection: Connection, request: RunRequest, keep_s: float) -> RunRow | None:
    """See `Store.enqueue`."""
    values: dict[str, Any] = request_values(request) | {"keep_s": keep_s}
    with writing(connection):
        row = connection.execute(FIND_RUN, values).mappings().first()
        if row is None:
            connection.execute(_ENQUEUE_RUN, values)
            return None
        if row["target"] == values["target"] and bytes(row["job_digest"]) == values["job_digest"]:
            connection.execute(_KEEP_RUN, values)
            return None
    return read_run(row)


def acquire(connection: Connection, request: RunRequest) -> Lease | RunRow:
    """See `Store.acquire`."""
    values: dict[str, Any] = request_values(request) | {"lease_s": request.lease_s}
    with writing(connection):
        row = connection.execute(FIND_RUN, values).mappings().first()
        if row is None:
            connection.execute(_INSERT_RUN, values)
            return lease_from(request, epoch=1, lost=0, failures=0)
        if not may_take(
            request,
            target=row["target"],
            job_digest=bytes(row["job_digest"]),
            state=row["state"],
            owner=row["owner"],
            task_id=row["task_id"],
            retries=row["retries"],
            expired=bool(row["expired"]),
            kept=row["state"] == RunState.WAITING and bool(connection.execute(_IS_KEPT, values).scalar()),
        ):
            return read_run(row)
        running, ours = row["state"] == RunState.RUNNING, row["owner"] == request.owner
        task_id, retries = row["task_id"], row["retries"]
        crashed = is_crash(request, state=row["state"], owner=row["owner"], task_id=task_id, retries=retries)
        lost = row["lost"] + crashed
        if lost > row["lost"] and lost >= request.max_deliveries:
            connection.execute(_QUARANTINE_RUN, values | {"lost": lost})
            return read_run(connection.execute(FIND_RUN, values).mappings().one())
        epoch = row["epoch"] + (not (running and ours))
        failures = 0 if row["state"] == RunState.FAILED else row["failures"]
        taken = {"epoch": epoch, "lost": lost, "failures": failures}
        taken["retries"] = known_retries(request, task_id=task_id, retries=retries)
        connection.execute(_TAKE_RUN, values | taken)
    return lease_from(request, epoch=epoch, lost=lost, failures=failures)


def restore(
    connection: Connection, lease: Lease, keys: Sequence[bytes], items: bool = False
) -> list[Checkpoint]:
    """See `Store.restore`."""
    fence = fence_values(lease)
    with _reading(connection):
        rows = list(connection.execute(_FIND_OF_RUN, {**fence, "items": items}).mappings())
        found = {bytes(row["cache_key"]) for row in rows}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        for start in range(0, len(missing), _KEYS_AT_ONCE):
            rows += _find_keys(connection, missing[start : start + _KEYS_AT_ONCE])
    checkpoints = [check_owner(read_checkpoint(row), fence["graph"], fence["execution_id"]) for row in rows]
    if any(row["dated"] for row in rows):
        connection.execute(_UNDATE, fence)
    return checkpoints


def save(
    connection: Connection, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None
) -> Checkpoint:
    """See `Store.save`."""
    ours = clean_checkpoint(checkpoint)
    fence = fence_values(lease)
    with writing(connection):
        check_held(connection, lease)
        row = connection.execute(_FIND_CHECKPOINT, {"cache_key": ours.key}).mappings().first()
        if row is None:
            connection.execute(_INSERT_CHECKPOINT, checkpoint_values(ours))
            add_executions(connection, [] if execution is None else [execution])
            return without_view(ours)
    return check_owner(read_checkpoint(row), fence["graph"], fence["execution_id"])


def lookup(connection: Connection, key: bytes, owner: str, lease_s: float) -> Checkpoint | bool:
    """See `Store.lookup`; a hit takes no write lock."""
    values = {"cache_key": key, "owner": clean_text(owner), "lease_s": lease_s}
    row = connection.execute(_FIND_LIVE, values).mappings().first()
    if row is None:
        with writing(connection):
            row = connection.execute(_FIND_LIVE, values).mappings().first()
            if row is None:
                return connection.execute(_CLAIM, values).rowcount == 1
    return check_owner(read_checkpoint(row), "", None)


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
    values = checkpoint_values(ours) | {"owner": clean_text(owner)}
    with writing(connection):
        connection.execute(_RELEASE_CLAIM, values)
        if execution is not None:
            row = _execution_values(execution)
            if connection.execute(_FIND_EXECUTION, row).first() is None:
                connection.execute(_ADD_EXECUTION, row)
        found = connection.execute(_FIND_LIVE, values).mappings().first()
        if found is None or replace:
            connection.execute(_REPLACE_CHECKPOINT, values)
            return without_view(ours)
    return check_owner(read_checkpoint(found), "", None)


def forget(connection: Connection, key: bytes) -> bool:
    """See `Store.forget`."""
    values = {"cache_key": key}
    with writing(connection):
        live = connection.execute(_FIND_LIVE, values).first() is not None
        return connection.execute(_FORGET, values).rowcount > 0 and live


def release_claim(connection: Connection, key: bytes, owner: str) -> None:
    """See `Store.release_claim`."""
    with writing(connection):
        connection.execute(_RELEASE_CLAIM, {"cache_key": key, "owner": clean_text(owner)})


def extend(
    connection: Connection, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]]
) -> dict[tuple[str | int, ...], Halt | None]:
    """See `Store.extend`."""
    held: dict[tuple[str | int, ...], Halt | None] = {}
    if not leases and not claims:
        return held
    with writing(connection):
        for lease in leases:
            values = fence_values(lease)
            statement = _EXTEND_RUN if lease.chunk is None else _EXTEND_CHUNK
            if connection.execute(statement, values | {"lease_s": lease.lease_s}).rowcount:
                found = (
                    None if lease.chunk is None else connection.execute(_FIND_HALT, values).mappings().one()
                )
                held[lease.name] = None if found is None else halt(**found)
        for key, owner, lease_s in claims:
            values = {"cache_key": key, "owner": clean_text(owner), "lease_s": lease_s}
            connection.execute(_EXTEND_CLAIM, values)
    return held


def end(connection: Connection, lease: Lease, ending: RunEnd) -> None:
    """See `Store.end`."""
    values = end_values(lease, ending) | {"wake_in_s": ending.wake_in_s, "retention_s": ending.retention_s}
    with writing(connection):
        if connection.execute(_END_RUN, values).rowcount:
            add_executions(connection, ending.executions)
            if ending.state.ended:
                connection.execute(_DATE, values)
            if ending.state is RunState.FAILED:
                connection.execute(_RESET_CHUNKS, values)
            return
        row = connection.execute(FIND_RUN, values).mappings().first()
    ours = (values["owner"], values["epoch"], values["state"])
    if row is None or (row["owner"], row["epoch"], row["state"]) != ours:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


def find_run(connection: Connection, graph: str, execution_id: str) -> RunRow | None:
    """See `Store.find_run`."""
    values = {"graph": clean_text(graph), "execution_id": clean_text(execution_id)}
    row = connection.execute(FIND_RUN, values).mappings().first()
    return None if row is None else read_run(row)


def find_job(connection: Connection, graph: str, execution_id: str) -> bytes | None:
    """See `Store.find_job`."""
    values = {"graph": clean_text(graph), "execution_id": clean_text(execution_id)}
    job = connection.execute(_FIND_JOB, values).scalar_one_or_none()
    return None if job is None else bytes(job)


def migrate(connection: Connection) -> int:
    """See `Store.migrate`. Readers beside a writer need WAL, which the file itself remembers."""
    _use_wal(connection)
    with writing(connection):
        return schema.upgrade(connection)


def _use_wal(connection: Connection) -> None:
    """Switch the file to WAL; SQLite does not wait for its lock here, so the busy timeout is ours to keep."""
    deadline = time.monotonic() + _WAL_WITHIN_S
    while True:
        try:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        except OperationalError as error:
            if "locked" not in str(error.orig) or time.monotonic() >= deadline:
                raise
            time.sleep(_WAL_AGAIN_S)
        else:
            return


@contextmanager
def writing(connection: Connection) -> Generator[None]:
    """Hold the write lock for a transaction; the driver itself is in autocommit and begins none."""
    with _transaction(connection, "BEGIN IMMEDIATE"):
        yield


@contextmanager
def _reading(connection: Connection) -> Generator[None]:
    """Read one state of the database with several statements."""
    with _transaction(connection, "BEGIN"):
        yield


@contextmanager
def _transaction(connection: Connection, begin: str) -> Generator[None]:
    connection.exec_driver_sql(begin)
    try:
        yield
        connection.exec_driver_sql("COMMIT")
    except BaseException:
        # SQLite ends the transaction by itself on some errors, such as a full disk.
        driver: Any = connection.connection.dbapi_connection
        if driver is not None and driver.in_transaction:
            connection.exec_driver_sql("ROLLBACK")
        raise


def _find_keys(connection: Connection, keys: Sequence[bytes]) -> Iterable[Any]:
    names = ", ".join(f":k{index}" for index in range(len(keys)))
    statement = text(
        f"SELECT {_COLUMNS}, expires_at IS NOT NULL AS dated FROM docket_cache WHERE cache_key IN ({names})"
    )
    return connection.execute(statement, {f"k{index}": key for index, key in enumerate(keys)}).mappings()


def check_held(connection: Connection, lease: Lease) -> None:
    """Do nothing inside a transaction in which *lease* holds.

    Raises:
        LeaseLost: It does not.
    """
    statement = _HOLDS if lease.chunk is None else _HOLDS_CHUNK
    if connection.execute(statement, fence_values(lease)).first() is None:
        raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)


def put_checkpoint(connection: Connection, checkpoint: Checkpoint) -> None:
    """Store a run's checkpoint in place of what is there."""
    connection.execute(_PUT_CHECKPOINT, checkpoint_values(clean_checkpoint(checkpoint)))


def insert_checkpoint(connection: Connection, checkpoint: Checkpoint) -> None:
    """Store a run's checkpoint unless it is there already."""
    values = checkpoint_values(clean_checkpoint(checkpoint))
    if connection.execute(_FIND_CHECKPOINT, values).first() is None:
        connection.execute(_INSERT_CHECKPOINT, values)


def add_executions(connection: Connection, executions: Sequence[StepExecution]) -> None:
    """Write rows of step executions."""
    if executions:
        connection.execute(_ADD_EXECUTION, [_execution_values(execution) for execution in executions])


def _execution_values(execution: StepExecution) -> dict[str, Any]:
    started_at: datetime = execution.started_at
    shown = started_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    return execution_values(execution) | {"started_at": shown}
