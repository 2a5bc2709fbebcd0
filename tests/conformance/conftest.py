"""The stores under one suite, each with a way to let time pass and to look behind the contract."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from docket_celery.store import MemoryStore, SQLStore
from tests.conformance.samples import Bench
from tests.postgres import database_url, postgres_server_url, postgres_store

__all__ = ["database_url", "postgres_server_url", "postgres_store"]

_TIMES = [
    ("docket_runs", "lease_until"),
    ("docket_runs", "expires_at"),
    ("docket_cache", "expires_at"),
    ("docket_claims", "lease_until"),
]


class _MemoryBench(Bench):
    def __init__(self) -> None:
        self.now = 1_000.0
        store = MemoryStore(clock=lambda: self.now)
        super().__init__(store)
        self._memory = store

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def executions(self) -> list[tuple[str, int]]:
        return [(row.step_name, row.delivery) for row in self._memory.executions]


class _SQLBench(Bench):
    def __init__(self, store: SQLStore) -> None:
        super().__init__(store)
        self._sql = store

    def pass_time(self, seconds: float) -> None:
        """Move what is stored into the past: the clock is the database's."""
        moved = f"strftime('%Y-%m-%d %H:%M:%f', {{0}}, '-{seconds} seconds') || '000'"
        if self._sql.engine.dialect.name == "postgresql":
            moved = f"{{0}} - interval '{seconds} seconds'"
        for table, column in _TIMES:
            self.sql(f"UPDATE {table} SET {column} = {moved.format(column)}")

    def executions(self) -> list[tuple[str, int]]:
        rows = self.sql("SELECT step_name, delivery FROM docket_executions ORDER BY id")
        return [(row[0], row[1]) for row in rows]

    def sql(self, statement: str, **values: Any) -> list[Any]:
        with self._sql.engine.connect() as connection:
            result = connection.execute(text(statement), values)
            return list(result) if result.returns_rows else []


@pytest.fixture(params=["memory", "sqlite_memory", "sqlite_file", "postgres"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Bench]:
    """Each store in turn, empty."""
    if request.param == "memory":
        yield _MemoryBench()
    elif request.param == "postgres":
        yield _SQLBench(request.getfixturevalue("postgres_store"))
    else:
        file = "" if request.param == "sqlite_memory" else f"/{tmp_path / 'store.db'}"
        store = SQLStore(f"sqlite://{file}")
        store.migrate()
        yield _SQLBench(store)
        # An engine over memory keeps its connection for as long as the data must live: until here.
        store.engine.dispose()


@pytest.fixture(params=["sqlite_file", "postgres"])
def sql_bench(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[_SQLBench]:
    """Each store that keeps rows which can be damaged from outside."""
    if request.param == "postgres":
        yield _SQLBench(request.getfixturevalue("postgres_store"))
    else:
        store = SQLStore(f"sqlite:///{tmp_path / 'store.db'}")
        store.migrate()
        yield _SQLBench(store)
        store.close()
