"""Batch tasks beyond a prefork worker on Redis: other pools, a database for results, RabbitMQ as the broker."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from docket_celery.errors import StepFailed
from examples.documents.documents_pb2 import Document
from examples.movies.graph import MOVIES, movie_graph
from examples.movies.movies_pb2 import EnrichedMovie, Movie
from tests.infra import servers
from tests.infra.rabbitmq import RabbitMQ
from tests.infra.workers import WorkerProcess
from tests.integration.apps import batches
from tests.integration.apps.journal import Journals
from tests.integration.apps.serving import Urls, own_urls, serving, unique

pytestmark = pytest.mark.integration
WAIT_S = 30
# Longer than any test: nothing may wait for a lease to expire.
ENV = {"DOCKET_CELERY_LEASE_SECONDS": "120", "DOCKET_CELERY_MAX_DELIVERIES": "3"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where and how a worker runs: what differs from a prefork worker with Redis for everything.

    Attributes:
        broker: ``redis`` or ``rabbitmq``.
        results: ``redis`` or ``database``.
        pool: Celery's name.
        concurrency: Tasks at a time, where the pool can.
    """

    broker: str = "redis"
    results: str = "redis"
    pool: str = "prefork"
    concurrency: int = 2


PREFORK = [
    pytest.param(Place(results="database"), id="database"),
    pytest.param(Place(broker="rabbitmq"), id="rabbitmq", marks=pytest.mark.rabbitmq),
    pytest.param(
        Place(broker="rabbitmq", results="database"), id="rabbitmq-database", marks=pytest.mark.rabbitmq
    ),
]
# The others come after them: pytest groups tests by a parameter's number.
PLACES = [
    *PREFORK,
    pytest.param(Place(pool="threads"), id="threads"),
    # Under gevent a worker whose prefetch is full looks for messages in Redis every 2 s only.
    pytest.param(Place(pool="gevent", concurrency=20), id="gevent"),
    pytest.param(Place(pool="solo"), id="solo"),
]


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """One of them after the other; each has one worker."""
    found: Place = request.param
    return found


@pytest.fixture(scope="module")
def urls(
    place: Place,
    request: pytest.FixtureRequest,
    _celery_connections: None,
    server_urls: servers.ServerUrls,
    session_database_url: str,
) -> Generator[Urls]:
    """The place's servers."""
    redis_only = own_urls(server_urls, session_database_url)
    broker, results = redis_only.broker, redis_only.results
    with ExitStack() as stack:
        if place.broker == "rabbitmq":
            rabbitmq: RabbitMQ = request.getfixturevalue("rabbitmq")
            rabbitmq.drop_queue("celery")
            broker = rabbitmq.url
        if place.results == "database":
            empty = servers.temporary_database(server_urls.database_url, migrated=False)
            results = f"db+{stack.enter_context(empty)}"
        yield Urls(broker=broker, results=results, database=session_database_url, journals=redis_only.results)


@pytest.fixture(scope="module", autouse=True)
def worker(place: Place, urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """A worker there."""
    directory = tmp_path_factory.mktemp("worker")
    with serving(
        batches.app, urls, directory, pool=place.pool, concurrency=place.concurrency, env=ENV
    ) as started:
        yield started


@pytest.fixture
def journals(urls: Urls) -> Journals:
    """What steps noted."""
    return Journals(urls.journals)


def movies(journal: str, deeds: Sequence[str]) -> list[Movie]:
    """Return a movie for each thing to do, rated by its number."""
    return [Movie(title=f"{journal}:{what}:{number}", rating=number) for number, what in enumerate(deeds)]


def test_two_stages_with_an_aggregate_between(journals: Journals) -> None:
    """The whole list comes back in order, and everything ran once."""
    run = unique("stages")
    found = batches.place_all.apply_async((movies(run, [""] * 5),), execution_id=run).get(timeout=WAIT_S)
    assert [each.title.split(" ")[:3] for each in found] == [[f"{i}:", f"{i}", "of"] for i in range(5)]
    assert sorted(journals.read(f"{run}/rate")) == ["0", "1", "2", "3", "4"]
    assert journals.read(f"sum_up/{run}") == ["5"]
    assert len(journals.read(f"place/{run}")) == 5


def test_a_batch_that_failed_goes_on_where_it_stood(journals: Journals) -> None:
    """The failed item fails it; under its execution id what is missing runs, and nothing else."""
    run = unique("resumed")
    items = movies(run, ["", "", "fail-once", "", "", ""])
    with pytest.raises(StepFailed, match="step 'rate' of item 2 failed after 1 attempt") as failed:
        batches.place_all.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert failed.value.caused_by(ConnectionError)
    assert journals.read(f"sum_up/{run}") == []
    found = batches.place_all.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert len(found) == 6
    assert sorted(journals.read(f"{run}/rate")) == ["0", "1", "2", "2", "3", "4", "5"]
    assert journals.read(f"sum_up/{run}") == ["6"]
    assert len(journals.read(f"place/{run}")) == 6


def test_an_empty_batch_ends() -> None:
    """Nothing for each item, and an aggregate of nothing."""
    assert batches.rate_all.delay([]).get(timeout=WAIT_S) == []
    assert batches.sum_all.delay([]).get(timeout=WAIT_S).count == 0


def test_what_failed_is_collected(journals: Journals) -> None:
    """Results in order, errors by index; the aggregate and the later stage see the others."""
    run = unique("collected")
    items = movies(run, ["", "fail", "", "", "fail"])
    found = batches.place_some.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert [each is None for each in found.results] == [False, True, False, False, True]
    assert sorted(found.errors) == [1, 4]
    assert found.errors[1].caused_by(ConnectionError)
    assert journals.read(f"sum_up/{run}") == ["3"]
    assert len(journals.read(f"place/{run}")) == 3


def test_a_value_is_split_and_merged() -> None:
    """In mid-graph, by a task with one message in and one out."""
    text = "one\ftwo words\fthree more words"
    found = batches.summarize.delay(Document(title="Long", text=text)).get(timeout=WAIT_S)
    assert (found.title, found.pages, found.words, found.longest_word) == ("Long", 3, 6, "words")


def test_a_big_result_comes_back() -> None:
    """From the database, wherever the results are."""
    items = [Movie(title="x" * 900 + str(number), rating=number) for number in range(400)]
    found = batches.enrich.apply_async((items,), chunk_size=100).get(timeout=WAIT_S)
    assert [each.original for each in found] == items


def test_a_chain_goes_on_after_a_batch() -> None:
    """The next task gets the list."""
    chained: Any = batches.enrich.s(MOVIES) | batches.count_them.s()
    assert chained.delay().get(timeout=WAIT_S) == 5
    assert batches.enrich.delay(MOVIES).get(timeout=WAIT_S) == movie_graph.execute_batch(
        EnrichedMovie, MOVIES
    )


@pytest.mark.parametrize("place", PREFORK, indirect=True, scope="module")
def test_a_killed_child_costs_its_own_chunk_a_retry(journals: Journals) -> None:
    """The retry of the chunk's task goes on, nothing else runs again."""
    run = unique("killed")
    items = movies(run, ["", "", "", "kill-once", "", ""])
    found = batches.place_all.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert len(found) == 6
    rated = journals.read(f"{run}/rate")
    assert {name: rated.count(name) for name in "01345"} == {"3": 2} | dict.fromkeys("0145", 1)
    assert journals.read(f"sum_up/{run}") == ["6"]
    assert len(journals.read(f"place/{run}")) == 6
