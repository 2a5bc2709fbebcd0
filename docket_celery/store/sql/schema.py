"""The tables, as public SQLAlchemy metadata (for people's own Alembic), and how they are made and upgraded.

All times are the database's own: `timestamptz` on Postgres, UTC text with six decimals on SQLite.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    DateTime,
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    func,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, OperationalError

from docket_celery.errors import SchemaMismatch, StoreRefused
from docket_celery.store.records import RunState
from docket_celery.store.rows import SCHEMA_VERSION
from docket_celery.store.sql.clock import now, writing

VERSION = SCHEMA_VERSION
"""The version of the tables that this release reads and writes."""

metadata = MetaData(
    naming_convention={"ck": "ck_%(table_name)s_%(constraint_name)s", "pk": "pk_%(table_name)s"}
)
"""Every table of this library, for ``target_metadata`` of an Alembic environment."""

_BIG = BigInteger().with_variant(Integer(), "sqlite")
_JSON = JSON().with_variant(JSONB(), "postgresql")
_TIME = DateTime(timezone=True)
_STATES = ", ".join(f"'{state.value}'" for state in RunState)


def _is_32_bytes(column: str) -> CheckConstraint:
    return CheckConstraint(f"length({column}) = 32", name=column)


def _index_where(name: str, condition: str, *columns: Column[Any]) -> None:
    """Make an index over the rows that meet *condition*; statements use it if their own text implies it."""
    Index(name, *columns, postgresql_where=text(condition), sqlite_where=text(condition))


docket_cache = Table(
    "docket_cache",
    metadata,
    Column("cache_key", LargeBinary, primary_key=True),
    Column("execution_id", Text, comment="NULL: shared by all runs (GLOBAL)"),
    Column("graph", Text, nullable=False),
    Column("step_name", Text, nullable=False),
    Column("step_version", Text, nullable=False),
    Column("item", Text, nullable=False, comment="path of the item in a batch: '', '7', '7/3'"),
    Column("item_index", BigInteger),
    Column("input_hash", Text, nullable=False, comment="SHA-256 in hex over the step's inputs"),
    Column("output_type", Text, nullable=False, comment="full Protocol Buffers name"),
    Column("output_data", LargeBinary, nullable=False),
    Column("output_json", _JSON, comment="best-effort view of output_data"),
    Column("checksum", LargeBinary, nullable=False),
    Column("ttl", Double, comment="in seconds; WORKFLOW: counted from the end of the run"),
    Column("created_at", _TIME, nullable=False),
    Column("expires_at", _TIME),
    # Written by release 0.1.0.
    Column("claimed_at", _TIME, comment="GLOBAL: when the step that made it began"),
    Column("output_shape", Text, comment="fields of output_type when output_data was written"),
    _is_32_bytes("cache_key"),
    _is_32_bytes("checksum"),
)
# execution_id leads: people look for it alone, the store with graph beside it, a chunk with its items too.
_index_where(
    "ix_docket_cache_run",
    "execution_id IS NOT NULL",
    docket_cache.c.execution_id,
    docket_cache.c.graph,
    docket_cache.c.step_name,
    docket_cache.c.item_index,
)
_index_where("ix_docket_cache_expired", "expires_at IS NOT NULL", docket_cache.c.expires_at)

docket_executions = Table(
    "docket_executions",
    metadata,
    Column("id", _BIG, Identity(always=True), primary_key=True),
    Column("graph", Text, nullable=False),
    Column("execution_id", Text, nullable=False),
    Column("step_name", Text, nullable=False),
    Column("item", Text, nullable=False),
    Column("delivery", _BIG, nullable=False, comment="counted from 1"),
    Column("attempts", Integer, nullable=False, comment="calls made; 0: restored"),
    Column("cached", Boolean, nullable=False),
    Column("status", Text, nullable=False),
    Column("started_at", _TIME, nullable=False),
    Column("duration_ms", Double, nullable=False),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("worker", Text, nullable=False),
    Column("task_id", Text),
)
Index("ix_docket_executions_run", docket_executions.c.execution_id, docket_executions.c.graph)
Index("ix_docket_executions_step", docket_executions.c.step_name, docket_executions.c.started_at)

docket_runs = Table(
    "docket_runs",
    metadata,
    Column("graph", Text, nullable=False),
    Column("execution_id", Text, nullable=False),
    Column("task_name", Text),
    Column("task_id", Text),
    Column("retries", Integer, nullable=False),
    Column("target", Text, nullable=False, comment="full Protocol Buffers name of the result"),
    Column("job", LargeBinary, nullable=False),
    Column("job_digest", LargeBinary, nullable=False),
    Column("state", Text, nullable=False),
    Column("stage", Integer, nullable=False),
    Column("epoch", _BIG, nullable=False, comment="fencing token; grows with each delivery"),
    Column("owner", Text, comment="of the lease, or of the last one"),
    Column("lease_until", _TIME, comment="until then no other delivery takes the run, if not NULL"),
    Column("lost", Integer, nullable=False, comment="takeovers of leases that were never released"),
    Column("failures", Integer, nullable=False, comment="ordinary Celery retries"),
    Column("wake_at", _TIME, comment="when a WAITING run's next delivery is due"),
    Column("progress", _JSON),
    Column("error", _JSON),
    Column("result", LargeBinary),
    Column("result_checksum", LargeBinary),
    Column("created_at", _TIME, nullable=False),
    Column("started_at", _TIME),
    Column("ended_at", _TIME),
    Column("updated_at", _TIME, nullable=False),
    Column("expires_at", _TIME, comment="when purging may delete the run"),
    Column("items_failed", _BIG, comment="of the open stage"),
    Column("items_allowed", _BIG, comment="how many may fail; -1: nothing of it starts any more"),
    Column("message", LargeBinary, comment="what is sent to continue the run if it is lost"),
    Column("lanes", _JSON, comment="of the open stage: most items at once, number of lanes"),
    # execution_id leads: people look for it alone.
    PrimaryKeyConstraint("execution_id", "graph"),
    CheckConstraint(f"state IN ({_STATES})", name="state"),
    CheckConstraint("length(execution_id) BETWEEN 1 AND 255", name="execution_id"),
    _is_32_bytes("job_digest"),
    _is_32_bytes("result_checksum"),
)
# None has lease_until: the update of a heartbeat changes no index. None has a live state: while the planner knows
# nothing of the table, it would find the row of a lease through all runs of that state.
_index_where(
    "ix_docket_runs_due",
    "message IS NOT NULL AND (wake_at IS NOT NULL OR state = 'RUNNING')",
    docket_runs.c.wake_at,
)
_index_where("ix_docket_runs_expired", "expires_at IS NOT NULL", docket_runs.c.expires_at)
# For people, who look at what is under way and at what failed.
_index_where("ix_docket_runs_live", "ended_at IS NULL", docket_runs.c.created_at)
_index_where("ix_docket_runs_failed", "state IN ('FAILED', 'QUARANTINED')", docket_runs.c.ended_at)

docket_claims = Table(
    "docket_claims",
    metadata,
    Column("cache_key", LargeBinary, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("lease_until", _TIME, nullable=False),
    Column("claimed_at", _TIME),  # written by release 0.1.0
    _is_32_bytes("cache_key"),
)
Index("ix_docket_claims_lease", docket_claims.c.lease_until)

docket_chunks = Table(
    "docket_chunks",
    metadata,
    Column("graph", Text, nullable=False),
    Column("execution_id", Text, nullable=False),
    Column("stage", Integer, nullable=False),
    Column("lo", _BIG, nullable=False, comment="first index"),
    Column("hi", _BIG, nullable=False, comment="last index + 1"),
    Column("state", Text, nullable=False),
    Column("owner", Text),
    Column("epoch", _BIG, nullable=False),
    Column("lease_until", _TIME),
    Column("task_id", Text),
    Column("retries", Integer, nullable=False),
    Column("lost", Integer, nullable=False, comment="takeovers of leases that were never released"),
    Column("failed", _BIG, nullable=False, comment="items that failed"),
    Column("errors", _JSON, comment="of failed items by index, and what stopped it as fatal"),
    PrimaryKeyConstraint("graph", "execution_id", "stage", "lo"),
    CheckConstraint(f"state IN ({_STATES})", name="state"),
    CheckConstraint("lo >= 0 AND hi >= lo", name="bounds"),
)

docket_schema = Table(
    "docket_schema",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("applied_at", _TIME, nullable=False),
)

Migration = Callable[[Connection], None]


def _to_5(connection: Connection) -> None:
    """Tell an incompatible change of a message type from a compatible one."""
    connection.exec_driver_sql("ALTER TABLE docket_cache ADD COLUMN output_shape TEXT")
    if connection.dialect.name == "postgresql":
        comment = "fields of output_type when output_data was written"
        connection.exec_driver_sql(f"COMMENT ON COLUMN docket_cache.output_shape IS '{comment}'")


_COMMENTS_6 = {
    "docket_runs.lanes": "of the open stage: most items at once, number of lanes",
    "docket_runs.message": "what is sent to continue the run if it is lost",
    "docket_runs.lease_until": "until then no other delivery takes the run, if not NULL",
}


def _to_6(connection: Connection) -> None:
    """Keep the lanes of a stage in a column of their own; they were a part of its progress."""
    run = connection.exec_driver_sql
    if connection.dialect.name != "postgresql":
        run("ALTER TABLE docket_runs ADD COLUMN lanes JSON")
        run(
            "UPDATE docket_runs SET lanes = json_extract(progress, '$.lanes'), "
            "progress = json_remove(progress, '$.lanes') WHERE json_extract(progress, '$.lanes') IS NOT NULL"
        )
        return
    run("ALTER TABLE docket_runs ADD COLUMN lanes jsonb")
    run(
        "UPDATE docket_runs SET lanes = progress -> 'lanes', progress = progress - 'lanes' "
        "WHERE progress -> 'lanes' IS NOT NULL"
    )
    for column, comment in _COMMENTS_6.items():
        run(f"COMMENT ON COLUMN {column} IS '{comment}'")


_GONE_7 = (
    "ix_docket_cache_step",
    "ix_docket_chunks_lease",
    "ix_docket_runs_id",
    "ix_docket_runs_lease",
    "ix_docket_runs_wake",
)
_NEW_7 = {
    "ix_docket_runs_due": "(wake_at) WHERE message IS NOT NULL AND (wake_at IS NOT NULL OR state = 'RUNNING')",
    "ix_docket_runs_live": "(created_at) WHERE ended_at IS NULL",
    "ix_docket_runs_failed": "(ended_at) WHERE state IN ('FAILED', 'QUARANTINED')",
}


def _to_7(connection: Connection) -> None:
    """Look for lost runs through an index of what is due, and drop the indexes that no call needs.

    On Postgres the new indexes may be there already: docs/persistence.md tells how to make them CONCURRENTLY.
    """
    run = connection.exec_driver_sql
    if connection.dialect.name == "postgresql":
        # All locks at once, or statements that hold one and wait for another could be in a deadlock with this.
        run("LOCK TABLE docket_runs, docket_cache, docket_chunks IN ACCESS EXCLUSIVE MODE")
    for name in _GONE_7:
        run(f"DROP INDEX IF EXISTS {name}")
    if connection.dialect.name == "postgresql":
        run("CREATE UNIQUE INDEX IF NOT EXISTS pk_docket_runs_7 ON docket_runs (execution_id, graph)")
        run("ALTER TABLE docket_runs DROP CONSTRAINT pk_docket_runs")
        run("ALTER TABLE docket_runs ADD CONSTRAINT pk_docket_runs PRIMARY KEY USING INDEX pk_docket_runs_7")
    else:
        # SQLite cannot change a key: the rows move into a table that has the new one.
        found = run("SELECT sql FROM sqlite_master WHERE name = 'docket_runs'").scalar_one()
        made = found.replace("docket_runs (", "docket_runs_7 (", 1)
        run(made.replace("PRIMARY KEY (graph, execution_id)", "PRIMARY KEY (execution_id, graph)"))
        run("INSERT INTO docket_runs_7 SELECT * FROM docket_runs")
        run("DROP TABLE docket_runs")
        run("ALTER TABLE docket_runs_7 RENAME TO docket_runs")
        run("CREATE INDEX ix_docket_runs_expired ON docket_runs (expires_at) WHERE expires_at IS NOT NULL")
    for name, rows in _NEW_7.items():
        run(f"CREATE INDEX IF NOT EXISTS {name} ON docket_runs {rows}")


# A migration is written in plain SQL and never changed: it starts from the tables as they were then.
MIGRATIONS: Mapping[int, Migration] = {5: _to_5, 6: _to_6, 7: _to_7}
"""How to reach a version from the one before; an empty database gets the newest tables at once."""
OLDEST = min(MIGRATIONS) - 1
"""The version of the first release."""

_WAL_WITHIN_S, _WAL_AGAIN_S = 5.0, 0.02
_LOCK_ID = 0x646F636B6574  # "docket": one advisory lock for all who migrate


def find_version(connection: Connection) -> int | None:
    """Return the version of the tables, or None if there are none or they were never stamped."""
    if not inspect(connection).has_table(docket_schema.name):
        return None
    version: int | None = connection.execute(select(func.max(docket_schema.c.version))).scalar_one()
    return version


_MISSING = ("no such table", "no such column", "has no column named")  # SQLite's words


def misses_something(error: DBAPIError) -> bool:
    """Tell whether a statement failed for a table or a column that is missing."""
    cause = error.orig
    lacks = getattr(cause, "sqlstate", None) in {"42P01", "42703"}
    return lacks or any(words in str(cause) for words in _MISSING)


def check(connection: Connection) -> None:
    """Check that the tables can be used as this release uses them.

    Raises `SchemaMismatch` if they are missing or of another version, `StoreRefused` if the encoding is not UTF8, a
    table is missing or a right.
    """
    found = find_version(connection)
    if found != VERSION:
        raise SchemaMismatch(found, VERSION)
    if connection.dialect.name != "postgresql":
        return
    check_encoding(connection)
    for table in metadata.tables:
        rights = "SELECT" if table == docket_schema.name else "SELECT, INSERT, UPDATE"
        missing = connection.execute(_FIND_MISSING, {"table": table, "rights": rights.split(", ")}).scalars()
        if rights := ", ".join(missing):
            advice = f"grant {rights} on {table} to the role, or restore the table"
            raise StoreRefused("the database", f"{rights} on table {table} is missing; {advice}")


_FIND_MISSING = text("""
SELECT u.right FROM unnest(CAST(:rights AS text[])) AS u ("right")
WHERE to_regclass(CAST(:table AS text)) IS NULL
    OR NOT has_table_privilege(to_regclass(CAST(:table AS text)), u.right)
""")


def check_encoding(connection: Connection) -> None:
    """Check that a Postgres database can hold every text; raise `StoreRefused` if its encoding is not UTF8."""
    encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
    if encoding != "UTF8":
        advice = "create a database with ENCODING 'UTF8' TEMPLATE template0"
        raise StoreRefused("the database", f"its encoding is {encoding}; {advice}")


def migrate(connection: Connection) -> int:
    """See `Store.migrate`; all in one transaction."""
    if connection.dialect.name == "sqlite":
        _use_wal(connection)
    with writing(connection):
        return upgrade(connection)


def _use_wal(connection: Connection) -> None:
    """Switch the file to WAL, so that readers work beside a writer.

    SQLite does not wait for its lock here, so the busy timeout is ours to keep.
    """
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


def upgrade(
    connection: Connection, migrations: Mapping[int, Migration] = MIGRATIONS, version: int = VERSION
) -> int:
    """Bring the tables to *version* inside the transaction that *connection* is in, and return it.

    Raises `SchemaMismatch` if they are of a newer version, `StoreRefused` if they are older than the first release.
    """
    if connection.dialect.name == "postgresql":
        check_encoding(connection)
        # A waiter must outlast the one that migrates before it; pooled connections have a far shorter limit.
        connection.execute(text("SET LOCAL statement_timeout = '10min'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": _LOCK_ID})
        # Statements after a waiting ALTER TABLE wait behind it: rather give way and be repeated.
        connection.execute(text("SET LOCAL lock_timeout = '3s'"))
    found = find_version(connection)
    if found is None:
        metadata.create_all(connection)
        _stamp(connection, version)
        return version
    if found > version:
        raise SchemaMismatch(found, version)
    if found < OLDEST:
        problem = f"its tables have version {found}, from before the first release; use an empty database"
        raise StoreRefused("the database", problem)
    for step in range(found + 1, version + 1):
        migrations[step](connection)
        _stamp(connection, step)
    return version


def _stamp(connection: Connection, version: int) -> None:
    connection.execute(insert(docket_schema).values(version=version, applied_at=now()))
