"""The path that docs/map.md tells is the one that a job really takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from tests.conftest import StartWorker
from tests.infra import ready
from tests.infra.processes import ROOT, wait_until
from tests.integration import recorder, shop
from tests.unit.protos.shop_pb2 import Payment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
MAP = ROOT / "docs" / "contributing" / "map.md"


def told(heading: str) -> list[str]:
    """Return the modules of the map's numbered list under *heading*."""
    section = MAP.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [
        name.removesuffix(".py").strip("/")
        for name in re.findall(r"^\d+\. `([\w./]+)`", section, re.MULTILINE)
    ]


def test_the_map_lists_the_modules_that_a_job_enters_in_their_order(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery], tmp_path: Path
) -> None:
    """A persisted job is traced on both sides: in the process that submits it and in a real worker."""
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
    submitting.start()
    try:
        result = shop.pay.delay(Payment(note="mapped"))
    finally:
        submitting.stop()
    assert result.get(timeout=30).amount_cents == 0
    wait_until(file.exists, within_s=10.0, what="the worker's record")
    entered = json.loads(file.read_text())
    assert (told("Submitting"), told("Running")) == (list(submitting.modules), entered)
