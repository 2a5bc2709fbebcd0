"""The crash matrix of a GraphTask: the worker's child dies, and Celery delivers the job again."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from docket_celery.errors import InvalidArguments
from docket_celery.store import SQLStore
from docket_celery.store.identity import check_execution_id
from docket_celery.task.task import GraphTask
from docket_celery.testing.forking import Ended
from docket_celery.testing.matrix import NAME, CrashReport, Job, Scene, delete_job, run_matrix, to_text
from docket_celery.testing.watching import Boundary, Journal, Orders

StartWatched = Callable[[Any, dict[str, str]], object]
"""Starts a worker for an app, with what `Worker` takes as *watched*."""


def task_crash_matrix(
    task: GraphTask[Any, Any],
    inputs: Sequence[Message],
    *,
    start: StartWatched,
    store: SQLStore,
    folder: Path,
    effects: Sequence[Any],
    execution_id: str | None,
    timeout_s: float,
) -> CrashReport:
    """Do what the fixture `docket_crash_matrix` does.

    Args:
        task: The task.
        inputs: The job.
        start: Starts the worker.
        store: The worker's database.
        folder: For journals.
        effects: As for `crash_matrix`.
        execution_id: Names the run; default: a new name.
        timeout_s: Seconds for each delivery of the job, redeliveries included.
    """
    plan = task.plan()
    if not plan.persists:
        problem = "no step of it persists, so there is nothing that a crash could break"
        raise InvalidArguments(f"task {task.name}", problem)
    orders = Orders(folder / "orders")
    orders.give(folder / "none", 0, None)
    start(task.app, {"task": task.name, "orders": str(folder / "orders")})
    job = _TaskJob(
        graph=task.graph,
        target=task.declaration.target,
        inputs=inputs,
        plan=plan,
        execution_id=check_execution_id(execution_id or f"{NAME}-{uuid.uuid4()}"),
        effects=frozenset(task.graph.find_step(step).name for step in effects),
        folder=folder,
        timeout_s=timeout_s,
        task=task,
        store=store,
        orders=orders,
    )
    return run_matrix(job)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TaskJob(Job):
    """A job that a worker does."""

    task: GraphTask[Any, Any]
    store: SQLStore
    orders: Orders

    def play(self, deadly: Boundary | None) -> Scene:
        path = self.folder / f"journal-{uuid.uuid4()}"
        journal = Journal(path)
        try:
            self.orders.give(path, 1, deadly)
            first = self._submit("result")
            if not first.error:
                self.orders.give(path, 3, None)
                second = self._submit("again")
                told = {**first.value, **second.value, "checkpoints": self.count(self.store, journal)}
                second = Ended(killed=False, value=told, error=second.error)
            else:
                second = first
            died = deadly is not None and any(entry.boundary == deadly for entry in journal.read(1))
            first = Ended(killed=died, value=first.value, error="" if died else first.error)
            return Scene(deadly=deadly, first=first, second=second, journal=journal.read())
        finally:
            delete_job(self.store, self, [entry.key for entry in journal.read() if entry.key])

    def _submit(self, what: str) -> Ended:
        """Submit the job and wait for its message: Celery delivers it again if its process dies."""
        submit: Any = self.task.apply_async
        try:
            result = submit(tuple(self.inputs), execution_id=self.execution_id)
            message: Message = result.get(timeout=self.timeout_s)
        except Exception as error:  # noqa: BLE001 -- whatever the task failed with is reported
            return Ended(killed=False, value={}, error=f"{type(error).__name__}: {error}")
        return Ended(killed=False, value={what: to_text(message)})
