from __future__ import annotations

import json
import re
from typing import Any

import pytest

from benchmarks import report, results
from benchmarks.budgets import Budget
from benchmarks.scenario import OURS, Figure, Scenario, Way
from benchmarks.scenarios import BUDGETS, SCENARIOS

TOY = Scenario(
    name="toy",
    title="Toy",
    figures=(Figure(name="run", title="a run"), Figure(name="rate", title="many runs", unit="runs/s")),
    ways=(
        Way(name=OURS, target=""),
        Way(name="peer", target="", why="it does less"),
        Way(name="broken", target=""),
    ),
)
BUDGET = Budget(figure="toy_run", text="half of peer", against="peer", times=0.5)
ABSOLUTE = Budget(figure="toy_run", text="30 ms", plus_s=0.03)
FOUND: dict[str, Any] = {
    "commit": "abc",
    "machine": {
        "cores": 2,
        "processor": "CPU",
        "system": "Linux x86_64",
        "python": "3.11.7",
        "versions": {"celery": "5.7.0", "dbos": "3.4.0"},
    },
    "figures": {
        "toy_run": {
            "scenario": "toy",
            "heading": "Toy",
            "title": "a run",
            "unit": "s",
            "taken": "2026-01-02 03:04 UTC",
            "load": [0.5, 1.25],
            "ways": {
                OURS: {"runs": 5, "seconds": [0.02, 0.025, 0.03], "cpu": [0.01, 0.01, 0.01]},
                "peer": {"runs": 5, "seconds": [0.01, 0.0125, 0.015], "cpu": [0.002, 0.002, 0.002]},
                "broken": {"error": "ValueError: no"},
            },
        },
        "toy_rate": {
            "scenario": "toy",
            "heading": "Toy",
            "title": "many runs",
            "unit": "runs/s",
            "taken": "2026-01-02 03:05 UTC",
            "load": [1.0, 2.0],
            "ways": {
                OURS: {"runs": 64, "seconds": [0.002], "cpu": [0.001]},
                "peer": {"runs": 64, "seconds": [0.004], "cpu": [0.001]},
            },
        },
    },
}
TEMPLATE = """\
# Title

<!-- budgets -->

<!-- table toy -->

<!-- slower -->

<!-- machine -->
"""
PAGE = """\
# Title

1 of 2 are reached.

| work | measured | limit | | |
|---|---|---|---|---|
| Toy: a run | 25 ms | half of peer = 6.25 ms | 4.00 x | **not reached** |
| Toy: a run | 25 ms | 30 ms | 0.83 x | reached |

| work | way | median | quartiles | CPU | ours / it |
|---|---|---|---|---|---|
| a run | docket_celery | 25 ms | 20 ms - 30 ms | 10 ms | |
| | peer | 12.5 ms | 10 ms - 15 ms | 2 ms | 2.00 x |
| | broken | failed | | | |
| many runs | docket_celery | 500/s | 500/s - 500/s | 1 ms | |
| | peer | 250/s | 250/s - 250/s | 1 ms | 0.50 x |

Toy: broken failed: ValueError: no

| work | way | ours / it | because |
|---|---|---|---|
| Toy: a run | peer | 2.00 x | it does less |

2 cores (CPU), Linux x86_64, Python 3.11.7; commit abc; from 2026-01-02 03:04 UTC to 2026-01-02 03:05 UTC; \
load average of the last minute 0.5 to 2.0, that of the measurement included.

celery 5.7.0, dbos 3.4.0.
"""


def test_results_give_the_same_page_byte_for_byte() -> None:
    """Budgets, tables, what is slower and why, and the machine."""
    assert report.page(FOUND, TEMPLATE, [TOY], [BUDGET, ABSOLUTE]) == PAGE


def test_a_mark_that_means_nothing_is_refused() -> None:
    """A misspelt mark would leave a hole in the page."""
    with pytest.raises(ValueError, match="the template has '<!-- tables toy -->'"):
        report.page(FOUND, "<!-- tables toy -->\n", [TOY], [])


def test_the_page_is_what_the_committed_results_give() -> None:
    """Nobody has edited a figure, and nothing was measured that the page does not show."""
    found = json.loads(results.COMMITTED.read_text())
    made = report.page(found, report.TEMPLATE.read_text(), SCENARIOS, BUDGETS)
    assert report.PAGE.read_text() == made, "run make bench-report"


def test_every_scenario_has_its_table_on_the_page() -> None:
    """A new scenario is shown before it is merged."""
    shown = re.findall(r"<!-- table ([a-z_]+) -->", report.TEMPLATE.read_text())
    assert sorted(shown) == sorted(scenario.name for scenario in SCENARIOS)


def test_committed_results_name_no_folder_of_a_machine() -> None:
    """Of an error its last line is kept."""
    assert re.findall(r'File \\"|site-packages', results.COMMITTED.read_text()) == []
