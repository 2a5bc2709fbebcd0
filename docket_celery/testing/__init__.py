"""Tools for testing your own graphs; docs/testing.md shows each.

Importing this loads nothing else: what is here is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docket_celery.testing.clocks import FakeClock
    from docket_celery.testing.crashes import crash_matrix
    from docket_celery.testing.matrix import CrashMatrixFailed, CrashReport
    from docket_celery.testing.modes import Bench, check_inputs, eager, inline
    from docket_celery.testing.plugin import StartWorker, TaskCrashMatrix
    from docket_celery.testing.recording import Events, record_events
    from docket_celery.testing.steps import run_step, step_context
    from docket_celery.testing.workers import Servers, Worker

__all__ = [
    "Bench",
    "CrashMatrixFailed",
    "CrashReport",
    "Events",
    "FakeClock",
    "Servers",
    "StartWorker",
    "TaskCrashMatrix",
    "Worker",
    "check_inputs",
    "crash_matrix",
    "eager",
    "inline",
    "record_events",
    "run_step",
    "step_context",
]

_HOMES = {
    **dict.fromkeys(("Bench", "check_inputs", "eager", "inline"), "modes"),
    **dict.fromkeys(("CrashMatrixFailed", "CrashReport"), "matrix"),
    **dict.fromkeys(("Events", "record_events"), "recording"),
    **dict.fromkeys(("Servers", "Worker"), "workers"),
    **dict.fromkeys(("run_step", "step_context"), "steps"),
    "crash_matrix": "crashes",
    "FakeClock": "clocks",
    "StartWorker": "plugin",
    "TaskCrashMatrix": "plugin",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
