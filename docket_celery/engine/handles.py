"""A run by its name, from any process that sees its store."""

from __future__ import annotations

import queue
import time
from types import TracebackType
from typing import Generic, TypeVar

from google.protobuf.message import Message

from docket_celery.engine.run import Run
from docket_celery.engine.run_context import RunOutcome
from docket_celery.engine.waiting import LOOK_S, check_threads, read_value, refuse_on_loop, run_on_pool
from docket_celery.errors import RunCancelled, RunNotFound, to_record
from docket_celery.store.contract import Store
from docket_celery.store.records import RunState


class RunHandle:
    """A run of a task, made by `GraphTask.handle`.

    Attributes:
        graph: Name of the graph.
        execution_id: Name of the run.
    """

    def __init__(
        self, store: Store, graph: str, execution_id: str, *, retention_s: float, threads: int
    ) -> None:
        self.graph, self.execution_id = graph, execution_id
        self._store, self._retention_s, self._threads = store, retention_s, threads

    def __repr__(self) -> str:
        return f"<RunHandle {self.execution_id!r} of graph {self.graph!r}>"

    def cancel(self, reason: str = "cancelled by its execution id") -> bool:
        """End the run as CANCELLED, wherever it is: its task fails with `RunCancelled`.

        What waits in a queue does not start. What runs hears of it within a quarter of ``docket_lease_seconds``: its
        contexts are cancelled, and nothing that it still makes is saved. Finished steps stay. Does not wait for that.

        Args:
            reason: Why, for the error and the run's row.

        Returns:
            False if the run had ended before in another way.

        Raises:
            RunNotFound: The database does not know it: no worker has taken it up yet, or it ended and was purged.
            StoreUnavailable: The database does not answer; trying again is safe.
        """
        error = to_record(RunCancelled(self.execution_id, reason))
        name = self.graph, self.execution_id
        row = run_on_pool(lambda: self._store.cancel(*name, error, self._retention_s), self._threads)
        if row is None:
            missing = RunNotFound(self.graph, self.execution_id)
            missing.add_note(
                "a queued job is in the broker alone: revoke its task with AsyncResult(task_id).revoke()"
            )
            raise missing
        return row.state is RunState.CANCELLED


T = TypeVar("T", bound=Message)


class StartedRun(Generic[T]):
    """A run in the background; made by `Graph.start`. Safe to share between threads.

    Attributes:
        execution_id: The name of the run.
    """

    def __init__(self, run: Run, target: type[T]) -> None:
        self.execution_id = run.context.execution_id
        self._run, self._target = run, target
        self._outcome: RunOutcome | None = None
        self._trace: TracebackType | None = None
        self._outcomes: queue.SimpleQueue[RunOutcome] = queue.SimpleQueue()
        check_threads(run)
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
            timeout: Most seconds to wait; the run itself continues. None: as long as it takes.

        Raises:
            TimeoutError: The run has not ended yet.
            RunCancelled: `cancel` ended it.
            InvalidArguments: Called before the end in an ``async def`` step, which must not block.
            StepFailed, AbortError, RunTimedOut, RunConflict, RunQuarantined, GraphChanged: As from `Graph.execute`.
        """
        if self._outcome is None:
            refuse_on_loop("result")
            with self._run.pool.blocking():
                return read_value(self._wait(timeout), self._target)
        return read_value(self._wait(timeout), self._target)

    def cancel(self, reason: str = "cancelled by its caller") -> bool:
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
            wait_s = LOOK_S if until is None else min(LOOK_S, until - time.monotonic())
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
