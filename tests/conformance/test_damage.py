from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from docket_celery.errors import CorruptCheckpoint
from docket_celery.store import SQLStore
from docket_celery.store.records import RunState
from tests.conformance.samples import GRAPH, RUN, Bench, SQLBench, ending, output, shared

pytestmark = pytest.mark.leaves_lease

COLUMNS = [
    "execution_id",
    "graph",
    "step_name",
    "step_version",
    "item",
    "item_index",
    "input_hash",
    "output_type",
    "output_data",
    "checksum",
]
Check = Callable[[], Any]


def flips(value: bytes, bits: range) -> Iterator[bytes]:
    """Return *value* once for each of *bits* of each byte, that bit flipped."""
    for index in range(len(value)):
        for bit in bits:
            yield value[:index] + bytes([value[index] ^ (1 << bit)]) + value[index + 1 :]


def survivors(file: Path, table: str, column: str, check: Check) -> list[str]:
    """Flip each bit of the one value of *column* in turn; return those that *check* did not refuse."""
    missed: list[str] = []
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    look = f"SELECT typeof({column}), CAST({column} AS BLOB) FROM {table}"  # noqa: S608 -- our own names
    kind, stored = connection.execute(look).fetchone()
    change = f"UPDATE {table} SET {column} = CAST(? AS {kind})"  # noqa: S608 -- our own names
    for damaged in flips(stored, range(8)):
        try:
            connection.execute(change, (damaged,))
        except sqlite3.IntegrityError:
            continue
        try:
            check()
        except CorruptCheckpoint:
            continue
        missed.append(damaged.hex())
    connection.execute(change, (stored,))
    connection.close()
    check()
    return missed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the SQLite store of these tests is."""
    return tmp_path / "store.db"


@pytest.fixture
def sqlite_bench(file: Path) -> Iterator[SQLBench]:
    """A store in that file."""
    store = SQLStore(f"sqlite:///{file}")
    store.migrate()
    yield SQLBench(store)
    store.close()


@pytest.mark.parametrize("column", ["cache_key", *COLUMNS])
def test_every_flipped_bit_of_a_runs_checkpoint_is_noticed(
    sqlite_bench: SQLBench, file: Path, column: str
) -> None:
    """Each bit of each column that gives the row its meaning; the row is found by its other names."""
    lease = sqlite_bench.take()
    item = "" if column == "cache_key" else "7/3"
    saved = output(item=item, item_index=12)
    sqlite_bench.store.save(lease, saved, None)

    def check() -> None:
        assert len(sqlite_bench.store.restore(lease, [saved.key])) == 1

    assert survivors(file, "docket_cache", column, check) == []


@pytest.mark.parametrize("column", COLUMNS)
def test_every_flipped_bit_of_a_shared_checkpoint_is_noticed(
    sqlite_bench: SQLBench, file: Path, column: str
) -> None:
    """A flipped key alone is a miss: nobody asks for it, and what is computed again is stored beside it."""
    sqlite_bench.store.publish(shared(item_index=12, step_version="2", item="3"), "a", None)
    if column == "execution_id":
        sqlite_bench.sql("UPDATE docket_cache SET execution_id = 'order-17'")
        with pytest.raises(CorruptCheckpoint):
            sqlite_bench.store.lookup(shared().key, "a", 30.0)
        return

    def check() -> None:
        assert sqlite_bench.store.lookup(shared().key, "a", 30.0) is not False

    assert survivors(file, "docket_cache", column, check) == []


@pytest.mark.parametrize("column", ["result", "result_checksum", "target"])
def test_every_flipped_bit_of_a_result_is_noticed(sqlite_bench: SQLBench, file: Path, column: str) -> None:
    """Whoever reads the outcome gets an error, never another result."""
    sqlite_bench.store.end(sqlite_bench.take(), ending())

    def check() -> None:
        assert sqlite_bench.refused(owner="second").result == ending().result
        assert sqlite_bench.store.find_run(GRAPH, RUN) is not None

    assert survivors(file, "docket_runs", column, check) == []


@pytest.mark.parametrize("column", ["cache_key", *COLUMNS])
def test_postgres_notices_damage_in_every_column(postgres_store: SQLStore, column: str) -> None:
    """The lowest bit of each byte, or another number, in each column that gives the row its meaning."""
    bench = SQLBench(postgres_store)
    lease = bench.take()
    saved = output(item="" if column == "cache_key" else "7/3", item_index=12)
    bench.store.save(lease, saved, None)
    (kept,) = bench.sql(f"SELECT {column} FROM docket_cache")[0]  # noqa: S608 -- our own names
    damaged: list[Any] = [13]
    if isinstance(kept, str):
        damaged = [flipped.decode() for flipped in flips(kept.encode(), range(1))]
    elif isinstance(kept, bytes):
        damaged = list(flips(kept, range(8)))
    for value in damaged:
        bench.sql(f"UPDATE docket_cache SET {column} = :value", value=value)  # noqa: S608 -- our own names
        with pytest.raises(CorruptCheckpoint):
            bench.store.restore(lease, [saved.key])
    assert damaged


def test_postgres_notices_a_damaged_result(postgres_store: SQLStore) -> None:
    """Each bit of the result, and a result that is gone."""
    bench = SQLBench(postgres_store)
    bench.store.end(bench.take(), ending())
    for value in [*flips(ending().result or b"", range(8)), None, b""]:
        bench.sql("UPDATE docket_runs SET result = :value", value=value)
        with pytest.raises(CorruptCheckpoint, match=RUN):
            bench.store.find_run(GRAPH, RUN)
        with pytest.raises(CorruptCheckpoint, match=RUN):
            bench.refused(owner="second")


def test_a_damaged_winner_is_neither_used_nor_overwritten(sql_bench: SQLBench) -> None:
    """A second saver and a second publisher get the error; the row stays for whoever repairs it."""
    lease = sql_bench.take()
    sql_bench.store.save(lease, output(), None)
    sql_bench.store.publish(shared(), "a", None)
    sql_bench.sql("UPDATE docket_cache SET output_data = :data", data=b"damaged")
    with pytest.raises(CorruptCheckpoint, match=output().key.hex()):
        sql_bench.store.save(lease, output(), None)
    with pytest.raises(CorruptCheckpoint, match=shared().key.hex()):
        sql_bench.store.publish(shared(), "b", None)
    assert {bytes(row[0]) for row in sql_bench.sql("SELECT output_data FROM docket_cache")} == {b"damaged"}


def test_a_state_that_nobody_writes_is_refused_by_the_table(sql_bench: SQLBench) -> None:
    """The states are a check of the table itself."""
    sql_bench.take()
    with pytest.raises(Exception, match="ck_docket_runs_state"):
        sql_bench.sql("UPDATE docket_runs SET state = 'LOST'")
    assert sql_bench.state() is RunState.RUNNING


def test_every_store_is_benched(bench: Bench) -> None:
    """The suite's levers work: time passes for a lease."""
    bench.take()
    before = bench.refused(owner="second").lease_left_s
    bench.pass_time(10)
    after = bench.refused(owner="second").lease_left_s
    assert before is not None
    assert after is not None
    assert 9 < before - after < 11
