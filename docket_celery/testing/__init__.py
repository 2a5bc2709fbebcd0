"""Tools for testing your own graphs; docs/testing.md shows each.

Importing this loads neither pytest nor Celery nor SQL.
"""

from __future__ import annotations

from docket_celery.testing.clocks import FakeClock
from docket_celery.testing.crashes import CrashMatrixFailed, CrashReport, crash_matrix
from docket_celery.testing.modes import Bench, check_inputs, eager, inline
from docket_celery.testing.recording import Events, record_events
from docket_celery.testing.steps import run_step, step_context

__all__ = [
    "Bench",
    "CrashMatrixFailed",
    "CrashReport",
    "Events",
    "FakeClock",
    "check_inputs",
    "crash_matrix",
    "eager",
    "inline",
    "record_events",
    "run_step",
    "step_context",
]
