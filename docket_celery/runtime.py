"""What a process has once: a pool of step threads, a timer, an event loop. Made lazily, never across a fork."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol

from docket_celery.django_orm import close_connections
from docket_celery.errors import TooManyAbandoned

_logger = logging.getLogger("docket_celery.runtime")
Work = Callable[[], None]
_MOST_WAIT_S = 3600.0
IDLE_S = 30.0
"""A pool thread without work for so many seconds ends, and with it what is bound to it: database connections."""
_FEW_DEAD = 64
_LATER_S = 1.0


class Worker(threading.Thread):
    """A pool thread. It ends after its present work once the pool has given it up."""

    def __init__(self, pool: Pool, number: int) -> None:
        super().__init__(name=f"docket-step-{number}", daemon=True)
        self.pool = pool
        self.given_up = False

    def run(self) -> None:
        try:
            self._work()
        finally:
            close_connections()

    def _work(self) -> None:
        while True:
            if (work := self.pool.take()) is not None:
                try:
                    work()
                except BaseException:
                    # Steps report their own errors; reaching here is a defect of this library, not of a step.
                    _logger.exception("work on a step thread failed")
            if self.pool.leave(self, worked=work is not None):
                return
            del work


class Pool:
    """Threads that run work in the order of submission, grown one by one up to *size*; idle ones end.

    Nothing that runs here waits for other work of the pool, so one thread is enough for any graph. A step that
    executes a graph itself is the exception, declared by `blocking`.

    Args:
        size: Most threads.
        idle_s: Seconds without work after which a thread ends; default: `IDLE_S`.
    """

    def __init__(self, size: int, idle_s: float | None = None) -> None:
        self._most_abandoned = 2 * size
        self._size, self._idle_s = size, IDLE_S if idle_s is None else idle_s
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._outstanding = 0
        self._closed = False
        self._workers: set[Worker] = set()
        self._abandoned: dict[Worker, str] = {}
        self._numbers = itertools.count(1)

    def submit(self, work: Work) -> None:
        """Run *work* on a pool thread; it must handle its own errors.

        Raises:
            RuntimeError: There is no thread and none can be started; *work* was not taken.
        """
        with self._lock:
            self._outstanding += 1
            try:
                self._grow()
            except RuntimeError:
                if not self._workers:
                    self._outstanding -= 1
                    raise
                _logger.warning("no further step thread can be started; %d go on", len(self._workers))
        self._queue.put(work)

    @contextmanager
    def blocking(self) -> Generator[None]:
        """Let another thread take the place of the calling worker while it waits for work of this pool.

        Raises:
            RuntimeError: No other thread can be started; the caller must not wait.
        """
        with self._lock:
            self._size += 1
            try:
                self._grow()
            except BaseException:
                self._size -= 1
                raise
        try:
            yield
        finally:
            with self._lock:
                self._size -= 1

    def take(self) -> Work | None:
        """Wait for the next work; None: look whether it is time to leave."""
        try:
            return self._queue.get(timeout=self._idle_s)
        except queue.Empty:
            return None

    def leave(self, worker: Worker, *, worked: bool) -> bool:
        """Count *worker*'s work as finished; True if the worker must end: given up, not needed, or closed."""
        with self._lock:
            if worker.given_up:
                self._abandoned.pop(worker, None)
                return True
            self._outstanding -= worked
            # Idle: whatever is outstanding, be it handed in this moment, has one of the others to do it.
            idle = not worked and self._outstanding < len(self._workers)
            spare = idle or len(self._workers) > self._size or (self._closed and not self._outstanding)
            if spare:
                self._workers.discard(worker)
        if spare and self._closed:
            # Each that leaves wakes the next: a wake-up may have gone to one that found work instead.
            self._queue.put(None)
        return spare

    def abandon(self, worker: Worker, why: str) -> None:
        """Give up a worker whose step does not stop; another thread takes its place.

        The caller makes sure that the worker is inside that step until this returns.

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
            try:
                self._grow()
            except RuntimeError:
                _logger.warning("the thread that step %r holds cannot be replaced now", why)

    def abandoned(self) -> list[str]:
        """Return the names of the steps that still hold an abandoned thread."""
        with self._lock:
            return sorted(self._abandoned.values())

    def check_abandoned(self) -> None:
        """Refuse what may come to hold another thread.

        Raises:
            TooManyAbandoned: Steps that do not stop hold twice as many threads as the pool has.
        """
        held = self.abandoned() if self._abandoned else []
        if held and len(held) >= self._most_abandoned:
            raise TooManyAbandoned(len(held), self._most_abandoned, sorted(set(held)))

    def close(self, timeout_s: float = 5.0) -> None:
        """End the idle threads and wait for them; abandoned ones are left alone.

        Work that is still handed in, by a run that ends late, is done; its thread ends after it.
        """
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        self._queue.put(None)
        until = time.monotonic() + timeout_s
        for worker in workers:
            if worker is not threading.current_thread():
                worker.join(max(0.0, until - time.monotonic()))

    def _grow(self) -> None:
        if self._outstanding > len(self._workers) and len(self._workers) < self._size:
            worker = Worker(self, next(self._numbers))
            worker.start()
            self._workers.add(worker)


def owns_thread() -> bool:
    """Tell whether the calling thread is a pool's or a `LoopThread`'s."""
    return isinstance(threading.current_thread(), (Worker, _LoopOwner))


def is_loop_thread() -> bool:
    """Tell whether the calling thread is a `LoopThread`'s."""
    return isinstance(threading.current_thread(), _LoopOwner)


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


class StepLoop(Protocol):
    """Where ``async def`` steps run."""

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run *coroutine*; cancelling the future cancels it."""
        ...


class CallerLoop:
    """The running asyncio loop of the caller, for the ``async def`` steps of ``aexecute``.

    Args:
        loop: The loop; it outlives the run, or the run is being cancelled with it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run *coroutine* on the loop.

        Raises:
            RuntimeError: The loop is closed.
        """
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise

    def tell(self, call: Callable[[], object]) -> None:
        """Make *call* on the loop's thread; on a loop that is closed nobody listens any more."""
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


class _LoopOwner(threading.Thread):
    """The thread of a `LoopThread`."""


class LoopThread:
    """An asyncio loop on a thread of its own, for ``async def`` steps outside ``aexecute``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._closing = False
        self._thread = _LoopOwner(target=self._run, name="docket-loop", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run *coroutine* on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what runs on the loop, stop it and wait for its thread."""
        self._closing = True
        self._loop.call_soon_threadsafe(self._cancel_all)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()

    def _run(self) -> None:
        while True:
            try:
                self._loop.run_forever()
            except BaseException:
                # asyncio lets SystemExit and KeyboardInterrupt of any task through; other runs need the loop.
                _logger.exception("a task ended the loop of async steps; it goes on")
            if self._closing:
                return

    def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        # Two rounds: one for the tasks to see it, one for their futures to be told.
        self._loop.call_soon(self._loop.call_soon, self._loop.stop)


class Runtime:
    """The pool, timer and loop of one process.

    Attributes:
        inline: Everything happens on the calling thread.
    """

    inline = False

    def __init__(self, threads: int) -> None:
        self.pool = Pool(threads)
        self.timer = Timer()
        self._loop: LoopThread | None = None
        self._lock = threading.Lock()

    def submit_surely(self, work: Work) -> None:
        """Run *work* on the pool: at once, or as soon as a thread for it can be started.

        For work without which a run would hang, whoever hands it in.
        """
        try:
            self.pool.submit(work)
        except RuntimeError as error:
            _logger.warning("no step thread can be started, trying again in %g s: %s", _LATER_S, error)
            self.timer.after(_LATER_S, lambda: self.submit_surely(work))

    def catch_up(self) -> None:
        """Let alarms ring that only the calling thread can: none here, the timer has a thread."""

    @property
    def loop(self) -> StepLoop:
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
        self.lock = threading.Lock()
        self.runtimes: dict[int, Runtime] = {}
        self._inherited: list[dict[int, Runtime]] = []

    def reset(self) -> None:
        # Kept, not freed: finalizing the parent's loop here would touch file descriptors that it still uses.
        self._inherited.append(self.runtimes)
        self.lock = threading.Lock()
        self.runtimes = {}


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
