from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.pool import QueuePool

from docket_celery.checkpoint import Checkpoint, Lease, RunState
from docket_celery.devserver import ServerProcess, start_postgres
from docket_celery.errors import LeaseLost, SchemaMismatch, StoreUnavailable
from docket_celery.store import SQLStore, postgres, schema
from tests.conformance.samples import GRAPH, RUN, SQLBench, ending, execution, output, request, shared

pytestmark = [pytest.mark.integration, pytest.mark.leaves_lease]

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


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


@contextmanager
def blocked(bench: SQLBench, work: Callable[[], T]) -> Generator[Future[T]]:
    """Start *work* in a thread and go on when its statement waits for the rival's lock; join it at the end."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with ThreadPoolExecutor(max_workers=1) as pool:
        outcome = pool.submit(work)
        deadline = time.monotonic() + 10
        while not bench.sql(waiting)[0][0]:
            assert time.monotonic() < deadline, "nothing waits for a lock"
            assert not outcome.done(), outcome.result()
            time.sleep(0.005)
        yield outcome


class TestInterleaving:
    """Two real connections, held in the middle by row locks."""

    def stale(self, bench: SQLBench) -> Lease:
        """Return a lease that expired and that nobody has taken yet."""
        lease = bench.take()
        bench.pass_time(31)
        return lease

    def test_a_save_that_waits_for_a_takeover_is_refused(self, bench: SQLBench, rival: Connection) -> None:
        """The fence sees what it waited for: the takeover that committed meanwhile."""
        stale = self.stale(bench)
        postgres.acquire(rival, request("second"))
        with blocked(bench, lambda: bench.store.save(stale, output(), execution())) as save:
            rival.commit()
        assert isinstance(save.exception(), LeaseLost)
        assert (bench.sql("SELECT 1 FROM docket_cache"), bench.executions()) == ([], [])

    def test_a_save_that_waits_for_a_takeover_that_fails_is_kept(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """A takeover that never committed took nothing."""
        stale = self.stale(bench)
        postgres.acquire(rival, request("second"))
        with blocked(bench, lambda: bench.store.save(stale, output(), None)) as save:
            rival.rollback()
        assert save.result().output_data == output().output_data

    def test_a_takeover_waits_for_a_save_and_restores_it(self, bench: SQLBench, rival: Connection) -> None:
        """What the old holder saved at the last moment is there when the new one looks."""
        stale = self.stale(bench)
        postgres.save(rival, stale, output(), None)
        with blocked(bench, lambda: bench.take(owner="second")) as take:
            rival.commit()
        assert [found.key for found in bench.store.restore(take.result(), [])] == [output().key]

    def test_an_end_that_waits_for_a_takeover_writes_nothing(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """Neither state nor result, executions or dates."""
        stale = bench.take()
        bench.store.save(stale, output(ttl_s=1.0), None)
        bench.pass_time(31)
        postgres.acquire(rival, request("second"))
        with blocked(bench, lambda: bench.store.end(stale, ending(executions=[execution("x")]))) as end:
            rival.commit()
        assert isinstance(end.exception(), LeaseLost)
        assert (bench.state(), bench.executions()) == (RunState.RUNNING, [])
        assert bench.sql("SELECT expires_at FROM docket_cache")[0][0] is None

    def test_a_heartbeat_that_waits_for_a_takeover_extends_nothing(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """The new holder's lease is not the old one's to extend."""
        stale = self.stale(bench)
        postgres.acquire(rival, request("second"))
        with blocked(bench, lambda: bench.store.extend([stale])) as extend:
            rival.commit()
        assert extend.result() == set()

    def test_two_takeovers_give_one_lease(self, bench: SQLBench, rival: Connection) -> None:
        """The second finds the lease alive again and gets the row; one crash is counted."""
        self.stale(bench)
        postgres.acquire(rival, request("second"))
        with blocked(bench, lambda: bench.refused(owner="third")) as refused:
            rival.commit()
        assert (refused.result().epoch, refused.result().lost) == (2, 1)

    def test_a_takeover_that_waits_for_the_end_gets_the_outcome(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """The row is read in a statement of its own, after what it waited for."""
        postgres.end(rival, self.stale(bench), ending())
        with blocked(bench, lambda: bench.refused(owner="second")) as refused:
            rival.commit()
        assert (refused.result().state, refused.result().result) == (RunState.SUCCEEDED, ending().result)

    def test_the_slower_of_two_savers_reads_the_winner(self, bench: SQLBench, rival: Connection) -> None:
        """Its own snapshot cannot see the winner's row: a new statement does."""
        lease = bench.take()
        postgres.save(rival, lease, output(data=b"first"), None)
        with blocked(bench, lambda: bench.store.save(lease, output(data=b"second"), execution())) as save:
            rival.commit()
        assert save.result().output_data == b"first"
        assert bench.executions() == []

    def test_the_slower_of_two_publishers_reads_the_winner(self, bench: SQLBench, rival: Connection) -> None:
        """Both computed; one result counts."""
        postgres.publish(rival, shared(data=b"first"), "a", None)
        with blocked(bench, lambda: bench.store.publish(shared(data=b"second"), "b", None)) as publish:
            rival.commit()
        assert publish.result().output_data == b"first"

    def test_a_lookup_that_waits_for_a_publisher_claims_nothing(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """Its snapshot is from before the result; claiming now would compute a second time."""
        bench.store.lookup(shared().key, "a", 30.0)
        postgres.publish(rival, shared(), "a", None)
        with blocked(bench, lambda: bench.store.lookup(shared().key, "b", 30.0)) as lookup:
            rival.commit()
        assert lookup.result() is False
        assert isinstance(bench.store.lookup(shared().key, "b", 30.0), Checkpoint)

    def test_one_of_two_that_meet_a_dead_claim_gets_it(self, bench: SQLBench, rival: Connection) -> None:
        """The one that waited sees a claim that its snapshot does not show."""
        bench.store.lookup(shared().key, "a", 30.0)
        bench.pass_time(31)
        assert postgres.lookup(rival, shared().key, "b", 30.0) is True
        with blocked(bench, lambda: bench.store.lookup(shared().key, "c", 30.0)) as lookup:
            rival.commit()
        assert lookup.result() is False


class TestStatements:
    """How many statements each call costs, counted where they leave for the server."""

    @pytest.fixture
    def count(self, bench: SQLBench) -> Callable[[Callable[[], Any]], int]:
        """Return a function that counts what another one sends."""
        sent: list[str] = []
        assert isinstance(bench.store, SQLStore)
        event.listen(
            bench.store.engine, "before_cursor_execute", lambda *arguments: sent.append(str(arguments[2]))
        )

        def counted(work: Callable[[], Any]) -> int:
            sent.clear()
            work()
            return len(sent)

        return counted

    def test_a_happy_run_costs_one_statement_a_call(
        self, bench: SQLBench, count: Callable[[Callable[[], Any]], int]
    ) -> None:
        """acquire, restore, each save, each heartbeat and the end: one each, so n steps cost n + 3."""
        store, lease = bench.store, bench.take(owner="first")
        assert count(lambda: bench.take(owner="first")) == 1
        assert count(lambda: store.restore(lease, [output().key])) == 1
        assert count(lambda: store.save(lease, output(), execution())) == 1
        assert count(lambda: store.save(lease, output("ship"), None)) == 1
        assert count(lambda: store.extend([lease, lease], [(shared().key, "a", 1.0)])) == 1
        assert count(lambda: store.extend([lease])) == 1
        assert count(lambda: store.end(lease, ending(executions=[execution("a"), execution("b")]))) == 1
        assert count(lambda: store.find_run(GRAPH, RUN)) == 1

    def test_a_global_hit_costs_one_statement_and_a_miss_two(
        self, bench: SQLBench, count: Callable[[Callable[[], Any]], int]
    ) -> None:
        """Looking up claims in the same statement; publishing gives the claim up in the same statement."""
        store = bench.store
        assert count(lambda: store.lookup(shared().key, "a", 30.0)) == 1
        assert count(lambda: store.lookup(shared().key, "b", 30.0)) == 1
        assert count(lambda: store.publish(shared(), "a", execution("infer"))) == 1
        assert count(lambda: store.lookup(shared().key, "b", 30.0)) == 1
        assert count(lambda: store.disclaim(shared().key, "b")) == 1

    def test_the_unhappy_ways_cost_one_more(
        self, bench: SQLBench, count: Callable[[Callable[[], Any]], int]
    ) -> None:
        """A refused run, a winner and a repeated end are read in a second statement."""
        store, lease = bench.store, bench.take()
        store.save(lease, output(), None)
        store.publish(shared(), "a", None)
        assert count(lambda: bench.refused(owner="second")) == 2
        assert count(lambda: store.save(lease, output(), None)) == 2
        assert count(lambda: store.publish(shared(), "b", None)) == 2
        store.end(lease, ending())
        assert count(lambda: store.end(lease, ending())) == 2

    def test_a_quarantine_is_one_statement(
        self, bench: SQLBench, count: Callable[[Callable[[], Any]], int]
    ) -> None:
        """It is decided and committed where the lease would have been."""
        bench.take(max_deliveries=1)
        bench.pass_time(31)
        assert count(lambda: bench.refused(owner="second", max_deliveries=1)) == 1

    def test_no_connection_is_held_between_calls(self, bench: SQLBench) -> None:
        """User code never runs with a connection of ours checked out."""
        bench.take()
        assert isinstance(bench.store, SQLStore)
        pool = bench.store.engine.pool
        assert isinstance(pool, QueuePool)
        assert (pool.checkedout(), pool.size()) == (0, 2)
        assert bench.sql("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'")[0][0] == 0

    def test_spent_claims_are_swept_by_later_publishers(self, bench: SQLBench) -> None:
        """A published claim stays a minute for late readers, then goes: the table does not grow for ever."""
        for index in range(6):
            key = shared(key=bytes([index]) * 32)
            bench.store.lookup(key.key, "a", 30.0)
            bench.store.publish(key, "a", None)
            bench.pass_time(120)
        assert bench.sql("SELECT count(*) FROM docket_claims")[0][0] <= 2


class TestConnections:
    """What a connection is set to, and what happens when it goes."""

    def settings(self, url: str) -> dict[str, str]:
        """Return what the server says of a store's connection."""
        store = SQLStore(url)
        names = [
            "statement_timeout",
            "default_transaction_isolation",
            "application_name",
            "search_path",
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
        """Connecting, a statement, and unanswered data; and nothing is prepared on the server."""
        assert self.settings(database_url) == {
            "statement_timeout": "15s",
            "default_transaction_isolation": "read committed",
            "application_name": "docket_celery",
            "keepalives_idle": "10",
            "tcp_user_timeout": "10000",
            "search_path": '"$user", public',
            "prepare_threshold": "None",
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

    def test_empty_options_send_none(self, database_url: str) -> None:
        """For poolers that refuse start-up options."""
        assert self.settings(f"{database_url}?options=")["statement_timeout"] == "0"
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
        postgres.extend(rival, [lease], [])
        url = make_url(database_url).update_query_dict({"options": "-c statement_timeout=100"})
        store = SQLStore(url)
        with pytest.raises(StoreUnavailable, match=r"did not save the checkpoint: .*57014"):
            store.save(lease, output(), None)
        rival.rollback()
        assert store.save(lease, output(), None).key == output().key
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

        steps = {2: create("two", 2), 3: create("three", 3), 4: fail}
        engine = create_engine(make_url(empty_database_url))
        with engine.begin() as connection:
            assert schema.upgrade(connection, steps, 3) == 3
            assert schema.upgrade(connection, steps, 3) == 3
        with pytest.raises(Exception, match="division by zero"), engine.begin() as connection:
            schema.upgrade(connection, steps, 4)
        with engine.connect() as connection:
            assert (schema.find_version(connection), ran) == (3, [2, 3])
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
