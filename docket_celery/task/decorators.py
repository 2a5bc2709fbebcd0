"""The typed ways to declare a GraphTask from a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, cast

from celery import Celery, shared_task

from docket_celery.graph import Graph
from docket_celery.plan.step import locate
from docket_celery.task.declaration import NameFunction, note_graph
from docket_celery.task.options import take_batch_options
from docket_celery.task.result import R
from docket_celery.task.task import GraphTask

P = ParamSpec("P")


def graph_task(
    app: Celery, graph: Graph, *, execution_id: NameFunction | None = None, **options: Any
) -> Callable[[Callable[P, R]], GraphTask[P, R]]:
    """Declare a GraphTask: its signature says what goes in and what comes out, *graph* does the work.

    Args:
        app: The Celery app.
        graph: The graph.
        execution_id: From the messages, the name of their run; default: the task's id.
        **options: Celery's task options.

    Raises:
        InvalidDeclaration: The signature, the body or an option does not fit, or another Graph has this one's name.
    """

    def note(function: Callable[P, R]) -> None:
        name = options.get("name") or app.gen_task_name(function.__name__, function.__module__)
        note_graph(app, name, graph, locate(function), is_declared=True)

    return _declare(app.task, note, {"graph": graph, "execution_id": execution_id, **options})


def shared_graph_task(
    graph: Graph, *, execution_id: NameFunction | None = None, **options: Any
) -> Callable[[Callable[P, R]], GraphTask[P, R]]:
    """Like `graph_task` without naming the app, as ``shared_task`` does.

    Raises:
        InvalidDeclaration: The signature, the body or an option does not fit, or another Graph has this one's name.
    """
    return _declare(shared_task, lambda _: None, {"graph": graph, "execution_id": execution_id, **options})


def _declare(
    make: Any, note: Callable[[Callable[P, R]], None], given: dict[str, Any]
) -> Callable[[Callable[P, R]], GraphTask[P, R]]:
    """Return the decorator; it refuses what cannot work where it is written, by the class that Celery makes later."""

    def declare(function: Callable[P, R]) -> GraphTask[P, R]:
        name = str(given.get("name") or getattr(function, "__name__", function))
        take_batch_options(dict(given))
        run = function if given.get("bind") else staticmethod(function)
        type(name, (GraphTask,), {**given, "run": run, "_decorated": True})
        note(function)
        return cast("GraphTask[P, R]", make(base=GraphTask, **given)(function))

    return declare
