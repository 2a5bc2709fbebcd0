"""How often-run statements reach Postgres: prepared and planned once for a connection, several in one round trip."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import create_engine, make_url

from docket_celery.errors import StoreRefused
from docket_celery.store import SQLStore
from docket_celery.store.records import Lease, RunState
from docket_celery.store.sql import runs, schema
from docket_celery.store.sql.database import Database
from docket_celery.store.sql.statement import Statement
from tests.conformance.blocking import InterruptedCall
from tests.conformance.samples import GRAPH, RUN, SQLBench, ending, execution, output, shared
from tests.conformance.samples import request as asked
from tests.infra.processes import wait_until
from tests.infra.servers import connect
from tests.infra.wire import Wire

pytestmark = [pytest.mark.integration, pytest.mark.leaves_lease]


@pytest.fixture
def store(database_url: str) -> Generator[SQLStore]:
    """A store on real Postgres, empty."""
    made = SQLStore(database_url)
    yield made
    made.close()


def with_query(url: str, **query: str) -> sa.URL:
    """Return *url* with these options."""
    return make_url(url).update_query_dict(query)


def session(store: SQLStore) -> Any:
    """Return the driver's connection, which is the one that the store has used and uses next."""
    with store.engine.connect() as connection:
        return connection.connection.driver_connection


def prepared(store: SQLStore) -> list[tuple[str, int, int]]:
    """Return the beginning of each prepared statement, and how often it ran as planned once and as planned again."""
    found = session(store).execute(
        "SELECT statement, generic_plans, custom_plans FROM pg_prepared_statements ORDER BY prepare_time"
    )
    return [(" ".join(text.split())[:30], generic, custom) for text, generic, custom in found.fetchall()]


def advance(store: SQLStore, owner: str = "first") -> None:
    """Make each call that runs for a run, a step or a hit, on its happy way and on others."""
    lease = store.acquire(asked(owner, task_id="t"))
    assert isinstance(lease, Lease)
    store.restore(lease, [output().key])
    store.save(lease, output(), execution())
    store.save(lease, output(), None)
    store.end(lease, ending(RunState.FAILED, error={"code": "DC204"}, executions=[execution("ship")]))
    again = store.acquire(asked("second"))
    assert isinstance(again, Lease)
    store.restore(again, [])
    store.end(again, ending(checkpoint=output("ship"), executions=[execution("ship"), execution("pack")]))
    store.acquire(asked("third"))
    assert store.lookup(shared().key, owner, 30.0) is True
    store.publish(shared(), owner, execution("infer"))
    store.lookup(shared().key, owner, 30.0, execution("infer", cached=True, attempts=0))
    store.release_claim(shared().key, owner)
    store.find_run(GRAPH, RUN)


class TestPreparing:
    """What is prepared on the server, and on whose connections."""

    def test_a_statement_is_prepared_and_planned_once_for_a_connection(self, store: SQLStore) -> None:
        """Also the first time that it runs; what runs seldom is not prepared."""
        lease = store.acquire(asked())
        assert isinstance(lease, Lease)
        for step in ("a", "b", "c"):
            store.save(lease, output(step), execution(step))
        store.purge(1)
        assert prepared(store) == [
            ("WITH added AS (INSERT INTO doc", 1, 0),
            ("WITH f AS (SELECT docket_runs.", 3, 0),
        ]

    def test_a_given_engine_prepares_by_its_own_threshold(self, database_url: str) -> None:
        """Psycopg's, unless its owner sets another one."""
        for threshold, found in ((5, 0), (1, 1)):
            arguments = {"prepare_threshold": threshold}
            engine = create_engine(
                make_url(database_url), connect_args=arguments, isolation_level="AUTOCOMMIT"
            )
            store = SQLStore(engine)
            for _ in range(2):
                store.find_run(GRAPH, RUN)
            assert len(prepared(store)) == found
            engine.dispose()

    @pytest.mark.parametrize(
        ("query", "found"),
        [
            ({"options": ""}, 0),
            ({"prepare_threshold": "none"}, 0),
            ({"prepare_threshold": "2"}, 0),
            ({"prepare_threshold": "1"}, 1),
            ({"prepare_threshold": "1", "options": ""}, 1),
        ],
    )
    def test_the_url_says_what_is_prepared(
        self, database_url: str, query: dict[str, str], found: int
    ) -> None:
        """Nothing where start-up options are not sent; all statements where it names a number of runs."""
        store = SQLStore(with_query(database_url, **query))
        for _ in range(2):
            store.find_run(GRAPH, RUN)
        assert len(prepared(store)) == found
        store.close()

    def test_a_column_may_change_its_type_while_a_worker_runs(
        self, store: SQLStore, database_url: str
    ) -> None:
        """What was prepared on open connections returns another type then; they are replaced."""
        for _ in range(2):
            assert store.find_run(GRAPH, RUN) is None
        with connect(database_url) as admin:
            for kind in ("varchar(500)", "text"):
                admin.execute(f"ALTER TABLE docket_runs ALTER COLUMN target TYPE {kind}")
                assert store.find_run(GRAPH, RUN) is None


class TestPlans:
    """A statement that is planned once must be planned well before there are any rows."""

    @pytest.mark.parametrize("vacuumed", [False, True])
    def test_rows_are_found_by_key_however_empty_the_tables_were(
        self, store: SQLStore, *, vacuumed: bool
    ) -> None:
        """On a table that vacuum has found empty, reading all of it seems to cost nothing."""
        bench = SQLBench(store)
        if vacuumed:
            bench.sql("VACUUM ANALYZE")
        advance(store)
        names = bench.sql("SELECT name, cardinality(parameter_types) FROM pg_prepared_statements")
        assert len(names) > 10
        scans = list[str]()
        for name, count in names:
            values = ", ".join(["NULL"] * count)
            (plan,) = session(store).execute(f"EXPLAIN (FORMAT JSON) EXECUTE {name} ({values})").fetchone()
            scans += find_scans(plan[0]["Plan"])
        assert len(scans) > 10
        assert [scan for scan in scans if not scan.endswith(" by key")] == []


def find_scans(node: dict[str, Any]) -> list[str]:
    """Return how the plan at *node* reads tables and indexes: by key, or all of them."""
    found = [scan for child in node.get("Plans", []) for scan in find_scans(child)]
    name = node.get("Index Name", node.get("Relation Name"))
    if node["Node Type"] in {"Seq Scan", "Index Scan", "Index Only Scan", "Bitmap Index Scan"}:
        found.append(f"{name} by key" if "Index Cond" in node else f"{node['Node Type']} on all of {name}")
    return found


class TestPoolers:
    """A pooler that gives connections away between two statements."""

    def test_a_statement_that_was_lost_is_repeated_and_nothing_is_prepared_any_more(
        self, store: SQLStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The other session has never heard of it (26000). It is said once, for the heartbeat's connections too."""
        lease = store.acquire(asked())
        assert isinstance(lease, Lease)
        clone = store.clone()
        for one in (store, clone):
            one.save(lease, output(), execution())
        with caplog.at_level(logging.WARNING, "docket_celery.store"):
            for one, step in ((store, "b"), (clone, "c"), (store, "d")):
                session(one).pgconn.exec_(b"DEALLOCATE ALL")
                one.save(lease, output(step), execution(step))
        assert [row[0] for row in SQLBench(store).executions()] == ["charge", "b", "c", "d"]
        (record,) = caplog.records
        assert "prepared statement" in record.getMessage()
        assert "(SQLSTATE 26000)" in record.getMessage()
        assert "?prepare_threshold=none" in record.getMessage()
        assert prepared(store) == []

    def test_a_name_that_another_one_has_taken_is_given_up(
        self, store: SQLStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """42P05: the session was another client's before."""
        monkeypatch.setattr(secrets, "randbits", lambda _: 7)
        session(store).pgconn.exec_(b"PREPARE _pg3_7 AS SELECT 1")
        lease = store.acquire(asked())
        assert isinstance(lease, Lease)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "(SQLSTATE 42P05)" in caplog.text
        assert prepared(store) == [("PREPARE _pg3_7 AS SELECT 1", 0, 0)]

    def test_two_connections_never_name_two_statements_alike(self, store: SQLStore) -> None:
        """Behind a pooler the one's name would run the other's statement."""
        names = set[str]()
        with store.engine.connect() as first, store.engine.connect() as second:
            for connection in (first, second):
                Statement(sa.select(sa.literal_column("1").label("one"))).run(connection, {})
                found = connection.exec_driver_sql("SELECT name FROM pg_prepared_statements")
                names |= set(found.scalars())
        assert len(names) == 2


def told(text: str, *columns: str) -> Statement:
    """Return a statement that gives back these columns."""
    return Statement(sa.text(text).columns(*map(sa.column, columns)))


TOUCH, LOST = told("UPDATE docket_runs SET lost = lost + 1"), told("SELECT lost FROM docket_runs", "lost")
LOCK = told("SELECT execution_id FROM docket_runs FOR UPDATE", "execution_id")
FAIL = told("SELECT 1 / (lost - lost) AS one FROM docket_runs", "one")


def run_both(database: Database, *statements: Statement) -> list[Any]:
    """Return the rows that each has found, or how many it has changed."""
    calls = [(statement, dict[str, Any]()) for statement in statements]
    found = database.run("run both", lambda connection: Statement.run_together(connection, *calls))
    return [[dict(row) for row in one.rows] or one.count for one in found]


@contextmanager
def interrupted_when_waiting(url: str) -> Generator[None]:
    """Raise `InterruptedCall` in the main thread by a signal, when a session in the database waits for a lock."""

    def stop(_number: int, _frame: object) -> None:
        raise InterruptedCall

    def stop_when_waiting() -> None:
        waits = "wait_event_type = 'Lock' AND datname = current_database()"
        with connect(url) as watcher:
            asked = f"SELECT 1 FROM pg_stat_activity WHERE {waits}"  # noqa: S608 -- our own
            wait_until(
                lambda: bool(watcher.execute(asked).fetchone()),
                within_s=10,
                what="the call waits for the lock",
            )
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, stop)
    waiter = threading.Thread(target=stop_when_waiting)
    waiter.start()
    try:
        yield
    finally:
        waiter.join()
        signal.signal(signal.SIGUSR1, before)


class TestTogether:
    """Two statements that are sent at once."""

    @pytest.fixture(params=["postgresql", "sqlite"])
    def database(self, request: pytest.FixtureRequest, database_url: str) -> Generator[Database]:
        """A database with one run."""
        made = Database(database_url if request.param == "postgresql" else "sqlite://")
        made.run("migrate", schema.migrate)
        made.run("acquire", runs.acquire, asked())
        yield made
        made.dispose()

    def test_the_second_sees_what_the_first_has_changed(self, database: Database) -> None:
        """Each has a snapshot of its own."""
        assert run_both(database, TOUCH, LOST) == [1, [{"lost": 1}]]
        assert run_both(database, TOUCH, LOST) == [1, [{"lost": 2}]]

    @pytest.mark.parametrize("database", ["postgresql"], indirect=True)
    @pytest.mark.parametrize("both", [(TOUCH, FAIL), (FAIL, TOUCH)])
    def test_an_error_of_one_takes_the_other_back(
        self, database: Database, both: tuple[Statement, Statement]
    ) -> None:
        """The error is the one that happened; no pipeline and no transaction is left open."""
        with pytest.raises(StoreRefused, match="division by zero"):
            run_both(database, *both)
        assert run_both(database, LOST, LOST) == [[{"lost": 0}]] * 2

    @pytest.mark.parametrize("database", ["postgresql"], indirect=True)
    def test_both_are_repeated_where_the_connection_was_dead(
        self, database: Database, database_url: str
    ) -> None:
        """The next connection has them done once."""
        run_both(database, LOST, LOST)
        with connect(database_url) as admin:
            ours = "FROM pg_stat_activity WHERE application_name = 'docket_celery' AND datname = current_database()"
            assert (True,) in admin.execute(f"SELECT pg_terminate_backend(pid, 5000) {ours}").fetchall()
        assert run_both(database, TOUCH, LOST) == [1, [{"lost": 1}]]

    @pytest.mark.parametrize("database", ["postgresql"], indirect=True)
    def test_what_a_signal_raises_is_not_lost(self, database: Database, database_url: str) -> None:
        """Psycopg cannot end a pipeline that still waits; that connection is closed."""
        with connect(database_url) as holder, holder.transaction():
            holder.execute("SELECT 1 FROM docket_runs FOR UPDATE")
            with interrupted_when_waiting(database_url), pytest.raises(InterruptedCall):
                run_both(database, LOCK, LOST)
        assert run_both(database, LOST, LOST) == [[{"lost": 0}]] * 2

    @pytest.mark.parametrize("database", ["postgresql"], indirect=True)
    def test_both_make_one_round_trip(self, database: Database, database_url: str) -> None:
        """Counted on the wire."""
        run_both(database, TOUCH, LOST)
        with Wire(database_url) as wire:
            through = Database(wire.url)
            run_both(through, TOUCH, LOST)
            with wire.counted() as trips:
                run_both(through, TOUCH, LOST)
            assert len(trips) == 1, trips
            with wire.counted() as trips:
                through.run(
                    "run each", lambda connection: [each.run(connection, {}) for each in (TOUCH, LOST)]
                )
            assert len(trips) == 2, trips
            through.dispose()
