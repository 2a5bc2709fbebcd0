"""Context managers around each call of a step: ``docket_step_hooks``, and what keeps Django's connections fresh.

Django binds a connection to a thread and closes it at the end of a request, which the library's threads never see.
Nothing here imports Django: a process that has not set it up needs none of this.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pkgutil
import re
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final, cast

from docket_celery.errors import InvalidSettings

_logger = logging.getLogger("docket_celery.process")

_PATH: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_FORM: Final = (
    "an entry is a callable that returns a context manager, or its import path 'package.module:name'"
)

MakeContext = Callable[[], AbstractContextManager[Any]]


class _Entered:
    """One use of the hook called *name*, which is put on what entering or exiting it raises."""

    def __init__(self, name: str, make: MakeContext) -> None:
        self._name, self._make = name, make

    def __enter__(self) -> None:
        try:
            made: Any = self._make()
            if not hasattr(made, "__enter__") or not hasattr(made, "__exit__"):
                raise InvalidSettings(
                    "docket_step_hooks",
                    f"{self._name} returned {made!r}, which is no context manager; "
                    "decorate a generator function with @contextlib.contextmanager",
                )
            made.__enter__()
        except BaseException as error:
            error.add_note(f"raised by step hook {self._name} when it was entered")
            raise
        self._made = made

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What it returns is not passed on: a hook cannot turn a failure into a result, as it has none to give.
        try:
            self._made.__exit__(kind, error, trace)
        except BaseException as raised:
            if raised is not error:
                raised.add_note(f"raised by step hook {self._name} when it was exited")
            raise


def read_hooks(key: str, value: Any) -> tuple[MakeContext | str, ...]:
    """Return the entries of *value*, whose form is checked; nothing is imported yet.

    It is a list or tuple of callables and import paths, or paths in one text, separated by commas. Raises
    `InvalidSettings`, which names *key*, for another form.
    """
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise InvalidSettings(key, f"must be a list, got {value!r}; {_FORM}")
    entries = tuple(cast("Sequence[Any]", value))
    for entry in entries:
        if isinstance(entry, str):
            if _PATH.fullmatch(entry) is None:
                raise InvalidSettings(key, f"entry {entry!r} is no import path; {_FORM}")
        elif not callable(entry) or (hasattr(entry, "__enter__") and not isinstance(entry, type)):
            raise InvalidSettings(key, f"entry {entry!r} cannot be called for a context manager; {_FORM}")
    return entries


def load_hook(entry: MakeContext | str) -> MakeContext:
    """Return the hook behind *entry*, imported if it is a path; raise `InvalidSettings` if there is none."""
    if not isinstance(entry, str):
        module, name = getattr(entry, "__module__", None), getattr(entry, "__qualname__", None)
        return functools.partial(_Entered, f"{module}:{name}" if module and name else repr(entry), entry)
    try:
        found: Any = pkgutil.resolve_name(entry)
    except Exception as error:
        problem = f"entry {entry!r} cannot be imported: {type(error).__name__}: {error}"
        raise InvalidSettings("docket_step_hooks", problem) from error
    if not callable(found):
        raise InvalidSettings("docket_step_hooks", f"entry {entry!r} is {found!r}; {_FORM}")
    return functools.partial(_Entered, entry, cast("MakeContext", found))


# --- Django ------------------------------------------------------------------------------------------------------


class StepThread(threading.Thread):
    """A thread of this library on which steps run; the Django connections opened on it are closed at its end."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(target=work, name=name, daemon=True)

    def run(self) -> None:
        try:
            super().run()
        finally:
            _close_connections()


class LoopOwner(StepThread):
    """The thread of the loop on which ``async def`` steps run."""


def django_hooks() -> tuple[MakeContext, ...]:
    """Return what keeps the Django connections of steps fresh, if Django is set up."""
    return (functools.partial(_Entered, f"{__name__}:django_hooks", _connections),) if _uses_django() else ()


def _uses_django() -> bool:
    """Tell whether this process has called ``django.setup()``."""
    apps: Any = sys.modules.get("django.apps")
    return apps is not None and bool(apps.apps.ready)


def _connections() -> AbstractContextManager[None]:
    if not isinstance(threading.current_thread(), StepThread):
        return contextlib.nullcontext()  # the host takes care of its own threads
    import asyncio

    return _fresh_connections() if asyncio._get_running_loop() is None else _own_orm_thread()


@contextlib.contextmanager
def _fresh_connections() -> Generator[None]:
    """Close connections that are broken or past CONN_MAX_AGE, as Django does around a request."""
    close_old = sys.modules["django.db"].close_old_connections
    _quietly(close_old)
    try:
        yield
    finally:
        _quietly(close_old)


@contextlib.contextmanager
def _own_orm_thread() -> Generator[None]:
    """Give the queries of an ``async def`` step a thread of their own, as ASGI gives each request.

    Else asgiref runs those of all steps on one thread of the process, which never closes its connection.
    """
    sync: Any = sys.modules["asgiref.sync"].SyncToAsync
    context = sys.modules["asgiref.sync"].ThreadSensitiveContext()
    token = sync.thread_sensitive_context.set(context)
    try:
        yield
    finally:
        sync.thread_sensitive_context.reset(token)
        executor = sync.context_to_thread_executor.pop(context, None)
        if executor is not None:
            executor.submit(_close_connections)
            # Not waited for: a cancelled step's query may still run there, and this is the loop's thread.
            executor.shutdown(wait=False)


def _close_connections() -> None:
    if _uses_django():
        _quietly(sys.modules["django.db"].connections.close_all)


def _quietly(close: Callable[[], object]) -> None:
    """Call *close*: a connection that cannot even be closed is no failure of the step, whose work is done."""
    try:
        close()
    except Exception as error:  # noqa: BLE001 -- drivers raise their own kinds
        _logger.warning("a Django connection could not be closed: %s", error)
