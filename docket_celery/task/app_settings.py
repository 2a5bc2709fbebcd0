"""The app's ``docket_*`` settings, and what is known of the worker they are read in."""

from __future__ import annotations

import functools
import os
import threading
from collections import UserDict
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast
from weakref import WeakKeyDictionary, WeakSet

from celery import Celery, _state
from celery.utils.collections import ConfigurationView

from docket_celery.engine.process.pool import Worker
from docket_celery.engine.process.settings import ENVIRONMENT, PREFIX, VARIABLES, Settings, check_environment
from docket_celery.engine.process.state import process
from docket_celery.task import envelope

_KEYS: Final = tuple(PREFIX + name for name in Settings.__dataclass_fields__)


class ThisWorker:
    """What this process knows of its worker; a prefork child inherits it.

    Attributes:
        app: The worker's app, or None: this process belongs to no worker.
        pool: Celery's name of its pool.
        slots: Tasks that it runs at once.
        main_pid: Process id of the worker's main process.
        watched: The apps that have GraphTasks.
    """

    def __init__(self) -> None:
        self.app: Celery | None = None
        self.pool: str | None = None
        self.slots = 1
        self.main_pid: int | None = None
        self.watched: WeakSet[Celery] = WeakSet()

    @property
    def forks(self) -> bool:
        """Whether its tasks run in forked children."""
        return self.pool == "prefork"

    @property
    def runs_tasks(self) -> bool:
        """Whether tasks run in this process: under prefork in the children."""
        return self.app is not None and not (self.forks and os.getpid() == self.main_pid)


this_worker = ThisWorker()


def settings(**values: Any) -> Settings:
    """Set ``docket_*`` values for this process, without an app, and return the settings in force.

    Args:
        **values: As in ``app.conf``, with or without the ``docket_`` prefix; None takes one back.

    Raises:
        InvalidSettings: A key is unknown or a value cannot be used; nothing was changed.
    """
    return process.set({k if k.startswith(PREFIX) else PREFIX + k: v for k, v in values.items()})


_last_read: WeakKeyDictionary[Celery, tuple[Any, Settings]] = WeakKeyDictionary()
"""What the settings of an app were read from last, and what they were then."""


def app_settings(app: Celery) -> Settings:
    """Return the settings in force for *app*, read again only if something has changed; raises InvalidSettings."""
    # `current_app` is a proxy, which cannot be remembered weakly; the app behind it can.
    behind = getattr(app, "_get_current_object", None)
    app = app if behind is None else behind()
    values = _find_values(app)
    seen, last = [values, process.own, *map(ENVIRONMENT.get, VARIABLES)], _last_read.get(app)
    if last is not None and last[0] == seen:
        return last[1]
    found = process.settings(values)
    envelope.types.limits.add(found.max_message_bytes)
    _last_read[app] = seen, found
    return found


def check_settings(app: Celery) -> Settings:
    """Like `app_settings`, and refuse ``docket_*`` keys and ``DOCKET_CELERY_*`` variables that do not exist."""
    # Listing the keys has Celery load the configuration; only then is the namespace known.
    names = [key.lower() for key in app.conf if isinstance(key, str)]
    namespace = (app.conf.prefix or "").lower()
    keys = (name.removeprefix(namespace) for name in names)
    Settings.read({key: None for key in keys if key.startswith(PREFIX)}, {})
    check_environment()
    return app_settings(app)


def deadline_s(task: Any, request: Any) -> float | None:
    """Return the limit in seconds that Celery does not enforce here: outside prefork it ignores soft limits.

    A message says its limits only where the submitter knew the task; else they are the task's, then the app's.
    """
    if this_worker.pool in (None, "prefork") and not request.is_eager:
        return None
    hard, soft = request.timelimit or (None, None)
    conf: Any = task.app.conf
    soft = soft or task.soft_time_limit or conf.task_soft_time_limit
    hard = hard or task.time_limit or conf.task_time_limit
    return soft or hard or None


def _find_values(app: Celery) -> dict[str, Any]:
    """Return the ``docket_*`` values of *app*, as Celery finds them, in a tenth of its time."""
    conf: Any = app.conf
    layers = list(_layers(conf))  # loads the configuration; only then is the namespace known
    spellings = _spellings(conf.prefix or "")
    # What wins, the first layer and the first spelling, is written last.
    there = {name: layer[name] for layer in reversed(layers) for name in spellings.keys() & layer.keys()}
    if not there:
        return {}
    found = {spellings[name]: there[name] for name in reversed(spellings) if name in there}
    # A list may be changed where it is.
    return {key: value.copy() if isinstance(value, list) else value for key, value in found.items()}


@functools.cache
def _spellings(prefix: str) -> dict[str, str]:
    """Return under which names Celery looks for which key, the one that wins first."""
    match_case = str.upper if prefix.isupper() else str.lower
    return {name: key for key in _KEYS for name in (match_case(prefix + key), key, key.upper())}


def _layers(conf: ConfigurationView) -> Iterator[Mapping[str, Any]]:
    """Yield the mappings that *conf* looks in, the first one first."""
    for layer in conf.maps or ():
        if type(layer) is dict:
            yield layer
            continue
        loaded: Any = cast("Any", layer).data if isinstance(layer, UserDict) else layer
        if isinstance(loaded, ConfigurationView):
            yield from _layers(loaded)
        else:
            yield loaded


def _current_settings() -> Settings | None:
    """Return the settings of the current app, if there is one."""
    # current_app would create a default app and read its configuration; look without creating.
    state: Any = _state
    app: Celery | None = getattr(state._tls, "current_app", None) or state.default_app
    return None if app is None else app_settings(app)


def _in_task() -> bool:
    """Tell whether this is the thread of a task, where Celery raises its limits; step threads know the task too."""
    state: Any = _state
    return not isinstance(threading.current_thread(), Worker) and state.get_current_worker_task() is not None


process.use_host(_current_settings, _in_task)
