"""Whoever installs the library keeps plain tasks exactly as they were."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import pytest
import redis
from billiard.exceptions import WorkerLostError

from tests.infra.processes import ROOT, wait_until
from tests.infra.workers import WorkerProcess
from tests.integration.apps import plain
from tests.integration.apps.journal import Journals
from tests.integration.apps.serving import Urls, queue_length, serving, unique

pytestmark = pytest.mark.integration
WAIT_S = 20
CHANGED = {
    "worker_prefetch_multiplier": "1",
    "worker_soft_shutdown_timeout": "30.0",
    "result_chord_expires": "604800",
    "broker_transport_options": (
        "{'visibility_timeout': 14400, 'unacked_restore_interval': 10, 'unacked_restore_throttle': 1}"
    ),
}


@pytest.fixture(scope="module", params=["bare", "configured"])
def worker(
    request: pytest.FixtureRequest, urls: Urls, tmp_path_factory: pytest.TempPathFactory
) -> Generator[WorkerProcess]:
    """A worker without the library, and one with GraphTasks and configure()."""
    directory = tmp_path_factory.mktemp("worker")
    with serving(plain.app, urls, directory, concurrency=3, env={"PLAIN_APP": request.param}) as started:
        yield started


@pytest.fixture
def journals(urls: Urls) -> Journals:
    """What the tasks noted."""
    return Journals(urls.results)


def describe(urls: Urls, mode: str) -> dict[str, Any]:
    """Return the app's settings and its plain tasks' attributes in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.apps.plain"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**urls.environment, "PLAIN_APP": mode},
        check=True,
        timeout=60,
    )
    described: dict[str, Any] = json.loads(done.stdout)
    return described


def nothing_held(urls: Urls) -> bool:
    """Tell whether the broker holds no message that it could deliver again."""
    with redis.Redis.from_url(urls.broker) as client:
        return not client.exists("unacked", "unacked_index") and queue_length(urls.broker) == 0


def test_a_lost_process_means_to_plain_tasks_what_it_always_meant(
    worker: WorkerProcess, urls: Urls, journals: Journals
) -> None:
    """One start and WorkerLostError, acknowledged early or late; reject_on_worker_lost alone starts again."""
    tasks: dict[str, Any] = {"early": plain.early, "late": plain.late, "rejecting": plain.rejecting}
    names = {kind: unique(kind) for kind in tasks}
    results = {kind: task.delay(names[kind]) for kind, task in tasks.items()}
    for kind in ("early", "late"):
        with pytest.raises(WorkerLostError):
            results[kind].get(timeout=WAIT_S)
    assert results["rejecting"].get(timeout=WAIT_S) == "survived"
    # Nothing is left that could be delivered again.
    wait_until(lambda: nothing_held(urls), within_s=10, what="the broker holds nothing")
    starts = {kind: journals.read(name) for kind, name in names.items()}
    assert {kind: len(set(pids)) for kind, pids in starts.items()} == {"early": 1, "late": 1, "rejecting": 2}
    assert {kind: len(pids) for kind, pids in starts.items()} == {"early": 1, "late": 1, "rejecting": 2}


def test_a_plain_task_retries_and_carries_json(worker: WorkerProcess, journals: Journals) -> None:
    """Celery's own autoretry and values are untouched."""
    journal = unique("failing")
    assert plain.failing.delay(journal).get(timeout=WAIT_S) == "retried"
    assert len(journals.read(journal)) == 2
    value = {"t": "x", "b": [1, None, {"__type__": "mine"}]}
    assert plain.echo.delay(value).get(timeout=WAIT_S) == value


def test_declaring_graph_tasks_changes_no_setting_and_no_task(urls: Urls) -> None:
    """The app and its plain tasks are what they are without the library."""
    bare, declares = describe(urls, "bare"), describe(urls, "declares")
    assert bare["docket"] == []
    assert "docket_celery.task.task" in declares["docket"]
    assert declares["conf"] == bare["conf"]
    assert declares["tasks"] == bare["tasks"]


def test_configure_changes_what_it_says_and_no_task(urls: Urls) -> None:
    """Five settings of the whole app; plain tasks keep every attribute."""
    bare, configured = describe(urls, "bare"), describe(urls, "configured")
    changed = {key: value for key, value in configured["conf"].items() if bare["conf"].get(key) != value}
    assert changed == CHANGED
    assert configured["tasks"] == bare["tasks"]
