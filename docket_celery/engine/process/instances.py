"""``factory=``: the instance behind a step, built once in each process and closed at its end."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

_logger = logging.getLogger("docket_celery.process")


class Factory:
    """Builds the instance of a step on first use in a process.

    *make* returns an instance of the class *kind*, or a context manager that is entered for it; `close` calls
    the instance's own. *on_built* is called with this after each time it has built the instance.
    """

    def __init__(self, kind: Any, make: Callable[[], Any], on_built: Callable[[Factory], object]) -> None:
        self._kind, self._make, self._on_built = kind, make, on_built
        self._lock = threading.Lock()
        self._instance: Any = None
        self._close: Callable[[], Any] | None = None

    def __repr__(self) -> str:
        return f"factory {getattr(self._make, '__qualname__', None) or repr(self._make)}"

    @property
    def built(self) -> bool:
        """Whether this process has the instance."""
        return self._instance is not None

    def instance(self) -> Any:
        """Return this process's instance; the first caller builds it, on its own thread, and others wait.

        Raises whatever the factory raised; the next call tries again.
        """
        found = self._instance
        if found is None:
            with self._lock:
                found = self._instance
                if found is None:
                    found = self._instance = self._build()
        return found

    def close(self) -> None:
        """Close the instance; the next call builds another. An error is logged, as others are to be closed too."""
        self._instance, close, self._close = None, self._close, None
        try:
            closed = None if close is None else close()
            if inspect.iscoroutine(closed):
                import asyncio

                asyncio.run(closed)
        except Exception:
            _logger.exception("the instance of %r was not closed properly", self)

    def _build(self) -> Any:
        try:
            instance = made = self._make()
            close: Any = getattr(made, "close", None)
            if isinstance(made, AbstractContextManager):
                manager = cast("AbstractContextManager[Any]", made)
                close = functools.partial(manager.__exit__, None, None, None)
                instance = manager.__enter__()
            self._close = close if callable(close) else None
            if not callable(getattr(instance, "compute", None)):
                self.close()
                raise TypeError(f"{self!r} made {type(instance).__name__}, which has no compute method")
        except Exception as error:
            error.add_note(f"raised by {self!r}, which builds {self._kind.__name__} once per process")
            raise
        self._on_built(self)
        return instance
