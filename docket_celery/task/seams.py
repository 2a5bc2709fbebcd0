"""Names inside Celery which, if a release renamed them, would repeat runs or tell wrong ends without any error.

docs/contributing/seams.md lists all private names that the package uses; the others raise where they are used.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import celery

from docket_celery.errors import IncompatibleCelery

if TYPE_CHECKING:
    from docket_celery.task.task import GraphTask


def check_seams(task: GraphTask[Any, Any]) -> None:
    """Look at a task as the installed Celery has made it, and at its result backend.

    Raises:
        IncompatibleCelery: Celery no longer does what the promises of a run need.
    """
    if "run" in vars(task):
        effect = f"autoretry_for of task {task.name} would deliver a failed run again for ever"
        raise IncompatibleCelery(celery.__version__, "celery.app.autoretry: _orig_run", effect)
    backend: Any = task.app.backend  # the task's own has our attributes in a worker
    for name in ("always_retry", "max_sleep_between_retries_ms"):
        if name not in vars(backend):
            effect = "the outcome of a run would be lost while the result backend is away"
            raise IncompatibleCelery(celery.__version__, f"celery.backends.base.Backend.{name}", effect)
    tell = getattr(backend, "mark_as_failure", None)
    if tell is None or "request" not in inspect.signature(tell).parameters:
        effect = "callers of a run that succeeded would be told FAILURE"
        raise IncompatibleCelery(celery.__version__, "celery.backends.base.Backend.mark_as_failure", effect)
