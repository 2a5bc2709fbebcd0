"""Where checkpoints and runs live. `MemoryStore` needs no SQLAlchemy; `SQLStore` imports it on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from docket_celery.store.memory import MemoryStore

if TYPE_CHECKING:
    from docket_celery.store.sql.store import SQLStore

__all__ = ["MemoryStore", "SQLStore"]


def __getattr__(name: str) -> Any:
    if name == "SQLStore":
        from docket_celery.store.sql.store import SQLStore

        return SQLStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
