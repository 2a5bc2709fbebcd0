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
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

from docket_celery.engine.process.perprocess import PerProcess
from docket_celery.plan.step import Make, Mark, Step

_logger = logging.getLogger("docket_celery.factory")


class _Place:
    """Where one process keeps the instance of one factory."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.instance: Any = None


class Factory:
    """Builds the instance of a step on first use in a process.

    Args:
        make: The class, and what returns an instance or a context manager that is entered for it. An instance with
            ``close()`` is closed when the process ends.
    """

    def __init__(self, make: Make) -> None:
        self.kind, self.make = make
        self._place = _Place()

    def __repr__(self) -> str:
        return f"factory {getattr(self.make, '__qualname__', None) or repr(self.make)}"

    @property
    def built(self) -> bool:
        """Whether this process has the instance."""
        return self._place.instance is not None

    def instance(self) -> Any:
        """Return this process's instance; the first caller builds it, on its own thread, and others wait.

        Raises:
            Exception: Whatever the factory raised; the next call tries again.
            TypeError: It made something without ``compute``.
        """
        place = self._place
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


_factories: PerProcess[WeakKeyDictionary[Mark, Factory]] = PerProcess(WeakKeyDictionary)


def factory_of(step: Step) -> Factory | None:
    """Return what builds the instance of *step* in this process, or None if it needs none."""
    if step.make is None:
        return None
    known = _factories.get()
    found = known.get(step.mark)
    return known.setdefault(step.mark, Factory(step.make)) if found is None else found


def holds_thread(step: Step) -> bool:
    """Tell whether a call keeps the thread that makes it: a coroutine's does while its instance is being built."""
    if not step.is_async:
        return True
    factory = factory_of(step)
    return factory is not None and not factory.built


def call_of(step: Step) -> Callable[..., Any]:
    """Return the step's code in this process: for ``factory=``, of an instance that the first caller builds.

    Raises:
        Exception: Whatever the factory raised.
    """
    factory = factory_of(step)
    return step.call if factory is None else factory.instance().compute


atexit.register(close_instances)
