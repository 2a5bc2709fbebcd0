from __future__ import annotations

import sqlite3
import threading
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.pool import StaticPool

from docket_celery.errors import (
    CorruptCheckpoint,
    InvalidArguments,
    InvalidSettings,
    SchemaMismatch,
    StoreUnavailable,
)
from docket_celery.store import SQLStore
from docket_celery.store.records import Chunk, ChunkEnd, ChunkRequest, Lease, RunState
from docket_celery.store.sql import schema
from tests.conformance.blocking import InterruptedCall, interrupted
from tests.conformance.samples import GRAPH, RUN, SQLBench, ending, output, request, shared


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the SQLite database of a test is."""
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Generator[SQLStore]:
    """A store in that file that waits for a lock for 50 ms."""
    store = SQLStore(f"sqlite:///{path}?timeout=0.05")
    store.migrate()
    yield store
    store.close()


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgres://u:secret@h/db", "postgresql+psycopg://h/db"),
        ("postgresql://u:secret@h:1/db?password=secret", "postgresql+psycopg://h:1/db"),
        ("postgresql+psycopg://u@server:secret@h/db", "postgresql+psycopg://h/db"),
        ("sqlite:///a.db", "sqlite+pysqlite:///a.db"),
    ],
)
def test_a_url_gets_its_driver(given: str, used: str) -> None:
    """The usual short forms mean psycopg 3; nothing connects yet, and neither user nor password is shown."""
    assert repr(SQLStore(given)) == f"SQLStore('{used}')"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "not a url",
        "mysql://h/db",
        "postgresql+psycopg2://u:secret@h/db",
        "postgresql+asyncpg://h/db",
        "postgresql://u:p@secret@h/db",
        "postgresql://u:p@secret/x@h/db",
        "postgresql://u:p@h?secret@h/db",
        "postgresql://u:p@h:secret/db",
        "postgresql://u:secret@h:port/db",
        "postgresql://u:secret@[::1/db",
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    """The setting is named, and a password in the URL is not repeated."""
    with pytest.raises(InvalidSettings, match="docket_database_url") as refused:
        SQLStore(url)
    assert "secret" not in "".join(traceback.format_exception(refused.value))


def test_only_memory_is_not_persistent(path: Path) -> None:
    """Another process sees a file and a server, but not this one's memory."""
    assert SQLStore(f"sqlite:///{path}").persistent
    assert SQLStore("postgresql://h/db").persistent
    for url in ("sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"):
        assert not SQLStore(url).persistent


def test_an_engine_over_memory_needs_one_connection() -> None:
    """SQLAlchemy's default gives each thread a database of its own."""
    with pytest.raises(InvalidArguments, match="StaticPool"):
        SQLStore(create_engine("sqlite://"))
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    store = SQLStore(engine)
    store.migrate()
    assert isinstance(store.acquire(request()), Lease)
    store.close()
    assert store.find_run(GRAPH, RUN) is not None
    engine.dispose()


def test_a_locked_file_is_unavailable(store: SQLStore, path: Path) -> None:
    """Another process writes for longer than we wait; afterwards the same call works."""
    rival = sqlite3.connect(path, isolation_level=None)
    rival.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="did not acquire the run: database is locked"):
        store.acquire(request())
    assert store.find_run(GRAPH, RUN) is None
    rival.execute("ROLLBACK")
    rival.close()
    assert isinstance(store.acquire(request()), Lease)


def test_a_failing_call_leaves_no_transaction(store: SQLStore, path: Path) -> None:
    """An error in the middle rolls back, and others may write at once."""
    lease = store.acquire(request())
    assert isinstance(lease, Lease)
    with pytest.raises(Exception, match="CHECK"):
        store.save(lease, output(key=b"short"), None)
    rival = sqlite3.connect(path, isolation_level=None, timeout=0)
    rival.execute("BEGIN IMMEDIATE")
    rival.execute("ROLLBACK")
    rival.close()
    store.end(lease, ending())


@pytest.mark.parametrize("statement", ["BEGIN", "DELETE FROM docket_cache", "COMMIT"])
def test_a_call_that_is_interrupted_leaves_no_transaction(sql_bench: SQLBench, statement: str) -> None:
    """A time limit may raise anywhere in it; what is written afterwards is committed, as other processes see."""
    sql_bench.store.end(sql_bench.take(execution_id="due"), ending(retention_s=60.0))
    sql_bench.pass_time(120)
    lease, engine = sql_bench.take(), sql_bench.engine
    with interrupted(engine, statement), pytest.raises(InterruptedCall):
        sql_bench.store.purge(10)
    sql_bench.store.end(lease, ending())
    other = SQLStore(engine.url)
    row = other.find_run(GRAPH, RUN)
    assert row is not None
    assert row.state is RunState.SUCCEEDED
    other.close()


def test_forgetting_an_expired_entry_deletes_no_other(store: SQLStore, path: Path) -> None:
    """Nobody can replace it between the two statements."""
    rival, refused = sqlite3.connect(path, isolation_level=None, timeout=0), list[str]()

    def write(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE"):
            with pytest.raises(sqlite3.OperationalError) as locked:
                rival.execute("BEGIN IMMEDIATE")
            refused.append(str(locked.value))

    event.listen(store.engine, "after_cursor_execute", write)
    assert not store.forget(shared().key)
    rival.close()
    assert refused == ["database is locked"] * 2


def test_a_run_is_taken_while_its_chunks_end(sql_bench: SQLBench) -> None:
    """Each extends the lease of the open stage between the look at the run and its change."""
    store, engine = sql_bench.store, sql_bench.engine
    assert isinstance(store, SQLStore)
    lease = sql_bench.take(task_id="t", task_name="shop.rate_all")
    store.open_stage(lease, 1, [Chunk(1, lo, lo + 1) for lo in range(9)], 0, message=b"{}")
    asked: dict[str, Any] = {
        "graph": GRAPH,
        "execution_id": RUN,
        "stage": 1,
        "owner": "a",
        "lease_s": 30.0,
        "max_deliveries": 9,
    }
    chunks = [store.lease_chunk(ChunkRequest(lo=lo, **asked)) for lo in range(9)]
    ended = list[Lease]()

    def end_chunk(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE docket_runs") and "started_at" in statement:
            chunk = chunks.pop()
            assert isinstance(chunk, Lease)
            ended.append(chunk)
            store.end_chunk(chunk, ChunkEnd(state=RunState.SUCCEEDED))

    event.listen(engine, "before_cursor_execute", end_chunk)
    again = sql_bench.take(owner="second", task_id="t")
    assert (again.epoch, len(ended)) == (2, 1)
    store.end(again, ending())


def test_a_cancelled_run_and_its_dates_are_written_together(sql_bench: SQLBench) -> None:
    """A process that dies in between leaves neither."""
    lease, error = sql_bench.take(), {"code": "DC204", "args": [RUN, ""]}
    sql_bench.store.save(lease, output(ttl_s=60.0), None)
    with interrupted(sql_bench.engine, "UPDATE docket_cache"), pytest.raises(InterruptedCall):
        sql_bench.store.cancel(GRAPH, RUN, error, 60.0)
    assert sql_bench.state() is RunState.RUNNING
    sql_bench.store.cancel(GRAPH, RUN, error, 60.0)
    assert sql_bench.sql("SELECT 1 FROM docket_cache WHERE expires_at IS NULL") == []


def test_a_file_that_cannot_be_opened_is_unavailable(tmp_path: Path) -> None:
    """The driver's words say why."""
    with pytest.raises(StoreUnavailable, match="unable to open database file"):
        SQLStore(f"sqlite:///{tmp_path / 'nowhere' / 'store.db'}").find_run(GRAPH, RUN)


def test_missing_tables_are_named_as_such(path: Path) -> None:
    """Each way to use them says to migrate."""
    store = SQLStore(f"sqlite:///{path}")
    for call in (store.check_schema, lambda: store.find_run(GRAPH, RUN), lambda: store.acquire(request())):
        with pytest.raises(SchemaMismatch, match="docket migrate"):
            call()
    store.close()


def test_a_newer_schema_is_refused(store: SQLStore) -> None:
    """By the check and by migrate."""
    with store.engine.connect() as connection:
        connection.exec_driver_sql("INSERT INTO docket_schema VALUES (99, '2026-01-31 12:00:00.000000')")
    for call in (store.check_schema, store.migrate):
        with pytest.raises(SchemaMismatch, match="upgrade docket-celery"):
            call()


def test_many_may_migrate_one_file_at_once(path: Path) -> None:
    """One makes the tables, the others find them."""
    start, versions = threading.Barrier(4), list[int]()

    def migrate() -> None:
        store = SQLStore(f"sqlite:///{path}")
        start.wait()
        versions.append(store.migrate())
        store.close()

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert versions == [schema.VERSION] * 4


def test_a_text_that_is_not_utf8_is_damage(store: SQLStore) -> None:
    """Trying again would never help, so it is not called unavailable."""
    lease = store.acquire(request())
    assert isinstance(lease, Lease)
    store.save(lease, output(), None)
    with store.engine.connect() as connection:
        connection.exec_driver_sql("UPDATE docket_cache SET output_type = CAST(x'ff41' AS TEXT)")
    with pytest.raises(CorruptCheckpoint, match="UTF-8"):
        store.restore(lease, [])


def test_readers_do_not_wait_for_a_writer(store: SQLStore, path: Path) -> None:
    """The file is in WAL mode, whoever opens it."""
    rival = sqlite3.connect(path, isolation_level=None)
    assert rival.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    rival.execute("BEGIN IMMEDIATE")
    assert store.find_run(GRAPH, RUN) is None
    rival.close()


def test_times_compare_with_the_databases_own(store: SQLStore) -> None:
    """People's queries may use SQLite's date functions on them."""
    store.acquire(request())
    with store.engine.connect() as connection:
        query = (
            "SELECT lease_until > datetime('now'), lease_until < datetime('now', '+31 seconds'), "
            "length(lease_until), datetime(created_at) IS NOT NULL FROM docket_runs"
        )
        assert connection.exec_driver_sql(query).one() == (1, 1, 26, 1)
        row = connection.execute(schema.docket_runs.select()).one()
    assert row.lease_until > row.created_at


def test_a_run_is_not_taken_whose_checkpoints_cannot_be_read(sql_bench: SQLBench) -> None:
    """Both are one transaction; else nobody would hold the lease, and nobody else would get it before it is over."""
    sql_bench.store.end(sql_bench.take(), ending(RunState.FAILED))

    def refuse(*arguments: Any) -> None:
        if "FROM docket_cache" in arguments[2]:
            raise OSError("gone")

    event.listen(sql_bench.engine, "before_cursor_execute", refuse)
    with pytest.raises(OSError, match="gone"):
        sql_bench.store.acquire_and_restore(request("second", task_id="t2"), list[bytes])
    event.remove(sql_bench.engine, "before_cursor_execute", refuse)
    assert sql_bench.state() is RunState.FAILED
