"""Databases of every earlier version become what a new one is, with all that they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, inspect

from docket_celery.errors import SchemaMismatch, StoreRefused, StoreUnavailable
from docket_celery.store import SQLStore
from docket_celery.store.records import Checkpoint, Progress, RunState
from docket_celery.store.sql import schema
from tests.conformance.samples import GRAPH, SQLBench, ending, output, shared
from tests.conformance.schema import freeze
from tests.infra import servers

pytestmark = pytest.mark.leaves_lease

VERSIONS = range(schema.OLDEST, schema.VERSION + 1)


class Databases:
    """Empty databases of one kind, and how a script is run in one."""

    def __init__(self, dialect: str, make_url: Callable[[], str]) -> None:
        self.dialect, self._make_url = dialect, make_url
        self._stores: list[SQLStore] = []

    def open(self) -> SQLStore:
        """Return a store over a new database without any table."""
        self._stores.append(SQLStore(self._make_url()))
        return self._stores[-1]

    def open_frozen(self, version: int) -> SQLStore:
        """Return a store over a new database as a release with *version* left it."""
        store = self.open()
        script = freeze.snapshot(self.dialect, version).read_text(encoding="utf-8")
        with store.engine.connect() as connection:
            driver: Any = connection.connection.dbapi_connection
            (driver.executescript if self.dialect == "sqlite" else driver.execute)(script)
        return store

    def close(self) -> None:
        """Close all stores."""
        for store in self._stores:
            store.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Databases]:
    """Databases of either kind, dropped after the test."""
    with ExitStack() as stack:

        def make_url() -> str:
            if request.param == "sqlite":
                return f"sqlite:///{tmp_path / f'{len(list(tmp_path.iterdir()))}.db'}"
            server: servers.ServerUrls = request.getfixturevalue("server_urls")
            return stack.enter_context(servers.temporary_database(server.database_url, migrated=False))

        made = Databases(request.param, make_url)
        stack.callback(made.close)
        yield made


def shape(store: SQLStore) -> dict[str, Any]:
    """Return what the database itself says of the tables: columns, keys, checks and indexes."""
    with store.engine.connect() as connection:
        inspector = inspect(connection)
        return {name: _table_shape(connection, name) for name in sorted(inspector.get_table_names())}


def _table_shape(connection: Connection, name: str) -> dict[str, Any]:
    inspector = inspect(connection)
    found: dict[str, Any] = {
        "columns": [{**column, "type": str(column["type"])} for column in inspector.get_columns(name)],
        "key": inspector.get_pk_constraint(name),
        "unique": inspector.get_unique_constraints(name),
        "checks": sorted(inspector.get_check_constraints(name), key=lambda check: str(check["name"])),
    }
    if connection.dialect.name == "postgresql":
        rows = connection.exec_driver_sql("SELECT indexdef FROM pg_indexes WHERE tablename = %s", (name,))
    else:
        statement = "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name = ?"
        rows = connection.exec_driver_sql(statement, (name,))
    return found | {"indexes": sorted(row[0] for row in rows)}


@pytest.mark.parametrize("version", VERSIONS)
def test_an_upgraded_database_is_like_a_new_one(databases: Databases, version: int) -> None:
    """Migrations end where `metadata` begins; and what is frozen of this version is what it makes."""
    new, old = databases.open(), databases.open_frozen(version)
    new.migrate()
    for _ in range(2):
        assert old.migrate() == schema.VERSION
        old.check_schema()
    assert shape(old) == shape(new)
    with old.engine.connect() as connection:
        stamped = connection.execute(schema.docket_schema.select().order_by("version"))
        assert [row.version for row in stamped] == list(range(version, schema.VERSION + 1))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_an_earlier_release_stored_is_still_there(databases: Databases, version: int) -> None:
    """Results, errors, checkpoints of both scopes and counts are read, and the runs go on."""
    store = databases.open_frozen(version)
    store.migrate()
    bench = SQLBench(store)
    done = store.find_run(GRAPH, "done")
    assert done is not None
    assert (done.state, done.result) == (RunState.SUCCEEDED, ending().result)
    failed = store.find_run(GRAPH, "failed")
    assert failed is not None
    assert failed.error == {"code": "DC200", "args": ["sold out", None]}
    lease = bench.take(execution_id="failed", owner="later")
    assert lease.epoch == 2
    assert [found.output_data for found in store.restore(lease, [])] == [output().output_data]
    store.end(lease, ending())
    assert bench.take(execution_id="parked", owner="later").epoch == 2
    found = store.lookup(shared().key, "later", 30.0)
    assert isinstance(found, Checkpoint)
    assert found.output_data == shared().output_data
    assert store.lookup(b"\1" * 32, "later", 30.0) is True
    assert bench.executions() == [("charge", 1), ("ship", 1)]


def test_lanes_move_out_of_the_progress(databases: Databases) -> None:
    """Version 6 has a column for them; what else the progress says stays."""
    store = databases.open_frozen(5)
    bench = SQLBench(store)
    progress = {"done": 1, "total": 9, "stage": 1, "stages": 2, "lanes": [4, 2]}
    kind = "text" if bench.dialect == "sqlite" else "jsonb"
    statement = f"UPDATE docket_runs SET progress = CAST(:text AS {kind}) WHERE execution_id = 'parked'"  # noqa: S608 -- ours
    bench.sql(statement, text=json.dumps(progress))
    store.migrate()
    rows = bench.sql("SELECT execution_id, CAST(lanes AS text) FROM docket_runs ORDER BY 1")
    assert [(name, lanes and json.loads(lanes)) for name, lanes in rows] == [
        ("done", None),
        ("failed", None),
        ("parked", [4, 2]),
    ]
    row = store.find_run(GRAPH, "parked")
    assert row is not None
    assert row.progress == Progress(done=1, total=9, stage=1, stages=2)


@pytest.mark.parametrize("databases", ["postgresql"], indirect=True)
def test_indexes_may_be_made_before_the_migration(databases: Databases) -> None:
    """By the statements of docs/persistence.md, while workers run: it takes them over and makes none."""
    store = databases.open_frozen(6)
    bench = SQLBench(store)
    page = (Path(__file__).parents[2] / "docs" / "persistence.md").read_text(encoding="utf-8")
    for statement in page.split("```sql\n")[1].split("```")[0].split(";")[:-1]:
        bench.sql(statement)
    made = "SELECT pg_relation_filenode(indexrelid) FROM pg_index WHERE indrelid = to_regclass('docket_runs')"
    before = set(bench.sql(made))
    store.migrate()
    assert set(bench.sql(made)) < before
    new = databases.open()
    new.migrate()
    assert shape(store) == shape(new)


def test_every_version_is_frozen_for_both_databases() -> None:
    """Whoever raises the version freezes its tables: ``python -m tests.conformance.schema.freeze``."""
    names = {freeze.snapshot(dialect, version).name for dialect in freeze.DIALECTS for version in VERSIONS}
    assert {path.name for path in freeze.HERE.glob("*.sql")} == names
    assert sorted(schema.MIGRATIONS) == list(VERSIONS)[1:]


def test_a_process_that_checked_nothing_is_told_of_older_tables(databases: Databases) -> None:
    """In process nobody checks the version first; the statement that misses a column says what to run."""
    store = databases.open_frozen(schema.OLDEST)
    calls: list[Callable[[], object]] = [
        lambda: store.lookup(shared().key, "later", 30.0),
        lambda: store.publish(shared(), "later", None),
    ]
    for call in calls:
        with pytest.raises(SchemaMismatch, match=r"version 4, .*docket migrate") as told:
            call()
        assert (told.value.found, told.value.expected) == (4, schema.VERSION)
    with store.engine.connect() as connection:
        connection.execute(schema.docket_schema.update().values(version=schema.VERSION))
    with pytest.raises(StoreRefused, match="output_shape"):
        store.lookup(shared().key, "later", 30.0)


def test_tables_from_before_the_first_release_are_refused(databases: Databases) -> None:
    """They are left as they are; nothing says how they were changed."""
    store = databases.open_frozen(schema.OLDEST)
    with store.engine.connect() as connection:
        connection.execute(schema.docket_schema.update().values(version=schema.OLDEST - 1))
    with pytest.raises(StoreRefused, match="version 3, from before the first release"):
        store.migrate()
    with pytest.raises(SchemaMismatch, match="version 3"):
        store.check_schema()


@pytest.mark.parametrize("databases", ["postgresql"], indirect=True)
def test_a_migration_gives_way_where_a_table_is_in_use(databases: Databases) -> None:
    """It fails after some seconds, as one that may be repeated, instead of holding up all who come behind it."""
    store = databases.open_frozen(schema.OLDEST)
    with store.engine.connect() as rival:
        rival.exec_driver_sql("BEGIN")
        rival.exec_driver_sql("SELECT * FROM docket_cache")
        with pytest.raises(StoreUnavailable, match="lock timeout"):
            store.migrate()
        rival.exec_driver_sql("ROLLBACK")
    with pytest.raises(SchemaMismatch, match="version 4"):
        store.check_schema()
    assert store.migrate() == schema.VERSION


def test_snapshots_hold_no_tables_but_ours() -> None:
    """They are read by people too."""
    for path in freeze.HERE.glob("*.sql"):
        made = re.findall(r"CREATE TABLE (\w+)", path.read_text(encoding="utf-8"))
        assert set(made) <= set(schema.metadata.tables), path.name
