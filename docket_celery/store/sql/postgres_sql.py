"""The statements for Postgres: one for each call of `Store` on its happy path.

Every statement commits by itself (AUTOCOMMIT, READ COMMITTED) and takes its time from ``clock_timestamp()``.
Bound values are cast wherever Postgres would have to guess their type. Each call may be repeated after a lost
answer: acquire by owner, save and publish by key, end by owner and state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import TextClause, text

from docket_celery.store.records import Checkpoint
from docket_celery.store.rows import (
    CHECKPOINT_COLUMNS,
    EXECUTION_COLUMNS,
    checkpoint_values,
    clean_checkpoint,
)
from docket_celery.store.rules import BODY_PATIENCE, KEPT_FOR_DELIVERY

DATED_AT_ONCE = 20_000
"""So many checkpoints does one statement date: a batch has very many, and a statement 15 seconds."""
_SECOND = "interval '1 second'"
_RUN = """
    r.graph, r.execution_id, r.target, r.job_digest, r.state, r.epoch, r.owner, r.lost, r.failures, r.retries,
    r.task_name, r.task_id, r.result, r.result_checksum, CAST(r.error AS text) AS error,
    CAST(r.progress AS text) AS progress,
    EXTRACT(EPOCH FROM r.lease_until - clock_timestamp()) AS lease_left_s"""
_TAKES_NEW = "(r.task_id = excluded.task_id AND excluded.retries > r.retries)"
# A delivery that comes again after it took the lease itself died with it, whatever came before it.
_IS_RELEASED = f"(CAST(:ended_cleanly AS boolean) AND COALESCE({_TAKES_NEW}, false))"
_IS_CRASH = f"(r.state = 'RUNNING' AND r.owner <> excluded.owner AND NOT {_IS_RELEASED})"
_IS_POISON = f"({_IS_CRASH} AND r.lost + 1 >= CAST(:max_deliveries AS integer))"
_UNTIL = f"clock_timestamp() + CAST(:lease_s AS double precision) * {_SECOND}"

_OPEN_CHUNKS = """
    SELECT 1 FROM docket_chunks AS c
    WHERE c.graph = r.graph AND c.execution_id = r.execution_id AND c.stage = r.stage"""
_IS_KEPT = f"""(
    EXISTS ({_OPEN_CHUNKS} AND c.state = 'RUNNING' AND c.lease_until > clock_timestamp())
    OR (r.lease_until > clock_timestamp() AND (
        r.updated_at > clock_timestamp() - CAST(:lease_s AS double precision) * {BODY_PATIENCE} * {_SECOND}
        OR (COALESCE(r.items_failed <= r.items_allowed, true)
            AND EXISTS ({_OPEN_CHUNKS} AND c.state = 'QUEUED')))))"""

# One moment for all dates of a new row: each call of clock_timestamp() is a later one.
ACQUIRE = text(f"""
INSERT INTO docket_runs AS r (
    graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, owner,
    lease_until, lost, failures, created_at, started_at, updated_at)
SELECT
    CAST(:graph AS text), CAST(:execution_id AS text), CAST(:task_name AS text), CAST(:task_id AS text),
    CAST(:retries AS integer), CAST(:target AS text), CAST(:job AS bytea), CAST(:job_digest AS bytea), 'RUNNING',
    0, 1, CAST(:owner AS text), moment.now + CAST(:lease_s AS double precision) * {_SECOND}, 0, 0,
    moment.now, moment.now, moment.now
FROM (SELECT clock_timestamp() AS now) AS moment
ON CONFLICT (graph, execution_id) DO UPDATE SET
    state = CASE WHEN {_IS_POISON} THEN 'QUARANTINED' ELSE 'RUNNING' END,
    lost = r.lost + CASE WHEN {_IS_CRASH} THEN 1 ELSE 0 END,
    failures = CASE WHEN r.state = 'FAILED' THEN 0 ELSE r.failures END,
    epoch = CASE WHEN {_IS_POISON} OR (r.state = 'RUNNING' AND r.owner = excluded.owner)
        THEN r.epoch ELSE r.epoch + 1 END,
    owner = CASE WHEN {_IS_POISON} THEN r.owner ELSE excluded.owner END,
    lease_until = CASE WHEN {_IS_POISON} THEN NULL ELSE excluded.lease_until END,
    task_name = CASE WHEN {_IS_POISON} THEN r.task_name ELSE excluded.task_name END,
    task_id = CASE WHEN {_IS_POISON} THEN r.task_id ELSE excluded.task_id END,
    retries = CASE WHEN {_IS_POISON} THEN r.retries
        WHEN r.task_id = excluded.task_id THEN GREATEST(r.retries, excluded.retries)
        ELSE excluded.retries END,
    ended_at = CASE WHEN {_IS_POISON} THEN clock_timestamp() END,
    started_at = COALESCE(r.started_at, excluded.started_at),
    updated_at = excluded.updated_at,
    error = NULL, result = NULL, result_checksum = NULL, wake_at = NULL, expires_at = NULL
WHERE r.target = excluded.target AND r.job_digest = excluded.job_digest AND (
    r.state = 'QUEUED'
    -- An open stage belongs to its task; a second one would open it beside.
    OR (r.state = 'WAITING' AND (r.lease_until IS NULL OR r.task_id = excluded.task_id OR NOT {_IS_KEPT}))
    OR (r.state = 'FAILED' AND NOT CAST(:waits_for_other AS boolean)
        AND (excluded.task_id IS NULL OR r.task_id IS DISTINCT FROM excluded.task_id))
    OR (r.state = 'RUNNING'
        AND (r.lease_until <= clock_timestamp() OR r.owner = excluded.owner
            OR (CAST(:celery_retry AS boolean) AND {_TAKES_NEW}))))
RETURNING {_RUN}
""")

# Nothing of a run that is there changes but until when it is kept, and that only if it is to go at all and its
# delivery will need it.
_KEPT = ", ".join(f"'{state.value}'" for state in KEPT_FOR_DELIVERY)
ENQUEUE = text(f"""
INSERT INTO docket_runs AS r (
    graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, lost, failures,
    created_at, updated_at, expires_at)
VALUES (
    :graph, :execution_id, :task_name, :task_id, :retries, :target, :job, :job_digest, 'QUEUED', 0, 0, 0, 0,
    clock_timestamp(), clock_timestamp(),
    clock_timestamp() + CAST(:keep_s AS double precision) * {_SECOND})
ON CONFLICT (graph, execution_id) DO UPDATE SET
    expires_at = CASE WHEN r.state IN ({_KEPT}) AND r.expires_at IS NOT NULL
        THEN GREATEST(r.expires_at, excluded.expires_at) ELSE r.expires_at END
WHERE r.target = excluded.target AND r.job_digest = excluded.job_digest
RETURNING 1
""")

FIND_RUN = text(f"SELECT {_RUN} FROM docket_runs AS r WHERE graph = :graph AND execution_id = :execution_id")
FIND_JOB = text("SELECT job FROM docket_runs WHERE graph = :graph AND execution_id = :execution_id")

_COLUMNS = ", ".join(CHECKPOINT_COLUMNS)
FIND_CHECKPOINT = text(f"SELECT {_COLUMNS} FROM docket_cache WHERE cache_key = :cache_key")
FIND_LIVE = text(
    f"SELECT {_COLUMNS} FROM docket_cache WHERE cache_key = :cache_key "
    "AND (expires_at IS NULL OR expires_at > clock_timestamp())"
)
RESTORE = text(f"""
SELECT {_COLUMNS}, expires_at IS NOT NULL AS dated FROM docket_cache
WHERE cache_key = ANY(CAST(:keys AS bytea[]))
    OR (graph = :graph AND execution_id = :execution_id AND (item = '' OR :items))
""")
UNDATE = text(f"""
UPDATE docket_cache AS c SET expires_at = NULL
FROM docket_runs AS r
WHERE c.cache_key = ANY(ARRAY(
        SELECT cache_key FROM docket_cache
        WHERE graph = :graph AND execution_id = :execution_id AND expires_at IS NOT NULL LIMIT {DATED_AT_ONCE}))
    AND r.graph = :graph AND r.execution_id = :execution_id
    AND r.state = 'RUNNING' AND r.epoch = :epoch AND r.owner = :owner
""")

_STORED = """
    CAST(:cache_key AS bytea), CAST(:execution_id AS text), CAST(:graph AS text), CAST(:step_name AS text),
    CAST(:step_version AS text), CAST(:item AS text), CAST(:item_index AS bigint), CAST(:input_hash AS text),
    CAST(:output_type AS text), CAST(:output_data AS bytea), CAST(:ttl AS double precision),
    CAST(:checksum AS bytea), CAST(:output_shape AS text), CAST(:output_json AS jsonb), clock_timestamp()"""
_EXECUTION_NAMES = ", ".join(EXECUTION_COLUMNS)
_EXECUTION_TYPES = {
    "graph": "text",
    "execution_id": "text",
    "step_name": "text",
    "item": "text",
    "delivery": "bigint",
    "attempts": "integer",
    "cached": "boolean",
    "status": "text",
    "started_at": "timestamptz",
    "duration_ms": "double precision",
    "error_code": "text",
    "error_message": "text",
    "worker": "text",
    "task_id": "text",
}
_EXECUTION = ", ".join(f"CAST(:x_{name} AS {_EXECUTION_TYPES[name]})" for name in EXECUTION_COLUMNS)
_EXECUTION_ARRAYS = ", ".join(f"CAST(:x_{name} AS {_EXECUTION_TYPES[name]}[])" for name in EXECUTION_COLUMNS)
_ADD_EXECUTION = f"INSERT INTO docket_executions ({_EXECUTION_NAMES})"

_CHECKPOINT_TYPES = {
    "cache_key": "bytea",
    "item_index": "bigint",
    "output_data": "bytea",
    "ttl": "double precision",
    "checksum": "bytea",
    "output_json": "text",
}
_KEPT_COLUMNS = (*CHECKPOINT_COLUMNS, "output_json")
_CHECKPOINT_ARRAYS = ", ".join(
    f"CAST(:k_{name} AS {_CHECKPOINT_TYPES.get(name, 'text')}[])" for name in _KEPT_COLUMNS
)
ADD_MANY = f""",
s AS (
    INSERT INTO docket_cache AS c ({_COLUMNS}, output_json, created_at)
    SELECT {", ".join(f"u.{name}" for name in CHECKPOINT_COLUMNS)}, CAST(u.output_json AS jsonb), clock_timestamp()
    FROM unnest({_CHECKPOINT_ARRAYS}) AS u ({", ".join(_KEPT_COLUMNS)}), f"""
"""Stores `checkpoint_arrays` after a fence called f; what happens where a key is there already comes next."""


def checkpoint_arrays(checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Return the columns of *checkpoints* as arrays, for `ADD_MANY`."""
    rows = [checkpoint_values(clean_checkpoint(checkpoint)) for checkpoint in checkpoints]
    return {f"k_{name}": [row[name] for row in rows] for name in _KEPT_COLUMNS}


_HOLDS_RUN = """
    SELECT 1 FROM docket_runs
    WHERE graph = :graph AND execution_id = :execution_id AND epoch = :epoch AND owner = :owner
        AND state = 'RUNNING' FOR SHARE"""
IS_CHUNK = """
    c.graph = :graph AND c.execution_id = :execution_id AND c.stage = :stage AND c.lo = :lo
    AND c.epoch = :epoch AND c.owner = :owner AND c.state = 'RUNNING' AND EXISTS (
        SELECT 1 FROM docket_runs AS r WHERE r.graph = c.graph AND r.execution_id = c.execution_id
            AND r.stage = c.stage AND r.state IN ('RUNNING', 'WAITING'))"""
FENCES = {False: _HOLDS_RUN, True: f"SELECT 1 FROM docket_chunks AS c WHERE {IS_CHUNK} FOR SHARE"}
"""What finds the row of a lease that still holds: of a run, or of a chunk."""


def _save(fence: str, execution: str) -> TextClause:
    return text(f"""
WITH f AS ({fence}),
s AS (
    INSERT INTO docket_cache ({_COLUMNS}, output_json, created_at) SELECT {_STORED} FROM f
    ON CONFLICT (cache_key) DO NOTHING RETURNING 1){execution}
SELECT (SELECT count(*) FROM f) AS fenced, (SELECT count(*) FROM s) AS saved
""")


# From s, not from f: a repeated save finds its own row and must not count the step twice.
SAVE = {
    (chunk, execution): _save(
        fence, f", e AS ({_ADD_EXECUTION} SELECT {_EXECUTION} FROM s)" if execution else ""
    )
    for chunk, fence in FENCES.items()
    for execution in (False, True)
}
"""By whether a chunk saves, and whether a step's row comes with it."""

# A published claim is spent, not deleted: a statement that looked before the result was there must not find
# the claim gone and compute again. A dead claim is taken only if the statement's snapshot shows the same one.
LOOKUP = text(f"""
WITH live AS (
    SELECT {_COLUMNS} FROM docket_cache
    WHERE cache_key = :cache_key AND (expires_at IS NULL OR expires_at > clock_timestamp())),
claimed AS (
    INSERT INTO docket_claims AS c (cache_key, owner, lease_until)
    SELECT CAST(:cache_key AS bytea), CAST(:owner AS text), {_UNTIL}
    WHERE NOT EXISTS (SELECT 1 FROM live)
    ON CONFLICT (cache_key) DO UPDATE SET
        owner = excluded.owner, lease_until = excluded.lease_until
    WHERE (c.owner = excluded.owner AND c.lease_until > clock_timestamp())
        OR (c.lease_until <= clock_timestamp() AND EXISTS (
            SELECT 1 FROM docket_claims AS seen
            WHERE seen.cache_key = c.cache_key AND seen.owner = c.owner AND seen.lease_until = c.lease_until))
    RETURNING 1)
SELECT claims.won, live.* FROM (SELECT count(*) AS won FROM claimed) AS claims LEFT JOIN live ON true
""")


def _publish(execution: str) -> TextClause:
    return text(f"""
WITH s AS (
    INSERT INTO docket_cache AS c ({_COLUMNS}, output_json, created_at, expires_at)
    SELECT {_STORED}, clock_timestamp() + CAST(:ttl AS double precision) * {_SECOND}
    ON CONFLICT (cache_key) DO UPDATE SET
        {", ".join(f"{name} = excluded.{name}" for name in CHECKPOINT_COLUMNS if name != "cache_key")},
        output_json = excluded.output_json, created_at = excluded.created_at,
        expires_at = excluded.expires_at
    WHERE CAST(:replace AS boolean) OR c.expires_at <= clock_timestamp()
    RETURNING 1),
spent AS (
    UPDATE docket_claims SET lease_until = clock_timestamp()
    WHERE cache_key = :cache_key AND owner = :owner AND lease_until > clock_timestamp()),
swept AS (
    DELETE FROM docket_claims WHERE cache_key IN (
        SELECT cache_key FROM docket_claims WHERE lease_until < statement_timestamp() - interval '1 minute'
        LIMIT 2 FOR UPDATE SKIP LOCKED)){execution}
SELECT count(*) AS saved FROM s
""")


PUBLISH = _publish("")
# The step did run, so its row is written even if another's output counts; a repeated publish adds none.
PUBLISH_EXECUTION = _publish(f""",
e AS ({_ADD_EXECUTION} SELECT {_EXECUTION} WHERE NOT EXISTS (
    SELECT 1 FROM docket_executions
    WHERE execution_id = CAST(:x_execution_id AS text) AND graph = CAST(:x_graph AS text)
        AND step_name = CAST(:x_step_name AS text) AND item = CAST(:x_item AS text)
        AND delivery = CAST(:x_delivery AS bigint) AND started_at = CAST(:x_started_at AS timestamptz)))""")
FORGET = text("""
DELETE FROM docket_cache WHERE cache_key = :cache_key AND execution_id IS NULL
RETURNING expires_at IS NULL OR expires_at > clock_timestamp()
""")
RELEASE_CLAIM = text(
    "DELETE FROM docket_claims "
    "WHERE cache_key = :cache_key AND owner = :owner AND lease_until > clock_timestamp()"
)


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


# Rows that another transaction has locked are left out and read as they were: waiting for one of them would cost all
# other runs of the process their leases.
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
EXTEND = {
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
EXTEND_RUN = text(f"""
{_WAIT}
UPDATE docket_runs SET lease_until = {_UNTIL} FROM wait
WHERE graph = :graph AND execution_id = :execution_id AND epoch = :epoch AND owner = :owner AND state = 'RUNNING'
    AND wait.ms IS NOT NULL
""")
EXTEND_CHUNK = text(f"""
{_WAIT}
UPDATE docket_chunks AS c SET lease_until = {_UNTIL} FROM wait
WHERE c.graph = :graph AND c.execution_id = :execution_id AND c.stage = :stage AND c.lo = :lo
    AND c.epoch = :epoch AND c.owner = :owner AND c.state = 'RUNNING' AND wait.ms IS NOT NULL
""")
"""Wait for a locked row, for a limited time that holds in this statement alone."""


def _end(more: str, dated: str) -> TextClause:
    return text(f"""
WITH f AS (
    UPDATE docket_runs SET
        state = :state, lease_until = NULL, failures = failures + CAST(:failed AS integer),
        result = CAST(:result AS bytea), result_checksum = CAST(:result_checksum AS bytea),
        error = CAST(:error AS jsonb),
        wake_at = clock_timestamp() + COALESCE(CAST(:wake_in_s AS double precision),
            CASE WHEN CAST(:state AS text) = 'WAITING' AND message IS NOT NULL
                THEN CAST(:lease_s AS double precision) END) * {_SECOND},
        retries = retries + CASE WHEN CAST(:wake_in_s AS double precision) IS NULL THEN 0 ELSE 1 END,
        items_failed = CASE WHEN CAST(:ended AS boolean) THEN CAST(:items_failed AS bigint) ELSE items_failed END,
        items_allowed = CASE WHEN NOT CAST(:ended AS boolean) THEN items_allowed END,
        ended_at = CASE WHEN CAST(:ended AS boolean) THEN clock_timestamp() END,
        expires_at = CASE WHEN CAST(:ended AS boolean)
            THEN clock_timestamp() + CAST(:retention_s AS double precision) * {_SECOND} END,
        updated_at = clock_timestamp()
    WHERE graph = :graph AND execution_id = :execution_id AND epoch = :epoch AND owner = :owner
        AND state = 'RUNNING'
    RETURNING ended_at){more}
SELECT count(*) AS fenced{dated} FROM f
""")


DATE = f"""
t AS (
    UPDATE docket_cache SET expires_at = f.ended_at + ttl * {_SECOND} FROM f
    WHERE cache_key = ANY(ARRAY(
        SELECT cache_key FROM docket_cache
        WHERE graph = :graph AND execution_id = :execution_id AND ttl IS NOT NULL LIMIT {DATED_AT_ONCE}))
    RETURNING 1)"""
"""Dates checkpoints of a run that a statement called f has ended."""
DATED = ", (SELECT count(*) FROM t) AS dated"
DATE_REST = text(f"""
WITH f AS (
    SELECT ended_at FROM docket_runs
    WHERE graph = :graph AND execution_id = :execution_id AND ended_at IS NOT NULL FOR SHARE)
UPDATE docket_cache SET expires_at = f.ended_at + ttl * {_SECOND} FROM f
WHERE cache_key = ANY(ARRAY(
    SELECT c.cache_key FROM f, docket_cache AS c
    WHERE c.graph = :graph AND c.execution_id = :execution_id AND c.ttl IS NOT NULL
        AND c.expires_at IS DISTINCT FROM f.ended_at + c.ttl * {_SECOND} LIMIT {DATED_AT_ONCE}))
""")
_RESET_CHUNKS = """,
c AS (
    UPDATE docket_chunks SET state = 'QUEUED', failed = 0, lost = 0, errors = NULL, lease_until = NULL FROM f
    WHERE CAST(:state AS text) = 'FAILED' AND graph = :graph AND execution_id = :execution_id
        AND (state <> 'SUCCEEDED' OR failed > 0))"""
ADD_EXECUTIONS = f""",
e AS ({_ADD_EXECUTION} SELECT u.* FROM unnest({_EXECUTION_ARRAYS}) AS u, f)"""
"""Writes rows after a fence called f."""
END = {
    (ended, executions): _end(
        (f",{DATE}{_RESET_CHUNKS}" if ended else "") + (ADD_EXECUTIONS if executions else ""),
        DATED if ended else ", 0 AS dated",
    )
    for ended in (False, True)
    for executions in (False, True)
}
