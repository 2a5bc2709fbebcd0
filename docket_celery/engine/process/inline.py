"""``docket_threads = 0``: everything a run does happens on the calling thread, in plan order.

For what is bound to one thread or one connection: Django's TestCase, SQLite in memory, eager tasks in tests. Work
for the pool waits in its queue, and alarms wait until the thread looks at the clock: between steps, while a step asks
its context, and while an ``async def`` step waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from docket_celery.engine.process.pool import Pool
from docket_celery.engine.process.runtime import Runtime
from docket_celery.engine.process.timer import Clock, Timer, system_clock
from docket_celery.plan.context import Cancellation

if TYPE_CHECKING:
    from docket_celery.engine.process.loops import StepLoop

_IDLE_WAIT_S = 0.1
_CANCEL_LOOK_S = 0.01


class InlineRuntime(Runtime):
    """The pool, timer and loop of one run on the calling thread."""

    inline = True

    def __init__(self, clock: Clock = system_clock) -> None:
        self.clock = clock
        super().__init__(Pool(0), Timer(clock, threaded=False))
        self._thread = threading.get_ident()
        self._ringing = False

    def _make_loop(self) -> StepLoop:
        from docket_celery.engine.process.loops import InlineLoop

        return InlineLoop(self.clock.new_loop(), self.pool.submit, self.wait_s, self.catch_up)

    def catch_up(self) -> None:
        """Make the timer's calls that are due, if this is the run's thread."""
        if self._ringing or threading.get_ident() != self._thread:
            return
        self._ringing = True
        try:
            self.timer.ring()
        finally:
            self._ringing = False

    def drive(self, ended: Callable[[], bool], most_s: float | None = None) -> None:
        """Do all work until *ended*, or for about *most_s* seconds; waits for backoffs are spent here."""
        until = None if most_s is None else self.clock.monotonic() + most_s
        while not ended() and (until is None or self.clock.monotonic() < until):
            self.catch_up()
            if not self.pool.work_off():
                self.clock.sleep(self.wait_s())

    def wait_s(self) -> float:
        """Return how long no alarm is due, at most what the clock sleeps at once."""
        left = self.timer.wait_s()
        return _IDLE_WAIT_S if left is None else min(self.clock.most_wait_s, left)


class InlineCancellation(Cancellation):
    """Looks at the clock whenever it is asked: no other thread raises it while a step has this one."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: InlineRuntime, parent: Cancellation | None = None) -> None:
        super().__init__(parent)
        self._runtime = runtime

    def now(self) -> float:
        """Return the run's time."""
        return self._runtime.clock.monotonic()

    def child(self) -> Cancellation:
        """Return a flag that is raised with this one."""
        return InlineCancellation(self._runtime, self)

    @property
    def error(self) -> BaseException | None:
        """Why it was cancelled, or None."""
        self._runtime.catch_up()
        return self._error

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to *timeout* seconds (None: for ever) and return `is_set`."""
        clock = self._runtime.clock
        until = None if timeout is None else clock.monotonic() + timeout
        while not self.is_set():
            left = _IDLE_WAIT_S if until is None else until - clock.monotonic()
            if left <= 0:
                return False
            if clock is system_clock:
                super().wait(min(left, _CANCEL_LOOK_S))  # another thread may raise it all the same
            else:
                due = self._runtime.timer.wait_s()
                clock.sleep(left if due is None else min(left, due))
        return True
