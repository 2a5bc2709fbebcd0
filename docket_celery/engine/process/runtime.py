"""The pool of step threads, the timer and the event loop on which runs are executed."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from docket_celery.engine.process.pool import Pool
from docket_celery.engine.process.timer import Timer, Work

if TYPE_CHECKING:
    from docket_celery.engine.process.loops import StepLoop

_logger = logging.getLogger("docket_celery.process")
_LATER_S = 1.0


class Runtime:
    """A pool, a timer and a loop; all on the calling thread if it is `inline`."""

    inline = False

    def __init__(self, pool: Pool, timer: Timer) -> None:
        self.pool, self.timer = pool, timer
        self._loop: StepLoop | None = None
        self._lock = threading.Lock()

    def submit_or_retry(self, work: Work) -> None:
        """Run *work*, without which a run would hang, on the pool: at once, or as soon as it has a thread."""
        try:
            self.pool.submit(work)
        except RuntimeError as error:
            _logger.warning("no step thread can be started, trying again in %g s: %s", _LATER_S, error)
            self.timer.after(_LATER_S, lambda: self.submit_or_retry(work))

    @property
    def loop(self) -> StepLoop:
        """The loop for ``async def`` steps, made on first use."""
        with self._lock:
            if self._loop is None:
                self._loop = self._make_loop()
            return self._loop

    def _make_loop(self) -> StepLoop:
        from docket_celery.engine.process.loops import LoopThread

        return LoopThread()

    def close(self) -> None:
        """End all threads that are not inside a step."""
        self.timer.close()
        self.pool.close()
        if self._loop is not None:
            self._loop.close()
