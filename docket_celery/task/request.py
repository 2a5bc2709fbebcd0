"""A GraphTask's message in the main process of a worker, which names this class to Celery."""

from __future__ import annotations

from typing import Any

from celery.worker.request import Request


class GraphRequest(Request):
    """A message that shows its arguments by the text that travels with them, without what is marked as secret."""

    def info(self, safe: bool = True) -> Any:  # noqa: ARG002 -- Celery's signature
        """Return what ``celery inspect`` and Flower show of it."""
        return super().info(safe=True)
