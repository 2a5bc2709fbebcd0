"""What a GraphTask's declared function says: which messages go in, which comes out, and how arguments become them."""

from __future__ import annotations

import dis
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from docket_celery.annotation import SignatureFault, ValueKey, read_annotation
from docket_celery.context import StepContext
from docket_celery.errors import InvalidArguments, InvalidDeclaration
from docket_celery.messages import from_json_object, type_name
from docket_celery.wire import Result, Undecodable

NameFunction = (
    Callable[[Any], str]
    | Callable[[Any, Any], str]
    | Callable[[Any, Any, Any], str]
    | Callable[[Any, Any, Any, Any], str]
    | Callable[[Any, Any, Any, Any, Any], str]
)
"""From a task's messages, the name of their run. By arity, since strict checkers refuse a lambda for ``...``."""
_EMPTY_OPS = frozenset(
    {"RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "NOT_TAKEN", "COPY_FREE_VARS"}
)
_DESTINATION = ("queue", "exchange", "exchange_type", "routing_key")
_MANNER = ("delivery_mode", "priority")
_RAISING_OPS = _EMPTY_OPS | {
    "LOAD_GLOBAL",
    "PUSH_NULL",
    "PRECALL",
    "CALL",
    "RAISE_VARARGS",
    "POP_TOP",
    "CACHE",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """The typed face of a task.

    Attributes:
        signature: Binds arguments; parameters in the order of `given`.
        given: What goes in, one for each parameter.
        target: What comes out.
    """

    task: str
    signature: inspect.Signature
    given: tuple[ValueKey, ...]
    target: ValueKey

    def bind(self, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> tuple[Message, ...]:
        """Return the messages for a call's arguments, in the order of `given`.

        Args:
            args: Positional arguments: messages, their JSON form as dicts, or results of earlier tasks.
            kwargs: The same by name.

        Raises:
            InvalidArguments: One is missing, too many, or of another type.
            UnknownMessageType, DecodeFailed, PayloadTooLarge: One arrived in a state that cannot be read.
        """
        try:
            bound = self.signature.bind(*(args or ()), **(kwargs or {}))
        except TypeError as error:
            raise InvalidArguments(self._shown(), str(error)) from None
        names = list(self.signature.parameters)
        return tuple(
            self._message(name, key, bound.arguments[name])
            for name, key in zip(names, self.given, strict=True)
        )

    def _message(self, name: str, key: ValueKey, value: Any) -> Message:
        if isinstance(value, Undecodable):
            raise value.error
        if isinstance(value, Result):
            value = value.message
        if isinstance(value, dict):
            return from_json_object(key.kind, typing.cast("dict[str, Any]", value))
        if type(value) is key.kind:
            return value
        actual = type_name(value) if isinstance(value, Message) else type(value).__name__
        raise InvalidArguments(
            self._shown(),
            f"argument {name!r} must be a {type_name(key.kind)}, not a {actual}; "
            f"pass {key.kind.__name__}(...), or its JSON form as a dict",
        )

    def _shown(self) -> str:
        parameters = ", ".join(
            f"{name}: {key.kind.__name__}"
            for name, key in zip(self.signature.parameters, self.given, strict=True)
        )
        return f"{self.task}({parameters})"


def read_function(task: str, function: Callable[..., Any]) -> Declaration:
    """Read the declared function of a task.

    Raises:
        InvalidDeclaration: An annotation is missing or is no message type, or the body is not empty.
    """
    if not is_empty(function):
        raise InvalidDeclaration(
            task,
            "its body would never run, since the graph does the work; leave it empty (raise NotImplementedError)",
        )
    signature = inspect.signature(function)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise InvalidDeclaration(task, f"its annotations cannot be read: {error}") from error
    given: list[ValueKey] = []
    for name, parameter in signature.parameters.items():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise InvalidDeclaration(task, f"parameter {name!r} is variadic; name each message")
        if parameter.default is not inspect.Parameter.empty:
            raise InvalidDeclaration(task, f"parameter {name!r} has a default; a job is always given whole")
        if hints.get(name) is StepContext:
            raise InvalidDeclaration(task, f"parameter {name!r} is a StepContext; only steps get one")
        given.append(_key(task, hints, name, f"parameter {name!r}"))
    target = _key(task, hints, "return", "its result")
    return _declaration(task, signature, given, target)


def read_generic(task: str, arguments: tuple[Any, ...]) -> Declaration:
    """Read the types of ``class X(GraphTask[[Order], Shipment])``.

    Raises:
        InvalidDeclaration: They are not message types.
    """
    if len(arguments) != 2 or not isinstance(arguments[0], (list, tuple)):
        raise InvalidDeclaration(task, "write GraphTask[[InputType], OutputType]")
    kinds = typing.cast("Sequence[Any]", arguments[0])
    given = [_annotation(task, kind, f"input {n}") for n, kind in enumerate(kinds, 1)]
    target = _annotation(task, arguments[1], "its result")
    parameters = [
        inspect.Parameter(f"input_{n}", inspect.Parameter.POSITIONAL_ONLY) for n, _ in enumerate(given, 1)
    ]
    return _declaration(task, inspect.Signature(parameters), given, target)


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


def json_values(context: object) -> dict[str, Any]:
    """Return *context* if it can travel.

    Raises:
        InvalidArguments: It is not a mapping with text keys and JSON values.
    """
    if not isinstance(context, Mapping):
        raise InvalidArguments("context", f"must be a mapping of JSON values, not {type(context).__name__}")
    values: dict[str, Any] = {str(key): value for key, value in typing.cast("Any", context).items()}
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        raise InvalidArguments("context", f"must hold JSON values only: {error}") from None
    return values


def is_empty(function: Callable[..., Any]) -> bool:
    """Tell whether a body is nothing but a docstring, ``...``, ``pass`` or ``raise NotImplementedError``."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if not isinstance(code, types.CodeType):
        return False
    instructions = list(dis.get_instructions(code))
    used = {instruction.opname for instruction in instructions}
    if "RAISE_VARARGS" in used:
        return code.co_names == ("NotImplementedError",) and used <= _RAISING_OPS
    constants = {i.argval for i in instructions if i.opname in ("LOAD_CONST", "RETURN_CONST")}
    return used <= _EMPTY_OPS and constants <= {None}


def _declaration(
    task: str, signature: inspect.Signature, given: list[ValueKey], target: ValueKey
) -> Declaration:
    if not given:
        raise InvalidDeclaration(task, "it takes no message; a job is at least one")
    if len(set(given)) != len(given):
        raise InvalidDeclaration(task, 'it takes two messages of one type; tell them apart with Named("...")')
    return Declaration(task=task, signature=signature, given=tuple(given), target=target)


def _key(task: str, hints: Mapping[str, Any], name: str, what: str) -> ValueKey:
    if name not in hints:
        raise InvalidDeclaration(task, f"{what} has no annotation; annotate it with its message type")
    return _annotation(task, hints[name], what)


def _annotation(task: str, annotation: Any, what: str) -> ValueKey:
    try:
        return read_annotation(annotation, what)
    except SignatureFault as fault:
        raise InvalidDeclaration(task, str(fault)) from None
