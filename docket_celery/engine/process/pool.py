"""The pool of step threads: grown one by one, replaced when a step does not come back."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from docket_celery.engine.process.hooks import StepThread
from docket_celery.engine.process.timer import Work
from docket_celery.errors import TooManyAbandoned

_logger = logging.getLogger("docket_celery.process")

IDLE_S = 30.0
"""Seconds after which a pool thread without work ends, and with it what is bound to it: database connections."""


class Worker(StepThread):
    """A pool thread. It ends after its present work once the pool has given it up.

    While it is idle it waits to be `given` work; None: it is to see whether it must leave.
    """

    def __init__(self, pool: Pool, number: int) -> None:
        super().__init__(self._work, f"docket-step-{number}")
        self.pool = pool
        self.given_up = False
        self.given: Work | None = None
        self._idles = threading.Lock()
        self._idles.acquire()

    def give(self, work: Work | None) -> None:
        """Wake it for *work*; the caller has taken it from the idle ones, and holds the pool's lock."""
        self._idles.release()
        self.given = work

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is given work; False: it was given none in time."""
        return self._idles.acquire(timeout=timeout_s)

    def _work(self) -> None:
        while True:
            if (work := self.pool.take(self)) is not None:
                try:
                    work()
                except BaseException:
                    # Steps report their own errors; reaching here is a defect of this library, not of a step.
                    _logger.exception("work on a step thread failed")
            if self.pool.leave(self, worked=work is not None):
                return
            del work


def current_worker() -> Worker | None:
    """Return the calling thread, if it is of a pool."""
    thread = threading.current_thread()
    return thread if isinstance(thread, Worker) else None


class Pool:
    """Threads that run work in the order of submission, grown one by one up to *size*; idle ones end.

    The thread that has been idle for the shortest time gets the next work, and no other one wakes. One wakes at a
    time: the next wakes by it, unless it finds the work done. Calls for help of many short runs so wake one thread.

    Nothing that runs here waits for other work of the pool, so one thread is enough for any graph. A step that
    executes a graph itself is the exception, declared by `blocking`. Without threads its owner calls `work_off`.
    """

    def __init__(self, size: int, idle_s: float | None = None) -> None:
        self._most_abandoned = 2 * size
        self._size, self._idle_s = size, IDLE_S if idle_s is None else idle_s
        self._queue: deque[Work] = deque()
        self._idle: list[Worker] = []
        self._waking: Worker | None = None
        self._lock = threading.Lock()
        self._outstanding = 0
        self._closed = False
        self._workers: set[Worker] = set()
        self._abandoned: dict[Worker, str] = {}
        self._numbers = itertools.count(1)

    def submit(self, work: Work) -> None:
        """Run *work*, which must handle its own errors, on a pool thread.

        Raises `RuntimeError` if there is no thread and none can be started; *work* was not taken.
        """
        with self._lock:
            self._outstanding += 1
            try:
                self._grow()
            except RuntimeError:
                if not self._workers:
                    self._outstanding -= 1
                    raise
                _logger.warning("no further step thread can be started; %d continue", len(self._workers))
            self._queue.append(work)
            self._wake_one()

    def work_off(self) -> bool:
        """Do the oldest work on the calling thread; False if there is none. For a pool without threads."""
        if not self._queue:
            return False
        self._queue.popleft()()
        return True

    def has_thread(self) -> bool:
        """Tell whether the calling thread is of this pool."""
        worker = current_worker()
        return worker is not None and worker.pool is self

    def blocking(self) -> AbstractContextManager[None]:
        """Put another thread in the place of the calling one, if it is of this pool, while it waits for its work.

        Raises `RuntimeError` if no other thread can be started; the caller must not wait.
        """
        return self._replacing() if self.has_thread() else nullcontext()

    @contextmanager
    def _replacing(self) -> Generator[None]:
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

    def take(self, worker: Worker) -> Work | None:
        """Wait for *worker*'s next work; None: look whether it is time to leave."""
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            if self._closed:
                return None
            self._idle.append(worker)
        woken = worker.wait(self._idle_s)
        with self._lock:
            if not woken and worker in self._idle:
                self._idle.remove(worker)
                return None
            if not woken:
                worker.wait(0.0)  # it was given work in this moment
            work, worker.given = worker.given, None
            self._wake_one()
        return work

    def leave(self, worker: Worker, *, worked: bool) -> bool:
        """Count *worker*'s work as finished; True if the worker must end: given up, not needed, or closed."""
        with self._lock:
            if worker.given_up:
                self._abandoned.pop(worker, None)
                return True
            self._outstanding -= worked
            # Idle: whatever is outstanding, be it handed in this moment, has one of the others to do it.
            idle = not worked and self._outstanding < len(self._workers)
            spare = idle or len(self._workers) > self._size or (self._closed and not self._queue)
            if spare:
                self._workers.discard(worker)
        return spare

    def abandon(self, worker: Worker, why: str) -> None:
        """Give up a worker whose step, named by *why*, does not stop; another thread takes its place.

        The caller makes sure that the worker is inside that step until this returns.
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
        """Raise `TooManyAbandoned` if steps that do not stop hold twice as many threads as the pool has."""
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
            while self._idle:
                self._idle.pop().give(None)
        until = time.monotonic() + timeout_s
        for worker in workers:
            if worker is not threading.current_thread():
                worker.join(max(0.0, until - time.monotonic()))

    def _wake_one(self) -> None:
        # A signal may raise in the thread that submits, between any two of these steps: one that was given nothing
        # must not seem to be waking.
        if self._queue and self._idle and (self._waking is None or self._waking.given is None):
            self._waking = self._idle.pop()
            self._waking.give(self._queue.popleft())

    def _grow(self) -> None:
        if self._outstanding > len(self._workers) and len(self._workers) < self._size:
            worker = Worker(self, next(self._numbers))
            worker.start()
            self._workers.add(worker)
