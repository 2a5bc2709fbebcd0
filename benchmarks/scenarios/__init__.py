"""All scenarios, in the order of the page."""

from __future__ import annotations

from benchmarks.budgets import Budget
from benchmarks.scenario import Scenario
from benchmarks.scenarios import celery_tasks, in_process, large, persisted, processes

SCENARIOS: tuple[Scenario, ...] = (
    *in_process.SCENARIOS,
    *persisted.SCENARIOS,
    *celery_tasks.SCENARIOS,
    *large.SCENARIOS,
    *processes.SCENARIOS,
)
BUDGETS: tuple[Budget, ...] = (
    *in_process.BUDGETS,
    *persisted.BUDGETS,
    *celery_tasks.BUDGETS,
    *processes.BUDGETS,
)
