"""What happens in a run, told to listeners. A listener can never break a run."""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

_logger = logging.getLogger("docket_celery.events")


class EventKind(enum.StrEnum):
    """The catalogue of events; names are stable."""

    RUN_STARTED = "run-started"
    RUN_ENDED = "run-ended"
    STEP_STARTED = "step-started"
    STEP_RETRYING = "step-retrying"
    STEP_SUCCEEDED = "step-succeeded"
    STEP_RESTORED = "step-restored"
    STEP_FAILED = "step-failed"
    STEP_ABANDONED = "step-abandoned"
    STEP_LATE = "step-late"
    INPUTS_CHANGED = "inputs-changed"
    BATCH_PROGRESS = "batch-progress"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: What happened. STEP_SUCCEEDED comes after the checkpoint is visible to others.
        step: Name of the step; '' for events of the run.
        item: Path of the item in a batch or fan-out: '', '7', '7/3'.
        attempt: From 1; 0 for events of the run and for restored steps.
        delivery: From 1.
        at: Seconds on `time.monotonic`'s clock.
        elapsed_s: Since the attempt (or run) began, where that makes sense.
        detail: One line for people; never an input or a result.
        done: BATCH_PROGRESS only: how many items of the stage have ended, failed ones too.
        total: BATCH_PROGRESS only: how many items the stage has.
    """

    kind: EventKind
    graph: str
    execution_id: str
    step: str = ""
    item: str = ""
    attempt: int = 0
    delivery: int = 1
    at: float
    elapsed_s: float | None = None
    detail: str = ""
    done: int | None = None
    total: int | None = None


class Listener(Protocol):
    """Takes events on the thread where they happen; must be quick and must not block."""

    def __call__(self, event: Event, /) -> None: ...


def emit(listeners: Iterable[Listener], event: Event) -> None:
    """Tell every listener; one that raises is logged and the run continues."""
    for listener in listeners:
        try:
            listener(event)
        except Exception:
            _logger.exception("listener %r failed on %s of run %r", listener, event.kind, event.execution_id)
