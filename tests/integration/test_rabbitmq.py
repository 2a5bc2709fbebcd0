"""What RabbitMQ does that Redis does not: quorum queues, delays in the broker, redelivery at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from examples.movies.movies_pb2 import Movie
from tests.infra import servers
from tests.infra.processes import ROOT, wait_until
from tests.infra.rabbitmq import RabbitMQ
from tests.integration.apps import batches
from tests.integration.apps.journal import Journals
from tests.integration.apps.serving import Urls, own_urls, serving, unique

pytestmark = [pytest.mark.integration, pytest.mark.rabbitmq]
WAIT_S = 40
# The routing that lets Celery delay messages in the broker: quorum queues behind a topic exchange.
QUORUM = {
    "task_default_queue": "orders",
    "task_default_queue_type": "quorum",
    "task_default_exchange": "orders",
    "task_default_exchange_type": "topic",
    "task_default_routing_key": "orders",
}
LASTING_OWNER = """
import sys, time
from pathlib import Path
from tests.infra.rabbitmq import RabbitMQ

with RabbitMQ(Path(sys.argv[1])) as server:
    print(server.url, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def urls(
    rabbitmq: RabbitMQ,
    server_urls: servers.ServerUrls,
    session_database_url: str,
    _celery_connections: None,
) -> Urls:
    """RabbitMQ as the broker, without messages."""
    redis_only = own_urls(server_urls, session_database_url)
    rabbitmq.drop_queue("celery")
    return Urls(broker=rabbitmq.url, results=redis_only.results, database=redis_only.database)


@pytest.fixture
def quorum(urls: Urls) -> Generator[list[str]]:
    """This process's app sends to quorum queues; the arguments of a worker that reads them."""
    conf, amqp = batches.app.conf, batches.app.amqp
    before = {key: conf[key] for key in QUORUM}
    caches: Any = vars(amqp)

    def use(values: dict[str, Any]) -> None:
        conf.update(values)
        for name in ("queues", "default_exchange"):
            caches.pop(name, None)
        caches["_rtable"] = None
        caches.pop("router", None)

    use(QUORUM)
    yield ["--", *(f"{key.replace('_', '.', 1)}={value}" for key, value in QUORUM.items())]
    use(before)


def test_parts_of_a_delayed_batch_do_not_wait_again(urls: Urls, quorum: list[str], tmp_path: Path) -> None:
    """The delay lies in the message's routing key, which the parts' messages take over."""
    delay_s = 8
    with serving(batches.app, urls, tmp_path, args=quorum) as worker:
        assert batches.sum_all.delay([Movie(title="a::1")]).get(timeout=WAIT_S).count == 1
        sent_at = time.monotonic()
        items = [Movie(title=f"{unique('delayed')}::{n}") for n in range(3)]
        result = batches.place_all.apply_async((items,), countdown=delay_s, chunk_size=1)
        assert len(result.get(timeout=WAIT_S)) == 3
        took_s = time.monotonic() - sent_at
        assert delay_s - 0.5 < took_s < 2 * delay_s
        assert "exchange=orders(topic)" in worker.read_log()
        assert "do not support direct exchanges" not in worker.read_log()


@pytest.mark.parametrize("wait", [{"countdown": 0.2}, {"countdown": 1.5}, {"eta": 0.5}], ids=str)
def test_short_waits_of_delayed_messages_are_whole_seconds(
    urls: Urls, quorum: list[str], tmp_path: Path, wait: dict[str, Any]
) -> None:
    """The caller's, and that of the retry in the worker: Celery would cut them down to 0 and fail to publish."""
    if "eta" in wait:
        wait = {"eta": datetime.now(UTC) + timedelta(seconds=wait["eta"])}
    with serving(batches.app, urls, tmp_path, args=quorum) as worker:
        movie = Movie(title=f"{unique('again')}:fail-once:1", rating=7)
        rated = batches.rate_again.apply_async((movie,), **wait).get(timeout=WAIT_S)
        assert rated.rating_percentile == 7
        assert "could not be published" not in worker.read_log()


def test_chunks_of_a_killed_worker_are_delivered_again_at_once(urls: Urls, tmp_path: Path) -> None:
    """When the lease has expired the next worker goes on; on Redis the message itself would lie for hours."""
    run = unique("fallen")
    items = [
        Movie(title=f"{run}:{what}:{n}", rating=n) for n, what in enumerate(["", "", "fall-once", "", ""])
    ]
    with serving(
        batches.app, urls, tmp_path, concurrency=1, env={"DOCKET_CELERY_LEASE_SECONDS": "2"}
    ) as worker:
        result = batches.place_all.apply_async((items,), execution_id=run)
        assert worker.wait(WAIT_S) == -signal.SIGKILL
        worker.restart()
        assert len(result.get(timeout=WAIT_S)) == 5
    journals = Journals(urls.results)
    rated = journals.read(f"{run}/rate")
    assert rated.count("2") == 2
    assert [rated.count(name) for name in "014"] == [1, 1, 1]
    assert journals.read(f"sum_up/{run}") == ["5"]
    assert len(journals.read(f"place/{run}")) == 5


def test_a_server_listens_on_loopback_and_ends_with_a_killed_owner(tmp_path: Path) -> None:
    """Kill -9 of whoever started it: the server, its port mapper, their children and their data are gone."""
    owner = subprocess.Popen(
        [sys.executable, "-c", LASTING_OWNER, os.fspath(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.fspath(ROOT)},
    )
    assert owner.stdout is not None
    try:
        assert owner.stdout.readline().startswith(b"amqp://")
        started = psutil.Process(owner.pid).children(recursive=True)
        names = {process.name() for process in started}
        assert {"beam.smp", "epmd"} <= names
        listening = {
            connection.laddr.ip
            for process in started
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening <= {"127.0.0.1", "::1"}
        assert (tmp_path / "node" / ".erlang.cookie").exists()
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    wait_until(
        lambda: not [process for process in started if is_there(process)],
        within_s=WAIT_S,
        what=f"the end of {started}",
    )
    wait_until(lambda: not (tmp_path / "node").exists(), within_s=WAIT_S, what="the data to go")


def is_there(process: psutil.Process) -> bool:
    """Tell whether a process runs; one that nobody has waited for does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
