"""Instances that factories build, in real workers and scripts: one per process, closed at its end."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from tests.conftest import StartWorker
from tests.infra.processes import ROOT
from tests.infra.workers import checkout_environment
from tests.integration.apps import built
from tests.unit.protos.shop_pb2 import Order

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]
APP = "tests.integration.apps.built"
WITHIN_S = 30.0


def noted(file: Path, what: str) -> list[str]:
    """Return the ids of the processes that wrote *what*, in order."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.partition(" ")[2] for line in lines if line.partition(" ")[0] == what]


def test_each_prefork_child_builds_one_and_closes_it_and_the_parent_builds_none(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery], tmp_path: Path
) -> None:
    """Two children meet in their first calls and work on: two instances, none from before the fork, both closed."""
    file = tmp_path / "built"
    file.touch()
    connect_app(built.app)
    worker = start_worker("prefork", 2, app=APP, env={built.VARIABLE: str(file)})
    assert noted(file, "built") == [], "built at import or before the fork"
    meeting = [built.score.delay(Order(amount_cents=2)) for _ in range(2)]
    pids = {result.get(timeout=WITHIN_S).text for result in meeting}
    assert len(pids) == 2
    more = [built.score.delay(Order()) for _ in range(6)]
    assert {result.get(timeout=WITHIN_S).text for result in more} <= pids
    assert Counter(noted(file, "built")) == Counter(pids)
    assert str(worker.pid) not in pids
    assert noted(file, "closed") == []
    worker.stop()
    assert Counter(noted(file, "closed")) == Counter(pids)


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_a_worker_of_one_process_builds_one_and_closes_it(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery], tmp_path: Path, pool: str
) -> None:
    """Threads and greenlets share the instance of their process."""
    file = tmp_path / "built"
    file.touch()
    connect_app(built.app)
    worker = start_worker(pool, 2, app=APP, env={built.VARIABLE: str(file)})
    for result in [built.score.delay(Order()) for _ in range(4)]:
        assert result.get(timeout=WITHIN_S).text == str(worker.pid)
    assert noted(file, "built") == [str(worker.pid)]
    worker.stop()
    assert noted(file, "closed") == [str(worker.pid)]


def test_a_script_closes_what_it_built_when_it_ends(tmp_path: Path) -> None:
    """No worker, no signal: Python's own exit does it."""
    file = tmp_path / "built"
    file.touch()
    done = subprocess.run(
        [sys.executable, "-m", APP],
        cwd=ROOT,
        env=checkout_environment({built.VARIABLE: str(file)}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert noted(file, "built") == noted(file, "closed") == [done.stdout.strip()]
