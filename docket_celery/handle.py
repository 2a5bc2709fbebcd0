"""A run by its name, from any process that sees its store."""

from __future__ import annotations

from docket_celery.checkpoint import RunRow, RunState, Store
from docket_celery.error_records import to_record
from docket_celery.errors import RunCancelled, RunNotFound
from docket_celery.waiting import call_aside


class RunHandle:
    """A run of a task, made by `GraphTask.handle`.

    Attributes:
        graph: Name of the graph.
        execution_id: Name of the run.

    Args:
        store: Where the run is.
        graph: Name of the graph.
        execution_id: Name of the run.
        retention_s: Seconds that an ended run is kept.
        threads: `Settings.threads`.
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
            RunNotFound: No worker has begun it yet, and it was not submitted through the store; or it was purged.
            StoreUnavailable: The database does not answer; trying again is safe.
        """
        error = to_record(RunCancelled(self.execution_id, reason))

        def cancel() -> RunRow | None:
            return self._store.cancel(self.graph, self.execution_id, error, self._retention_s)

        row = call_aside(cancel, self._threads)
        if row is None:
            raise RunNotFound(self.graph, self.execution_id)
        return row.state is RunState.CANCELLED
