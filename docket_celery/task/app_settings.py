"""The app's ``docket_*`` settings, and what is known of the worker they are read in."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any, Final
from weakref import WeakSet

from celery import Celery, _state

from docket_celery.engine.process.pool import Worker
from docket_celery.engine.process.settings import PREFIX, Settings, check_environment
from docket_celery.engine.process.state import process
from docket_celery.task import envelope

_KEYS: Final = tuple(PREFIX + name for name in Settings.__dataclass_fields__)


class _Worker:
    """What this process knows of its worker; a prefork child inherits it."""

    def __init__(self) -> None:
        self.pool: str | None = None
        self.main_pid: int | None = None
        self.slots = 1
        self.app: Celery | None = None
        self.watched: WeakSet[Celery] = WeakSet()


this_worker = _Worker()


def settings(**values: Any) -> Settings:
    """Set ``docket_*`` values for this process, without an app, and return the settings in force.

    Args:
        **values: As in ``app.conf``, with or without the ``docket_`` prefix; None takes one back.

    Raises:
        InvalidSettings: A key is unknown or a value cannot be used; nothing was changed.
    """
    return process.set({k if k.startswith(PREFIX) else PREFIX + k: v for k, v in values.items()})


def app_settings(app: Celery) -> Settings:
    """Return the settings in force for *app*.

    Raises:
        InvalidSettings: A value cannot be used.
    """
    found = process.settings(_app_values(app))
    envelope.types.limits.add(found.max_message_bytes)
    return found


def check_settings(app: Celery) -> Settings:
    """Like `app_settings`, and refuse ``docket_*`` keys and ``DOCKET_CELERY_*`` variables that do not exist.

    Raises:
        InvalidSettings: A key is unknown or a value cannot be used.
    """
    # Listing the keys has Celery load the configuration; only then is the namespace known.
    names = [key.lower() for key in app.conf if isinstance(key, str)]
    namespace = (app.conf.prefix or "").lower()
    keys = (name.removeprefix(namespace) for name in names)
    Settings.read({key: None for key in keys if key.startswith(PREFIX)}, {})
    check_environment()
    return app_settings(app)


def worker_app() -> Celery | None:
    """Return the app of the worker that this process belongs to, or None."""
    return this_worker.app


def worker_slots() -> int:
    """Return how many tasks this process's worker runs at once, as far as is known."""
    return this_worker.slots


def forks() -> bool:
    """Tell whether this process's worker runs its tasks in forked children."""
    return this_worker.pool == "prefork"


def runs_tasks() -> bool:
    """Tell whether this process runs a worker's tasks: under prefork its children do."""
    return this_worker.app is not None and not (forks() and os.getpid() == this_worker.main_pid)


def soft_limits_work() -> bool:
    """Tell whether Celery itself enforces soft time limits here: in prefork only."""
    return this_worker.pool is None or this_worker.pool == "prefork"


def deadline_s(task: Any, request: Any) -> float | None:
    """Return the limit in seconds that Celery does not enforce here: outside prefork it ignores soft limits.

    A message says its limits only where the submitter knew the task; else they are the task's, then the app's.
    """
    if soft_limits_work() and not request.is_eager:
        return None
    hard, soft = request.timelimit or (None, None)
    conf: Any = task.app.conf
    soft = soft or task.soft_time_limit or conf.task_soft_time_limit
    hard = hard or task.time_limit or conf.task_time_limit
    return soft or hard or None


def _app_values(app: Celery) -> Mapping[str, Any]:
    conf = app.conf
    # Celery finds a key with its namespace by itself (CELERY_DOCKET_THREADS), an upper-case one without it not.
    return {key: conf[name] for key in _KEYS for name in (key.upper(), key) if name in conf}


def current_values() -> Mapping[str, Any]:
    """Return the ``docket_*`` values of the current app, if there is one."""
    # current_app would create a default app and read its configuration; look without creating.
    state: Any = _state
    app: Celery | None = getattr(state._tls, "current_app", None) or state.default_app
    return {} if app is None else _app_values(app)


def in_task() -> bool:
    """Tell whether this is the thread of a task, where Celery raises its limits; step threads know the task too."""
    state: Any = _state
    return not isinstance(threading.current_thread(), Worker) and state.get_current_worker_task() is not None
