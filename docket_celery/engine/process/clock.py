"""Where a run on the calling thread has its time from."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Time, and a way to let it pass.

    Attributes:
        most_wait_s: Most seconds to sleep at once, so that others may be heard meanwhile.
    """

    most_wait_s: float

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let *seconds* pass."""
        ...

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """Return an asyncio loop with the same time."""
        ...


class SystemClock:
    """The machine's time."""

    most_wait_s = 0.1

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def new_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.new_event_loop()


system_clock = SystemClock()
