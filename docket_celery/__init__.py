"""Typed functions over Protocol Buffers, run as one Celery task.

The types are the graph: `Graph` collects steps, `graph_task` makes them a Celery task, and checkpoints in Postgres
let Celery's own retries resume instead of starting over.
"""

# ruff: noqa: F405 -- the errors are imported with a star: __all__ says which, and a test gets each
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docket_celery.engine.handles import RunHandle, StartedRun
    from docket_celery.errors import *  # noqa: F403
    from docket_celery.graph import Graph
    from docket_celery.plan.annotation import Named
    from docket_celery.plan.batch import BatchResult
    from docket_celery.plan.context import StepContext, current_context
    from docket_celery.plan.options import ExponentialBackoff, FixedBackoff, RetryPolicy, Scope, StepOptions
    from docket_celery.plan.plan import Plan
    from docket_celery.store import MemoryStore, SQLStore
    from docket_celery.store.codec import Codec
    from docket_celery.store.records import Progress, RunState
    from docket_celery.task.app_defaults import configure
    from docket_celery.task.app_settings import settings
    from docket_celery.task.decorators import graph_task, shared_graph_task
    from docket_celery.task.references import StoredResult
    from docket_celery.task.result import GraphResult
    from docket_celery.task.task import GraphTask

__all__ = [  # noqa: RUF022 -- grouped by what people look for
    # Declaring a graph
    "BatchResult",
    "Graph",
    "Named",
    "Plan",
    "Progress",
    "Scope",
    "StartedRun",
    "StepContext",
    "StepOptions",
    "current_context",
    # Retrying
    "ExponentialBackoff",
    "FixedBackoff",
    "RetryPolicy",
    # Running it on Celery
    "GraphResult",
    "GraphTask",
    "RunHandle",
    "StoredResult",
    "configure",
    "graph_task",
    "settings",
    "shared_graph_task",
    # Storing
    "Codec",
    "MemoryStore",
    "RunState",
    "SQLStore",
    # Errors
    "AbortError",
    "BatchFailed",
    "CacheMismatch",
    "CodecFailed",
    "CorruptCheckpoint",
    "DecodeFailed",
    "DocketError",
    "GraphChanged",
    "GraphError",
    "IncompatibleCelery",
    "InputMutated",
    "InputsChanged",
    "InvalidArguments",
    "InvalidDeclaration",
    "InvalidSettings",
    "LeaseLost",
    "PayloadTooLarge",
    "PayloadUnavailable",
    "RunCancelled",
    "RunConflict",
    "RunNotFound",
    "RunQuarantined",
    "RunTimedOut",
    "SchemaMismatch",
    "ServersUnavailable",
    "StepFailed",
    "StepTimedOut",
    "StoreMissing",
    "StoreRefused",
    "StoreUnavailable",
    "TooManyAbandoned",
    "UnknownMessageType",
    "WrongResult",
]

_HOMES = {
    "engine.handles": ("RunHandle", "StartedRun"),
    "graph": ("Graph",),
    "plan.annotation": ("Named",),
    "plan.batch": ("BatchResult",),
    "plan.context": ("StepContext", "current_context"),
    "plan.options": ("ExponentialBackoff", "FixedBackoff", "RetryPolicy", "Scope", "StepOptions"),
    "plan.plan": ("Plan",),
    "store": ("MemoryStore", "SQLStore"),
    "store.codec": ("Codec",),
    "store.records": ("Progress", "RunState"),
    "task.app_defaults": ("configure",),
    "task.app_settings": ("settings",),
    "task.decorators": ("graph_task", "shared_graph_task"),
    "task.references": ("StoredResult",),
    "task.result": ("GraphResult",),
    "task.task": ("GraphTask",),
}
"""Where each name is; all others are errors. Imported on first use: a script that runs graphs in process pays for
neither Celery nor SQLAlchemy, and pytest, which loads our plugin everywhere, for nothing."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "errors")
    globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
