"""Where checkpoints and runs live. Each of the two stores is imported on first use: `SQLStore` needs SQLAlchemy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docket_celery.store.memory import MemoryStore
    from docket_celery.store.sql.store import SQLStore

__all__ = ["MemoryStore", "SQLStore"]

_HOMES = {"MemoryStore": "memory", "SQLStore": "sql.store"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
