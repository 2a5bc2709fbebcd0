"""What a job costs around its run is done once: at its submission, and in its delivery."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.infra.processes import ROOT

ONCE = {"submitting": 1, "running": 1}


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """What a job has done, counted in a process of its own."""
    argv = [sys.executable, "-m", "tests.unit.once"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["text"] == "17"
    return found


def test_settings_are_looked_at_once_on_each_side(counted: dict[str, Any]) -> None:
    """By the submission, and by the delivery; all else is handed what they found."""
    assert counted["settings"] == ONCE


def test_a_delivery_hands_one_piece_of_work_to_the_pool(counted: dict[str, Any]) -> None:
    """Celery's thread runs no step: that is the one hop there is."""
    assert counted["hops"] == {"running": 1}


def test_a_first_delivery_asks_the_result_backend_nothing(counted: dict[str, Any]) -> None:
    """Whether its task has ended before is a question for a message that came once more."""
    assert counted["questions"] == {}


def test_a_result_is_encoded_once(counted: dict[str, Any]) -> None:
    """For the backend; the job was, when it was published."""
    assert counted["encodings"] == ONCE
