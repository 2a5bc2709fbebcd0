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
        inputs: What it takes, a parameter each.
        gathered: For each input '', or how an aggregate takes all items at once: 'list' or 'Iterable'.
        output: What it returns.
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
    """Return what *call* takes and returns.

    Raises:
        SignatureFault: With everything that is missing or unsupported.
    """
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
    inputs, bound = _Inputs(), _bound(call)
    output: tuple[ValueKey, bool] | None = None
    try:
        output = _result(hints)
    except SignatureFault as fault:
        faults += fault.texts
    for parameter in parameters:
        try:
            inputs.add(parameter, hints.get(parameter.name), bound=parameter.name in bound)
        except SignatureFault as fault:
            faults += fault.texts
    if faults or output is None:
        raise SignatureFault(*faults, output=output and output[0])
    return Signature(
        inputs=tuple(key for key, _ in inputs.taken),
        gathered=tuple(gathered for _, gathered in inputs.taken),
        output=output[0],
        splits=output[1],
        positional=tuple(inputs.positional),
        keywords=tuple(inputs.keywords),
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


class _Inputs:
    """What the parameters say, one after the other; the attributes are those of `Signature`.

    Attributes:
        taken: The inputs, with how they are gathered, in their order; and the parameter of each.
        left_out: A parameter was left to its default.
    """

    def __init__(self) -> None:
        self.taken: dict[tuple[ValueKey, str], str] = {}
        self.positional: list[int] = []
        self.keywords: list[tuple[str, int]] = []
        self.left_out = False

    def add(self, parameter: inspect.Parameter, annotation: Any, *, bound: bool = False) -> None:
        """Take *parameter*, unless it is bound or left to its default.

        Args:
            parameter: The next one.
            annotation: Its type hint; None: it has none.
            bound: A `functools.partial` gives it a value, which stays.
        """
        what = f"parameter {parameter.name!r}"
        has_default = parameter.default is not inspect.Parameter.empty
        if bound or (has_default and not mentions_values(annotation)):
            self.left_out = True
            return
        if isinstance(parameter.default, Message):
            raise SignatureFault(
                f"{what} has a message as its default, and the run would give it another one; drop the default, or "
                f"fix the value with functools.partial(..., {parameter.name}=...), which makes it no input"
            )
        if annotation is None:
            raise SignatureFault(
                f"{what} has no annotation; annotate it with its message type or StepContext"
            )
        index = -1 if is_context(annotation) else self._value(parameter.name, annotation, what)
        # By position it would be taken for the parameter that was left out before it.
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY or (
            self.left_out and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ):
            self.keywords.append((parameter.name, index))
        else:
            self.positional.append(index)

    def _value(self, name: str, annotation: Any, what: str) -> int:
        item, gathered = read_many(annotation) or (annotation, "")
        key = read_annotation(item, what)
        other = self.taken.setdefault((key, gathered), name)
        if other != name:
            raise SignatureFault(
                f"parameters {other!r} and {name!r} are both {key}, of which a run has one; drop one, or tell them "
                'apart with Annotated[..., Named("...")]'
            )
        return len(self.taken) - 1


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
    """Return the type hints of *function*, of a step or of a task's declaration.

    Raises:
        SignatureFault: One names what is not there when the program runs.
    """
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
    if code is None:
        return False
    try:
        tree = ast.parse("".join(linecache.getlines(code.co_filename)))
    except SyntaxError:
        return False
    guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _names_checkers(node.test)]
    imports = [node for block in guarded for node in ast.walk(block)]
    return any(
        name == (alias.asname or alias.name.partition(".")[0])
        for node in imports
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    )


def _names_checkers(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(test)}
