"""Purging on Postgres: through the indexes however much there is, and past the locks of others."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, make_url, text

from docket_celery.store import SQLStore
from docket_celery.store.records import Purged, RunState
from docket_celery.store.sql import purging, runs
from tests.conformance.blocking import blocked, keep_open
from tests.conformance.samples import RUN, SQLBench, ending, execution, output, request, shared

pytestmark = [pytest.mark.integration, pytest.mark.leaves_lease]

# 60,000 runs that are kept for another month, with what they have; a thousand of each kind are due.
FILL = """
INSERT INTO docket_runs (graph, execution_id, retries, target, job, job_digest, state, stage, epoch, lost, failures,
    created_at, updated_at, expires_at)
SELECT 'checkout', 'order-' || n, 0, 'shop.Shipment', '', decode(repeat('64', 32), 'hex'), 'SUCCEEDED', 0, 1, 0, 0,
    now(), now(), now() + n * interval '1 second' - interval '1000 seconds'
FROM generate_series(1, 60000) AS n;
INSERT INTO docket_executions (graph, execution_id, step_name, item, delivery, attempts, cached, status, started_at,
    duration_ms, worker)
SELECT 'checkout', 'order-' || n % 60000, 'charge', '', 1, 1, false, 'SUCCEEDED', now(), 1, ''
FROM generate_series(1, 120000) AS n;
INSERT INTO docket_cache (cache_key, execution_id, graph, step_name, step_version, item, input_hash, output_type,
    output_data, checksum, created_at, expires_at)
SELECT sha256(n::text::bytea), CASE WHEN n % 2 = 0 THEN 'order-' || n END, 'checkout', 'charge', '', '', '', 'shop.X',
    '', sha256(''), now(), now() + n * interval '1 second' - interval '1000 seconds'
FROM generate_series(1, 60000) AS n;
INSERT INTO docket_claims (cache_key, owner, lease_until)
SELECT sha256(n::text::bytea), 'a', now() + n * interval '1 second' - interval '1000 seconds'
FROM generate_series(1, 60000) AS n;
INSERT INTO docket_chunks (graph, execution_id, stage, lo, hi, state, epoch, retries, lost, failed)
SELECT 'checkout', 'order-' || n, 1, 0, 1, 'SUCCEEDED', 1, 0, 0, 0 FROM generate_series(1, 60000) AS n;
ANALYZE docket_runs, docket_executions, docket_cache, docket_claims, docket_chunks;
"""


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


def plans(bench: SQLBench, work: Callable[[], object]) -> dict[str, str]:
    """Return how Postgres would execute the statements of *work* on full tables; it is done on all but empty ones."""
    assert isinstance(bench.store, SQLStore)
    bench.store.end(bench.take(execution_id="due"), ending(retention_s=60.0))
    bench.pass_time(120)
    engine, found = bench.store.engine, list[tuple[str, Any]]()

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement not in {"BEGIN", "COMMIT"}:
            found.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    work()
    event.remove(engine, "before_cursor_execute", note)
    bench.sql(FILL)
    with engine.connect() as connection:
        return {
            statement: "\n".join(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars())
            for statement, parameters in found
        }


def test_no_statement_reads_a_whole_table(bench: SQLBench) -> None:
    """With many rows that are not due, only those that are, and what belongs to them, are looked at."""
    shown = plans(bench, lambda: bench.store.purge(1000))
    due = []
    for plan in shown.values():
        assert re.findall(r"Seq Scan on docket_\w+", plan) == [], plan
        due += re.findall(r"Index Scan using (ix_\w+(?:expired|lease)) on .*\n\s+Index Cond: ", plan)
    cache, claims = "ix_docket_cache_expired", "ix_docket_claims_lease"
    assert due == ["ix_docket_runs_expired"] * 6 + [cache, claims]


def test_what_is_due_is_deleted_and_the_rest_stays(bench: SQLBench) -> None:
    """A thousand of each, in passes that are bounded; the statement timeout of the store holds for each."""
    bench.sql(FILL)
    total, passes = Purged(), 0
    while deleted := bench.store.purge(1000):
        total += deleted
        passes += 1
    # Half of the checkpoints are shared; the clock has gone on while this ran.
    assert 1000 <= total.runs < 1200
    assert 1998 <= total.executions < 2400
    assert 1000 <= total.checkpoints < 1200
    assert 938 <= total.claims < 1200
    assert total.chunks == total.runs
    assert passes >= 10
    left = bench.sql("SELECT count(*), min(expires_at) > now() - interval '10 seconds' FROM docket_runs")
    assert left == [(60000 - total.runs, True)]


def test_sweeping_claims_beside_publishing_uses_the_index(bench: SQLBench) -> None:
    """Each result that is published takes two dead claims along, however many are alive."""
    (shown,) = plans(bench, lambda: bench.store.publish(shared(), "a", execution())).values()
    assert "ix_docket_claims_lease" in shown
    assert "Seq Scan" not in shown, shown


def test_rows_that_another_one_holds_are_left_to_it(bench: SQLBench, rival: Connection) -> None:
    """Nobody waits: what is skipped now is deleted next time."""
    bench.store.end(bench.take(), ending(retention_s=60.0))
    bench.store.publish(shared(ttl_s=60.0), "a", None)
    bench.store.lookup(shared("claimed").key, "a", 30.0)
    bench.pass_time(120)
    for table in ("docket_runs", "docket_cache", "docket_claims"):
        rival.execute(text(f"SELECT 1 FROM {table} FOR UPDATE"))  # noqa: S608 -- our own names
    assert bench.store.purge(10) == Purged()
    rival.rollback()
    assert bench.store.purge(10) == Purged(runs=1, checkpoints=1, claims=1)


@pytest.mark.parametrize("commits", [True, False])
def test_a_run_that_is_being_resumed_keeps_its_checkpoints(
    bench: SQLBench, rival: Connection, commits: bool
) -> None:
    """Whoever takes the lease at this moment finds them; if it does not come to that, they go next time."""
    lease = bench.take()
    bench.store.save(lease, output(ttl_s=60.0), execution())
    bench.store.end(lease, ending(RunState.FAILED, retention_s=60.0))
    bench.pass_time(120)
    runs.acquire(rival, request("second"))
    assert bench.store.purge(10) == Purged()
    (rival.commit if commits else rival.rollback)()
    if commits:
        assert bench.store.purge(10) == Purged()
        assert len(bench.store.restore(bench.take(owner="second"), [])) == 1
    else:
        assert bench.store.purge(10) == Purged(runs=1, checkpoints=1, executions=1)


def test_a_submission_that_waits_for_the_purge_starts_anew(bench: SQLBench, rival: Connection) -> None:
    """It comes to a row that goes away under it, and makes its own."""
    lease = bench.take()
    bench.store.save(lease, output(), execution())
    bench.store.end(lease, ending(RunState.FAILED, retention_s=60.0))
    bench.pass_time(120)
    keep_open(rival)
    assert purging.purge(rival, 10).runs == 1
    with blocked(bench, lambda: bench.take(owner="second")) as take:
        rival.commit()
    assert take.result().epoch == 1
    assert bench.store.restore(take.result(), []) == []
    assert bench.store.find_run("checkout", RUN) is not None
