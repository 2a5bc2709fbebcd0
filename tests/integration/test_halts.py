"""What a batch's parts do that come when others are at work: stopped ones end, second ones leave the first alone."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import redis

from docket_celery.errors import AbortError
from docket_celery.store import SQLStore
from docket_celery.store.records import LostRun
from docket_celery.task import chords
from examples.movies.movies_pb2 import Movie
from tests.infra.processes import wait_until
from tests.infra.workers import WorkerProcess
from tests.integration.apps import halting
from tests.integration.apps.journal import Journals
from tests.integration.apps.serving import Urls, query, serving, unique

pytestmark = pytest.mark.integration
WAIT_S = 30
# Short, so that workers hear soon of what others did.
ENV = {"DOCKET_CELERY_LEASE_SECONDS": "2", "DOCKET_CELERY_THREADS": "4"}


@pytest.fixture(scope="module", autouse=True)
def worker(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """A prefork worker with two children."""
    with serving(halting.app, urls, tmp_path_factory.mktemp("worker"), concurrency=2, env=ENV) as started:
        yield started


def movies(journal: str, count: int) -> list[Movie]:
    """Return that many movies."""
    return [Movie(title=journal, rating=number) for number in range(count)]


def tell(urls: Urls, journal: str) -> None:
    """Write a line that steps wait for."""
    with redis.Redis.from_url(urls.results) as client:
        client.rpush(f"journal:{journal}", "now")


def test_an_abort_reaches_chunks_of_other_processes(journals: Journals, urls: Urls) -> None:
    """Their items see that they are cancelled, and nothing that they still make is stored."""
    run = unique("halted")
    sent = halting.work_on_all.apply_async((movies(run, 4),), execution_id=run, context={"aborts": "0"})
    journals.wait(f"{run}/began", 4)
    tell(urls, f"{run}/go")
    # Item 1 is in the chunk of the one that stops the batch, 2 and 3 are in the other process.
    assert sorted(journals.wait(f"{run}/cancelled", 3)) == ["1", "2", "3"]
    with pytest.raises(AbortError, match="stop it all"):
        sent.get(timeout=WAIT_S)
    saved = "SELECT count(*) FROM docket_cache WHERE execution_id = %s AND step_name = 'work'"
    assert query(urls, saved, run) == [(0,)]


def lost_run(urls: Urls, run: str) -> LostRun:
    """Return a run as a sweep would find it that takes it for lost."""
    store = SQLStore(urls.database)
    statement = "SELECT task_name, retries, stage, message FROM docket_runs WHERE execution_id = %s"
    ((task_name, retries, stage, message),) = query(urls, statement, run)
    store.close()
    found = {"task_name": task_name, "retries": retries, "stage": stage, "message": bytes(message)}
    return LostRun(graph="halting", execution_id=run, **found)


def test_a_second_body_leaves_the_first_one_alone_and_a_retry_takes_over(
    journals: Journals, urls: Urls, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both have a greater count than the holder of the lease; only Celery's own retry has seen it die."""
    run, queue = unique("bodies"), unique("long")
    # Longer than the test: nobody takes the run because its lease is over.
    env = ENV | {"DOCKET_CELERY_LEASE_SECONDS": "120"}
    directory = tmp_path_factory.mktemp("long")
    with serving(halting.app, urls, directory, concurrency=2, env=env, args=["-Q", queue]) as worker:
        tell(urls, f"{run}/go")
        sent = halting.gather_all.apply_async((movies(run, 4),), execution_id=run, queue=queue)
        (holder,) = journals.wait(f"{run}/gathering", 1)
        row = "SELECT state, epoch, lost FROM docket_runs WHERE execution_id = %s"
        assert query(urls, row, run) == [("RUNNING", 2, 0)]
        ignored = f"[{sent.id}] ignored"
        before = worker.read_log().count(ignored)
        chords.revive(halting.app, lost_run(urls, run))
        wait_until(
            lambda: worker.read_log().count(ignored) > before, within_s=WAIT_S, what="the end of the copy"
        )
        assert journals.read(f"{run}/gathering") == [holder]
        assert query(urls, row, run) == [("RUNNING", 2, 0)]
        worker.kill_child(int(holder))
        (_, second) = journals.wait(f"{run}/gathering", 2)
        assert second != holder
        assert query(urls, row, run) == [("RUNNING", 3, 1)]
        tell(urls, f"{run}/gather")
        assert sent.get(timeout=WAIT_S).count == 4
