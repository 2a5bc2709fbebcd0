"""The options of a GraphTask: those of Celery, of batches and of routing; what is no option is refused."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from docket_celery.batch.options import BatchOptions
from docket_celery.errors import InvalidArguments, InvalidDeclaration
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.batch import BatchPolicy
from docket_celery.plan.options import RetryPolicy, Scope, StepOptions, nearest_option
from docket_celery.task.app_settings import this_worker

if TYPE_CHECKING:
    from docket_celery.task.task import AnyTask

STEP_ONLY: Final = frozenset(StepOptions.__dataclass_fields__) - {"name"}
_PLAIN_STEP_OPTIONS: Final = STEP_ONLY - {"retry", "version", "key", "cache"}
_DESTINATION: Final = ("queue", "exchange", "exchange_type", "routing_key")
_MANNER: Final = ("delivery_mode", "priority")
_DECORATOR_OPTIONS: Final = frozenset(
    {"base", "bind", "compression", "connection", "execution_id", "filter", "graph", "lazy", "name", "shared"}
).union(_DESTINATION, _MANNER)
"""What Celery's decorator takes besides the attributes of the class."""
_BATCH_OPTIONS: Final = ("on_error", "max_failed", "chunk_size", "max_concurrency")
"""What a task and a submission may ask of a batch."""
SLOTS, THREADS = "slots", "threads"
"""Beside them in the headers of a batch's parts: those of the worker that began it, so that all have its lanes."""
SERIALIZERS: Final = ("json", "auth")
"""What can carry messages: JSON, alone or inside of Celery's signature."""


def check_serializer(serializer: str | None) -> None:
    """Raise InvalidArguments for a serializer that cannot carry messages; None: the app's, or JSON in its place."""
    if serializer not in (None, *SERIALIZERS):
        raise InvalidArguments("serializer", f"is {serializer!r}, and messages travel in JSON; leave it out")


def check_options(task: str, options: Mapping[str, Any], known: Collection[str] | None) -> None:
    """Raise InvalidDeclaration for what is no option of a task; a class (*known* is None) may have others."""
    for name, value in options.items():
        # `retry` is a method of Celery's tasks, which a class may override.
        meant = known is not None or name in _PLAIN_STEP_OPTIONS or isinstance(value, (RetryPolicy, Scope))
        if name in STEP_ONLY and meant:
            problem = (
                "is an option of a step; give it to graph.step(...), or to all steps with Graph(defaults=...)"
            )
            raise InvalidDeclaration(task, f"{name}= {problem}")
        if known is None or name in known or name in _DECORATOR_OPTIONS or name.startswith("_"):
            continue
        close = difflib.get_close_matches(name, [each for each in known if each[0] != "_"], n=1, cutoff=0.85)
        if close:
            hint = f"did you mean {close[0]}=?"
        elif nearest := nearest_option(name):
            hint = f"if it is meant for a step, write {nearest} in graph.step(...)"
        else:
            hint = "see Celery's task options; attributes of your own belong on a class GraphTask[[...], ...]"
        raise InvalidDeclaration(task, f"{name}= is no option of a task; {hint}")


def check_name_function(task: str, function: Callable[..., Any], given: Sequence[ValueKey]) -> None:
    """Raise InvalidDeclaration for an ``execution_id`` that does not take the messages, one parameter for each."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        first = next(iter(signature.parameters), "")
        drop = f"drop {first}: it is called with the messages alone"
        fix = drop if first in ("self", "cls") else str(error)
        problem = f"execution_id takes {signature}, and the task has {len(given)} message(s); {fix}"
        raise InvalidDeclaration(task, problem) from None


def read_batch_options(
    task: AnyTask | type[AnyTask], asked: Mapping[str, Any] | None = None, threads: int = 1
) -> BatchOptions:
    """Return how a batch of *task* is worked on: as the submission *asked*, else as the task or its class says.

    A value that cannot be used raises InvalidArguments.
    """
    asked = {name: value for name, value in (asked or {}).items() if value is not None}
    usual = "collect" if task.declaration.form == "BatchResult" else "fail"
    on_error = asked.get("on_error", task.on_error or usual)
    # A limit of the task's own means nothing to a submission under which no item may fail.
    max_failed = asked.get("max_failed", task.max_failed if on_error == "collect" else None)
    return BatchOptions(
        policy=BatchPolicy(on_error, max_failed),
        chunk_size=asked.get("chunk_size", task.chunk_size),
        max_concurrency=asked.get("max_concurrency", task.max_concurrency),
        slots=int(asked.get(SLOTS, this_worker.slots)),
        threads=int(asked.get(THREADS, threads)),
    )


def take_batch_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take out of a submission's *options* what it asks of its batch, and return it.

    An option that reads like one of ours and is none, or an unfit serializer, raises InvalidArguments.
    """
    check_serializer(options.get("serializer"))
    for name in options:
        # Celery takes any option and drops what it does not know: a misspelt limit would be none.
        if (meant := _find_meant(name)) is not None:
            raise InvalidArguments(name, f"is not known; did you mean {meant}?")
    return {name: value for name in _BATCH_OPTIONS if (value := options.pop(name, None)) is not None}


@functools.lru_cache(maxsize=256)
def _find_meant(name: str) -> str | None:
    """Return the option of ours that *name* reads like and is not; a comparison takes longer than all the rest."""
    ours = (*_BATCH_OPTIONS, "execution_id")
    return None if name in ours else next(iter(difflib.get_close_matches(name, ours, n=1, cutoff=0.85)), None)


def take_routing(cls: type) -> dict[str, Any]:
    """Take the class's own routing attributes off it and return them, with those taken off its bases.

    Celery warns of them on each task class, since its version 6 will not look at them.
    """
    own = {name: cls.__dict__[name] for name in (*_DESTINATION, *_MANNER) if name in cls.__dict__}
    for name in own:
        delattr(cls, name)
    inherited: dict[str, Any] = getattr(cls, "routing", {})
    return inherited | own


def add_routing(declared: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of one submission, with what the task declared and they leave open."""
    given = {name: value for name, value in options.items() if value is not None}
    # A queue and an exchange are two ways to say where: what is said here replaces the whole.
    left_out = _DESTINATION if any(name in given for name in _DESTINATION) else ()
    return {**options, **{k: v for k, v in declared.items() if k not in given and k not in left_out}}
