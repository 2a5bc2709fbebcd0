"""``factory=``: the instance behind a step, built once in each process and closed at its end."""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from docket_celery.perprocess import PerProcess

_logger = logging.getLogger("docket_celery.factory")


class Computes(Protocol):
    """What a factory makes: an object with ``compute``."""

    @property
    def compute(self) -> Callable[..., Any]:
        """The step's code."""
        ...


C = TypeVar("C", bound=Computes)
Makes = Callable[[], C] | Callable[[], AbstractContextManager[C]]
"""Returns the instance, or a context manager to enter for it."""


class _Place:
    """Where one process keeps the instance of one factory."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.instance: Any = None


class Factory:
    """Builds the instance of a step on first use in a process; calling it calls the instance's ``compute``.

    Args:
        kind: The class whose ``compute`` is the step's signature.
        make: Returns an instance, or a context manager that is entered for it. One that has ``close()`` or is a
            context manager is closed when the process ends.
    """

    def __init__(self, kind: Any, make: Any) -> None:
        self.kind, self.make = kind, make
        self._place = PerProcess(_Place)

    def __repr__(self) -> str:
        return f"factory {getattr(self.make, '__qualname__', None) or repr(self.make)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.instance().compute(*args, **kwargs)

    @property
    def built(self) -> bool:
        """Whether this process has the instance."""
        return self._place.get().instance is not None

    def instance(self) -> Any:
        """Return this process's instance; the first caller builds it, on its own thread, and others wait.

        Raises:
            Exception: Whatever the factory raised; the next call tries again.
            TypeError: It made something without ``compute``.
        """
        place = self._place.get()
        found = place.instance
        if found is None:
            with place.lock:
                found = place.instance
                if found is None:
                    found = place.instance = self._build(place)
        return found

    def _build(self, place: _Place) -> Any:
        try:
            instance = made = self.make()
            close: Any = getattr(made, "close", None)
            if isinstance(made, AbstractContextManager):
                manager = cast("AbstractContextManager[Any]", made)
                close = functools.partial(manager.__exit__, None, None, None)
                instance = manager.__enter__()
            closing = _Closing(self, place, close if callable(close) else None)
            if not callable(getattr(instance, "compute", None)):
                closing.run()
                raise TypeError(f"{self!r} made {type(instance).__name__}, which has no compute method")
        except Exception as error:
            error.add_note(f"raised by {self!r}, which builds {self.kind.__name__} once per process")
            raise
        _closings.get().append(closing)
        return instance


class _Closing(NamedTuple):
    """How to undo what a factory built."""

    factory: Factory
    place: _Place
    close: Callable[[], Any] | None

    def run(self) -> None:
        """Close the instance; an error is logged, as others are to be closed and the process is about to end."""
        if self.close is None:
            return
        try:
            closed = self.close()
            if inspect.iscoroutine(closed):
                asyncio.run(closed)
        except Exception:
            _logger.exception("the instance of %r was not closed properly", self.factory)


_closings: PerProcess[list[_Closing]] = PerProcess(list)


def close_instances() -> None:
    """Close what this process has built, the latest first; a step that is called after that builds anew."""
    closings = _closings.get()
    while closings:
        closing = closings.pop()
        closing.place.instance = None
        closing.run()


atexit.register(close_instances)
