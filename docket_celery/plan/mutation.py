"""``docket_check_mutation``: finds steps that change their inputs, which they share with other steps.

Each call of a step gets copies of its own, compared with the originals afterwards. So the error names the step that
changed them, whatever runs beside it, and no other step sees the change.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from google.protobuf.message import Message

from docket_celery.errors import AbortError, InputMutated
from docket_celery.plan.messages import Value, copy_message, value_bytes
from docket_celery.plan.plan import Plan
from docket_celery.plan.step import Step


def checked(plan: Plan) -> Plan:
    """Return *plan* with every step checked."""
    steps = tuple(replace(each, step=replace(each.step, wrap=_compare_inputs)) for each in plan.steps)
    stages = tuple(replace(stage, plan=checked(stage.plan)) for stage in plan.stages)
    return replace(plan, steps=steps, stages=stages)


def _compare_inputs(step: Step, call: Callable[..., Any], attempt: int) -> Callable[..., Any]:
    """Return *call*, made with copies; it raises InputMutated if one changes, unless the step raises AbortError."""

    def call_here(*args: Any, **kwargs: Any) -> Any:
        with _copies(step, attempt, args, kwargs) as (mine, named):
            return call(*mine, **named)

    async def call_async(*args: Any, **kwargs: Any) -> Any:
        with _copies(step, attempt, args, kwargs) as (mine, named):
            return await call(*mine, **named)

    return call_async if step.is_async else call_here


@contextmanager
def _copies(
    step: Step, attempt: int, args: Iterable[Any], kwargs: dict[str, Any]
) -> Generator[tuple[list[Any], dict[str, Any]]]:
    before: list[tuple[Value, bytes]] = []

    def copy(argument: Any) -> Any:
        if isinstance(argument, Message):
            made: Value = copy_message(argument)
        elif isinstance(argument, Iterable):
            # The list of all items is the step's own and may be sorted; the messages in it are not.
            made = [copy_message(item) for item in cast("Iterable[Message]", argument)]
        else:
            return argument
        before.append((made, value_bytes(made)))
        if isinstance(made, Message):
            return made
        return list(made) if isinstance(argument, list) else iter(made)

    mine, named = [copy(each) for each in args], {name: copy(each) for name, each in kwargs.items()}
    error: Exception | None = None
    try:
        yield mine, named
    except AbortError:
        raise
    except Exception as raised:  # noqa: BLE001 -- a step that changed its inputs may fail for that
        error = raised
    # In the order in which the arguments were copied: positional ones, then keywords.
    sources = [n for n in (*step.positional, *(n for _, n in step.keywords)) if n >= 0]
    pairs = zip(sources, before, strict=True)
    changed = [str(step.inputs[n]) for n, (made, was) in pairs if value_bytes(made) != was]
    if changed:
        raise InputMutated(step.name, attempt, changed) from error
    if error is not None:
        raise error
