"""Time: the clock of a run, and the timer for backoffs and deadlines."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

_logger = logging.getLogger("docket_celery.process")

Work = Callable[[], None]

_MOST_WAIT_S = 3600.0
_FEW_DEAD = 64


class Clock:
    """The machine's time, and a way to let it pass; the test kit has one that passes at once.

    Attributes:
        most_wait_s: Most seconds to sleep at once, so that other threads are heard meanwhile.
    """

    most_wait_s = 0.1

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait *seconds*."""
        time.sleep(seconds)

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """Return an asyncio loop with the same time."""
        import asyncio

        return asyncio.new_event_loop()


system_clock = Clock()


class Alarm:
    """A pending call of the timer."""

    __slots__ = ("_timer", "at", "call")

    def __init__(self, timer: Timer, at: float, call: Work) -> None:
        self._timer, self.at = timer, at
        self.call: Work | None = call

    def cancel(self) -> bool:
        """Prevent the call; False if it was made or cancelled before."""
        return self._timer.cancel(self)


class Timer:
    """Makes quick calls at their time; unless it is *threaded*, `ring` makes those that are due."""

    def __init__(self, clock: Clock = system_clock, *, threaded: bool = True) -> None:
        self._clock, self._threaded = clock, threaded
        self._condition = threading.Condition()
        self._heap: list[tuple[float, int, Alarm]] = []
        self._order = itertools.count()
        self._dead = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def after(self, delay_s: float, call: Work) -> Alarm:
        """Make *call* after *delay_s* seconds."""
        alarm = Alarm(self, self._clock.monotonic() + delay_s, call)
        with self._condition:
            heapq.heappush(self._heap, (alarm.at, next(self._order), alarm))
            if self._thread is not None:
                if self._heap[0][2] is alarm:
                    self._condition.notify()
            elif self._threaded:
                thread = threading.Thread(target=self._run, name="docket-timer", daemon=True)
                thread.start()
                self._thread = thread
        return alarm

    def cancel(self, alarm: Alarm) -> bool:
        """See `Alarm.cancel`."""
        with self._condition:
            if alarm.call is None:
                return False
            alarm.call = None
            self._dead += 1
            # Most alarms are cancelled long before their time: without this an hour's timeouts would pile up.
            if self._dead > _FEW_DEAD and 2 * self._dead > len(self._heap):
                self._heap = [entry for entry in self._heap if entry[2].call is not None]
                heapq.heapify(self._heap)
                self._dead = 0
        return True

    def ring(self) -> None:
        """Make the calls that are due now."""
        now = self._clock.monotonic()
        while True:
            with self._condition:
                call = self._take(now)
            if call is None:
                return
            call()

    def wait_s(self) -> float | None:
        """Return the seconds until the next alarm; None: there is none."""
        with self._condition:
            return max(0.0, self._heap[0][0] - self._clock.monotonic()) if self._heap else None

    def close(self) -> None:
        """End the thread; pending calls are dropped."""
        with self._condition:
            self._closed = True
            self._condition.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5.0)

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except BaseException:
                # Whatever it was: without this thread no timeout and no retry happens any more.
                _logger.exception("a timer call failed")
            del call

    def _next(self) -> Work | None:
        with self._condition:
            while not self._closed:
                if (call := self._take(self._clock.monotonic())) is not None:
                    return call
                wait_s = self.wait_s()
                self._condition.wait(None if wait_s is None else min(wait_s, _MOST_WAIT_S))
        return None

    def _take(self, now: float) -> Work | None:
        """Take the next call that is due; the caller holds the lock."""
        while self._heap and self._heap[0][0] <= now:
            alarm = heapq.heappop(self._heap)[2]
            if alarm.call is not None:
                call, alarm.call = alarm.call, None
                return call
            self._dead -= 1
        return None
