"""What a step may know about the execution it is part of."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

_current: ContextVar[Callable[[], StepContext] | None] = ContextVar("docket_celery_step", default=None)
_step_logger = logging.getLogger("docket_celery.step")


class Cancellation:
    """A flag that is raised once, with the error that explains it; reads like `threading.Event`.

    A child is raised with its parent, but not the other way round.
    """

    __slots__ = ("_callbacks", "_error", "_event", "_lock")

    def __init__(self, parent: Cancellation | None = None) -> None:
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._event: threading.Event | None = None
        self._callbacks: list[Callable[[BaseException], None]] = []
        if parent is not None:
            parent.on_cancel(self.cancel)

    def now(self) -> float:
        """Return the run's time: `time.monotonic`, unless the run has a clock of its own."""
        return time.monotonic()

    def child(self) -> Cancellation:
        """Return a flag that is raised with this one."""
        return Cancellation(self)

    @property
    def error(self) -> BaseException | None:
        """Why it was cancelled, or None."""
        return self._error

    def is_set(self) -> bool:
        """Tell whether it was cancelled."""
        return self.error is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to *timeout* seconds (None: for ever) and return `is_set`."""
        with self._lock:
            if self._error is not None:
                return True
            if self._event is None:
                self._event = threading.Event()
            event = self._event
        return event.wait(timeout)

    def on_cancel(self, callback: Callable[[BaseException], None]) -> None:
        """Call *callback* with the error when cancelled, at once if that is past."""
        with self._lock:
            if self._error is None:
                self._callbacks.append(callback)
                return
        callback(self._error)

    def forget(self, callback: Callable[[BaseException], None]) -> None:
        """Drop *callback*; one that is not there is ignored."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

    def cancel(self, error: BaseException) -> None:
        """Raise the flag; only the first error counts."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            callbacks, self._callbacks = self._callbacks, []
            if self._event is not None:
                self._event.set()
        for callback in callbacks:
            callback(error)


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class StepContext:
    """Facts of one attempt of one step; annotate a parameter with this class to get it.

    Attributes:
        graph: Name of the graph.
        execution_id: Name of the run.
        step: Name of the step.
        make_key: Makes `idempotency_key`, on first use.
        attempt: Which call this is within the delivery, from 1.
        delivery: Which pick-up of the run by a worker this is, from 1.
        item: Path of the item in a batch, else ''.
        values: The caller's ``context=`` mapping.
        deadline: When this attempt times out, on `time.monotonic`'s clock, or None.
        cancelled: Set when the attempt timed out or the run stops; has ``is_set()`` and ``wait(seconds)``.
    """

    graph: str
    execution_id: str
    step: str
    make_key: Callable[[], str]
    attempt: int = 1
    delivery: int = 1
    item: str = ""
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    deadline: float | None = None
    cancelled: Cancellation = field(default_factory=Cancellation)
    _key: str = field(default="", init=False)

    @property
    def idempotency_key(self) -> str:
        """A UUID for the outside world: the same for this run, step and item on every attempt and delivery."""
        if not self._key:
            self._key = self.make_key()
        return self._key

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose records carry graph, execution_id, step and attempt."""
        extra = {
            "docket_graph": self.graph,
            "docket_execution_id": self.execution_id,
            "docket_step": self.step,
            "docket_attempt": self.attempt,
        }
        return logging.LoggerAdapter(_step_logger, extra)

    def check(self) -> None:
        """Raise the reason if this attempt should stop.

        Raises:
            StepTimedOut, RunCancelled, RunTimedOut, AbortError, LeaseLost: As the case may be.
        """
        error = self.cancelled.error
        if error is not None:
            raise error

    def sleep(self, seconds: float) -> None:
        """Sleep, but wake and raise like `check` when this attempt should stop."""
        until = self.cancelled.now() + seconds
        while not self.cancelled.is_set() and (left := until - self.cancelled.now()) > 0:
            self.cancelled.wait(min(left, threading.TIMEOUT_MAX))
        self.check()

    def __repr__(self) -> str:
        return f"<StepContext {self.graph}/{self.execution_id} step={self.step} attempt={self.attempt}>"


def current_context() -> StepContext:
    """Return the context of the step that is running here.

    Raises:
        LookupError: No step runs in this thread or task.
    """
    find = _current.get()
    if find is None:
        raise LookupError("current_context() works inside a step only; no step is running here")
    return find()


bind_context = _current.set
"""Make what a function returns the current one within the present `contextvars` context; called when it is needed."""
