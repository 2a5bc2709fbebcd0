"""The signature of a step's code, however it was written or wrapped: what goes in and what comes out."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import linecache
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from docket_celery.plan.annotation import (
    SignatureFault,
    ValueKey,
    is_context,
    mentions_values,
    read_annotation,
    read_many,
)

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, kw_only=True, eq=False)
class Signature:
    """What a step takes and returns.

    Attributes:
        gathered: For each input '', or how an aggregate takes all items at once: 'list' or 'Iterable'.
        splits: It returns a list, whose messages are the items of a fan-out.
        positional: For each positional argument the index into `inputs`, or -1 for the StepContext.
        keywords: The same for keyword-only arguments.
    """

    inputs: tuple[ValueKey, ...]
    gathered: tuple[str, ...]
    output: ValueKey
    splits: bool
    positional: tuple[int, ...]
    keywords: tuple[tuple[str, int], ...]


def read_signature(call: Callable[..., Any]) -> Signature:
    """Return what *call* takes and returns, or raise a SignatureFault with all that is missing or unsupported."""
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError) as error:
        raise SignatureFault(
            f"its signature cannot be read ({error}); wrap it in a plain function"
        ) from error
    function = unwrap(call)
    hints = read_hints(function)
    faults = list(_shape_faults(call, function, parameters))
    if faults:
        raise SignatureFault(*faults)
    taken: dict[tuple[ValueKey, str], str] = {}
    positional: list[int] = []
    keywords: list[tuple[str, int]] = []
    output: tuple[ValueKey, bool] | None = None
    try:
        output = _result(hints)
    except SignatureFault as fault:
        faults += fault.texts
    bound, left_out = _bound(call), False
    for parameter in parameters:
        try:
            index = None if parameter.name in bound else _take(parameter, hints.get(parameter.name), taken)
        except SignatureFault as fault:
            faults += fault.texts
            continue
        # By position it would be taken for a parameter that was left out before it.
        by_name = left_out and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if index is None:
            left_out = True
        elif by_name or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            keywords.append((parameter.name, index))
        else:
            positional.append(index)
    if faults or output is None:
        raise SignatureFault(*faults, output=output and output[0])
    return Signature(
        inputs=tuple(key for key, _ in taken),
        gathered=tuple(gathered for _, gathered in taken),
        output=output[0],
        splits=output[1],
        positional=tuple(positional),
        keywords=tuple(keywords),
    )


def plain(call: Any) -> Any:
    """Return what partials around *call* bind arguments of."""
    while isinstance(call, functools.partial):
        call = call.func
    return call


def unwrap(call: Any) -> Any:
    """Return the function that has the annotations: behind partials, methods, callables and wrappers."""
    found = plain(call)
    if not inspect.isroutine(found):
        found = type(found).__call__
    found = inspect.unwrap(found)
    return getattr(found, "__func__", found)


def is_async(call: Callable[..., Any]) -> bool:
    """Tell whether calling it returns a coroutine."""
    found = plain(call)
    return inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(getattr(found, "__call__", None))  # noqa: B004


def _result(hints: dict[str, Any]) -> tuple[ValueKey, bool]:
    if "return" not in hints:
        raise SignatureFault("its return annotation is missing; annotate it with the message type it returns")
    item, many = read_many(hints["return"]) or (hints["return"], "")
    if many == "Iterable":
        raise SignatureFault("its result is an Iterable[...]; a step that splits a value returns list[...]")
    return read_annotation(item, "its result"), bool(many)


def _take(
    parameter: inspect.Parameter, annotation: Any, taken: dict[tuple[ValueKey, str], str]
) -> int | None:
    """Return the index of *parameter* among the inputs, -1 for the StepContext, None if it is left to its default.

    A new one is added to *taken*: the inputs with how they are gathered, and the parameter of each.
    """
    what = f"parameter {parameter.name!r}"
    if parameter.default is not inspect.Parameter.empty and not mentions_values(annotation):
        return None
    if isinstance(parameter.default, Message):
        raise SignatureFault(
            f"{what} has a message as its default, and the run would give it another one; drop the default, or "
            f"fix the value with functools.partial(..., {parameter.name}=...), which makes it no input"
        )
    if annotation is None:
        raise SignatureFault(f"{what} has no annotation; annotate it with its message type or StepContext")
    if is_context(annotation):
        return -1
    item, gathered = read_many(annotation) or (annotation, "")
    key = read_annotation(item, what)
    other = taken.setdefault((key, gathered), parameter.name)
    if other != parameter.name:
        raise SignatureFault(
            f"parameters {other!r} and {parameter.name!r} are both {key}, of which a run has one; drop one, or tell "
            'them apart with Annotated[..., Named("...")]'
        )
    return len(taken) - 1


def _bound(call: Any) -> set[str]:
    """Return the parameters that partials give a value by name."""
    names: set[str] = set()
    while isinstance(call, functools.partial):
        names.update(call.keywords)
        call = call.func
    return names


def _shape_faults(
    call: Callable[..., Any], function: Any, parameters: Sequence[inspect.Parameter]
) -> Iterable[str]:
    """Yield what makes annotations pointless to look at."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        yield "it is a generator, for its yield; return the message instead"
    first = parameters[0] if parameters else None
    if (
        first is not None
        and first.name in ("self", "cls")
        and first.annotation is inspect.Parameter.empty
        and inspect.isfunction(call)
    ):
        yield (
            f"it is a method without an instance, for its {first.name}; register instance.{call.__name__}, or an "
            "object with compute"
        )
    variadic = [parameter for parameter in parameters if parameter.kind in _VARIADIC]
    if not variadic:
        return
    stars = ("*", "**")
    shown = ", ".join(stars[p.kind is inspect.Parameter.VAR_KEYWORD] + p.name for p in variadic)
    if len(variadic) == 2 or variadic[0].annotation is inspect.Parameter.empty:
        yield (
            f"its inputs are hidden behind {shown}; if a decorator made it, put @functools.wraps on the function "
            "inside that decorator, else name each input and annotate it with its message type"
        )
    else:
        yield f"parameter {shown} is variadic; name each input and annotate it with its message type"


def read_hints(function: Any) -> dict[str, Any]:
    """Return the type hints of *function*, of a step or of a task's declaration; SignatureFault: one has no value."""
    try:
        return typing.get_type_hints(function, localns=_closure(function) or None, include_extras=True)
    except NameError as error:
        raise SignatureFault(_unknown_name(function, error)) from error
    except (AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise SignatureFault(f"its annotations cannot be read: {error}") from error


def _unknown_name(function: Any, error: NameError) -> str:
    if error.name and _is_for_checkers(function, error.name):
        return (
            f"an annotation names {error.name}, which is imported under TYPE_CHECKING alone; a graph reads "
            "annotations when it runs, so import it outside of that block"
        )
    if error.name and "<locals>" in getattr(function, "__qualname__", ""):
        return (
            f"an annotation names {error.name}, which its module does not define; annotations that are text (from "
            f"__future__ import annotations) cannot name a type of the function around them: define {error.name} in "
            "the module"
        )
    return (
        f"an annotation names something that is not defined: {error}; import it where the function is written"
    )


def _closure(function: Any) -> dict[str, Any]:
    """Return the local names around *function* that it uses; one that is not assigned yet is left out."""
    found: dict[str, Any] = {}
    if inspect.isfunction(function):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):
                found[name] = cell.cell_contents
    return found


def _is_for_checkers(function: Any, name: str) -> bool:
    """Tell whether the module of *function* imports *name* where only type checkers look."""
    code = getattr(function, "__code__", None)
    try:
        tree = ast.parse("".join(linecache.getlines(code.co_filename)) if code else "")
    except SyntaxError:
        return False
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    names = [node for block in blocks for node in ast.walk(block) if isinstance(node, ast.alias)]
    return any(name == (node.asname or node.name.partition(".")[0]) for node in names)
