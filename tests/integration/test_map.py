"""The path that docs/map.md tells is the one that a job really takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from celery import Celery

from tests.conftest import StartWorker
from tests.infra import ready
from tests.infra.processes import ROOT, wait_until
from tests.integration import recorder, shop
from tests.unit.protos.shop_pb2 import Order

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
NOT_ENTERED = {"chords", "fan_out", "large_jobs", "references", "upload"}
MOST_AT_SUBMIT = 7
MOST_IN_WORKER = 40
MAP = ROOT / "docs" / "contributing" / "map.md"


def told(heading: str) -> list[str]:
    """Return the modules of the map's numbered list under *heading*."""
    section = MAP.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [
        name.removesuffix(".py").strip("/")
        for name in re.findall(r"^\d+\. `([\w./]+)`", section, re.MULTILINE)
    ]


def without_heartbeat(modules: list[str]) -> list[str]:
    """Return *modules* without those that another thread enters at any moment."""
    return [name for name in modules if name not in {"engine/process/heartbeat", "engine/process/timer"}]


def read(file: Path) -> list[recorder.Record]:
    """Return what the worker has recorded so far."""
    return [recorder.Record(**each) for each in json.loads(file.read_text())] if file.exists() else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a job entered in the process that submits it, and in the worker."""

    submitted: recorder.Record
    ran: recorder.Record


@pytest.fixture
def recorded(start_worker: StartWorker, connect_app: Callable[[Celery], Celery], tmp_path: Path) -> Recorded:
    """Trace a job of three steps, one of which persists, on both sides; it is the second one of both processes."""
    file = tmp_path / "modules.json"
    start_worker(
        pool="solo",
        app="tests.integration.shop",
        env={recorder.VARIABLE: str(file)},
        args=[f"--include={ready.__name__},{recorder.__name__}"],
    )
    connect_app(shop.app)
    _ = shop.app.tasks  # the app is complete before anything is submitted
    submitting = recorder.Recorder()
    for number in (1, 2):
        submitting.take()
        submitting.start()
        try:
            result = shop.pack.delay(Order(order_id="17"))
        finally:
            submitting.stop()
        assert result.get(timeout=30).text == "17: 0"
        wait_until(lambda: len(read(file)) == number, within_s=10.0, what="the worker's record")  # noqa: B023
    return Recorded(submitted=submitting.take(), ran=read(file)[-1])


def test_the_map_lists_the_modules_that_a_job_enters_in_their_order(recorded: Recorded) -> None:
    """All but those of the thread that extends leases, which looks when it is due; a new path is written down."""
    submitting, entered = recorded.submitted, recorded.ran.modules
    assert (told("Submitting"), without_heartbeat(told("Running"))) == (
        submitting.modules,
        without_heartbeat(entered),
    )


def test_an_ordinary_job_enters_few_modules_and_calls_downward_only(recorded: Recorded) -> None:
    """What batches and large jobs need is none of its business; calls between rooms go downward."""
    submitted, ran = recorded.submitted, recorded.ran
    entered = {*submitted.modules, *ran.modules}
    assert {m for m in entered if m.startswith("batch/") or m.rpartition("/")[2] in NOT_ENTERED} == set()
    assert [*submitted.upward, *ran.upward] == []
    assert len(submitted.modules) <= MOST_AT_SUBMIT
    assert len(ran.modules) <= MOST_IN_WORKER
