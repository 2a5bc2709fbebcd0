"""``docket_check_mutation``: finds steps that change their inputs, which they share with other steps.

Each call of a step gets copies of its own, compared with the originals afterwards. So the one that is blamed is the
one that did it, whatever runs beside it; and what it changed is seen by nobody else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from google.protobuf.message import Message

from docket_celery.errors import AbortError, InputMutated
from docket_celery.plan.context import current_context
from docket_celery.plan.messages import Value, value_bytes
from docket_celery.plan.plan import Plan
from docket_celery.plan.step import Step


def checked(plan: Plan) -> Plan:
    """Return *plan* with every step checked."""
    steps = tuple(replace(planned, step=_checked(planned.step)) for planned in plan.steps)
    stages = tuple(replace(stage, plan=checked(stage.plan)) for stage in plan.stages)
    return replace(plan, steps=steps, stages=stages)


def _checked(step: Step) -> Step:
    if not step.inputs:
        return step
    return replace(step, call=_async(step, step.call) if step.is_async else _sync(step, step.call))


def _sync(step: Step, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def checked_call(*args: Any, **kwargs: Any) -> Any:
        inputs = _Inputs(args, kwargs)
        try:
            value = call(*inputs.args, **inputs.kwargs)
        except Exception as error:
            inputs.check(step, error)
            raise
        inputs.check(step)
        return value

    return checked_call


def _async(step: Step, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    async def checked_call(*args: Any, **kwargs: Any) -> Any:
        inputs = _Inputs(args, kwargs)
        try:
            value = await call(*inputs.args, **inputs.kwargs)
        except Exception as error:
            inputs.check(step, error)
            raise
        inputs.check(step)
        return value

    return checked_call


class _Inputs:
    """The arguments of one call, messages copied, and what the messages were."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._before: list[tuple[Value, bytes]] = []
        self.args = [self._copy(arg) for arg in args]
        self.kwargs = {name: self._copy(arg) for name, arg in kwargs.items()}

    def _copy(self, argument: Any) -> Any:
        if isinstance(argument, Message):
            copy = _copy_of(argument)
            self._before.append((copy, value_bytes(copy)))
            return copy
        if not isinstance(argument, Iterable):
            return argument
        # All items of a fan-out. The list is the step's own and may be sorted; the messages in it are not.
        items = [_copy_of(item) for item in cast("Iterable[Message]", argument)]
        self._before.append((items, value_bytes(items)))
        return list(items) if isinstance(argument, list) else iter(items)

    def check(self, step: Step, error: Exception | None = None) -> None:
        """Compare; *error* is what the step raised meanwhile.

        Raises:
            InputMutated: One has changed. An `AbortError` of the step stands all the same.
        """
        # In the order in which the step's arguments were copied: positional ones, then keywords.
        sources = [n for n in (*step.positional, *(n for _, n in step.keywords)) if n >= 0]
        changed = [
            str(step.inputs[source])
            for source, (copy, before) in zip(sources, self._before, strict=True)
            if value_bytes(copy) != before
        ]
        if changed and not isinstance(error, AbortError):
            raise InputMutated(step.name, current_context().attempt, changed) from error


def _copy_of(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
