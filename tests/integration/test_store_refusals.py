"""Databases, rights and addresses with which no run can work, and those that come back by themselves."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import pytest
from celery import Celery
from sqlalchemy import Connection, create_engine, make_url, text

from docket_celery import Graph, Scope
from docket_celery.errors import InvalidSettings, SchemaMismatch, StoreRefused, StoreUnavailable
from docket_celery.store import SQLStore
from docket_celery.store.records import Chunk, ChunkRequest, Halt, Lease
from docket_celery.task.checks import find_faults
from docket_celery.task.decorators import graph_task
from tests.conformance.samples import GRAPH, RUN, SQLBench, ending, execution, output, request, shared
from tests.infra import servers
from tests.unit.protos.shop_pb2 import Order, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.leaves_lease]


@pytest.fixture
def bench(database_url: str) -> Generator[SQLBench]:
    """A store on real Postgres, empty."""
    store = SQLStore(database_url)
    yield SQLBench(store)
    store.close()


@contextmanager
def admin_of(url: str) -> Iterator[Connection]:
    """Yield a connection that commits each statement by itself."""
    engine = create_engine(make_url(url), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.fixture
def locked_run(database_url: str, bench: SQLBench) -> Generator[Lease]:
    """The lease of a run whose row another session has locked for as long as the test takes."""
    lease = bench.take(execution_id="locked")
    engine = create_engine(make_url(database_url))
    with engine.connect() as rival:
        rival.execute(text("SELECT 1 FROM docket_runs WHERE execution_id = 'locked' FOR UPDATE"))
        yield lease
    engine.dispose()


class TestLockedRows:
    """A backup or a person in psql holds one row for longer than a lease."""

    def test_a_locked_run_costs_no_other_run_its_lease(self, bench: SQLBench, locked_run: Lease) -> None:
        """The others are extended at once; the locked one is neither extended nor lost."""
        others = [bench.take(execution_id=f"order-{number}") for number in range(5)]
        bench.store.lookup(shared().key, "a", 5.0)
        before = bench.sql("SELECT execution_id, lease_until FROM docket_runs")
        held = bench.store.extend([*others, locked_run], [(shared().key, "a", 300.0)])
        assert held == {lease.name: None for lease in others} | {locked_run.name: Halt.LOCKED}
        moved = [
            row.execution_id
            for row, (_, was) in zip(
                bench.sql("SELECT execution_id, lease_until FROM docket_runs ORDER BY execution_id"),
                sorted(tuple(row) for row in before),
                strict=True,
            )
            if row.lease_until > was
        ]
        assert moved == [f"order-{number}" for number in range(5)]
        ((left,),) = bench.sql(
            "SELECT lease_until > clock_timestamp() + interval '1 minute' FROM docket_claims"
        )
        assert left

    def test_a_locked_chunk_costs_no_other_chunk_its_lease(self, bench: SQLBench, database_url: str) -> None:
        """As for runs."""
        store = bench.store
        assert isinstance(store, SQLStore)
        store.open_stage(bench.take(), 1, [Chunk(1, 0, 5), Chunk(1, 5, 9)], 0)
        leases: list[Lease] = []
        for lo in (0, 5):
            asked = ChunkRequest(
                graph=GRAPH, execution_id=RUN, stage=1, lo=lo, owner="a", lease_s=30.0, max_deliveries=3
            )
            lease = store.lease_chunk(asked)
            assert isinstance(lease, Lease)
            leases.append(lease)
        engine = create_engine(make_url(database_url))
        with engine.connect() as rival:
            rival.execute(text("SELECT 1 FROM docket_chunks WHERE lo = 0 FOR UPDATE"))
            assert store.extend(leases) == {leases[0].name: Halt.LOCKED, leases[1].name: None}
        engine.dispose()
        assert store.extend(leases) == {leases[0].name: None, leases[1].name: None}

    def test_a_run_that_is_locked_for_a_moment_is_extended(self, bench: SQLBench, database_url: str) -> None:
        """A save locks the row too, and ends soon."""
        lease = bench.take()
        engine = create_engine(make_url(database_url))
        with engine.connect() as rival:
            rival.execute(text("SELECT 1 FROM docket_runs FOR SHARE"))
            timer = threading.Timer(0.2, rival.rollback)
            timer.start()
            assert bench.store.extend([lease]) == {lease.name: None}
            timer.join()
        engine.dispose()


class TestFailover:
    """The old primary stays up, read-only, and another server has its address."""

    def test_connections_to_a_server_that_became_read_only_are_closed(
        self, bench: SQLBench, database_url: str
    ) -> None:
        """The next call connects again, and finds a primary."""
        lease = bench.take()
        assert isinstance(bench.store, SQLStore)
        bench.store.save(lease, output(), execution())
        name = make_url(database_url).database
        with bench.store.engine.connect() as pooled:
            pooled.execute(text("SET default_transaction_read_only = on"))
            old = pooled.execute(text("SELECT pg_backend_pid()")).scalar_one()
        bench.store.save(lease, output("ship"), None)
        with bench.store.engine.connect() as pooled:
            assert pooled.execute(text("SELECT pg_backend_pid()")).scalar_one() != old
        with admin_of(database_url) as admin:
            admin.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
            try:
                bench.store.engine.dispose()
                with pytest.raises(StoreUnavailable, match="25006"):
                    bench.store.end(lease, ending())
            finally:
                admin.execute(text("SET default_transaction_read_only = off"))
                admin.execute(text(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'))
        bench.store.end(lease, ending())


@pytest.fixture(params=["LATIN1", "SQL_ASCII", "EUC_JP"])
def narrow_url(request: pytest.FixtureRequest, server_urls: servers.ServerUrls) -> Generator[str]:
    """An empty database whose encoding cannot hold every text."""
    name = f"docket_narrow_{secrets.token_hex(4)}"
    with admin_of(server_urls.database_url) as admin:
        admin.execute(
            text(f"CREATE DATABASE {name} ENCODING '{request.param}' LOCALE 'C' TEMPLATE template0")
        )
        yield servers.database_at(server_urls.database_url, name)
        admin.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


class TestDatabasesThatRefuse:
    """What trying again does not cure is told before anything runs."""

    def test_a_database_of_another_encoding_gets_no_tables(self, narrow_url: str) -> None:
        """Neither by the migration, nor is it accepted with tables that were made before."""
        store = SQLStore(narrow_url)
        with pytest.raises(StoreRefused, match=r"encoding is (LATIN1|SQL_ASCII|EUC_JP); create .*UTF8"):
            store.migrate()
        with pytest.raises(SchemaMismatch):
            store.check_schema()
        store.close()

    @pytest.fixture
    def role(self, empty_database_url: str) -> Generator[tuple[str, Connection]]:
        """A URL of a role without rights in a migrated database, and the owner's connection."""
        store = SQLStore(empty_database_url)
        store.migrate()
        store.close()
        name, password = f"docket_role_{secrets.token_hex(4)}", secrets.token_hex(8)
        with admin_of(empty_database_url) as admin:
            admin.execute(text(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'"))
            url = make_url(empty_database_url).set(username=name, password=password)
            yield url.render_as_string(hide_password=False), admin
            admin.execute(text(f"DROP OWNED BY {name}"))
            admin.execute(text(f"DROP ROLE {name}"))

    def test_a_missing_right_is_found_before_a_worker_starts(self, role: tuple[str, Connection]) -> None:
        """The table and the right are named, by the check and by a save."""
        url, admin = role
        user = make_url(url).username
        store = SQLStore(url)
        with pytest.raises(StoreRefused, match="docket"):
            store.check_schema()
        admin.execute(text(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {user}"))
        store.check_schema()
        lease = store.acquire(request())
        assert isinstance(lease, Lease)
        admin.execute(text(f"REVOKE INSERT ON docket_cache FROM {user}"))
        with pytest.raises(StoreRefused, match="INSERT on table docket_cache is missing"):
            store.check_schema()
        with pytest.raises(StoreRefused, match=r"permission denied .*42501.*grant"):
            store.save(lease, output(), None)
        store.close()

    def test_a_missing_table_is_found_before_a_worker_starts(self, empty_database_url: str) -> None:
        """Though the version is stamped."""
        store = SQLStore(empty_database_url)
        store.migrate()
        with admin_of(empty_database_url) as admin:
            admin.execute(text("DROP TABLE docket_claims"))
        with pytest.raises(StoreRefused, match="docket_claims is missing"):
            store.check_schema()
        store.close()

    def test_a_refused_save_is_not_the_steps_failure(self, role: tuple[str, Connection]) -> None:
        """The run fails with the store's error; the step did what it was to do."""
        url, admin = role
        user = make_url(url).username
        admin.execute(text(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {user}"))
        admin.execute(text(f"REVOKE INSERT ON docket_cache FROM {user}"))
        store = SQLStore(url)
        graph = Graph("refusals", store=store)

        @graph.step(persist=Scope.WORKFLOW)
        def charge(order: Order) -> Shipment:
            return Shipment(tracking_id="1")

        with pytest.raises(StoreRefused, match="42501"):
            graph.execute(Shipment, Order(order_id="17"), execution_id="refused")
        store.close()

    def test_a_worker_does_not_start_on_it(
        self, role: tuple[str, Connection], connect_app: Callable[[Celery], Celery]
    ) -> None:
        """The fault is one of those that keep a worker from starting."""
        graph = Graph("refusals", store=SQLStore(role[0]))

        @graph.step(persist=Scope.WORKFLOW)
        def charge(order: Order) -> Shipment:
            return Shipment(tracking_id="1")

        app = connect_app(Celery("refusals"))

        @graph_task(app, graph, name="refusals.charge")
        def task(order: Order) -> Shipment:
            raise NotImplementedError

        (fault,) = find_faults(app, "solo")
        assert "DC4" in fault


class TestAddressesThatCannotWork:
    """A URL that can never work stops a worker at its start; while it runs, no job is lost over it."""

    def refused(self, url: str) -> str:
        """Return what the check says of *url*; any other call is unavailable."""
        store = SQLStore(url)
        with pytest.raises(InvalidSettings) as refused:
            store.check_schema()
        with pytest.raises(StoreUnavailable):
            store.find_run(GRAPH, RUN)
        store.close()
        return str(refused.value)

    def test_a_wrong_password_is_a_fault_of_the_setting(self, database_url: str) -> None:
        """Without the password in its text."""
        url = make_url(database_url).set(password="wrong-" + secrets.token_hex(8))
        told = self.refused(url.render_as_string(hide_password=False))
        assert "password authentication failed" in told
        assert str(url.password) not in told

    def test_an_unknown_database_and_an_unknown_role_are_too(self, database_url: str) -> None:
        """Each with what to do."""
        url = make_url(database_url)
        told = self.refused(url.set(database="nowhere").render_as_string(hide_password=False))
        assert "create the database or correct its name" in told

    def test_an_unknown_option_of_the_url_is_too(self, database_url: str) -> None:
        """As libpq names it."""
        assert 'invalid connection option "sslmod"' in self.refused(f"{database_url}?sslmod=require")
