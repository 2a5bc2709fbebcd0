"""One timer thread for backoffs and deadlines."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

_logger = logging.getLogger("docket_celery.runtime")

Work = Callable[[], None]


_MOST_WAIT_S = 3600.0


_FEW_DEAD = 64


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
    """One thread that makes calls at their time. A call must be quick: hand longer work to the pool."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._heap: list[tuple[float, int, Alarm]] = []
        self._order = itertools.count()
        self._dead = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def after(self, delay_s: float, call: Work) -> Alarm:
        """Make *call* after *delay_s* seconds, on the timer's thread."""
        alarm = Alarm(self, time.monotonic() + delay_s, call)
        with self._condition:
            heapq.heappush(self._heap, (alarm.at, next(self._order), alarm))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="docket-timer", daemon=True)
                thread.start()
                self._thread = thread
            elif self._heap[0][2] is alarm:
                self._condition.notify()
        return alarm

    def cancel(self, alarm: Alarm) -> bool:
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
                if not self._heap:
                    self._condition.wait()
                    continue
                wait_s = self._heap[0][0] - time.monotonic()
                if wait_s > 0:
                    self._condition.wait(min(wait_s, _MOST_WAIT_S))
                    continue
                alarm = heapq.heappop(self._heap)[2]
                if alarm.call is not None:
                    call, alarm.call = alarm.call, None
                    return call
                self._dead -= 1
        return None
