"""What a worker does for its GraphTasks beside running them: checks before it starts, and the end of a process."""

from __future__ import annotations

import logging
import os
from typing import Any

from celery import Celery, signals
from celery.concurrency import get_implementation

from docket_celery.engine.process.state import process
from docket_celery.errors import DocketError
from docket_celery.task import sweeper
from docket_celery.task.app_settings import app_settings, this_worker
from docket_celery.task.checks import find_faults, graph_tasks

_logger = logging.getLogger("docket_celery.worker")


def connect(app: Celery) -> None:
    """Connect to *app*, which has a GraphTask, and to its workers; done once for each app."""
    if app in this_worker.watched:
        return
    this_worker.watched.add(app)
    app.on_after_finalize.connect(_on_after_finalize, weak=False)
    # Celery connects a receiver once, however many apps there are.
    signals.worker_init.connect(_on_worker_init, weak=False)
    signals.worker_process_shutdown.connect(_on_shutdown, weak=False)
    signals.worker_shutdown.connect(_on_shutdown, weak=False)
    sweeper.connect(app)


def _on_after_finalize(sender: Any = None, **_: Any) -> None:
    """Look at the wiring once all tasks are declared; a fault is logged here and stops a worker's start."""
    for task in graph_tasks(sender):
        try:
            if task.plan().persists:
                # The run's row has the bound on retries, or `park_s`, not Celery: both end alike.
                type(task).max_retries = None
        except DocketError as error:
            # The report names places and fixes; a traceback would only bury it.
            _logger.error("task %s cannot run: %s", task.name, error)  # noqa: TRY400


def _on_worker_init(sender: Any = None, **_: Any) -> None:
    """Refuse to start a worker that could not keep its promises.

    Raises:
        SystemExit: With the faults; Celery's signals let nothing else stop a worker.
    """
    this_worker.main_pid, this_worker.app = os.getpid(), sender.app
    try:
        kind = get_implementation(sender.pool_cls) if isinstance(sender.pool_cls, str) else sender.pool_cls
        this_worker.pool = None if kind is None else kind.__module__.rpartition(".")[2]
        this_worker.slots = max(1, int(getattr(sender, "concurrency", None) or 1))
        faults = find_faults(sender.app, this_worker.pool)
        for task in () if faults else graph_tasks(sender.app):
            # Those that were declared after the app was finalized have not been looked at.
            plan = task.plan()
            if plan.persists or task.graph.find_batch_store(plan, app_settings(sender.app)) is not None:
                # Parts of a batch too outlast outages and dead workers for as long as their rows say.
                type(task).max_retries = None
    except Exception as error:  # noqa: BLE001 -- Celery would log it and start the worker all the same
        faults = [f"the checks themselves failed: {type(error).__name__}: {error}"]
    if faults:
        raise SystemExit(
            "docket_celery refuses to start this worker:\n" + "\n".join(f"  {f}" for f in faults)
        )


def _on_shutdown(**_: Any) -> None:
    """Close what is open in this process: a prefork child leaves without Python's own exit."""
    process.close_instances()
    process.close_stores()
