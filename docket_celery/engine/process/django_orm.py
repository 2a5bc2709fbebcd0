"""Django's database connections on threads of ours: fresh for each step, closed when a thread ends.

Django binds a connection to a thread and closes it at the end of a request, which our threads never see. Nothing
here imports Django: what the process has not set up needs no care.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

from docket_celery.engine.process.hooks import StepHook

_logger = logging.getLogger("docket_celery.django")


def is_set_up() -> bool:
    """Tell whether this process has called ``django.setup()``."""
    apps: Any = sys.modules.get("django.apps")
    return apps is not None and bool(apps.apps.ready)


def connection_hooks(owns_thread: Callable[[], bool]) -> tuple[StepHook, ...]:
    """Return what keeps the connections of steps fresh, if Django is set up.

    Args:
        owns_thread: Tells whether the calling thread is ours; connections of any other are left alone.
    """
    if not is_set_up():
        return ()

    def make() -> AbstractContextManager[None]:
        if not owns_thread():
            return contextlib.nullcontext()
        return _fresh_connections() if asyncio._get_running_loop() is None else _own_orm_thread()

    return (StepHook(name=__name__, make=make),)


def close_connections() -> None:
    """Close all connections of the calling thread, which is about to end."""
    if is_set_up():
        _quietly(_database().connections.close_all)


@contextlib.contextmanager
def _fresh_connections() -> Generator[None]:
    """Do what Django does around a request: let go of connections that are broken or past CONN_MAX_AGE."""
    close_old = _database().close_old_connections
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
    sync: Any = sys.modules["asgiref.sync"]
    context = sync.ThreadSensitiveContext()
    current, executors = (
        sync.SyncToAsync.thread_sensitive_context,
        sync.SyncToAsync.context_to_thread_executor,
    )
    token = current.set(context)
    try:
        yield
    finally:
        current.reset(token)
        executor = executors.pop(context, None)
        if executor is not None:
            executor.submit(close_connections)
            # Not waited for: a cancelled step's query may still run there, and this is the loop's thread.
            executor.shutdown(wait=False)


def _database() -> Any:
    return sys.modules["django.db"]


def _quietly(close: Callable[[], object]) -> None:
    """A connection that cannot even be closed is no failure of the step, whose work is done."""
    try:
        close()
    except Exception as error:  # noqa: BLE001 -- drivers raise their own kinds
        _logger.warning("a Django connection could not be closed: %s", error)
