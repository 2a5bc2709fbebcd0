"""``python -m docket_celery.testing.worker_main ORDER``: a Celery worker of a test, in a process of its own."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

_LEASE_S = 5.0


def main(order: dict[str, Any]) -> int:
    """Run the worker; return its exit status.

    Args:
        order: As `workers.Worker` writes it.
    """
    sys.path[:] = order["path"]
    from celery import maybe_patch_concurrency

    # Before anything else is imported: gevent replaces what others would have taken by then.
    maybe_patch_concurrency(["celery", *order["argv"]])

    from celery import signals
    from celery.app.utils import find_app

    from docket_celery.task.app_settings import settings

    app: Any = find_app(order["app"])
    settings(database_url=order["database_url"])

    def tell_ready(**_: Any) -> None:
        Path(order["ready"]).touch()

    signals.worker_ready.connect(tell_ready, weak=False)
    if order["watched"] is not None:
        _watch(app, order["watched"], order["database_url"])
    app.worker_main(order["argv"])
    return 0


def _watch(app: Any, watched: dict[str, str], database_url: str) -> None:
    """Make each process of the pool tell what it does with one task, and die where it is told to."""
    from celery import signals

    from docket_celery.engine.overrides import overridden
    from docket_celery.plan.override import overriding
    from docket_celery.store import SQLStore
    from docket_celery.task.app_settings import settings
    from docket_celery.testing.watching import Orders, WorkerWatch

    # A dead process's claim on a shared result holds the next one up for so long.
    settings(lease_seconds=_LEASE_S)
    stack = ExitStack()

    def surround(**_: Any) -> None:
        task = app.tasks[watched["task"]]
        watch = WorkerWatch(Orders(Path(watched["orders"])))
        watched_steps = watch.steps([planned.step for planned in task.plan().steps])
        stack.enter_context(overriding(task.graph, watched_steps))
        stack.enter_context(overridden(store=watch.store(SQLStore(database_url))))

    signals.worker_process_init.connect(surround, weak=False)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
