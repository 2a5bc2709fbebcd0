"""What a block of code sets for the runs that begin inside it, in place of what the process has.

Context-local: other threads and asyncio tasks see nothing of it; steps, and what they execute, do. The test kit
fills it in; in production it is empty, and asking for it costs one lookup a run.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from docket_celery.engine.process.timer import Clock
from docket_celery.observe.events import Listener
from docket_celery.store.contract import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What surrounds the runs: fields of `Settings` that win over all others, and what else they use.

    The *store* wins over the graph's and over ``docket_database_url``; what a call names wins over it. The *clock*
    is for runs on the calling thread. The *listeners* hear of the runs beside the graphs' own.
    """

    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    store: Store | None = None
    clock: Clock | None = None
    listeners: tuple[Listener, ...] = ()


_current: ContextVar[Overrides | None] = ContextVar("docket_celery_overrides", default=None)
overrides = _current.get
"""Return what surrounds the caller, or None."""


@contextmanager
def overridden(**changes: Any) -> Generator[Overrides]:
    """Change fields of `Overrides` for the runs that begin in the block; settings and listeners are added."""
    outer = _current.get() or Overrides()
    if "settings" in changes:
        changes["settings"] = {**outer.settings, **changes["settings"]}
    if "listeners" in changes:
        changes["listeners"] = (*outer.listeners, *changes["listeners"])
    inner = replace(outer, **changes)
    token = _current.set(inner)
    try:
        yield inner
    finally:
        _current.reset(token)
