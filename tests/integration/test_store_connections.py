from __future__ import annotations

import gc
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text

from docket_celery import Graph, Scope
from docket_celery.devserver import ServerProcess, start_postgres
from docket_celery.errors import SchemaMismatch, StoreUnavailable
from docket_celery.store import SQLStore
from docket_celery.store.records import Lease, Purged, RunState
from docket_celery.store.sql import heartbeat, schema
from tests.conformance.blocking import InterruptedCall
from tests.conformance.samples import GRAPH, RUN, SQLBench, ending, execution, output, request
from tests.infra.processes import wait_until
from tests.unit.protos.shop_pb2 import Charge, Order

pytestmark = [pytest.mark.integration, pytest.mark.leaves_lease]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(database_url: str) -> Generator[SQLBench]:
    """A store on real Postgres, empty."""
    store = SQLStore(database_url)
    yield SQLBench(store)
    store.close()


@pytest.fixture
def rival(database_url: str) -> Generator[Connection]:
    """Another worker's connection, which commits when the test says so."""
    engine = create_engine(make_url(database_url), isolation_level="READ COMMITTED")
    with engine.connect() as connection:
        yield connection
        connection.rollback()
    engine.dispose()


class TestConnections:
    """What a connection is set to, and what happens when it goes."""

    def settings(self, url: str) -> dict[str, str]:
        """Return what the server says of a store's connection."""
        store = SQLStore(url)
        names = [
            "statement_timeout",
            "idle_in_transaction_session_timeout",
            "default_transaction_isolation",
            "application_name",
            "search_path",
            "plan_cache_mode",
            "enable_seqscan",
            "jit",
        ]
        with store.engine.connect() as connection:
            found = {name: str(connection.execute(text(f"SHOW {name}")).scalar_one()) for name in names}
            driver: Any = connection.connection.dbapi_connection
            found["prepare_threshold"] = str(driver.prepare_threshold)
            found["autocommit"] = str(driver.autocommit)
            given = driver.info.get_parameters()
            found |= {
                name: given[name] for name in ("connect_timeout", "tcp_user_timeout", "keepalives_idle")
            }
        store.close()
        return found

    def test_every_wait_has_a_limit(self, database_url: str) -> None:
        """Connecting, a statement, a pause in a transaction, unanswered data."""
        assert self.settings(database_url) == {
            "statement_timeout": "15s",
            "idle_in_transaction_session_timeout": "15s",
            "default_transaction_isolation": "read committed",
            "application_name": "docket_celery",
            "keepalives_idle": "10",
            "tcp_user_timeout": "10000",
            "search_path": '"$user", public',
            "plan_cache_mode": "force_generic_plan",
            "enable_seqscan": "off",
            "jit": "off",
            "prepare_threshold": "1000000000",
            "autocommit": "True",
            "connect_timeout": "5",
        }

    def test_what_the_url_sets_wins(self, database_url: str) -> None:
        """Also inside ``options``, beside the limits that it does not name."""
        query = {
            "application_name": "shop",
            "connect_timeout": "7",
            "prepare_threshold": "3",
            "options": "-c search_path=shop -c statement_timeout=1000",
        }
        url = make_url(database_url).update_query_dict(query).set(drivername="postgres")
        found = self.settings(url.render_as_string(hide_password=False))
        assert found["application_name"] == "shop"
        assert (found["connect_timeout"], found["prepare_threshold"]) == ("7", "3")
        assert (found["search_path"], found["statement_timeout"]) == ("shop", "1s")
        assert found["default_transaction_isolation"] == "read committed"
        assert (found["plan_cache_mode"], found["enable_seqscan"]) == ("auto", "on")

    def test_empty_options_send_none(self, database_url: str) -> None:
        """For poolers that refuse start-up options; they seldom keep prepared statements either."""
        found = self.settings(f"{database_url}?options=")
        assert (found["statement_timeout"], found["enable_seqscan"]) == ("0", "on")
        assert found["prepare_threshold"] == "None"
        url = make_url(database_url).update_query_dict({"options": ""})
        with SQLStore(url).engine.connect() as connection:
            assert connection.execute(text("SHOW statement_timeout")).scalar_one() == "0"
        connection.engine.dispose()

    def test_a_given_engine_is_used_as_it_is(self, database_url: str) -> None:
        """Its own settings stay; closing the store does not close it."""
        engine = create_engine(make_url(database_url), connect_args={"application_name": "mine"})
        store = SQLStore(engine)
        assert isinstance(store.acquire(request(execution_id="given")), Lease)
        pool = engine.pool
        store.close()
        with engine.connect() as connection:
            assert connection.execute(text("SHOW application_name")).scalar_one() == "mine"
            assert connection.get_isolation_level() == "READ COMMITTED"
        assert engine.pool is pool
        engine.dispose()

    def test_connections_that_were_opened_are_kept(self, bench: SQLBench) -> None:
        """Five threads at once use the same five sessions again and again: none is opened for each use."""
        assert isinstance(bench.store, SQLStore)
        engine, sessions = bench.store.engine, list[int]()
        together = threading.Barrier(5)

        def use() -> None:
            for _ in range(3):
                with engine.connect() as connection:
                    sessions.append(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())
                    together.wait()
                together.wait()

        threads = [threading.Thread(target=use) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(sessions) == 15
        assert len(set(sessions)) == 5

    def test_a_connection_that_the_server_ended_is_replaced_at_once(self, bench: SQLBench) -> None:
        """All pooled connections die; the next call succeeds, without a pause or an error."""
        lease = bench.take()
        assert isinstance(bench.store, SQLStore)
        self.terminate(bench.store.engine)
        bench.store.save(lease, output(), execution())
        self.terminate(bench.store.engine)
        bench.store.end(lease, ending())
        assert bench.executions() == [("charge", 1)]

    def terminate(self, engine: Engine) -> None:
        """End all other sessions in the database, those of *engine*'s pool among them."""
        admin = create_engine(engine.url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            ended = connection.execute(
                text(
                    "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            ).scalar_one()
        admin.dispose()
        assert ended

    def test_a_statement_over_its_limit_is_unavailable_not_lost(
        self, bench: SQLBench, database_url: str, rival: Connection
    ) -> None:
        """The refusal names the action; the same call works when the lock is gone."""
        lease = bench.take()
        heartbeat.extend(rival, [lease], [])
        url = make_url(database_url).update_query_dict({"options": "-c statement_timeout=100"})
        store = SQLStore(url)
        with pytest.raises(StoreUnavailable, match=r"did not save the checkpoint: .*57014"):
            store.save(lease, output(), None)
        rival.rollback()
        assert store.save(lease, output(), None).key == output().key
        store.close()

    def test_a_statement_that_a_signal_interrupts_is_not_left_in_the_pool(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """A time limit that raises while the server works: the error stays what it is, and the next call works."""
        lease = bench.take()
        heartbeat.extend(rival, [lease], [])

        def stop(_number: int, _frame: object) -> None:
            raise InterruptedCall

        def stop_when_waiting() -> None:
            waits = "wait_event_type = 'Lock' AND datname = current_database()"
            is_waiting = f"SELECT 1 FROM pg_stat_activity WHERE {waits}"  # noqa: S608 -- our own
            wait_until(lambda: bool(bench.sql(is_waiting)), within_s=10, what="the call waits for the lock")
            os.kill(os.getpid(), signal.SIGUSR1)

        before = signal.signal(signal.SIGUSR1, stop)
        waiter = threading.Thread(target=stop_when_waiting)
        waiter.start()
        try:
            with pytest.raises(InterruptedCall):
                bench.store.save(lease, output(), None)
        finally:
            waiter.join()
            signal.signal(signal.SIGUSR1, before)
        rival.rollback()
        bench.store.end(lease, ending())
        assert bench.state() is RunState.SUCCEEDED

    def test_a_worker_that_is_stopped_within_a_transaction_keeps_no_lock(
        self, bench: SQLBench, database_url: str
    ) -> None:
        """The server ends its session; the call is repeated when the worker continues."""
        bench.store.end(bench.take(), ending(retention_s=1.0))
        bench.pass_time(2)
        limit = "-c idle_in_transaction_session_timeout=100"
        store = SQLStore(make_url(database_url).update_query_dict({"options": limit}))
        purged = list[Purged]()

        def stop(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if statement == "COMMIT" and not purged:
                purged.append(Purged())
                wait_until(lambda: bool(bench.store.purge(10)), within_s=10, what="the run is purged")

        event.listen(store.engine, "before_cursor_execute", stop)
        assert store.purge(10) == Purged()
        assert purged
        assert bench.store.find_run(GRAPH, RUN) is None
        store.close()

    def test_a_read_only_server_is_unavailable(self, bench: SQLBench, database_url: str) -> None:
        """A standby that was promoted late, or a primary that was demoted: passing, not a failed run."""
        bench.take()
        store = SQLStore(
            make_url(database_url).update_query_dict({"options": "-c default_transaction_read_only=on"})
        )
        with pytest.raises(StoreUnavailable, match="25006"):
            store.acquire(request("second"))
        store.close()

    def test_an_exhausted_pool_is_unavailable(self, database_url: str) -> None:
        """Waiting for a connection has an end too."""
        engine = create_engine(make_url(database_url), pool_size=1, max_overflow=0, pool_timeout=0.05)
        with engine.connect(), pytest.raises(StoreUnavailable, match="stayed in use"):
            SQLStore(engine).find_run(GRAPH, RUN)
        engine.dispose()

    def test_a_wrong_password_is_not_repeated(self, database_url: str) -> None:
        """Neither in the text, nor in the store's own representation."""
        url = make_url(database_url).set(password="wrong-" + secrets.token_hex(8))
        store = SQLStore(url)
        with pytest.raises(StoreUnavailable) as refused:
            store.find_run(GRAPH, RUN)
        assert str(url.password) not in str(refused.value) + repr(store)
        assert "password authentication failed" in str(refused.value)

    def test_a_restart_in_mid_use_is_survived(self) -> None:
        """While the server is down calls are unavailable; back again, the next one goes on."""
        with restartable() as (server, start_again):
            store = SQLStore(server.url)
            store.migrate()
            lease = store.acquire(request())
            assert isinstance(lease, Lease)
            store.save(lease, output(), execution())
            server.kill()
            with pytest.raises(StoreUnavailable, match="did not save the checkpoint"):
                store.save(lease, output("ship"), None)
            with pytest.raises(StoreUnavailable):
                store.extend([lease])
            start_again()
            store.save(lease, output("ship"), execution("ship"))
            assert len(store.restore(lease, [])) == 2
            start_again()
            store.end(lease, ending())
            row = store.find_run(GRAPH, RUN)
            assert row is not None
            assert row.state is RunState.SUCCEEDED
            store.close()


@contextmanager
def restartable() -> Generator[tuple[ServerProcess, Callable[[], None]]]:
    """Yield a server of our own and a function that starts it again where it was, killing it first."""
    directory = Path(tempfile.mkdtemp(prefix="docket-restart-", dir="/tmp"))
    directory.chmod(0o1777)
    running = [start_postgres(directory / "pg")]

    def start_again() -> None:
        running[-1].kill()
        running.append(start_postgres(directory / "pg", port=running[-1].port))

    try:
        yield running[0], start_again
    finally:
        running[-1].stop()
        shutil.rmtree(directory)


FORK = """
import json, os, sys
from sqlalchemy import create_engine, text
from docket_celery.store import SQLStore

url, kind = sys.argv[1:]
store = SQLStore(url if kind == "url" else create_engine(url))

def backend():
    with store.engine.connect() as connection:
        return connection.execute(text("SELECT pg_backend_pid()")).scalar_one()

before = backend()
store.find_run("g", "r")
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    store.find_run("g", "r")
    os.write(writer, str(backend()).encode())
    store.close()
    os._exit(0)
_, status = os.waitpid(child, 0)
print(json.dumps({"status": status, "before": before, "child": int(os.read(reader, 99)), "after": backend()}))
"""


@pytest.mark.parametrize("kind", ["url", "engine"])
def test_a_forked_child_uses_its_own_connections(database_url: str, kind: str) -> None:
    """The child gets another backend; the parent's goes on as if nothing had happened."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORK, database_url, kind],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["status"] == 0
    assert told["child"] != told["before"] == told["after"]


def test_a_store_that_nobody_has_any_more_gives_its_connections_back(database_url: str) -> None:
    """Those of its heartbeat too; no store of a process is closed one by one."""
    graph = Graph("freed")

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        return Charge(charge_id=order.order_id)

    keeper = SQLStore(database_url)
    others = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with keeper.engine.connect() as connection:
        stores = [SQLStore(database_url) for _ in range(5)]
        for number, store in enumerate(stores):
            order = Order(order_id=str(number))
            assert graph.execute(Charge, order, store=store).charge_id == order.order_id
        assert connection.execute(others).scalar_one() >= len(stores)
        del store
        stores.clear()

        def is_alone() -> bool:
            gc.collect()
            return bool(connection.execute(others).scalar_one() == 0)

        wait_until(is_alone, within_s=10, what="all sessions end")
    keeper.close()


class TestSchema:
    """Making and upgrading the tables."""

    def test_missing_tables_are_named_as_such(self, empty_database_url: str) -> None:
        """Each way to use them says to migrate."""
        store = SQLStore(empty_database_url)
        for call in (
            store.check_schema,
            lambda: store.find_run(GRAPH, RUN),
            lambda: store.acquire(request()),
        ):
            with pytest.raises(SchemaMismatch, match="docket migrate") as missing:
                call()
            assert missing.value.args == (None, schema.VERSION)
        store.close()

    def test_many_may_migrate_at_once(self, empty_database_url: str) -> None:
        """Workers that all start with migrate: one makes the tables, the others find them."""
        start, versions = threading.Barrier(8), list[int]()
        stores = [SQLStore(empty_database_url) for _ in range(8)]

        def migrate(store: SQLStore) -> None:
            start.wait()
            versions.append(store.migrate())

        threads = [threading.Thread(target=migrate, args=(store,)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert versions == [schema.VERSION] * 8
        assert SQLBench(stores[0]).sql("SELECT version FROM docket_schema") == [(schema.VERSION,)]
        stores[0].check_schema()
        for store in stores:
            store.close()

    def test_a_newer_schema_is_refused(self, empty_database_url: str) -> None:
        """By the check and by migrate, which leaves it alone."""
        store = SQLStore(empty_database_url)
        store.migrate()
        SQLBench(store).sql("INSERT INTO docket_schema (version, applied_at) VALUES (99, now())")
        for call in (store.check_schema, store.migrate):
            with pytest.raises(SchemaMismatch, match="upgrade docket-celery") as newer:
                call()
            assert newer.value.args == (99, schema.VERSION)
        store.close()

    def test_an_older_schema_is_upgraded_step_by_step(self, empty_database_url: str) -> None:
        """Each step once and in order; a step that fails leaves the version before."""
        store, ran = SQLStore(empty_database_url), list[int]()
        store.migrate()

        def create(name: str, version: int) -> schema.Migration:
            def step(connection: Connection) -> None:
                connection.execute(text(f"CREATE TABLE {name} (a int)"))
                ran.append(version)

            return step

        def fail(connection: Connection) -> None:
            connection.execute(text("SELECT 1 / 0"))

        new = schema.VERSION + 1
        steps = {new: create("one", new), new + 1: create("two", new + 1), new + 2: fail}
        engine = create_engine(make_url(empty_database_url))
        with engine.begin() as connection:
            assert schema.upgrade(connection, steps, new + 1) == new + 1
            assert schema.upgrade(connection, steps, new + 1) == new + 1
        with pytest.raises(Exception, match="division by zero"), engine.begin() as connection:
            schema.upgrade(connection, steps, new + 2)
        with engine.connect() as connection:
            assert (schema.find_version(connection), ran) == (new + 1, [new, new + 1])
        engine.dispose()
        store.close()

    def test_the_metadata_describes_what_migrate_made(self, empty_database_url: str) -> None:
        """People's own Alembic sees no difference: tables, columns, nullability and indexes."""
        from sqlalchemy import inspect

        store = SQLStore(empty_database_url)
        store.migrate()
        found = inspect(store.engine)
        for table in schema.metadata.sorted_tables:
            columns = {column["name"]: column["nullable"] for column in found.get_columns(table.name)}
            assert columns == {column.name: column.nullable for column in table.columns}
            assert {index["name"] for index in found.get_indexes(table.name)} == {
                i.name for i in table.indexes
            }
        store.close()


def test_the_memory_store_needs_no_sqlalchemy() -> None:
    """A graph that persists nothing, or in memory, never imports it."""
    code = (
        "import sys, docket_celery.store as store; store.MemoryStore(); "
        "print(sorted({'sqlalchemy', 'psycopg'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
