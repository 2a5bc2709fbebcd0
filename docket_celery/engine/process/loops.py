"""Where ``async def`` steps run: the caller's loop, one loop thread per process, or a loop on the calling thread.

Imported when it is needed, like asyncio itself, which takes 10 ms of a process that has no such step.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from docket_celery.engine.process.hooks import LoopOwner
from docket_celery.engine.process.timer import Work
from docket_celery.errors import InvalidSettings

_logger = logging.getLogger("docket_celery.process")
_LOOP_FAULT = (
    "0 runs async steps on the calling thread, and an asyncio loop runs there already; "
    "await aexecute with at least 1"
)


class StepLoop:
    """An asyncio loop, which outlives the run, for ``async def`` steps; its thread is another than the caller's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def submit(
        self, coroutine: Coroutine[Any, Any, Any], on_end: Callable[[], object] = lambda: None
    ) -> Future[Any]:
        """Do what `asyncio.run_coroutine_threadsafe` does, which has no way to learn of the end of its task.

        Cancelling the future cancels *coroutine*; *on_end* is called when it has really ended, which is later.
        Raises `RuntimeError` if the loop is closed.
        """
        future: Future[Any] = Future()

        def begin() -> None:
            if future.cancelled():
                coroutine.close()
                on_end()
                return
            task = self._loop.create_task(coroutine)
            task.add_done_callback(ended)
            future.add_done_callback(lambda future: cancel(task) if future.cancelled() else None)

        def cancel(task: asyncio.Task[Any]) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(task.cancel)

        def ended(task: asyncio.Task[Any]) -> None:
            on_end()
            if task.cancelled():
                future.cancel()
            elif future.set_running_or_notify_cancel():
                error = task.exception()
                if error is None:
                    future.set_result(task.result())
                else:
                    future.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(begin)
        except RuntimeError:
            coroutine.close()
            raise
        return future

    def close(self) -> None:
        """Do nothing: the loop is the caller's."""

    def tell(self, call: Callable[[], object]) -> None:
        """Make *call* on the loop's thread; a closed loop is left alone, as no task waits on it."""
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


def running_loop() -> StepLoop:
    """Return the loop that runs on this thread; raise `RuntimeError` if none does."""
    return StepLoop(asyncio.get_running_loop())


class LoopThread(StepLoop):
    """A loop on a thread of its own, for ``async def`` steps outside ``aexecute``."""

    def __init__(self) -> None:
        super().__init__(asyncio.new_event_loop())
        self._closing = False
        self._thread = LoopOwner(self._run, "docket-loop")
        self._thread.start()

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
                _logger.exception("a task ended the loop of async steps; the loop continues")
            if self._closing:
                return

    def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        # Two rounds: one for the tasks to see it, one for their futures to be told.
        self._loop.call_soon(self._loop.call_soon, self._loop.stop)


class InlineLoop(StepLoop):
    """A private asyncio loop that runs one ``async def`` step at a time, to its end, on the calling thread.

    Args:
        loop: The loop.
        queue: Keeps work for the calling thread.
        wait_s: Tells for how many seconds no alarm is due.
        catch_up: Makes the calls of alarms that are due.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        queue: Callable[[Work], object],
        wait_s: Callable[[], float],
        catch_up: Work,
    ) -> None:
        super().__init__(loop)
        self._queue, self._wait_s, self._catch_up = queue, wait_s, catch_up

    def submit(
        self, coroutine: Coroutine[Any, Any, Any], on_end: Callable[[], object] = lambda: None
    ) -> Future[Any]:
        """Keep *coroutine* for the calling thread; raise `InvalidSettings` if a loop runs on that already."""
        if asyncio._get_running_loop() is not None:
            coroutine.close()
            raise InvalidSettings("docket_threads", _LOOP_FAULT)
        ended = self._loop.create_future()

        def end() -> None:
            ended.set_result(None)
            on_end()

        future = super().submit(coroutine, end)
        self._queue(functools.partial(self._drive, future, ended))
        return future

    def close(self) -> None:
        """Close the loop."""
        if asyncio._get_running_loop() is None:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _drive(self, future: Future[Any], ended: asyncio.Future[None]) -> None:
        try:
            self._loop.run_until_complete(self._watch(ended))
        except BaseException:
            # Ctrl-C came while the loop waited: the step sees its cancellation before the run ends.
            future.cancel()
            self._loop.run_until_complete(asyncio.wait([ended]))
            raise

    async def _watch(self, ended: asyncio.Future[None]) -> None:
        """Wait for the step; let alarms ring meanwhile: a deadline cancels it."""
        while not ended.done():
            await asyncio.wait([ended], timeout=self._wait_s())
            self._catch_up()
