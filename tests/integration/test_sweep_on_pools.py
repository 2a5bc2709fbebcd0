"""The sweep in workers of every pool: a batch whose chord Redis has forgotten ends all the same."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import pytest
import redis

from examples.movies.movies_pb2 import Movie
from tests.infra.processes import wait_until
from tests.infra.workers import WorkerProcess
from tests.integration.apps import paced
from tests.integration.apps.journal import Journals
from tests.integration.apps.serving import Urls, serving, unique

pytestmark = pytest.mark.integration
WAIT_S = 30
# Short, so that the sweep comes soon.
ENV = {"DOCKET_CELERY_LEASE_SECONDS": "1", "DOCKET_CELERY_THREADS": "4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """How a worker runs its tasks.

    Attributes:
        name: Celery's.
        concurrency: Tasks at a time, where the pool can.
        args: More of the command line.
    """

    name: str
    concurrency: int = 2
    args: Sequence[str] = ()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(Pool(name="threads"), id="threads"),
        pytest.param(Pool(name="solo"), id="solo"),
        # Under gevent a worker whose prefetch is full looks for messages in Redis every 2 s only.
        pytest.param(Pool(name="gevent", concurrency=20), id="gevent"),
        pytest.param(Pool(name="prefork"), id="prefork"),
        pytest.param(Pool(name="prefork", args=["--max-tasks-per-child=1"]), id="one-task-per-child"),
    ],
)
def pool(request: pytest.FixtureRequest) -> Pool:
    """One of them after the other; each has one worker."""
    found: Pool = request.param
    return found


@pytest.fixture(scope="module", autouse=True)
def worker(pool: Pool, urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """A worker with that pool."""
    directory = tmp_path_factory.mktemp("worker")
    with serving(
        paced.app, urls, directory, pool=pool.name, concurrency=pool.concurrency, env=ENV, args=pool.args
    ) as started:
        yield started


def test_a_batch_whose_join_is_lost_ends(journals: Journals, urls: Urls, worker: WorkerProcess) -> None:
    """The worker that ran its chunks looks for it, finds it and goes on with it; each item ran once."""
    run = unique("forgotten")
    items = [Movie(title=run, rating=number) for number in range(4)]
    sent = paced.gather_all.apply_async((items,), execution_id=run)
    journals.wait(f"{run}/began", 2)
    with redis.Redis.from_url(urls.results) as client:
        keys = [key for suffix in "jtsdc" for key in client.keys(f"celery-taskset-meta-*.{suffix}")]  # type: ignore[union-attr, unused-ignore]
        assert keys
        client.delete(*keys)
        client.rpush(f"journal:{run}/go", *["go"] * 4)
    assert sent.get(timeout=WAIT_S).count == 4
    assert sorted(journals.read(f"{run}/ended")) == ["0", "1", "2", "3"]
    assert journals.read(f"gather/{run}") == ["4"]
    found = f"run {run!r} of graph 'pacing' is not advanced by any worker"
    assert found in worker.read_log()


def test_an_idle_worker_goes_on_looking(journals: Journals, urls: Urls, worker: WorkerProcess) -> None:
    """It finds a batch that another worker left behind, though no task of its own has begun meanwhile."""
    run, queue = unique("left"), unique("gone")
    directory = worker.log.parent
    with serving(paced.app, urls, directory, concurrency=1, env=ENV, args=["-Q", queue]) as doomed:
        items = [Movie(title=run, rating=number) for number in range(2)]
        sent = paced.gather_all.apply_async((items,), execution_id=run, queue=queue)
        journals.wait(f"{run}/began", 2)
        doomed.kill()
    found = f"run {run!r} of graph 'pacing' is not advanced by any worker"
    wait_until(lambda: found in worker.read_log(), within_s=WAIT_S, what=f"a look that finds {run}")
    with redis.Redis.from_url(urls.broker) as client:
        wait_until(lambda: bool(client.llen(queue)), within_s=WAIT_S, what=f"a message for {run}")
        client.delete(queue)
    assert not sent.ready()
    assert paced.gather_all.handle(run).cancel()
