"""The Celery side of a process's life: where settings come from, and what a worker checks before it starts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol, cast
from weakref import WeakSet

from celery import Celery, _state, signals
from celery.backends.base import DisabledBackend
from celery.backends.cache import CacheBackend
from celery.backends.rpc import RPCBackend
from celery.concurrency import get_implementation

from docket_celery import wire
from docket_celery.checkpoint import Store
from docket_celery.configuration import PREFIX, Settings, check_environment
from docket_celery.defaults import process_defaults
from docket_celery.errors import DocketError, InvalidDeclaration, InvalidSettings, StoreUnavailable
from docket_celery.factory import close_instances
from docket_celery.graph import Graph
from docket_celery.hooks import load_hooks
from docket_celery.plan import Plan
from docket_celery.runtime import Worker

_logger = logging.getLogger("docket_celery.worker")
_KEYS: Final = tuple(PREFIX + name for name in Settings.__dataclass_fields__)


class TaskClass(Protocol):
    """What is needed of a GraphTask here."""

    name: str
    graph: Graph
    max_retries: int | None

    @property
    def backend(self) -> Any: ...
    @classmethod
    def plan(cls) -> Plan: ...


class _Process:
    """What this process knows of its worker; a prefork child inherits it."""

    def __init__(self) -> None:
        self.pool: str | None = None
        self.slots = 1
        self.app: Celery | None = None
        self.watched: WeakSet[Celery] = WeakSet()


_process = _Process()


def settings(**values: Any) -> Settings:
    """Set ``docket_*`` values for this process, without an app, and return the settings in force.

    Args:
        **values: As in ``app.conf``, with or without the ``docket_`` prefix; None takes one back.

    Raises:
        InvalidSettings: A key is unknown or a value cannot be used; nothing was changed.
    """
    return process_defaults.set({k if k.startswith(PREFIX) else PREFIX + k: v for k, v in values.items()})


def app_settings(app: Celery) -> Settings:
    """Return the settings in force for *app*.

    Raises:
        InvalidSettings: A value cannot be used.
    """
    found = process_defaults.settings(_app_values(app))
    # `current_app` is a proxy, which cannot be remembered weakly; the app behind it can.
    behind = getattr(app, "_get_current_object", None)
    wire.types.limit(app if behind is None else behind(), found.max_message_bytes)
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
    return _process.app


def worker_slots() -> int:
    """Return how many tasks this process's worker runs at once, as far as is known."""
    return _process.slots


def forks() -> bool:
    """Tell whether this process's worker runs its tasks in forked children."""
    return _process.pool == "prefork"


def soft_limits_work() -> bool:
    """Tell whether Celery itself enforces soft time limits here: in prefork only."""
    return _process.pool is None or _process.pool == "prefork"


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


def watch_task(app: Celery) -> None:
    """Look at the wiring of *app*'s GraphTasks once all of them are declared; done once for each app."""
    if app not in _process.watched:
        _process.watched.add(app)
        app.on_after_finalize.connect(_on_after_finalize, weak=False)


def graph_tasks(app: Celery) -> Iterator[TaskClass]:
    """Yield the GraphTasks declared on *app*, by name."""
    tasks = cast("dict[str, Any]", app.tasks)
    for name in sorted(tasks):
        if isinstance(getattr(tasks[name], "graph", None), Graph):
            yield tasks[name]


def find_faults(app: Celery, pool: str | None = None) -> list[str]:
    """Return what would keep *app*'s GraphTasks from keeping their promises, as text for people.

    Args:
        app: The app, with its tasks imported.
        pool: The worker's pool, where one is about to start.
    """
    try:
        found = check_settings(app)
        load_hooks(found.step_hooks)
    except DocketError as error:
        return [str(error)]
    faults: list[str] = []
    if found.threads == 0 and pool is not None:
        faults.append(str(InvalidSettings("docket_threads", _INLINE_FAULT)))
    checked: set[int] = set()
    for task in graph_tasks(app):
        try:
            plan = task.plan()
            spread = task.graph.find_batch_store(plan, found)
            store = task.graph.find_store(plan, found) if plan.persists and spread is None else spread
            if spread is not None and (fault := _backend_fault(task, pool)) is not None:
                faults.append(fault)
        except DocketError as error:
            faults.append(f"task {task.name}: {error}")
            continue
        if store is None or id(store) in checked:
            continue
        checked.add(id(store))
        if not store.persistent and pool not in (None, "solo"):
            faults.append(str(InvalidDeclaration(task.name, _MEMORY_FAULT)))
        faults += _schema_faults(store, starting=pool is not None)
    return faults


_MEMORY_FAULT: Final = (
    "its graph persists into a MemoryStore, which other worker processes cannot see; "
    "set docket_database_url, or use the solo pool"
)

_INLINE_FAULT: Final = (
    "0 is for calls in process and eager tasks: a worker's own thread must stay free for its signals and limits; "
    "set at least 1"
)


def _backend_fault(task: TaskClass, pool: str | None) -> str | None:
    """Return why no chord of *task* could end, or None."""
    backend = task.backend
    if isinstance(backend, DisabledBackend):
        kind = "no result backend"
    elif isinstance(backend, RPCBackend):
        kind = "the rpc result backend"
    elif pool == "prefork" and _in_memory(backend):
        # Each child has its own: none ever counts all parts of a chord.
        kind = "the in-memory result backend under prefork"
    else:
        return None
    problem = (
        f"its items are spread over the workers by chords, which {kind} cannot join; set result_backend to Redis "
        f"or a database"
    )
    return str(InvalidDeclaration(task.name, problem))


def _in_memory(backend: Any) -> bool:
    return isinstance(backend, CacheBackend) and getattr(backend, "backend", None) == "memory"


def _schema_faults(store: Store, *, starting: bool) -> list[str]:
    try:
        store.check_schema()
    except StoreUnavailable as error:
        if not starting:
            return [str(error)]
        # A worker starts degraded: deliveries retry until the database answers.
        _logger.warning("the schema could not be checked: %s", error)
    except DocketError as error:
        return [str(error)]
    finally:
        # No connection of the main process may reach a forked child.
        store.close()
    return []


def _app_values(app: Celery) -> Mapping[str, Any]:
    conf = app.conf
    # Celery finds a key with its namespace by itself (CELERY_DOCKET_THREADS), an upper-case one without it not.
    return {key: conf[name] for key in _KEYS for name in (key.upper(), key) if name in conf}


def _current_values() -> Mapping[str, Any]:
    # current_app would create a default app and read its configuration; look without creating.
    state: Any = _state
    app: Celery | None = getattr(state._tls, "current_app", None) or state.default_app
    return {} if app is None else _app_values(app)


def _in_task() -> bool:
    """Tell whether this is the thread of a task, where Celery raises its limits; step threads know the task too."""
    state: Any = _state
    return not isinstance(threading.current_thread(), Worker) and state.get_current_worker_task() is not None


def _on_after_finalize(sender: Any = None, **_: Any) -> None:
    """Let the run row, not Celery, bound the retries of tasks that persist: both then end alike."""
    for task in graph_tasks(sender):
        try:
            plan = task.plan()
        except DocketError as error:
            # The report names places and fixes; a traceback would only bury it.
            _logger.error("task %s cannot run: %s", task.name, error)  # noqa: TRY400
            continue
        _leave_retries_to_row(task, plan)


def _leave_retries_to_row(task: TaskClass, plan: Plan) -> None:
    if plan.persists:
        type(task).max_retries = None


def _on_worker_init(sender: Any = None, **_: Any) -> None:
    """Refuse to start a worker that could not keep its promises.

    Raises:
        SystemExit: With the faults; Celery's signals let nothing else stop a worker.
    """
    pool = getattr(sender, "pool_cls", None)
    kind = get_implementation(pool) if isinstance(pool, str) else pool
    _process.pool = None if kind is None else kind.__module__.rpartition(".")[2]
    _process.app, _process.slots = sender.app, max(1, int(getattr(sender, "concurrency", None) or 1))
    try:
        faults = find_faults(sender.app, _process.pool)
        for task in () if faults else graph_tasks(sender.app):
            # Those that were declared after the app was finalized have not been looked at.
            plan = task.plan()
            _leave_retries_to_row(task, plan)
            if task.graph.find_batch_store(plan, app_settings(sender.app)) is not None:
                # Parts of a batch outlast outages and dead workers for as long as their rows say.
                type(task).max_retries = None
    except Exception as error:  # noqa: BLE001 -- Celery would log it and start the worker all the same
        faults = [f"the checks themselves failed: {type(error).__name__}: {error}"]
    if faults:
        raise SystemExit(
            "docket_celery refuses to start this worker:\n" + "\n".join(f"  {f}" for f in faults)
        )


def _on_process_shutdown(**_: Any) -> None:
    """End what steps have built in this process: a prefork child leaves without Python's own exit."""
    close_instances()


def _on_worker_shutdown(**_: Any) -> None:
    close_instances()
    process_defaults.close()


def install() -> None:
    """Connect to Celery; done once, when GraphTask is imported."""
    process_defaults.use_host(_current_values, _in_task)
    signals.worker_init.connect(_on_worker_init, weak=False)
    signals.worker_process_shutdown.connect(_on_process_shutdown, weak=False)
    signals.worker_shutdown.connect(_on_worker_shutdown, weak=False)
