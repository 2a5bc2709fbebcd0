"""A clock that the test owns: waits take no time, and are counted."""

from __future__ import annotations

import asyncio
import selectors
import threading
from typing import Any

from docket_celery.engine.process.timer import Clock
from docket_celery.plan.options import Seconds, to_seconds

_WALL_START_S = 946_684_800.0  # 2000-01-01T00:00:00Z


class FakeClock(Clock):
    """Time that passes only when a call waits for it, or by `advance`.

    For runs on the calling thread (`inline`, `eager`) it is what backoffs, deadlines, leases, ``ctx.sleep`` and, in
    ``async def`` steps, ``asyncio.sleep`` go by; for `docket_celery.MemoryStore` (``MemoryStore(clock.time)``) what
    ``ttl`` goes by. Code that reads `time` itself sees the machine's time.

    Args:
        start: Seconds since 1970 that `time` begins with; 2000-01-01 if left out.

    Attributes:
        waited_s: Seconds that were waited so far; what `advance` skipped is not counted.
    """

    most_wait_s = float("inf")

    def __init__(self, start: float = _WALL_START_S) -> None:
        self._lock = threading.Lock()
        self._start_s = start
        self._passed_s = 0.0
        self.waited_s = 0.0

    def monotonic(self) -> float:
        """Return the seconds that have passed since the clock was made."""
        return self._passed_s

    def time(self) -> float:
        """Return the seconds since 1970."""
        return self._start_s + self._passed_s

    def sleep(self, seconds: float) -> None:
        """Pass *seconds* at once, and count them as waited."""
        with self._lock:
            self._passed_s += seconds
            self.waited_s += seconds

    def advance(self, seconds: Seconds) -> None:
        """Pass *seconds* (or a timedelta) without a wait: a ttl runs out, a lease expires."""
        with self._lock:
            self._passed_s += to_seconds(seconds, "advance")

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """Return an asyncio loop whose timers go by this clock."""
        return _FakeTimeLoop(self)

    def __repr__(self) -> str:
        return f"<FakeClock waited={self.waited_s:g} s>"


class _FakeTimeLoop(asyncio.SelectorEventLoop):
    """Asks what is ready, and instead of waiting for a timer advances the clock to it."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(_NoWaitSelector(clock))
        self._fake_clock = clock

    def time(self) -> float:
        return self._fake_clock.monotonic()


class _NoWaitSelector(selectors.DefaultSelector):
    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, Any]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(0)
        if not ready:
            self._clock.sleep(timeout)
        return ready
