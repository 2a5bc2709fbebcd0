"""The ways to wait for a run: with the calling thread, on the caller's asyncio loop, or later by a handle.

A thread that waits here runs no SQL and no step of a run that has a lease: it sits in short `queue.SimpleQueue`
waits, where a signal may interrupt it without leaving a lock or a transaction behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Generic, TypeVar

from google.protobuf.message import Message

from docket_celery.defaults import process_defaults
from docket_celery.errors import InvalidArguments, InvalidSettings, RunCancelled
from docket_celery.outcome import RunOutcome
from docket_celery.run import Run
from docket_celery.runtime import CallerLoop, Worker, is_loop_thread, process_runtime
from docket_celery.stored_items import StoredBatch

T = TypeVar("T", bound=Message)
R = TypeVar("R")

_logger = logging.getLogger("docket_celery.run")
_LEAVE_S = 5.0
_LOOK_S = 0.5


def run_here(run: Run) -> RunOutcome:
    """Start *run* and wait for its end with the calling thread.

    Raises:
        BaseException: Whatever interrupted the waiting thread (a soft time limit, SystemExit, Ctrl-C); the run was
            cancelled and its lease given up before.
        InvalidArguments: The calling thread runs the ``async def`` steps, which would all wait with it.
        TooManyAbandoned: Too many threads are held by timed-out steps.
    """
    if run.inline is None:
        _refuse_on_loop("execute")
    run.pool.check_abandoned()
    outcomes: queue.SimpleQueue[RunOutcome] = queue.SimpleQueue()
    try:
        run.start(outcomes.put)
        if run.inline is not None:
            run.watch()
            run.inline.drive(lambda: run.concluded)
            return outcomes.get()
        thread = threading.current_thread()
        if isinstance(thread, Worker) and thread.pool is run.pool:
            # A step that executes a graph: its thread waits for work of the pool that it belongs to.
            with thread.pool.blocking():
                return _wait(run, outcomes)
        return _wait(run, outcomes)
    except BaseException as interruption:
        run.stop(interruption)
        parked = _leave(run, outcomes, interruption)
        if parked is not None:
            return parked
        raise
    finally:
        if run.inline is not None:
            run.inline.close()


async def run_on_loop(run: Run, loop: CallerLoop) -> RunOutcome:
    """Start *run* and wait for its end without blocking the running loop.

    Raises:
        asyncio.CancelledError: The waiting task was cancelled; the run was cancelled and its lease given up before.
        TooManyAbandoned: Too many threads are held by timed-out steps.
    """
    _require_threads(run)
    run.pool.check_abandoned()
    ended: asyncio.Future[RunOutcome] = asyncio.get_running_loop().create_future()

    def report(outcome: RunOutcome) -> None:
        loop.tell(functools.partial(ended.set_result, outcome))

    try:
        run.start(report)
        run.watch()
        # A cancelled wait leaves the future alone: the outcome still has to come.
        await asyncio.wait([ended])
    except BaseException as interruption:
        run.stop(interruption)
        if run.store is not None:
            await asyncio.wait([ended], timeout=_LEAVE_S)
            if not ended.done():
                _warn_of_lease(run)
        raise
    return ended.result()


class StartedRun(Generic[T]):
    """A run that goes on in the background; made by `Graph.start`. Safe to share between threads.

    Attributes:
        execution_id: The name of the run.
    """

    def __init__(self, run: Run, target: type[T]) -> None:
        self.execution_id = run.submission.execution_id
        self._run, self._target = run, target
        self._outcome: RunOutcome | None = None
        self._trace: TracebackType | None = None
        self._outcomes: queue.SimpleQueue[RunOutcome] = queue.SimpleQueue()
        _require_threads(run)
        run.pool.check_abandoned()
        run.start(self._end)
        run.watch()

    def __repr__(self) -> str:
        return f"<StartedRun {self.execution_id!r}: {'done' if self.done() else 'running'}>"

    def done(self) -> bool:
        """Tell whether the run has ended, whichever way."""
        return self._outcome is not None

    def result(self, timeout: float | None = None) -> T:
        """Wait for the end and return the target's message; may be called again.

        Args:
            timeout: Most seconds to wait; the run itself goes on. None: as long as it takes.

        Raises:
            TimeoutError: The run has not ended yet.
            RunCancelled: `cancel` ended it.
            InvalidArguments: Called before the end in an ``async def`` step, which must not block.
            StepFailed, AbortError, RunTimedOut, RunConflict, RunQuarantined, GraphChanged: As from `Graph.execute`.
        """
        if self._outcome is None:
            _refuse_on_loop("result")
        thread = threading.current_thread()
        if self._outcome is None and isinstance(thread, Worker) and thread.pool is self._run.pool:
            # A step that waits for another run: its thread waits for work of the pool that it belongs to.
            with thread.pool.blocking():
                return read_value(self._wait(timeout), self._target)
        return read_value(self._wait(timeout), self._target)

    def cancel(self, reason: str = "cancelled by whoever started it") -> bool:
        """End the run with `RunCancelled`: nothing new starts, contexts are cancelled, late results are discarded.

        A run that persists ends in the state CANCELLED, its finished steps are kept. Does not wait for that.

        Args:
            reason: Why, for the error and the run's row.

        Returns:
            False if the run had ended before. After True, `result` tells what came first.
        """
        if self.done():
            return False
        self._run.stop(RunCancelled(self.execution_id, reason))
        return True

    def _end(self, outcome: RunOutcome) -> None:
        if outcome.error is not None:
            self._trace = outcome.error.__traceback__
        self._outcome = outcome
        self._outcomes.put(outcome)

    def _wait(self, timeout_s: float | None) -> RunOutcome:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while self._outcome is None:
            wait_s = _LOOK_S if until is None else min(_LOOK_S, until - time.monotonic())
            if wait_s <= 0:
                raise TimeoutError(f"run {self.execution_id!r} has not ended within {timeout_s:g} s")
            try:
                outcome = self._outcomes.get(timeout=wait_s)
            except queue.Empty:
                continue
            # Back again for the next one who waits.
            self._outcomes.put(outcome)
        if self._outcome.error is not None:
            # Each raise adds frames: those of earlier calls are none of this one's.
            self._outcome.error.__traceback__ = self._trace
        return self._outcome


def call_aside(work: Callable[[], R], threads: int) -> R:
    """Do *work*, such as SQL, where the host does not interrupt it: on this thread, else on the pool.

    Args:
        work: What to do.
        threads: `Settings.threads`.

    Raises:
        BaseException: Whatever *work* raised, or whatever interrupted the waiting thread.
    """
    if threads == 0 or process_defaults.may_help():
        return work()
    done: Future[R] = Future()

    def do() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 -- it is for whoever waits
            done.set_exception(error)
        finally:
            told.put(None)

    told: queue.SimpleQueue[None] = queue.SimpleQueue()
    process_runtime(threads).pool.submit(do)
    while not done.done():
        with contextlib.suppress(queue.Empty):
            told.get(timeout=_LOOK_S)
    return done.result()


def read_value(outcome: RunOutcome, target: type[T]) -> T:
    """Return the message that a run ended with.

    Raises:
        BaseException: The error it ended with.
    """
    if outcome.error is not None:
        raise outcome.error
    if not isinstance(outcome.value, target):
        raise AssertionError(f"a run ended without a value: {outcome!r}")
    return outcome.value


def read_outcome(outcome: RunOutcome) -> object:
    """Return what a run ended with.

    Raises:
        BaseException: The error it ended with.
    """
    if outcome.error is not None:
        raise outcome.error
    return outcome.value.load() if isinstance(outcome.value, StoredBatch) else outcome.value


def _wait(run: Run, outcomes: queue.SimpleQueue[RunOutcome]) -> RunOutcome:
    while True:
        wait_s = run.look_after()
        try:
            return outcomes.get(timeout=wait_s)
        except queue.Empty:
            continue


def _leave(
    run: Run, outcomes: queue.SimpleQueue[RunOutcome], interruption: BaseException
) -> RunOutcome | None:
    """Give the pool a moment to hand back the lease; an expired lease is the fallback.

    Returns:
        The outcome, where the host decided that this interruption has the run delivered again; else None.
    """
    if run.store is None:
        outcome = run.parked_or_failed(interruption)
    else:
        if run.inline is not None:
            run.inline.drive(lambda: run.concluded, _LEAVE_S)
        try:
            outcome = outcomes.get(timeout=_LEAVE_S if run.inline is None else 0.001)
        except queue.Empty:
            _warn_of_lease(run)
            return None
    # A process that is told to end ends: only what fails the run can be cured by another delivery.
    parks = isinstance(interruption, Exception) and outcome.error is interruption
    return outcome if parks and outcome.park_s is not None else None


def _require_threads(run: Run) -> None:
    if run.inline is not None:
        raise InvalidSettings(
            "docket_threads", "0 runs everything on the calling thread; aexecute and start need at least 1"
        )


def _refuse_on_loop(what: str) -> None:
    if is_loop_thread():
        raise InvalidArguments(
            what,
            "would block the thread of all async def steps, this run's too; inside an async def step: "
            "await graph.aexecute(...), or make the step a plain def",
        )


def _warn_of_lease(run: Run) -> None:
    _logger.warning("run %r: its lease was not given back in time", run.submission.execution_id)
