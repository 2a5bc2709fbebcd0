"""What surrounds a step's code: the host's scopes around each stretch on a thread, hooks once around the call.

A scope is bound to its thread, as Celery's current task is: an ``async def`` step leaves it whenever it waits, since
the loop's thread then runs other steps. A hook belongs to the call: it is entered before and exited after.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from docket_celery.engine.process.hooks import StepHook

MakeScope = Callable[[], AbstractContextManager[Any]]


def call_within(
    scopes: Sequence[MakeScope], hooks: Sequence[StepHook], call: Callable[..., Any], *args: Any
) -> Any:
    """Return ``call(*args)``, made inside *scopes* and *hooks*, the first outermost."""
    with ExitStack() as stack:
        _enter(stack, scopes)
        _hook(stack, hooks)
        return call(*args)


async def await_within(
    scopes: Sequence[MakeScope],
    hooks: Sequence[StepHook],
    call: Callable[..., Coroutine[Any, Any, Any]],
    *args: Any,
) -> Any:
    """Return what the coroutine of ``call(*args)`` returns; *hooks* last over its waits, *scopes* do not."""
    coroutine = _hooked(hooks, call, *args) if hooks else call(*args)
    return await (_resumed_within(scopes, coroutine) if scopes else coroutine)


async def _hooked(
    hooks: Sequence[StepHook], call: Callable[..., Coroutine[Any, Any, Any]], *args: Any
) -> Any:
    with ExitStack() as stack:
        _hook(stack, hooks)
        return await call(*args)


@types.coroutine
def _resumed_within(
    scopes: Sequence[MakeScope], coroutine: Coroutine[Any, Any, Any]
) -> Generator[Any, Any, Any]:
    """Drive *coroutine*: *scopes* are entered for each resume and left at each suspension."""
    resume: Callable[[Any], Any] = coroutine.send
    given: Any = None
    try:
        while True:
            with ExitStack() as stack:
                _enter(stack, scopes)
                try:
                    wanted = resume(given)
                except StopIteration as end:
                    return end.value
            try:
                given = yield wanted
                resume = coroutine.send
            except GeneratorExit:
                with ExitStack() as stack:
                    _enter(stack, scopes)
                    coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001 -- whatever is thrown in is the coroutine's to handle
                given, resume = error, coroutine.throw
    finally:
        # If a scope could not be entered the coroutine has never begun, or is left in the middle.
        coroutine.close()


def _enter(stack: ExitStack, scopes: Sequence[MakeScope]) -> None:
    for scope in scopes:
        stack.enter_context(scope())


def _hook(stack: ExitStack, hooks: Sequence[StepHook]) -> None:
    for hook in hooks:
        stack.enter_context(hook.entered())
