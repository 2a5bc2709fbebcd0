"""Servers, workers and the watch over leftovers, for every test."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import kombu.pools
import pytest
from celery import Celery

from tests.infra import leaks, servers
from tests.infra.flower import FlowerProcess
from tests.infra.workers import APP, WorkerProcess, WorkerSpec, checkout_environment

LOGS = pytest.StashKey[list[Path]]()
HIDDEN = pytest.StashKey[Any]()
LASTING = pytest.StashKey[Any]()
DATABASE = pytest.StashKey[str]()
STARTED = pytest.StashKey[tuple[Any, servers.ServerUrls]]()
SETTLE_S = 3.0
"""What ends by itself may take this long after a test."""


class StartWorker(Protocol):
    """The type of the `start_worker` fixture; the arguments are `WorkerSpec`'s."""

    def __call__(
        self,
        pool: str = "prefork",
        concurrency: int = 2,
        app: str = APP,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
    ) -> WorkerProcess:
        """Start a worker and return it when it consumes."""
        ...


class StartFlower(Protocol):
    """The type of the `start_flower` fixture."""

    def __call__(self, app: str = APP, args: Sequence[str] = ()) -> FlowerProcess:
        """Start Flower and return it when it answers."""
        ...


def pytest_configure(config: pytest.Config) -> None:
    """Keep tests away from servers that the environment names, and declare our marks."""
    # A shell starts background jobs with SIGINT ignored, and children inherit that: tests that interrupt need it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[LASTING] = set()
    config.stash[HIDDEN] = servers.hide_environment()
    config.addinivalue_line("markers", "leaves_lease: ends while a run's lease is live, on purpose")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the servers that xdist's controller started."""
    if (started := config.stash.get(STARTED, None)) is not None:
        started[0].stop()
    os.environ.update(config.stash[HIDDEN])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that wait for servers and workers first, so that short files fill the end of a parallel run.

    The order is that of pytest-randomly otherwise. Every process of xdist must come to the same one.
    """
    items.sort(key=lambda item: "integration" not in item.path.parts)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Start one pair of servers for all of xdist's processes, and tell them where."""
    config: pytest.Config = node.config
    if servers.only_unit_tests(config):
        return
    if STARTED not in config.stash:
        config.stash[STARTED] = servers.start_servers()
    urls = config.stash[STARTED][1]
    node.workerinput["docket_servers"] = {"database_url": urls.database_url, "broker_url": urls.broker_url}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the logs of a failed test's processes to its report."""
    report = yield
    if report.failed:
        for log in item.stash.get(LOGS, list[Path]()):
            report.sections.append((f"log {log.name}", log.read_text(errors="replace")[-20_000:]))
    return report


@pytest.fixture(autouse=True)
def _no_leftovers(request: pytest.FixtureRequest) -> Generator[None]:
    """Fail a test that leaves a thread, a process, a database session or a live lease behind."""
    children, threads = leaks.child_pids(), leaks.library_threads()
    yield
    found: dict[str, list[str]] = {}
    _close_idle()
    if (url := request.node.stash.get(DATABASE, None)) is not None:
        if request.node.get_closest_marker("leaves_lease") is None:
            found["live leases"] = leaks.live_leases(url, SETTLE_S)
        found["database sessions"] = leaks.connections_left(url, SETTLE_S)
    found["threads"] = leaks.threads_left(threads, SETTLE_S)
    found["processes"] = leaks.children_left(children | request.config.stash[LASTING], SETTLE_S)
    left = {kind: names for kind, names in found.items() if names}
    if left:
        pytest.fail(f"the test left behind: {left}", pytrace=False)


def _close_idle() -> None:
    """End the process's idle threads and stores, which are meant to stay for the next run."""
    if (state := sys.modules.get("docket_celery.engine.process.state")) is not None:
        state.process.close_runtimes()
        state.process.close_instances()
        state.process.close_stores()


@pytest.fixture(scope="session")
def server_urls(request: pytest.FixtureRequest) -> Generator[servers.ServerUrls]:
    """Postgres and Redis of the test run, started by the first test that asks, stopped at the end."""
    given = getattr(request.config, "workerinput", {}).get("docket_servers")
    if given is not None:
        yield servers.ServerUrls(**given)
        return
    before = leaks.child_pids()
    started, urls = servers.start_servers()
    # They stay, though a test may have been the first to ask.
    request.config.stash[LASTING].update(leaks.child_pids() - before)
    try:
        yield urls
    finally:
        started.stop()


@pytest.fixture(scope="session")
def _redis_urls(server_urls: servers.ServerUrls) -> tuple[str, str]:
    """The URLs of this process's broker and result databases."""
    return servers.redis_urls(server_urls.broker_url, os.environ.get("PYTEST_XDIST_WORKER", "master"))


@pytest.fixture
def broker_url(_redis_urls: tuple[str, str]) -> str:
    """Celery's broker: a Redis database of this process, emptied before the test; results are emptied too."""
    servers.flush(*_redis_urls)
    return _redis_urls[0]


@pytest.fixture
def result_url(broker_url: str, _redis_urls: tuple[str, str]) -> str:
    """Celery's result backend: a Redis database of this process, emptied before the test."""
    return _redis_urls[1]


@pytest.fixture(scope="session")
def session_database_url(server_urls: servers.ServerUrls) -> Generator[str]:
    """This process's database, with this release's tables; tests take `database_url`."""
    with servers.temporary_database(server_urls.database_url, migrated=True) as url:
        yield url


@pytest.fixture
def database_url(request: pytest.FixtureRequest, session_database_url: str) -> str:
    """SQLAlchemy URL of a Postgres database with this release's tables, emptied before the test.

    After the test nothing of it may hold a session there, and no run may hold a live lease.
    """
    servers.truncate(session_database_url)
    request.node.stash[DATABASE] = session_database_url
    return session_database_url


@pytest.fixture
def empty_database_url(server_urls: servers.ServerUrls) -> Generator[str]:
    """SQLAlchemy URL of a Postgres database without any table, dropped after the test."""
    with servers.temporary_database(server_urls.database_url, migrated=False) as url:
        yield url


@pytest.fixture
def worker_env(broker_url: str, result_url: str, database_url: str) -> dict[str, str]:
    """The environment of a process that works with this test's broker, results and database."""
    return checkout_environment(
        {
            "CELERY_BROKER_URL": broker_url,
            "CELERY_RESULT_BACKEND": result_url,
            "DOCKET_CELERY_DATABASE_URL": database_url,
        }
    )


@pytest.fixture
def start_worker(
    request: pytest.FixtureRequest, tmp_path: Path, worker_env: dict[str, str]
) -> Generator[StartWorker]:
    """A function that starts a Celery worker on this test's servers and returns it when it consumes.

    What it returns is a context manager too. All workers are stopped after the test; their logs are part of
    the report of a failed test.
    """
    with ExitStack() as stack:

        def start(
            pool: str = "prefork",
            concurrency: int = 2,
            app: str = APP,
            env: Mapping[str, str] | None = None,
            args: Sequence[str] = (),
        ) -> WorkerProcess:
            spec = WorkerSpec(pool=pool, concurrency=concurrency, app=app, env=dict(env or {}), args=args)
            worker = WorkerProcess(spec, directory=tmp_path, env=worker_env)
            stack.callback(worker.stop)
            request.node.stash.setdefault(LOGS, list[Path]()).append(worker.log)
            return worker

        yield start


@pytest.fixture
def start_flower(
    request: pytest.FixtureRequest, tmp_path: Path, worker_env: dict[str, str]
) -> Generator[StartFlower]:
    """A function that starts Flower on this test's broker, stopped after the test.

    Workers must send events for it to see tasks: ``start_worker(args=["-E"])``.
    """
    with ExitStack() as stack:

        def start(app: str = APP, args: Sequence[str] = ()) -> FlowerProcess:
            flower = FlowerProcess(app, directory=tmp_path, env=worker_env, args=args)
            stack.callback(flower.stop)
            request.node.stash.setdefault(LOGS, list[Path]()).append(flower.log)
            return flower

        yield start


@pytest.fixture(scope="session")
def _celery_connections() -> Generator[None]:
    """Close what Celery apps of this process opened, at the end: the pools are kombu's, for all apps."""
    yield
    kombu.pools.reset()


@pytest.fixture
def connect_app(
    _celery_connections: None, broker_url: str, result_url: str, database_url: str
) -> Callable[[Celery], Celery]:
    """A function that points a Celery app of this process at the test's servers."""

    def connect(app: Celery) -> Celery:
        app.conf.update(broker_url=broker_url, result_backend=result_url, docket_database_url=database_url)
        return app

    return connect
