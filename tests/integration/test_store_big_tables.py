"""What workers ask the database again and again reads what is due, however large the tables are."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, event, text

from docket_celery.store import SQLStore
from docket_celery.store.records import Purged
from tests.conformance.samples import SQLBench, ending, execution, output
from tests.infra import servers
from tests.integration.test_deploying_page import statements

pytestmark = [pytest.mark.integration, pytest.mark.leaves_lease]

TASKS = ["shop.rate_all"]
WITHIN_S = 10.0
TIMES = 8
"""So often the driver has prepared a statement, and Postgres has made a plan that stays."""
# 100,000 runs of which nothing is due. Two thousand are of no batch and were abandoned: their lease is over, or their
# retry never came. Every hundredth was a batch; those at work or waiting are to be looked at tomorrow.
FILL = """
INSERT INTO docket_runs (graph, execution_id, task_name, retries, target, job, job_digest, state, stage, epoch, lost,
    failures, lease_until, wake_at, message, created_at, updated_at, ended_at, expires_at)
SELECT 'checkout', md5(n::text), 'shop.rate_all', 0, 'shop.Shipment', '', decode(repeat('64', 32), 'hex'), state, 0,
    1, 0, 0, CASE state WHEN 'RUNNING' THEN moment END, CASE state WHEN 'WAITING' THEN moment END,
    CASE WHEN n % 100 = 0 THEN decode('7b7d', 'hex') END, now(), now(),
    CASE WHEN state NOT IN ('RUNNING', 'WAITING') THEN now() END,
    CASE WHEN state NOT IN ('RUNNING', 'WAITING') THEN now() + n * interval '1 second' + interval '1 day' END
FROM (
    SELECT n, now() + CASE WHEN n % 10 = 0 THEN interval '1 day' ELSE interval '-1 day' END AS moment,
        CASE WHEN n % 100 = 1 OR n % 10000 = 0 THEN 'RUNNING' WHEN n % 100 = 51 OR n % 10000 = 100 THEN 'WAITING'
            WHEN n % 100 = 50 THEN 'CANCELLED' ELSE 'SUCCEEDED' END AS state
    FROM generate_series(1, 100000) AS n) AS runs;
INSERT INTO docket_executions (graph, execution_id, step_name, item, delivery, attempts, cached, status, started_at,
    duration_ms, worker)
SELECT 'checkout', md5(n::text), 'charge', '', 1, 1, false, 'SUCCEEDED', now(), 1, ''
FROM generate_series(1, 100000) AS n;
INSERT INTO docket_cache (cache_key, execution_id, graph, step_name, step_version, item, input_hash, output_type,
    output_data, checksum, created_at, expires_at)
SELECT sha256(n::text::bytea), CASE WHEN n % 2 = 0 THEN md5(n::text) END, 'checkout', 'charge', '', '', '', 'shop.X',
    '', sha256(''), now(), now() + n * interval '1 second' + interval '1 day'
FROM generate_series(1, 100000) AS n;
INSERT INTO docket_chunks (graph, execution_id, stage, lo, hi, state, epoch, retries, lost, failed, lease_until)
SELECT 'checkout', md5(n::text), 1, 0, 1, 'RUNNING', 1, 0, 0, 0, now() - interval '1 day'
FROM generate_series(1, 100000) AS n;
INSERT INTO docket_claims (cache_key, owner, lease_until)
SELECT sha256(n::text::bytea), 'a', now() + interval '1 day' FROM generate_series(1, 100) AS n;
"""


class Database:
    """A database of its own; each of its sessions is closed at once."""

    def __init__(self, url: str, engine: Engine) -> None:
        self.url, self._engine = url, engine

    def sql(self, statement: str) -> list[Any]:
        """Run SQL of the test's own."""
        with self._engine.connect() as connection:
            result = connection.execute(text(statement))
            return list(result) if result.returns_rows else []

    def call(self, work: Callable[[SQLStore], Any]) -> Any:
        """Do *work* with a store of its own."""
        store = SQLStore(self.url)
        try:
            return work(store)
        finally:
            store.close()

    def counted(self, statement: str) -> list[Any]:
        """Return what Postgres has counted, once all other sessions have added their part: at their end."""
        others = (
            "datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        deadline = time.monotonic() + WITHIN_S
        while self.sql(f"SELECT 1 FROM pg_stat_activity WHERE {others}"):  # noqa: S608 -- from above
            assert time.monotonic() < deadline
        return self.sql(statement)

    def blocks(self) -> int:
        """Return how many pages of tables and indexes have been read, in memory or not."""
        counted = "heap_blks_read + heap_blks_hit + coalesce(idx_blks_read + idx_blks_hit, 0)"
        ((found,),) = self.counted(f"SELECT sum({counted}) FROM pg_statio_user_tables")  # noqa: S608 -- from above
        return int(found)

    def used_indexes(self, table: str) -> set[str]:
        """Return the names of the indexes of *table* through which rows were looked for."""
        used = f"SELECT indexrelname FROM pg_stat_user_indexes WHERE relname = '{table}' AND idx_scan > 0"  # noqa: S608 -- ours
        return {name for (name,) in self.counted(used)}


@pytest.fixture(scope="module")
def server_url(request: pytest.FixtureRequest) -> str:
    """The server, for databases that no other test has filled or analysed."""
    urls: servers.ServerUrls = request.getfixturevalue("server_urls")
    return urls.database_url


def _open(server_url: str) -> Generator[Database]:
    with servers.temporary_database(server_url, migrated=True) as url:
        engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        yield Database(url, engine)
        engine.dispose()


@pytest.fixture
def empty(server_url: str) -> Generator[Database]:
    """New tables."""
    yield from _open(server_url)


@pytest.fixture(scope="module", params=["never analysed", "analysed"])
def full(request: pytest.FixtureRequest, server_url: str) -> Generator[Database]:
    """Large tables; the planner knows what is in them, or not."""
    for database in _open(server_url):
        for table in ("docket_runs", "docket_executions", "docket_cache", "docket_chunks", "docket_claims"):
            database.sql(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
        database.sql(FILL)
        if request.param == "analysed":
            database.sql("VACUUM ANALYZE")
        yield database


def look(store: SQLStore) -> object:
    """Look for lost runs once."""
    return store.find_lost(TASKS, 30.0, 3, 20)


def test_a_look_reads_a_handful_of_pages(full: Database) -> None:
    """Neither the runs of no batch nor the ended ones are looked at, nor those whose time has not come."""
    before = full.blocks()
    assert full.call(lambda store: [look(store) for _ in range(TIMES)]) == [[]] * TIMES
    assert full.blocks() - before <= 30 * TIMES


def test_a_purge_with_nothing_due_reads_a_handful_of_pages(full: Database) -> None:
    """One step into an index for the runs, one for the checkpoints; the table of claims is small."""
    before = full.blocks()
    assert full.call(lambda store: [store.purge(1000) for _ in range(TIMES)]) == [Purged()] * TIMES
    assert full.blocks() - before <= 30 * TIMES


def test_people_see_what_is_under_way_or_failed_through_an_index(full: Database) -> None:
    """The queries of docs/deploying.md that a dashboard repeats."""
    for query in (one for one in statements() if "FROM docket_runs" in one):
        plan = "\n".join(line for (line,) in full.sql(f"EXPLAIN {query}"))
        assert re.search("ix_docket_runs_(live|failed)", plan), plan
        assert "Seq Scan" not in plan, plan


@pytest.mark.parametrize(("work", "most"), [(look, 1), (lambda store: store.purge(1000), 3)])
def test_nothing_due_takes_few_statements(
    empty: Database, work: Callable[[SQLStore], Any], most: int
) -> None:
    """No transaction is begun, and nothing is locked."""
    statements = list[str]()

    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    def counted(store: SQLStore) -> None:
        event.listen(store.engine, "before_cursor_execute", count)
        work(store)

    empty.call(counted)
    assert len(statements) == most, statements


def test_a_run_is_found_by_its_key_on_tables_of_which_nothing_is_known(empty: Database) -> None:
    """An index by state would look as good there, and a plan that was made once stays: it reads all running runs."""

    def work(store: SQLStore) -> None:
        bench = SQLBench(store)
        for number in range(20):
            name = f"order-{number}"
            lease = bench.take(execution_id=name)
            store.save(lease, output(execution_id=name), execution(execution_id=name))
            assert store.extend([lease], [])
            store.end(lease, ending(retention_s=60.0))
            assert store.find_run(lease.graph, name) is not None

    empty.call(work)
    assert empty.used_indexes("docket_runs") == {"pk_docket_runs"}


def test_a_heartbeat_changes_no_index(empty: Database) -> None:
    """No index has what it writes, so the row's new version stays on its page."""

    def work(store: SQLStore) -> None:
        lease = SQLBench(store).take()
        for _ in range(3):
            assert store.extend([lease], [])
        store.end(lease, ending(retention_s=60.0))

    empty.call(work)
    updates = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'docket_runs'"
    assert [tuple(row) for row in empty.counted(updates)] == [(4, 3)]
