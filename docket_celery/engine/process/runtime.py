"""What a process has once: a pool of step threads, a timer, an event loop. Made lazily, never across a fork."""

from __future__ import annotations

import logging
import os
import threading

from docket_celery.engine.process.loops import LoopThread, StepLoop, is_loop_thread
from docket_celery.engine.process.pool import Pool, Worker
from docket_celery.engine.process.timer import Timer, Work

_logger = logging.getLogger("docket_celery.runtime")
_LATER_S = 1.0


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


def owns_thread() -> bool:
    """Tell whether the calling thread is a pool's or a `LoopThread`'s."""
    return isinstance(threading.current_thread(), Worker) or is_loop_thread()
