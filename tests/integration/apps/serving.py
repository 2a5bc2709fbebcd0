"""One worker for all tests of a module."""

from __future__ import annotations

import os
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import redis
from celery import Celery

from docket_celery.testing.workers import forget_connections
from tests.infra import servers
from tests.infra.workers import WorkerProcess, WorkerSpec, checkout_environment
from tests.integration.apps.journal import JOURNALS, RESULTS

_URL_KEYS = ("broker_url", "result_backend")


@dataclass(frozen=True, slots=True, kw_only=True)
class Urls:
    """Where a module's app and its worker meet.

    Attributes:
        broker: Celery's.
        results: Celery's result backend.
        database: This library's.
        journals: A Redis; empty: that of the results.
    """

    broker: str
    results: str
    database: str
    journals: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process that works with them."""
        return checkout_environment(
            {
                "CELERY_BROKER_URL": self.broker,
                RESULTS: self.results,
                JOURNALS: self.journals,
                "DOCKET_CELERY_DATABASE_URL": self.database,
            }
        )


def own_urls(server_urls: servers.ServerUrls, database_url: str) -> Urls:
    """Return this pytest process's servers, with Redis emptied."""
    process = os.environ.get("PYTEST_XDIST_WORKER", "master")
    broker, results = servers.redis_urls(server_urls.broker_url, process)
    servers.flush(broker, results)
    return Urls(broker=broker, results=results, database=database_url)


_met: WeakKeyDictionary[Celery, tuple[str, str]] = WeakKeyDictionary()
"""Where each app was pointed last: it keeps its connections, which are good for as long as it stays there."""


@contextmanager
def connected(app: Celery, urls: Urls) -> Generator[Celery]:
    """Point *app* of this process at *urls* for the length of a module."""
    before = {key: app.conf.get(key) for key in (*_URL_KEYS, "docket_database_url")}
    app.conf.update(broker_url=urls.broker, result_backend=urls.results, docket_database_url=urls.database)
    here = urls.broker, urls.results
    if _met.get(app, here) != here:
        forget_connections(app)
    _met[app] = here
    try:
        yield app
    finally:
        app.conf.update(before)


@contextmanager
def serving(
    app: Celery,
    urls: Urls,
    directory: Path,
    *,
    pool: str = "prefork",
    concurrency: int = 2,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Generator[WorkerProcess]:
    """Run a worker of *app* and point *app* of this process at the same servers."""
    spec = WorkerSpec(pool=pool, concurrency=concurrency, app=app.main or "", env=dict(env or {}), args=args)
    with connected(app, urls), WorkerProcess(spec, directory=directory, env=urls.environment) as worker:
        yield worker


def unique(name: str) -> str:
    """Return a name that no other test uses, for runs and journals."""
    return f"{name}-{uuid.uuid4().hex[:12]}"


def queue_length(url: str, queue: str = "celery") -> int:
    """Return how many messages wait in a Redis *queue*."""
    with redis.Redis.from_url(url) as client:
        return int(client.llen(queue))  # type: ignore[arg-type, unused-ignore]


def drop_queue(url: str, queue: str) -> None:
    """Forget the messages that wait in a Redis *queue*."""
    with redis.Redis.from_url(url) as client:
        client.delete(queue)


def query(urls: Urls, statement: str, *values: object) -> list[tuple[Any, ...]]:
    """Look into the database behind the store's back."""
    with servers.connect(urls.database) as connection:
        return connection.execute(statement, values).fetchall()  # type: ignore[arg-type, unused-ignore]
