"""The ways to wait for a run: with the calling thread, on the caller's asyncio loop, or later by a handle.

A thread that waits here runs no SQL and no step of a run that has a lease: it sits in short `queue.SimpleQueue`
waits, where a signal may interrupt it without leaving a lock or a transaction behind.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message

from docket_celery.engine.process.hooks import LoopOwner
from docket_celery.engine.process.state import process
from docket_celery.engine.run import Run
from docket_celery.engine.run_context import RunOutcome
from docket_celery.engine.stored_items import StoredBatch
from docket_celery.errors import InvalidArguments, InvalidSettings

if TYPE_CHECKING:
    import asyncio

    from docket_celery.engine.process.loops import StepLoop

T = TypeVar("T", bound=Message)
R = TypeVar("R")

_logger = logging.getLogger("docket_celery.run")
_LEAVE_S = 5.0
LOOK_S = 0.5


def run_here(run: Run) -> RunOutcome:
    """Start *run* and wait for its end with the calling thread.

    What interrupts that (a soft time limit, SystemExit, Ctrl-C) cancels the run, gives up its lease and is raised.
    """
    if run.inline is None:
        refuse_on_loop("execute")
    run.pool.check_abandoned()
    outcomes: queue.SimpleQueue[RunOutcome] = queue.SimpleQueue()
    try:
        run.start(outcomes.put)
        if run.inline is not None:
            run.watch()
            run.inline.drive(lambda: run.concluded)
            return outcomes.get()
        if run.concluded:
            return outcomes.get()  # this thread has run all steps itself
        # A step may execute a graph: its thread then waits for work of the pool that it belongs to.
        with run.pool.blocking():
            while True:
                try:
                    return outcomes.get(timeout=run.poll())
                except queue.Empty:
                    continue
    except BaseException as interruption:
        run.stop(interruption)
        parked = _leave(run, outcomes, interruption)
        if parked is not None:
            return parked
        raise
    finally:
        if run.inline is not None:
            run.inline.close()


async def run_on_loop(run: Run, loop: StepLoop) -> RunOutcome:
    """Start *run* and wait for its end without blocking the running loop.

    If the waiting task is cancelled, so is the run, and its lease is given up before.
    """
    import asyncio

    check_threads(run)
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
        if run.context.store is not None:
            await asyncio.wait([ended], timeout=_LEAVE_S)
            if not ended.done():
                _warn_of_lease(run)
        raise
    return ended.result()


def run_on_pool(work: Callable[[], R], threads: int) -> R:
    """Do *work*, such as SQL, where the host does not interrupt it: on this thread, else on the pool."""
    if threads == 0 or process.may_help():
        return work()
    done: Future[R] = Future()
    told: queue.SimpleQueue[None] = queue.SimpleQueue()

    def do() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 -- it is for the waiting thread
            done.set_exception(error)
        told.put(None)

    process.runtime(threads).pool.submit(do)
    while not done.done():
        with contextlib.suppress(queue.Empty):
            told.get(timeout=LOOK_S)
    return done.result()


def read_value(outcome: RunOutcome, target: type[T]) -> T:
    """Return the message that a run ended with, or raise its error."""
    if outcome.error is not None:
        raise outcome.error
    assert isinstance(outcome.value, target), outcome
    return outcome.value


def read_outcome(outcome: RunOutcome) -> object:
    """Return what a run ended with, or raise its error."""
    if outcome.error is not None:
        raise outcome.error
    return outcome.value.load() if isinstance(outcome.value, StoredBatch) else outcome.value


def _leave(
    run: Run, outcomes: queue.SimpleQueue[RunOutcome], interruption: BaseException
) -> RunOutcome | None:
    """Return the outcome if the host has the run delivered again; an expired lease is the fallback."""
    if run.context.store is None:
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


def check_threads(run: Run) -> None:
    """Refuse a run that has no thread of the pool for its steps: the calling one does not wait for them here."""
    if run.inline is not None:
        raise InvalidSettings(
            "docket_threads", "0 runs everything on the calling thread; aexecute and start need at least 1"
        )
    run.pool.check_abandoned()


def refuse_on_loop(what: str) -> None:
    """Refuse to block the thread that runs all ``async def`` steps."""
    if isinstance(threading.current_thread(), LoopOwner):
        raise InvalidArguments(
            what,
            "would block the thread of all async def steps, this run's too; inside an async def step: "
            "await graph.aexecute(...), or make the step a plain def",
        )


def _warn_of_lease(run: Run) -> None:
    _logger.warning("run %r: its lease was not given back in time", run.context.execution_id)
