"""A child dies while Celery counts the parts of a stage: its retry brings the join about, long before a sweep."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from examples.movies.movies_pb2 import Movie
from tests.infra.workers import WorkerProcess
from tests.integration.apps import joins
from tests.integration.apps.journal import Journals
from tests.integration.apps.serving import Urls, serving, unique

pytestmark = pytest.mark.integration
WAIT_S = 20
# Longer than any test: neither an expired lease nor the sweep brings a batch on.
ENV = {"DOCKET_CELERY_LEASE_SECONDS": "120"}


@pytest.fixture(scope="module", autouse=True)
def worker(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """A prefork worker with two children."""
    with serving(joins.app, urls, tmp_path_factory.mktemp("worker"), concurrency=2, env=ENV) as started:
        yield started


@pytest.mark.parametrize(("when", "noted"), [("uncounted", 7), ("unwoken", 2)])
def test_a_join_outlives_the_child_that_dies_in_it(urls: Urls, when: str, noted: int) -> None:
    """Before a part is counted, and after the last one was and before the body is sent; nothing runs again."""
    run = unique(when)
    items = [Movie(title=f"{run}::{number}", rating=number) for number in range(6)]
    found = joins.place_all.apply_async((items,), execution_id=run).get(timeout=WAIT_S)
    assert [each.title.split(" ")[0] for each in found] == [f"{number}:" for number in range(6)]
    journals = Journals(urls.results)
    assert sorted(journals.read(f"{run}/rate")) == ["0", "1", "2", "3", "4", "5"]
    assert journals.read(f"sum_up/{run}") == ["6"]
    assert len(journals.read(f"place/{run}")) == 6
    assert len(journals.read(f"joins/{run}")) >= noted, "nobody died"
