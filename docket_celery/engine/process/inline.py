"""``docket_threads = 0``: everything a run does happens on the calling thread, in plan order.

For what is bound to one thread or one connection: Django's TestCase, SQLite in memory, eager tasks in tests. Work
that would go to the pool waits in a list, alarms wait until the thread looks at the clock: between steps, while a
step asks its context, and while an ``async def`` step waits.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import heapq
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from docket_celery.engine.process.clock import Clock, system_clock
from docket_celery.engine.process.heartbeat import Heartbeat
from docket_celery.engine.process.loops import OnEnd
from docket_celery.engine.process.pool import Pool
from docket_celery.engine.process.runtime import Runtime
from docket_celery.engine.process.timer import Alarm, Timer, Work
from docket_celery.errors import InvalidSettings
from docket_celery.plan.context import Cancellation
from docket_celery.store.contract import Store

_IDLE_WAIT_S = 0.1
_CANCEL_LOOK_S = 0.01
_LOOP_FAULT = (
    "0 runs async steps on the calling thread, and an asyncio loop runs there already; "
    "await aexecute with at least 1"
)


class InlinePool(Pool):
    """Work that the calling thread does when it comes to it."""

    def __init__(self) -> None:
        super().__init__(0)
        self._work: deque[Work] = deque()

    def submit(self, work: Work) -> None:
        """Keep *work* for the calling thread."""
        self._work.append(work)

    def step(self) -> bool:
        """Do the oldest work; False if there is none."""
        if not self._work:
            return False
        self._work.popleft()()
        return True


class InlineTimer(Timer):
    """Alarms that ring when the calling thread looks."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def after(self, delay_s: float, call: Work) -> Alarm:
        """Make *call* at the first look after *delay_s* seconds."""
        alarm = Alarm(self, self._clock.monotonic() + delay_s, call)
        heapq.heappush(self._heap, (alarm.at, next(self._order), alarm))
        return alarm

    def ring(self) -> None:
        """Make the calls that are due."""
        now = self._clock.monotonic()
        while self._heap and self._heap[0][0] <= now:
            alarm = heapq.heappop(self._heap)[2]
            if alarm.call is None:
                self._dead -= 1
                continue
            call, alarm.call = alarm.call, None
            call()

    @property
    def pending(self) -> bool:
        """Whether there are alarms."""
        return bool(self._heap)

    def wait_s(self) -> float:
        """Return how long nothing is due, at most what the clock sleeps at once."""
        if not self._heap:
            return _IDLE_WAIT_S
        return min(self._clock.most_wait_s, max(0.0, self._heap[0][0] - self._clock.monotonic()))


class InlineLoop:
    """A private asyncio loop that runs one ``async def`` step at a time, to its end."""

    def __init__(self, runtime: InlineRuntime) -> None:
        self._runtime = runtime
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Any], on_end: OnEnd = lambda: None) -> Future[Any]:
        """Keep *coroutine* for the calling thread; cancelling the future cancels it.

        Args:
            coroutine: What to run.
            on_end: Called when it has really ended.

        Raises:
            InvalidSettings: A loop runs on this thread already, which cannot run another one.
        """
        if _runs_a_loop():
            coroutine.close()
            raise InvalidSettings("docket_threads", _LOOP_FAULT)
        future: Future[Any] = Future()
        drive = functools.partial(self._drive, coroutine, future, contextvars.copy_context(), on_end)
        self._runtime.pool.submit(drive)
        return future

    def close(self) -> None:
        """Close the loop, if a step needed one."""
        if self._loop is not None:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
            self._loop = None

    def _drive(
        self,
        coroutine: Coroutine[Any, Any, Any],
        future: Future[Any],
        context: contextvars.Context,
        on_end: OnEnd,
    ) -> None:
        if future.cancelled():
            coroutine.close()
            on_end()
            return
        if self._loop is None:
            self._loop = self._runtime.clock.new_loop()
        task = self._loop.create_task(coroutine, context=context)
        task.add_done_callback(lambda _: on_end())
        future.add_done_callback(lambda _: task.cancel())
        try:
            self._loop.run_until_complete(self._watch(task))
        except BaseException:
            # Ctrl-C came while the loop waited: the step sees its cancellation before the run ends.
            task.cancel()
            self._loop.run_until_complete(asyncio.wait([task]))
            raise
        if task.cancelled():
            future.cancel()
        elif future.set_running_or_notify_cancel():
            future.set_result(task.result())

    async def _watch(self, task: asyncio.Task[Any]) -> None:
        """Wait for *task*; let alarms ring meanwhile: a deadline cancels it."""
        while not task.done():
            await asyncio.wait([task], timeout=self._runtime.timer.wait_s())
            self._runtime.catch_up()


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class InlineRuntime(Runtime):
    """The pool, timer and loop of one run on the calling thread."""

    inline = True
    pool: InlinePool
    timer: InlineTimer

    def __init__(self, clock: Clock = system_clock) -> None:
        super().__init__(0)
        self.clock = clock
        self.pool, self.timer = InlinePool(), InlineTimer(clock)
        self._thread = threading.get_ident()
        self._own_loop = InlineLoop(self)
        self._ringing = False

    @property
    def loop(self) -> InlineLoop:
        """The loop for ``async def`` steps."""
        return self._own_loop

    def catch_up(self) -> None:
        """Let ring what is due, if this is the run's thread."""
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
            if not self.pool.step():
                self.clock.sleep(self.timer.wait_s())

    def close(self) -> None:
        """Close the loop."""
        self._own_loop.close()


class InlineCancellation(Cancellation):
    """Looks at the clock whenever it is asked: nobody else can raise it while a step has the thread."""

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

    def is_set(self) -> bool:
        """Tell whether it was cancelled."""
        return self.error is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to *timeout* seconds (None: for ever) and return `is_set`."""
        clock, timer = self._runtime.clock, self._runtime.timer
        until = None if timeout is None else clock.monotonic() + timeout
        while not self.is_set():
            left = _IDLE_WAIT_S if until is None else until - clock.monotonic()
            if left <= 0:
                return False
            if clock is system_clock:
                super().wait(min(left, _CANCEL_LOOK_S))  # another thread may raise it all the same
            else:
                clock.sleep(min(left, timer.wait_s()) if timer.pending else left)
        return True


class InlineHeartbeat(Heartbeat):
    """Extends what is watched from the calling thread, over its connection."""

    def __init__(self, store: Store, clock: Clock = system_clock) -> None:
        super().__init__(store)
        self._clock = clock
        self._beat_at = clock.monotonic()

    def beat_if_due(self) -> None:
        """Extend what is watched, at a quarter of the shortest lease or as soon after as the thread comes to it."""
        now = self._clock.monotonic()
        if (self._held or self._claims) and now >= self._beat_at + self.interval_s():
            self._beat_at = now
            self._beat(now)

    def _ensure_thread(self) -> None:
        pass
