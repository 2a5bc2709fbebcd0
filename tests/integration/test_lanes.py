"""A child dies while a lane goes from one chunk to the next: its retry has the lane go on, long before a sweep."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from examples.movies.movies_pb2 import Movie
from tests.infra.servers import connect
from tests.infra.workers import WorkerProcess
from tests.integration.apps import lanes
from tests.integration.apps.journal import Journals
from tests.integration.apps.serving import Urls, serving, unique

pytestmark = pytest.mark.integration
WAIT_S = 20
# Longer than any test: neither an expired lease nor the sweep brings a lane on.
ENV = {"DOCKET_CELERY_LEASE_SECONDS": "120"}
ITEMS = 6


@pytest.fixture(scope="module", autouse=True)
def worker(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """A prefork worker with one child more than there are lanes."""
    with serving(lanes.app, urls, tmp_path_factory.mktemp("worker"), concurrency=3, env=ENV) as started:
        yield started


@pytest.mark.parametrize("when", ["unsent", "sent"])
def test_a_lane_outlives_the_child_that_dies_between_two_chunks(
    urls: Urls, journals: Journals, worker: WorkerProcess, when: str
) -> None:
    """Before the message of the next chunk is out, and after that, when it goes out twice: no item runs twice."""
    run = unique(when)
    items = [Movie(title=f"{number}") for number in range(ITEMS)]
    found = lanes.move_all.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert [each.original for each in found] == items
    assert sorted(journals.read(f"{run}/moved")) == [str(number) for number in range(ITEMS)]
    assert max(map(int, journals.read(f"{run}/at-once"))) <= 2
    (died,) = journals.read(f"{run}/died")
    assert journals.read(f"{run}/again") == [died], "its retry did not go on with the lane"
    worker.wait_for_log("SIGKILL")
    replaced = journals.read(f"{run}/replaced")
    # The last chunk of a lane replaces nothing. Two copies of one lane may both go the rest of it.
    assert set(replaced) == {*map(str, range(ITEMS - 2))}
    if when == "unsent":
        assert len(replaced) == ITEMS - 2 + 1
        with connect(urls.database) as connection:
            query = "SELECT epoch FROM docket_runs WHERE execution_id = %s"
            # Opened, and joined by the chord's body: the stage was not opened anew for the rest of the lane.
            assert connection.execute(query, [run]).fetchall() == [(2,)]
