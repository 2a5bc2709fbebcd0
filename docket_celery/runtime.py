"""What a process has once: a pool of step threads, a timer and an event loop. Made lazily, never across a fork."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

_logger = logging.getLogger("docket_celery.runtime")
Work = Callable[[], None]


class Worker(threading.Thread):
    """A pool thread. It ends after its present work once the pool has given it up."""

    def __init__(self, pool: Pool, number: int) -> None:
        super().__init__(name=f"docket-step-{number}", daemon=True)
        self.pool = pool
        self.given_up = False

    def run(self) -> None:
        while (work := self.pool.take()) is not None:
            try:
                work()
            except BaseException:
                # Steps report their own errors; reaching here is a defect of this library, not of a step.
                _logger.exception("work on a step thread failed")
            del work
            if self.pool.done(self):
                return


class Pool:
    """Threads that run work in the order of submission, grown one by one up to *size*.

    Nothing that runs here waits for other work of the pool, so one thread is enough for any graph.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._outstanding = 0
        self._workers: set[Worker] = set()
        self._abandoned: dict[Worker, str] = {}
        self._numbers = itertools.count(1)

    def submit(self, work: Work) -> None:
        """Run *work* on a pool thread; it must handle its own errors."""
        with self._lock:
            self._outstanding += 1
            self._grow()
        self._queue.put(work)

    def take(self) -> Work | None:
        """Wait for the next work; None ends the calling worker."""
        return self._queue.get()

    def done(self, worker: Worker) -> bool:
        """Count *worker*'s work as finished; True if the pool has given the worker up."""
        with self._lock:
            if worker.given_up:
                self._abandoned.pop(worker, None)
                return True
            self._outstanding -= 1
        return False

    def abandon(self, worker: Worker, why: str) -> None:
        """Give up a worker whose step does not stop; another thread takes its place.

        Args:
            worker: The thread that is still inside the step.
            why: The step's name, for the report.
        """
        with self._lock:
            if worker.given_up:
                return
            worker.given_up = True
            self._workers.discard(worker)
            self._abandoned[worker] = why
            self._outstanding -= 1
            self._grow()

    def abandoned(self) -> list[str]:
        """Return the names of the steps that still hold an abandoned thread."""
        with self._lock:
            return sorted(self._abandoned.values())

    def close(self, timeout_s: float = 5.0) -> None:
        """End the idle threads and wait for them; abandoned ones are left alone."""
        with self._lock:
            workers = list(self._workers)
            self._workers.clear()
        for _ in workers:
            self._queue.put(None)
        until = time.monotonic() + timeout_s
        for worker in workers:
            if worker is not threading.current_thread():
                worker.join(max(0.0, until - time.monotonic()))

    def _grow(self) -> None:
        if self._outstanding > len(self._workers) and len(self._workers) < self.size:
            worker = Worker(self, next(self._numbers))
            self._workers.add(worker)
            worker.start()


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
        self._thread: threading.Thread | None = None
        self._closed = False

    def after(self, delay_s: float, call: Work) -> Alarm:
        """Make *call* after *delay_s* seconds, on the timer's thread."""
        alarm = Alarm(self, time.monotonic() + delay_s, call)
        with self._condition:
            heapq.heappush(self._heap, (alarm.at, next(self._order), alarm))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="docket-timer", daemon=True)
                self._thread.start()
            elif self._heap[0][2] is alarm:
                self._condition.notify()
        return alarm

    def cancel(self, alarm: Alarm) -> bool:
        with self._condition:
            if alarm.call is None:
                return False
            alarm.call = None
            while self._heap and self._heap[0][2].call is None:
                heapq.heappop(self._heap)
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
            except Exception:
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
                    self._condition.wait(wait_s)
                    continue
                alarm = heapq.heappop(self._heap)[2]
                if alarm.call is not None:
                    call, alarm.call = alarm.call, None
                    return call
        return None


class LoopThread:
    """An asyncio loop on a thread of its own, for ``async def`` steps outside ``aexecute``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="docket-loop", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run *coroutine* on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()


class Runtime:
    """The pool, timer and loop of one process."""

    def __init__(self, threads: int) -> None:
        self.pool = Pool(threads)
        self.timer = Timer()
        self._loop: LoopThread | None = None
        self._lock = threading.Lock()

    @property
    def loop(self) -> LoopThread:
        """The loop for ``async def`` steps, made on first use."""
        with self._lock:
            if self._loop is None:
                self._loop = LoopThread()
            return self._loop

    def close(self) -> None:
        """End all threads that are not inside a step."""
        self.timer.close()
        self.pool.close()
        if self._loop is not None:
            self._loop.close()


class _Process:
    """The runtimes of this process by thread count; a forked child starts with none."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.runtimes: dict[int, Runtime] = {}


_process = _Process()
os.register_at_fork(after_in_child=_process.reset)


def process_runtime(threads: int) -> Runtime:
    """Return this process's runtime with *threads* step threads, made on first use."""
    found = _process.runtimes.get(threads)
    if found is None:
        with _process.lock:
            found = _process.runtimes.get(threads)
            if found is None:
                found = _process.runtimes[threads] = Runtime(threads)
    return found


def close_runtimes() -> None:
    """End the threads of this process; the next run makes new ones. For tests and shutdown."""
    with _process.lock:
        runtimes, _process.runtimes = list(_process.runtimes.values()), {}
    for runtime in runtimes:
        runtime.close()
