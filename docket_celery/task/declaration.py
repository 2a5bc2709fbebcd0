"""What a GraphTask's declared function says: which messages go in, which comes out, and how arguments become them."""

from __future__ import annotations

import dis
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.message import Message

from docket_celery.errors import InvalidArguments, InvalidDeclaration
from docket_celery.graph import Graph
from docket_celery.plan.annotation import SignatureFault, ValueKey, read_annotation, read_many
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.context import StepContext
from docket_celery.plan.messages import Value, from_json_object, type_name
from docket_celery.plan.plan import Plan
from docket_celery.task.envelope import Result, Results, Undecodable

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
        batch: Which of `given` comes as a list.
        form: How the target comes: 'one' message, a 'list' of them, or a 'BatchResult'.
    """

    task: str
    signature: inspect.Signature
    given: tuple[ValueKey, ...]
    target: ValueKey
    batch: ValueKey | None = None
    form: Literal["one", "list", "BatchResult"] = "one"

    @property
    def collects(self) -> bool:
        """Whether the target is made for each item."""
        return self.form != "one"

    def compile(self, graph: Graph) -> Plan:
        """Return what *graph* does for it.

        Raises:
            GraphError: The graph has faults.
        """
        return graph.compiled(self.target, self.given, self.batch, collects=self.collects)

    def blank(self) -> tuple[tuple[None, ...], dict[str, None]]:
        """Return arguments that fit in number only."""
        named = [n for n, p in self.signature.parameters.items() if p.kind is p.KEYWORD_ONLY]
        return (None,) * (len(self.given) - len(named)), dict.fromkeys(named)

    def bind(self, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> tuple[Value, ...]:
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
            self._value(name, key, bound.arguments[name]) for name, key in zip(names, self.given, strict=True)
        )

    def bind_item(self, index: int, value: Any) -> Message:
        """Return the message for an item of the batch.

        Raises:
            InvalidArguments: It is of another type.
        """
        assert self.batch is not None
        if type(value) is self.batch.kind:
            return value
        name = list(self.signature.parameters)[self.given.index(self.batch)]
        return self._message(f"{name}[{index}]", self.batch, value)

    def bind_others(self, values: Sequence[Any]) -> tuple[Message, ...]:
        """Return the messages that all items of a batch share, in the order of the other parameters.

        Raises:
            InvalidArguments: One is missing, too many, or of another type; or the task takes no batch.
        """
        if self.batch is None:
            raise InvalidArguments(
                self._shown(), "it takes no list[...]; submit its job with delay or apply_async"
            )
        names = [
            (name, key)
            for name, key in zip(self.signature.parameters, self.given, strict=True)
            if key != self.batch
        ]
        if len(names) != len(values):
            shown = ", ".join(name for name, _ in names) or "nothing"
            raise InvalidArguments(
                self._shown(),
                f"submit_batch takes the items, then {shown}; got {len(values)} beside the items",
            )
        return tuple(
            self._message(name, key, value) for (name, key), value in zip(names, values, strict=True)
        )

    def join(self, items: Sequence[Any], others: Sequence[Message]) -> tuple[Any, ...]:
        """Return the arguments of a job by position: the batch, and what all its items share."""
        rest = iter(others)
        return tuple(items if key == self.batch else next(rest) for key in self.given)

    def _value(self, name: str, key: ValueKey, value: Any) -> Value:
        if key != self.batch:
            return self._message(name, key, value)
        if isinstance(value, Results):
            value = value.value
        if isinstance(value, BatchResult):
            value = [each for _, each in typing.cast("BatchResult[Message]", value).succeeded()]
        if isinstance(value, (str, bytes, dict, Message)) or not isinstance(value, Iterable):
            raise InvalidArguments(
                self._shown(),
                f"argument {name!r} must be a list of {type_name(key.kind)}, not {value!r:.100}",
            )
        items: Iterable[Any] = value  # pyright: ignore[reportUnknownVariableType]  # of whatever it is
        return [self._message(f"{name}[{index}]", key, item) for index, item in enumerate(items)]

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
            f"{name}: list[{key.kind.__name__}]" if key == self.batch else f"{name}: {key.kind.__name__}"
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
        given.append(_hint(task, hints, name, f"parameter {name!r}"))
    return _declaration(task, signature, given, _hint(task, hints, "return", "its result"))


def read_generic(task: str, arguments: tuple[Any, ...]) -> Declaration:
    """Read the types of ``class X(GraphTask[[Order], Shipment])``.

    Raises:
        InvalidDeclaration: They are not message types.
    """
    if len(arguments) != 2 or not isinstance(arguments[0], (list, tuple)):
        raise InvalidDeclaration(task, "write GraphTask[[InputType], OutputType]")
    kinds = typing.cast("Sequence[Any]", arguments[0])
    parameters = [
        inspect.Parameter(f"input_{n}", inspect.Parameter.POSITIONAL_ONLY) for n, _ in enumerate(kinds, 1)
    ]
    return _declaration(task, inspect.Signature(parameters), list(kinds), arguments[1])


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


def _declaration(task: str, signature: inspect.Signature, hints: list[Any], result: Any) -> Declaration:
    given: list[ValueKey] = []
    batches: list[ValueKey] = []
    for name, hint in zip(signature.parameters, hints, strict=True):
        many = read_many(hint)
        given.append(_annotation(task, hint if many is None else many[0], f"parameter {name!r}"))
        if many is not None:
            batches.append(given[-1])
    if len(batches) > 1:
        raise InvalidDeclaration(task, f"it takes {len(batches)} lists; a batch has one list of items")
    if not given:
        raise InvalidDeclaration(task, "it takes no message; a job is at least one")
    if len(set(given)) != len(given):
        raise InvalidDeclaration(task, 'it takes two messages of one type; tell them apart with Named("...")')
    target, form = _target(task, result)
    batch = batches[0] if batches else None
    return Declaration(
        task=task, signature=signature, given=tuple(given), target=target, batch=batch, form=form
    )


def _target(task: str, result: Any) -> tuple[ValueKey, Literal["one", "list", "BatchResult"]]:
    if typing.get_origin(result) is BatchResult:
        return _annotation(task, typing.get_args(result)[0], "its result"), "BatchResult"
    many = read_many(result)
    if many is None:
        return _annotation(task, result, "its result"), "one"
    if many[1] != "list":
        raise InvalidDeclaration(task, "its result is an Iterable[...]; a batch returns list[...]")
    return _annotation(task, many[0], "its result"), "list"


def _hint(task: str, hints: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in hints:
        raise InvalidDeclaration(task, f"{what} has no annotation; annotate it with its message type")
    return hints[name]


def _annotation(task: str, annotation: Any, what: str) -> ValueKey:
    try:
        return read_annotation(annotation, what)
    except SignatureFault as fault:
        raise InvalidDeclaration(task, str(fault)) from None
