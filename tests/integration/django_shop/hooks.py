"""What this project wants around each step."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextvars import ContextVar

from docket_celery import current_context

SITE: ContextVar[str] = ContextVar("site", default="no site")


@contextlib.contextmanager
def site() -> Generator[None]:
    """Make the run's site known to queries."""
    SITE.set(str(current_context().values.get("site", "main")))
    yield
