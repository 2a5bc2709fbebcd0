"""Typed functions over Protocol Buffers, run as one Celery task.

The types are the graph: `Graph` collects steps, `graph_task` makes them a Celery task, and checkpoints in Postgres
let Celery's own retries resume instead of starting over.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from docket_celery.defaults import process_defaults

if TYPE_CHECKING:
    from docket_celery.annotation import Named
    from docket_celery.appdefaults import configure
    from docket_celery.batch_result import BatchResult
    from docket_celery.checkpoint import RunState, Store
    from docket_celery.codec import Codec
    from docket_celery.context import StepContext, current_context
    from docket_celery.decorators import graph_task, shared_graph_task
    from docket_celery.errors import (
        AbortError,
        BatchFailed,
        CacheMismatch,
        CodecFailed,
        CorruptCheckpoint,
        DecodeFailed,
        DocketError,
        GraphChanged,
        GraphError,
        InputMutated,
        InputsChanged,
        InvalidArguments,
        InvalidDeclaration,
        InvalidSettings,
        LeaseLost,
        PayloadTooLarge,
        PayloadUnavailable,
        RunCancelled,
        RunConflict,
        RunNotFound,
        RunQuarantined,
        RunTimedOut,
        SchemaMismatch,
        ServersUnavailable,
        StepFailed,
        StepTimedOut,
        StoreMissing,
        StoreUnavailable,
        TooManyAbandoned,
        UnknownMessageType,
        WrongResult,
    )
    from docket_celery.graph import Graph
    from docket_celery.handle import RunHandle
    from docket_celery.lifecycle import settings
    from docket_celery.plan import Plan
    from docket_celery.policy import ExponentialBackoff, FixedBackoff, RetryPolicy, Scope, StepOptions
    from docket_celery.results import GraphResult, StoredResult
    from docket_celery.store import MemoryStore, SQLStore
    from docket_celery.task import GraphTask
    from docket_celery.waiting import StartedRun

__all__ = [  # noqa: RUF022 -- grouped by what people look for
    # Declaring a graph
    "BatchResult",
    "Graph",
    "Named",
    "Plan",
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
    "StoreUnavailable",
    "TooManyAbandoned",
    "UnknownMessageType",
    "WrongResult",
]


_HOMES = {
    **dict.fromkeys(("ExponentialBackoff", "FixedBackoff", "RetryPolicy", "Scope", "StepOptions"), "policy"),
    **dict.fromkeys(("GraphResult", "StoredResult"), "results"),
    **dict.fromkeys(("graph_task", "shared_graph_task"), "decorators"),
    **dict.fromkeys(("MemoryStore", "SQLStore"), "store"),
    **dict.fromkeys(("StepContext", "current_context"), "context"),
    "BatchResult": "batch_result",
    "Codec": "codec",
    "Graph": "graph",
    "GraphTask": "task",
    "Named": "annotation",
    "Plan": "plan",
    "RunHandle": "handle",
    "RunState": "checkpoint",
    "StartedRun": "waiting",
    "configure": "appdefaults",
    "settings": "lifecycle",
}
"""Where each name is; all others are errors. Imported on first use: a script that runs graphs in process pays for
neither Celery nor SQLAlchemy, and pytest, which loads our plugin everywhere, for nothing."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _open_store(url: str, codec: Codec | None) -> Store:
    from docket_celery.store import SQLStore

    return SQLStore(url, codec=codec)


process_defaults.use_opener(_open_store)
