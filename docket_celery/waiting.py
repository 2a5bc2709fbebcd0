"""The ways to wait for a run: with the calling thread, or on the caller's asyncio loop.

A thread that waits here runs no SQL and no step of a run that has a lease: it sits in short `queue.SimpleQueue`
waits, where a signal may interrupt it without leaving a lock or a transaction behind.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
from typing import TypeVar

from google.protobuf.message import Message

from docket_celery.outcome import RunOutcome
from docket_celery.run import Run
from docket_celery.runtime import CallerLoop, Worker

T = TypeVar("T", bound=Message)

_logger = logging.getLogger("docket_celery.run")
_LEAVE_S = 5.0


def run_here(run: Run) -> RunOutcome:
    """Start *run* and wait for its end with the calling thread.

    Raises:
        BaseException: Whatever interrupted the waiting thread (a soft time limit, SystemExit, Ctrl-C); the run was
            cancelled and its lease given up before.
        TooManyAbandoned: Too many threads are held by timed-out steps.
    """
    run.check_abandoned()
    outcomes: queue.SimpleQueue[RunOutcome] = queue.SimpleQueue()
    try:
        run.start(outcomes.put)
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


async def run_on_loop(run: Run, loop: CallerLoop) -> RunOutcome:
    """Start *run* and wait for its end without blocking the running loop.

    Raises:
        asyncio.CancelledError: The waiting task was cancelled; the run was cancelled and its lease given up before.
        TooManyAbandoned: Too many threads are held by timed-out steps.
    """
    run.check_abandoned()
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
        try:
            outcome = outcomes.get(timeout=_LEAVE_S)
        except queue.Empty:
            _warn_of_lease(run)
            return None
    # A process that is told to end ends: only what fails the run can be cured by another delivery.
    parks = isinstance(interruption, Exception) and outcome.error is interruption
    return outcome if parks and outcome.park_s is not None else None


def _warn_of_lease(run: Run) -> None:
    _logger.warning("run %r: its lease was not given back in time", run.submission.execution_id)
