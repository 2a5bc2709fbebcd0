from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from docket_celery.store import SQLStore
from docket_celery.store.records import RunState
from tests.conformance.samples import RUN, SQLBench, ending, execution, output, shared

pytestmark = pytest.mark.leaves_lease


def moment(value: Any) -> datetime:
    """Return a stored time, which SQLite keeps as text in UTC."""
    if isinstance(value, datetime):
        return value
    return datetime.strptime(value, "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC)


def times(bench: SQLBench, table: str, *columns: str) -> list[datetime | None]:
    """Return the times in the one row of *table*."""
    (row,) = bench.sql(f"SELECT {', '.join(columns)} FROM {table}")  # noqa: S608 -- our own names
    return [None if value is None else moment(value) for value in row]


def test_a_running_run_has_no_other_dates_than_its_start(sql_bench: SQLBench) -> None:
    """A new run is created and started now, leased, and neither ended nor parked nor due for purging."""
    sql_bench.take()
    created, started, until = times(sql_bench, "docket_runs", "created_at", "started_at", "lease_until")
    assert created is not None
    assert started == created
    assert until is not None
    assert abs(until - created - timedelta(seconds=30)) < timedelta(seconds=1)
    assert times(sql_bench, "docket_runs", "ended_at", "wake_at", "expires_at") == [None, None, None]


def test_an_ended_run_may_be_purged_after_its_retention(sql_bench: SQLBench) -> None:
    """The retention counts from the end; without one the run stays."""
    sql_bench.store.end(sql_bench.take(), ending(retention_s=3600.0))
    ended, expires = times(sql_bench, "docket_runs", "ended_at", "expires_at")
    assert ended is not None
    assert expires is not None
    assert abs(expires - ended - timedelta(hours=1)) < timedelta(seconds=1)
    assert times(sql_bench, "docket_runs", "lease_until", "wake_at") == [None, None]


def test_an_ended_run_without_retention_stays(sql_bench: SQLBench) -> None:
    """No retention, no date."""
    sql_bench.store.end(sql_bench.take(), ending())
    assert times(sql_bench, "docket_runs", "expires_at") == [None]


def test_a_parked_run_has_a_wake_time_and_no_end(sql_bench: SQLBench) -> None:
    """Retention and checkpoint dates wait for the end."""
    lease = sql_bench.take()
    sql_bench.store.save(lease, output(ttl_s=60.0), None)
    sql_bench.store.end(lease, ending(RunState.WAITING, wake_in_s=60.0, retention_s=3600.0))
    wake, updated = times(sql_bench, "docket_runs", "wake_at", "updated_at")
    assert wake is not None
    assert updated is not None
    assert abs(wake - updated - timedelta(minutes=1)) < timedelta(seconds=1)
    assert times(sql_bench, "docket_runs", "ended_at", "expires_at", "lease_until") == [None, None, None]
    assert times(sql_bench, "docket_cache", "expires_at") == [None]


def test_ending_dates_the_checkpoints_that_have_a_ttl(sql_bench: SQLBench) -> None:
    """A WORKFLOW checkpoint expires ttl seconds after its run's end, those of other runs not at all."""
    lease, other = sql_bench.take(), sql_bench.take(execution_id="order-18")
    sql_bench.store.save(lease, output(ttl_s=60.0), None)
    sql_bench.store.save(lease, output("ship"), None)
    sql_bench.store.save(other, output("other", execution_id="order-18", ttl_s=60.0), None)
    sql_bench.store.end(lease, ending())
    (ended,) = [
        moment(row[0]) for row in sql_bench.sql("SELECT ended_at FROM docket_runs WHERE ended_at IS NOT NULL")
    ]
    dates = dict(tuple(row) for row in sql_bench.sql("SELECT step_name, expires_at FROM docket_cache"))
    assert (dates["ship"], dates["other"]) == (None, None)
    assert abs(moment(dates["charge"]) - ended - timedelta(minutes=1)) < timedelta(seconds=1)


def test_resuming_takes_all_dates_back(sql_bench: SQLBench) -> None:
    """Nothing of a live run is due for purging."""
    lease = sql_bench.take()
    sql_bench.store.save(lease, output(ttl_s=60.0), None)
    sql_bench.store.end(lease, ending(RunState.FAILED, retention_s=60.0))
    lease = sql_bench.take(owner="second")
    sql_bench.store.restore(lease, [])
    assert times(sql_bench, "docket_cache", "expires_at") == [None]
    assert times(sql_bench, "docket_runs", "expires_at", "ended_at") == [None, None]


def test_a_stale_owner_takes_no_dates_back(sql_bench: SQLBench) -> None:
    """Reading late must not keep an ended run's rows for ever."""
    lease = sql_bench.take()
    sql_bench.store.save(lease, output(ttl_s=60.0), None)
    sql_bench.store.end(lease, ending(RunState.FAILED))
    assert len(sql_bench.store.restore(lease, [])) == 1
    assert times(sql_bench, "docket_cache", "expires_at") != [None]


def test_a_step_execution_is_kept_whole(sql_bench: SQLBench) -> None:
    """Saved with a checkpoint or at the end, each column has what was said, to the microsecond."""
    lease = sql_bench.take()
    row = execution(item="7/3", error_code="DC202", error_message="late", worker="w1@host", task_id="t1")
    sql_bench.store.save(lease, output(), row)
    sql_bench.store.end(lease, ending(executions=[row, execution("ship", cached=True, attempts=0)]))
    found = sql_bench.sql(
        "SELECT graph, execution_id, step_name, item, delivery, attempts, cached, status, started_at, duration_ms, "
        "error_code, error_message, worker, task_id FROM docket_executions ORDER BY id"
    )
    assert [tuple(kept)[:6] for kept in found] == [
        ("checkout", RUN, "charge", "7/3", 1, 1),
        ("checkout", RUN, "charge", "7/3", 1, 1),
        ("checkout", RUN, "ship", "", 1, 0),
    ]
    assert [bool(kept[6]) for kept in found] == [False, False, True]
    assert moment(found[0][8]) == row.started_at
    assert tuple(found[1])[9:] == (1.5, "DC202", "late", "w1@host", "t1")
    assert tuple(found[2])[9:] == (1.5, None, None, "", None)


@pytest.fixture
def filled(postgres_store: SQLStore) -> SQLBench:
    """A database in which an order ran, an inference was shared, and another one expired."""
    bench = SQLBench(postgres_store)
    lease = bench.take(execution_id="order-12345")
    bench.store.save(lease, output(execution_id="order-12345"), execution(execution_id="order-12345"))
    bench.store.publish(shared("MLInference"), "a", execution("MLInference"))
    late = execution("MLInference", delivery=2, cached=True, attempts=0)
    bench.store.end(lease, ending(executions=[late]))
    bench.store.publish(shared("old", ttl_s=1.0), "a", None)
    bench.pass_time(60)
    return bench


def test_cached_results_are_queryable_by_step(filled: SQLBench) -> None:
    """The guide's example 4."""
    rows = filled.sql("""
SELECT
    step_name,
    input_hash,
    output_data,
    created_at
FROM docket_cache
WHERE step_name = 'MLInference'
ORDER BY created_at DESC;
""")
    assert [(row[0], row[1], bytes(row[2])) for row in rows] == [("MLInference", "cd" * 32, b"\x08\x02")]


def test_expired_rows_can_be_deleted_by_hand(filled: SQLBench) -> None:
    """The guide's persistence model."""
    filled.sql("DELETE FROM docket_cache WHERE expires_at < NOW();")
    rows = filled.sql("SELECT step_name FROM docket_cache ORDER BY step_name")
    assert [row[0] for row in rows] == ["MLInference", "charge"]


def test_the_steps_of_an_execution_are_listed(filled: SQLBench) -> None:
    """The guide's observability, first query."""
    rows = filled.sql("""
-- Find cached results for a specific execution
SELECT step_name, created_at
FROM docket_cache
WHERE execution_id = 'order-12345'
ORDER BY created_at;
""")
    assert [row[0] for row in rows] == ["charge"]


def test_the_hit_rate_is_counted(filled: SQLBench) -> None:
    """The guide's observability, second query; its colons are the driver's business, not SQLAlchemy's."""
    statement = """
-- See cache hit rate for expensive step
SELECT
    COUNT(*) as total_executions,
    COUNT(CASE WHEN cached THEN 1 END) as cache_hits,
    (COUNT(CASE WHEN cached THEN 1 END)::float / COUNT(*)) * 100 as hit_rate
FROM docket_executions
WHERE step_name = 'MLInference';
"""
    assert isinstance(filled.store, SQLStore)
    with filled.store.engine.connect() as connection:
        assert connection.exec_driver_sql(statement).one() == (2, 1, 50.0)


def test_everything_of_an_execution_is_selected(filled: SQLBench) -> None:
    """The guide's limitations, number 5; the view is JSON that SQL can look into."""
    rows = filled.sql("SELECT * FROM docket_cache WHERE execution_id = 'order-12345'")
    assert rows[0].output_json == {"id": "ch_1"}
    assert rows[0].execution_id == "order-12345"
    ids = filled.sql("SELECT output_json->>'id' FROM docket_cache WHERE output_json @> '{\"id\": \"ch_1\"}'")
    assert [row[0] for row in ids] == ["ch_1"]


def test_a_run_that_is_taken_again_has_neither_error_nor_result(sql_bench: SQLBench) -> None:
    """Nor JSON's null: people look for rows with ``error IS NULL``."""
    lease = sql_bench.take()
    sql_bench.store.end(lease, ending(RunState.FAILED, error={"code": "DC200", "args": ["sold out", None]}))
    sql_bench.take(owner="second", task_id="t2")
    rows = sql_bench.sql("SELECT error IS NULL, result IS NULL, ended_at IS NULL FROM docket_runs")
    assert [tuple(map(bool, row)) for row in rows] == [(True, True, True)]
