"""How an execution ends: once, with values or an error, whichever thread comes first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from docket_celery.errors import StepFailed
from docket_celery.plan.context import Cancellation


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an execution ended: with the values of its outputs, or an error.

    Attributes:
        failed: Why items failed, by index, of a fan-out that ended all the same.
    """

    values: tuple[Any, ...] = ()
    error: BaseException | None = None
    failed: Mapping[int, StepFailed] = field(default_factory=dict[int, StepFailed])


class Ending:
    """What a plan, a plan with fan-outs and a group of items have in common: each ends once.

    Args:
        cancellation: Raised when the execution is aborted; None: somebody else raises it.
        on_end: Called once with the outcome, on whichever thread ended it.

    Attributes:
        lock: Guards `closed`, `failing` and what subclasses keep of their parts.
        closed: It has ended; nothing begins and nothing counts any more.
        failing: Nothing new begins; what is running finishes and is saved.
    """

    def __init__(self, cancellation: Cancellation | None, on_end: Callable[[Outcome], None]) -> None:
        self.lock = threading.Lock()
        self.closed = False
        self.failing = False
        self._flag, self._on_end = cancellation, on_end

    def start(self) -> None:
        """Find what is to be done; it may end here."""

    def dispatch(self) -> None:
        """Begin what is ready."""
        raise NotImplementedError

    def hold(self) -> None:
        """Start nothing more; what is running finishes and is saved, then the execution ends."""
        raise NotImplementedError

    def abort(self, error: BaseException) -> None:
        """End at once with *error*: nothing new starts, contexts are cancelled, late results are discarded."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self._seize()
        if self._flag is not None:
            self._flag.cancel(error)
        self._let_go(error)
        self._on_end(Outcome(error=error))

    def end(self, outcome: Outcome) -> None:
        """End with *outcome*, unless it has ended."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
        self._on_end(outcome)

    def _seize(self) -> None:
        """Do what an abort needs done under the lock."""

    def _let_go(self, error: BaseException) -> None:
        """Stop the parts of an execution that was aborted."""
