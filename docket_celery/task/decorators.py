"""The typed ways to declare a GraphTask from a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, cast

from celery import Celery, shared_task

from docket_celery.errors import InvalidDeclaration
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

    def declare(function: Callable[P, R]) -> GraphTask[P, R]:
        _check(function, {"graph": graph, "execution_id": execution_id, **options})
        name = options.get("name") or app.gen_task_name(function.__name__, function.__module__)
        note_graph(app, name, graph, locate(function), is_declared=True)
        make: Any = app.task
        task = make(base=GraphTask, graph=graph, execution_id=execution_id, **options)(function)
        return cast("GraphTask[P, R]", task)

    return declare


def shared_graph_task(
    graph: Graph, *, execution_id: NameFunction | None = None, **options: Any
) -> Callable[[Callable[P, R]], GraphTask[P, R]]:
    """Like `graph_task` without naming the app, as ``shared_task`` does.

    Raises:
        InvalidDeclaration: The signature, the body or an option does not fit, or another Graph has this one's name.
    """

    def declare(function: Callable[P, R]) -> GraphTask[P, R]:
        _check(function, {"graph": graph, "execution_id": execution_id, **options})
        make: Any = shared_task
        task = make(base=GraphTask, graph=graph, execution_id=execution_id, **options)(function)
        return cast("GraphTask[P, R]", task)

    return declare


def _check(function: Callable[..., Any], attributes: dict[str, Any]) -> None:
    """Refuse what cannot work where it is written, by the class that Celery makes when the app is finalized."""
    name = str(attributes.get("name") or getattr(function, "__name__", function))
    if attributes.get("bind"):
        raise InvalidDeclaration(name, "bind=True hands the task to a body that never runs; drop it")
    take_batch_options(dict(attributes))
    type(name, (GraphTask,), {**attributes, "run": staticmethod(function), "_decorated": True})
