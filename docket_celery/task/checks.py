"""What must hold before a worker starts: each fault with its fix."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, cast

from celery import Celery
from celery.backends.base import DisabledBackend
from celery.backends.cache import CacheBackend
from celery.backends.rpc import RPCBackend
from kombu.serialization import prepare_accept_content

from docket_celery.engine.process.hooks import load_hook
from docket_celery.errors import DocketError, InvalidDeclaration, InvalidSettings, StoreUnavailable
from docket_celery.graph import Graph
from docket_celery.plan.plan import Plan
from docket_celery.store.contract import Store
from docket_celery.task.app_settings import check_settings
from docket_celery.task.options import SERIALIZERS
from docket_celery.task.seams import check_seams

if TYPE_CHECKING:
    from docket_celery.task.task import AnyTask

_logger = logging.getLogger("docket_celery.worker")


def graph_tasks(app: Celery) -> Iterator[AnyTask]:
    """Yield the GraphTasks declared on *app*, by name."""
    tasks = cast("dict[str, Any]", app.tasks)
    for name in sorted(tasks):
        if isinstance(getattr(tasks[name], "graph", None), Graph):
            yield tasks[name]


def find_unused(app: Celery) -> list[str]:
    """Return the steps of *app*'s graphs, which have no faults, that no task's plan holds, as text for people."""
    plans: dict[Graph, list[Plan]] = {}
    for task in graph_tasks(app):
        plans.setdefault(task.graph, []).append(task.plan())
    return [
        f"step {step.name!r} ({step.where}) of graph {graph.name!r} is in no task's plan: none needs {step.output}"
        for graph, known in plans.items()
        for step in graph.unplanned(known)
    ]


def find_faults(app: Celery, pool: str | None = None, *, database: bool = True) -> list[str]:
    """Return what would keep *app*'s GraphTasks from keeping their promises, as text for people.

    Where a worker is about to start, *pool* is its pool. Without *database* settings and wiring alone are looked at.
    """
    try:
        found = check_settings(app)
        for hook in found.step_hooks:
            load_hook(hook)
    except DocketError as error:
        return [str(error)]
    faults: list[str] = []
    if found.threads == 0 and pool is not None:
        faults.append(str(InvalidSettings("docket_threads", _INLINE_FAULT)))
    checked: set[int] = set()
    faults += map(str, _find_serializer_faults(app))
    for task in graph_tasks(app):
        try:
            plan = task.plan()
            check_seams(task)
            if not database:
                continue
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


def _find_serializer_faults(app: Celery) -> Iterator[InvalidSettings]:
    """Yield the settings that keep the JSON of GraphTasks out; a job would find that out after its effects."""
    conf, tasks = app.conf, list(graph_tasks(app))
    if not tasks:
        return
    if conf.result_serializer not in SERIALIZERS:
        problem = f"{conf.result_serializer!r} cannot carry the results of GraphTasks; set it to 'json'"
        yield InvalidSettings("result_serializer", problem)
    needed = {"accept_content": tasks[0].serializer, "result_accept_content": conf.result_serializer}
    for setting, serializer in needed.items():
        accepted = prepare_accept_content(conf[setting])
        own = prepare_accept_content([serializer]) if serializer in SERIALIZERS else None
        if accepted is not None and own is not None and not own <= accepted:
            problem = f"{serializer!r} is not in it, and is what GraphTasks are sent in; add it"
            yield InvalidSettings(setting, problem)


def _backend_fault(task: AnyTask, pool: str | None) -> str | None:
    """Return why no chord of *task* could end, or None."""
    backend = task.backend
    if isinstance(backend, DisabledBackend):
        kind = None
    elif isinstance(backend, RPCBackend):
        kind = "the rpc result backend"
    elif pool == "prefork" and _in_memory(backend):
        # Each child has its own: none ever counts all parts of a chord.
        kind = "the in-memory result backend under prefork"
    else:
        return None
    obstacle = "need a result backend, and the app has none" if kind is None else f"{kind} cannot join"
    problem = f"its items are spread over the workers by chords, which {obstacle}; "
    problem += "set result_backend to Redis or a database"
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
