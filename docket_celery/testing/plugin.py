"""The pytest plugin: fixtures with real servers and real workers.

pytest imports this in every environment that has the library, so it imports nothing else before a fixture is used.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from celery import Celery
    from google.protobuf.message import Message

    from docket_celery.store import SQLStore
    from docket_celery.task.task import GraphTask
    from docket_celery.testing.databases import Databases
    from docket_celery.testing.matrix import CrashReport
    from docket_celery.testing.modes import Bench
    from docket_celery.testing.recording import Events
    from docket_celery.testing.workers import Servers, Worker

_OPTIONS = {
    "docket_database_url": "SQLAlchemy URL of a Postgres that tests may make databases on (default: start one)",
    "docket_broker_url": "URL of a Redis database for tests alone, emptied before each (default: start one)",
}
_LOGS = pytest.StashKey[list[Path]]()
_LOG_CHARS = 20_000


class StartWorker(Protocol):
    """The type of the `docket_worker` fixture."""

    def __call__(
        self,
        app: Celery | str,
        *,
        pool: str = "prefork",
        concurrency: int = 2,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
    ) -> Worker:
        """Start a worker and return it when it is ready.

        Args:
            app: The Celery app, or its path as for ``celery -A``.
            pool: Celery's name: prefork, threads, solo, gevent.
            concurrency: Processes, threads or greenlets.
            env: More environment variables.
            args: More arguments of ``celery worker``.
        """
        ...


class TaskCrashMatrix(Protocol):
    """The type of the `docket_crash_matrix` fixture."""

    def __call__(
        self,
        task: GraphTask[Any, Any],
        /,
        *inputs: Message,
        effects: Sequence[Any] = (),
        execution_id: str | None = None,
        timeout_s: float = 60.0,
    ) -> CrashReport:
        """Kill the job at every boundary in a worker, have Celery deliver it again, and check as `crash_matrix` does.

        Args:
            task: The task; another process must be able to import its app.
            *inputs: The job.
            effects: As for `crash_matrix`.
            execution_id: Names the run; default: a new name.
            timeout_s: Seconds until a submission has its result.

        Raises:
            CrashMatrixFailed: A promise was broken, or a boundary was not reached again.
            InvalidArguments: No step of the task persists.
        """
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare what may be set in pytest's configuration."""
    for name, text in _OPTIONS.items():
        parser.addini(name, text, default="")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the logs of its workers to the report of a failed test."""
    report = yield
    if report.failed:
        for log in item.stash.get(_LOGS, list[Path]()):
            text = log.read_text(encoding="utf-8", errors="replace")
            report.sections.append((f"worker log {log.name}", text[-_LOG_CHARS:]))
    return report


# --- servers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def docket_databases(pytestconfig: pytest.Config) -> Generator[Databases]:
    """Makes databases on the test run's Postgres; for tests that need more than `docket_database_url`."""
    from docket_celery.testing.databases import Databases
    from docket_celery.testing.servers import server

    with server(pytestconfig.getini("docket_database_url"), "docket_database_url") as url:
        made = Databases(url)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def docket_database_url(docket_databases: Databases) -> Generator[str]:
    """SQLAlchemy URL of a Postgres database of this test's own, with this release's tables, dropped afterwards."""
    with docket_databases.fresh() as url:
        yield url


@pytest.fixture(scope="session")
def docket_redis_url(pytestconfig: pytest.Config) -> Generator[str]:
    """URL of the test run's Redis, database 0 where it was started here; results are in the database after it."""
    from docket_celery.testing.servers import server

    with server(pytestconfig.getini("docket_broker_url"), "docket_broker_url") as url:
        yield url


@pytest.fixture
def docket_servers(docket_redis_url: str, docket_database_url: str) -> Servers:
    """This test's broker and result backend, emptied before it, and its database."""
    from docket_celery.testing.workers import Servers, empty

    server, _, number = docket_redis_url.rpartition("/")
    result_url = f"{server}/{int(number or 0) + 1}"
    empty(docket_redis_url, result_url)
    return Servers(broker_url=docket_redis_url, result_url=result_url, database_url=docket_database_url)


# --- what tests ask for ------------------------------------------------------------------------------------------


@pytest.fixture
def docket_store(docket_database_url: str) -> Generator[SQLStore]:
    """An `SQLStore` on a Postgres database of this test's own, with this release's tables."""
    from docket_celery.store import SQLStore

    store = SQLStore(docket_database_url)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def docket_worker(
    request: pytest.FixtureRequest, tmp_path: Path, docket_servers: Servers
) -> Generator[StartWorker]:
    """A function that starts a real worker for an app, with this test's broker, results and database.

    The app of this process uses the same servers until the end of the test. All workers are stopped then; their logs
    are part of the report of a failed test.
    """
    from docket_celery.testing.workers import Worker, find_app, find_path, pointed_at

    with ExitStack() as stack:
        pointed: list[Celery] = []

        def start(
            app: Celery | str,
            *,
            pool: str = "prefork",
            concurrency: int = 2,
            env: Mapping[str, str] | None = None,
            args: Sequence[str] = (),
        ) -> Worker:
            path, found = find_path(app), find_app(app)
            if not any(each is found for each in pointed):
                stack.enter_context(pointed_at(found, docket_servers))
                pointed.append(found)
            argv = [f"--pool={pool}", f"--concurrency={concurrency}", "--loglevel=INFO", *args]
            worker = Worker(path, docket_servers, directory=tmp_path, argv=argv, env=env)
            stack.callback(worker.stop)
            request.node.stash.setdefault(_LOGS, list[Path]()).append(worker.log)
            return worker

        yield start


@pytest.fixture
def docket_crash_matrix(
    request: pytest.FixtureRequest, tmp_path: Path, docket_servers: Servers, docket_store: SQLStore
) -> Generator[TaskCrashMatrix]:
    """The crash matrix of a GraphTask: killed at every boundary in a real worker, delivered again by Celery."""
    from docket_celery.testing.task_crashes import task_crash_matrix
    from docket_celery.testing.workers import Worker, find_path, pointed_at

    with ExitStack() as stack:

        def start(app: Celery, watched: dict[str, str]) -> Worker:
            stack.enter_context(pointed_at(app, docket_servers))
            argv = ["--pool=prefork", "--concurrency=1", "--loglevel=INFO"]
            worker = Worker(find_path(app), docket_servers, directory=tmp_path, argv=argv, watched=watched)
            stack.callback(worker.stop)
            request.node.stash.setdefault(_LOGS, list[Path]()).append(worker.log)
            return worker

        def play(
            task: GraphTask[Any, Any],
            /,
            *inputs: Message,
            effects: Sequence[Any] = (),
            execution_id: str | None = None,
            timeout_s: float = 60.0,
        ) -> CrashReport:
            return task_crash_matrix(
                task,
                inputs,
                start=start,
                store=docket_store,
                folder=tmp_path,
                effects=effects,
                execution_id=execution_id,
                timeout_s=timeout_s,
            )

        yield play


@pytest.fixture
def docket_inline() -> Generator[Bench]:
    """`docket_celery.testing.inline` around the test."""
    from docket_celery.testing.modes import inline

    with inline() as bench:
        yield bench


@pytest.fixture
def docket_events() -> Generator[Events]:
    """The events of all runs that the test begins: `docket_celery.testing.record_events` around it."""
    from docket_celery.testing.recording import record_events

    with record_events() as events:
        yield events
