"""The stores under one suite, each with a way to let time pass and to look behind the contract."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from docket_celery.store import MemoryStore, SQLStore
from docket_celery.store.contract import BatchStore
from tests.codecs import CODEC
from tests.conformance.samples import Bench, SQLBench


@pytest.fixture
def postgres_store(database_url: str) -> Generator[SQLStore]:
    """A store on real Postgres, its tables empty."""
    store = SQLStore(database_url)
    yield store
    store.close()


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


@pytest.fixture
def postgres_codec_store(database_url: str) -> Generator[SQLStore]:
    """The same with a codec."""
    store = SQLStore(database_url, codec=CODEC)
    yield store
    store.close()


@pytest.fixture(
    params=["memory", "sqlite_memory", "sqlite_file", "sqlite_codec", "postgres", "postgres_codec"]
)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Bench]:
    """Each store in turn, empty."""
    if request.param == "memory":
        yield _MemoryBench()
    elif request.param.startswith("postgres"):
        yield SQLBench(request.getfixturevalue(f"{request.param}_store"))
    else:
        file = "" if request.param == "sqlite_memory" else f"/{tmp_path / 'store.db'}"
        store = SQLStore(f"sqlite://{file}", codec=CODEC if request.param == "sqlite_codec" else None)
        store.migrate()
        yield SQLBench(store)
        # An engine over memory keeps its connection for as long as the data must live: until here.
        store.engine.dispose()


@pytest.fixture(params=["sqlite_file", "postgres"])
def sql_bench(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[SQLBench]:
    """Each store that keeps rows which can be damaged from outside."""
    if request.param == "postgres":
        yield SQLBench(request.getfixturevalue("postgres_store"))
    else:
        store = SQLStore(f"sqlite:///{tmp_path / 'store.db'}")
        store.migrate()
        yield SQLBench(store)
        store.close()


@pytest.fixture
def batches(bench: Bench) -> BatchStore:
    """A store that several workers can share."""
    if not isinstance(bench.store, BatchStore):
        pytest.skip("memory serves one process")
    return bench.store
