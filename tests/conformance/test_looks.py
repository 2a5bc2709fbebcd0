"""Looking for lost runs: many look at once, each takes so many at most, and less often the longer nothing helps."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, create_engine, event

from docket_celery.store import SQLStore
from docket_celery.store.contract import BatchStore
from docket_celery.store.records import Chunk, ChunkEnd, ChunkRequest, Lease, RunState
from docket_celery.store.rules import LONGEST_LOOK_S
from docket_celery.store.sql import upkeep
from tests.conformance.blocking import keep_open
from tests.conformance.samples import GRAPH, Bench, SQLBench

LEASE_S = 30.0
WITHIN_S = 10
TASKS = ["shop.rate_all"]


@pytest.fixture
def rival(database_url: str) -> Generator[Connection]:
    """A connection of somebody else's, who does not commit before the test says so."""
    engine = create_engine(database_url)
    try:
        with engine.connect() as connection:
            keep_open(connection)
            yield connection
    finally:
        engine.dispose()


def lose(bench: Bench, batches: BatchStore, *runs: str) -> None:
    """Leave *runs* with a stage that is done, and without the body that should go on; each is due now."""
    for run in runs:
        lease = bench.take(execution_id=run, task_id=run, task_name=TASKS[0])
        batches.open_stage(lease, 1, [Chunk(1, 0, 2)], 0, message=b"{}")
        chunk = batches.lease_chunk(
            ChunkRequest(
                graph=GRAPH, execution_id=run, stage=1, lo=0, owner=run, lease_s=LEASE_S, max_deliveries=9
            )
        )
        assert isinstance(chunk, Lease)
        batches.end_chunk(chunk, ChunkEnd(state=RunState.SUCCEEDED))
    bench.pass_time(LEASE_S + 1)


def look(batches: BatchStore, limit: int = 10) -> list[str]:
    """Look once; return the names of the runs that are lost."""
    return sorted(one.execution_id for one in batches.find_lost(TASKS, LEASE_S, 3, limit))


def test_a_look_takes_so_many_at_most(bench: Bench, batches: BatchStore) -> None:
    """The next one finds the others, and none finds a run that another one has just sent on."""
    lose(bench, batches, "first", "second", "third")
    found = [look(batches, limit=2), look(batches, limit=2), look(batches, limit=2)]
    assert [len(names) for names in found] == [2, 1, 0]
    assert sorted(name for names in found for name in names) == ["first", "second", "third"]


def test_two_who_look_at_once_never_find_the_same(postgres_store: SQLStore, rival: Connection) -> None:
    """What one has locked the other passes by, without waiting for it; after them nothing is left to be found."""
    lose(SQLBench(postgres_store), postgres_store, "first", "second", "third")
    seen = [one.execution_id for one in upkeep.find_lost(rival, TASKS, LEASE_S, 3, 1)]
    with ThreadPoolExecutor(max_workers=1) as pool:
        others = pool.submit(look, postgres_store)
        try:
            assert sorted([*seen, *others.result(WITHIN_S)]) == ["first", "second", "third"]
            assert len(seen) == 1
            rival.commit()
        finally:
            rival.rollback()
    assert look(postgres_store) == []


def test_a_run_that_was_locked_is_found_by_the_next_look(postgres_store: SQLStore, rival: Connection) -> None:
    """Whoever had it may have died before it sent the run on."""
    lose(SQLBench(postgres_store), postgres_store, "first", "second")
    (seen,) = [one.execution_id for one in upkeep.find_lost(rival, TASKS, LEASE_S, 3, 1)]
    with ThreadPoolExecutor(max_workers=1) as pool:
        others = pool.submit(look, postgres_store)
        try:
            assert others.result(WITHIN_S) == [name for name in ("first", "second") if name != seen]
        finally:
            rival.rollback()
    assert look(postgres_store) == [seen]


def test_a_look_locks_one_run_at_a_time(postgres_store: SQLStore, rival: Connection) -> None:
    """What it has looked at is free while it looks at the others."""
    lose(SQLBench(postgres_store), postgres_store, "first", "second", "third")
    free = list[int]()

    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement == "COMMIT":
            runs = rival.exec_driver_sql("SELECT 1 FROM docket_runs FOR UPDATE SKIP LOCKED")
            free.append(len(runs.all()))
            rival.rollback()

    event.listen(postgres_store.engine, "before_cursor_execute", count)
    assert look(postgres_store) == ["first", "second", "third"]
    assert free == [2, 2, 2]


def test_looks_become_rarer_the_longer_nothing_happens(bench: Bench, batches: BatchStore) -> None:
    """Each pause is as long as the silence before it, so that a long queue does not fill up with copies."""
    lose(bench, batches, "silent")
    silence_s = LEASE_S + 1
    for _ in range(4):
        assert look(batches) == ["silent"]
        bench.pass_time(silence_s - 1)
        assert look(batches) == []
        bench.pass_time(2)
        silence_s += silence_s + 1


def test_a_silent_run_is_looked_at_every_hour_all_the_same(bench: Bench, batches: BatchStore) -> None:
    """However long ago its last sign of life was."""
    assert isinstance(bench, SQLBench)
    lose(bench, batches, "silent")
    earlier = bench.earlier("updated_at", 50 * LONGEST_LOOK_S)
    bench.sql(f"UPDATE docket_runs SET updated_at = {earlier}")  # noqa: S608 -- a name from above
    for _ in range(3):
        assert look(batches) == ["silent"]
        bench.pass_time(LONGEST_LOOK_S - 5)
        assert look(batches) == []
        bench.pass_time(6)
