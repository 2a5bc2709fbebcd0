"""How many functions are called for a run whose steps do nothing, on all threads: what it costs, without a clock.

`BUDGETS` says how many calls of this package's own functions a run takes, exactly, and how many calls in all, those
of Celery, the standard library and C included, to a tenth: releases differ. ``python -m tests.unit.counted`` prints
what they are now. If they are lower, write them here; if they are higher, find out first what the calls are for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.infra.processes import ROOT

BUDGETS = {
    "chain of three": {"own": 81, "all": 190},
    "fan of three and join": {"own": 107, "all": 253},
    "delivery of the chain": {"own": 153, "all": 955},
    "submitting it": {"own": 36, "all": 789},
    "submitting a plain task": {"own": 0, "all": 826},
}


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    """The calls of each kind of run, counted in a process of its own."""
    argv = [sys.executable, "-W", "error", "-m", "tests.unit.counted"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("run", ["chain of three", "delivery of the chain", "submitting it"])
def test_a_run_calls_as_many_functions_of_ours_as_is_known(
    counted: dict[str, dict[str, int]], run: str
) -> None:
    """One thread after the other works on it, so that the number is the same each time."""
    assert (run, counted[run]["own"]) == (run, BUDGETS[run]["own"])


def test_submitting_calls_at_most_a_tenth_more_functions_than_for_a_plain_task(
    counted: dict[str, dict[str, int]],
) -> None:
    """What a job adds to Celery's own work, whatever release of Celery does that."""
    assert counted["submitting it"]["all"] <= 1.1 * counted["submitting a plain task"]["all"]


@pytest.mark.parametrize("run", BUDGETS)
def test_a_run_calls_about_as_many_functions_as_is_known(
    counted: dict[str, dict[str, int]], run: str
) -> None:
    """In a fan it depends on the threads which of them does what."""
    assert counted[run] == pytest.approx(BUDGETS[run], rel=0.1)
