"""All scenarios, in the order of the page."""

from __future__ import annotations

from benchmarks.budgets import Budget
from benchmarks.scenario import Scenario
from benchmarks.scenarios import in_process, persisted

SCENARIOS: tuple[Scenario, ...] = (*in_process.SCENARIOS, *persisted.SCENARIOS)
BUDGETS: tuple[Budget, ...] = (*in_process.BUDGETS, *persisted.BUDGETS)
