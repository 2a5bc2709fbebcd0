"""Three aggregates in sequence over a thousand items on real workers, in random graphs, against plain Python."""

from __future__ import annotations

from collections.abc import Generator
from random import Random

import pytest

from tests.infra import servers
from tests.infra.workers import WorkerProcess
from tests.integration.apps import serial
from tests.integration.apps.serving import Urls, own_urls, serving
from tests.unit.series import in_plain_python, money

pytestmark = pytest.mark.integration
WAIT_S = 60


@pytest.fixture(scope="module", autouse=True)
def worker(
    _celery_connections: None,
    server_urls: servers.ServerUrls,
    session_database_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Generator[WorkerProcess]:
    """A prefork worker with two children."""
    urls: Urls = own_urls(server_urls, session_database_url)
    with serving(serial.app, urls, tmp_path_factory.mktemp("worker"), concurrency=2) as started:
        yield started


@pytest.mark.parametrize("seed", serial.SEEDS)
def test_three_aggregates_on_real_workers_equal_plain_python(seed: int) -> None:
    """A thousand items through chunks, stages and joins are what they are in lists."""
    series, random = serial.SERIES[seed], Random(seed)
    batch = [random.randrange(1_000_000) for _ in range(1000)]
    found = serial.TASKS[seed].delay(money(batch)).get(timeout=WAIT_S)
    numbers = found.cents if series.single else [each.cents for each in found]
    assert numbers == in_plain_python(series, batch)
