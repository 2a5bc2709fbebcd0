"""From a function to a step: what its signature says goes in and comes out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, cast

from google.protobuf.message import Message

from docket_celery.context import StepContext
from docket_celery.factory import Factory
from docket_celery.messages import Value, is_message_type, type_name
from docket_celery.perprocess import PerProcess
from docket_celery.policy import RetryPolicy, Scope, StepOptions, to_seconds
from docket_celery.slots import Slots

_LIKE_LISTS = (Iterable, Iterator, Sequence, Collection, tuple, set)


@dataclass(frozen=True, slots=True)
class Named:
    """Tells two values of one message type apart: ``Annotated[Money, Named("tax")]``."""

    name: str


class ValueKey(NamedTuple):
    """What identifies a value within a run: its message type and, where given, its `Named` name."""

    kind: type[Message]
    name: str = ""

    def __str__(self) -> str:
        text = type_name(self.kind)
        return f'{text} named "{self.name}"' if self.name else text


class SignatureFault(Exception):
    """A signature cannot be read as a step; the text says which part and how to mend it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What was handed to the graph, before its signature is read (annotations may name later definitions).

    Attributes:
        slots: Those of ``max_concurrent=``; made here, as a signature may be read more than once.
        factory: Builds the instance of the class that *target* is.
    """

    target: Any
    options: StepOptions
    name: str
    order: int
    where: str
    slots: PerProcess[Slots] | None = None
    factory: Factory | None = None
    aggregates: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A typed function with its policy.

    Attributes:
        call: The function or bound ``compute`` method.
        gathered: For each input '', or how an aggregate takes all items at once: 'list' or 'Iterable'.
        aggregates: It takes all items of a fan-out at once.
        splits: It returns a list, whose messages are the items of a fan-out.
        positional: For each positional argument the index into `inputs`, or -1 for the StepContext.
        keywords: The same for keyword-only arguments.
        identity: The oldest name; names checkpoints and idempotency keys.
        timeout_s: Seconds for one attempt, or None.
        retriable: Whether another attempt may cure an error; None: the default rule.
        slots: Bound how many calls run at once, or None.
        factory: Builds the instance whose ``compute`` is called, or None.
    """

    name: str
    order: int
    where: str
    call: Callable[..., Any]
    inputs: tuple[ValueKey, ...]
    gathered: tuple[str, ...]
    aggregates: bool
    output: ValueKey
    splits: bool
    positional: tuple[int, ...]
    keywords: tuple[tuple[str, int], ...]
    is_async: bool
    options: StepOptions
    timeout_s: float | None
    ttl_s: float | None
    max_attempts: int
    retriable: Callable[[BaseException], bool] | None
    slots: PerProcess[Slots] | None = None
    factory: Factory | None = None

    @property
    def identity(self) -> str:
        return self.options.renamed_from[0] if self.options.renamed_from else self.name

    @property
    def persist(self) -> Scope | None:
        return self.options.persist

    @property
    def result_name(self) -> str:
        """The full name of the type it returns."""
        name = type_name(self.output.kind)
        return f"list[{name}]" if self.splits else name

    def _hand_over(self, values: Sequence[Any]) -> list[Any]:
        # Lists and iterators of the step's own: an aggregate may sort the one, and the other is used up.
        ways: dict[str, Callable[[Any], Any]] = {"list": list, "Iterable": iter}
        pairs = zip(values, self.gathered, strict=True)
        return [ways[many](value) if many else value for value, many in pairs]

    def wrong_result(self, value: object) -> str | None:
        """Return the name of what *value* is instead of the declared result, or None if it is that."""
        if not self.splits:
            return None if type(value) is self.output.kind else _kind_name(value)
        if not isinstance(value, list):
            return _kind_name(value)
        held = cast("list[object]", value)
        wrong = next((each for each in held if type(each) is not self.output.kind), self)
        return None if wrong is self else f"a list that holds {_kind_name(wrong)}"

    def invoke(self, values: Sequence[Value], context: StepContext) -> Any:
        """Call the function; for ``async def`` this returns the coroutine."""
        if self.aggregates:
            values = self._hand_over(values)
        args = [context if i < 0 else values[i] for i in self.positional]
        if not self.keywords:
            return self.call(*args)
        return self.call(*args, **{name: context if i < 0 else values[i] for name, i in self.keywords})


def _kind_name(value: object) -> str:
    return "None" if value is None else type(value).__name__


def default_name(target: Any) -> str | None:
    """Return the name a step gets without ``name=``: the function's or class's; None where there is none to use."""
    if isinstance(target, functools.partial):
        return None
    name = getattr(target, "__name__", None)
    if name is None:
        return type(target).__name__
    return None if name == "<lambda>" else str(name)


def locate(target: Any) -> str:
    """Return ``file:line`` of a function or class, or its repr."""
    plain = inspect.unwrap(target) if callable(target) else target
    while isinstance(plain, functools.partial):
        plain = plain.func
    plain = getattr(plain, "__func__", plain)
    code = getattr(plain, "__code__", None)
    if code is None:
        compute = getattr(plain if isinstance(plain, type) else type(plain), "compute", None)
        code = getattr(compute, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else repr(target)


def read_step(registration: Registration) -> Step:
    """Read the signature and check the options against each other.

    Raises:
        SignatureFault: Something is missing, unsupported or contradictory.
    """
    code = _code(registration)
    signature = _signature(code)
    options = registration.options
    _check_options(options)
    _check_gathers(registration, signature)
    return Step(
        name=registration.name,
        order=registration.order,
        where=registration.where,
        call=code if registration.factory is None else registration.factory,
        inputs=tuple(signature.inputs),
        gathered=tuple(signature.gathered),
        aggregates=registration.aggregates,
        output=signature.output,
        splits=signature.splits,
        positional=tuple(signature.positional),
        keywords=tuple(signature.keywords),
        is_async=_is_async(code),
        options=options,
        timeout_s=None if options.timeout is None else to_seconds(options.timeout, "timeout"),
        ttl_s=None if options.ttl is None else to_seconds(options.ttl, "ttl"),
        max_attempts=1 if options.retry is None else options.retry.max_attempts,
        retriable=_classifier(options),
        slots=registration.slots,
        factory=registration.factory,
    )


def read_annotation(annotation: Any, what: str) -> ValueKey:
    """Return the value an annotation stands for.

    Raises:
        SignatureFault: It is not a message type (with at most one `Named`); *what* says whose annotation it is.
    """
    name, kind = "", annotation
    if typing.get_origin(annotation) is Annotated:
        kind, *extras = typing.get_args(annotation)
        names = [extra.name for extra in extras if isinstance(extra, Named)]
        if len(names) > 1:
            raise SignatureFault(f"{what} has {len(names)} Named(...); keep one")
        name = names[0] if names else ""
    if is_message_type(kind):
        return ValueKey(kind, name)
    shown = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    if typing.get_origin(kind) in (list, *_LIKE_LISTS) or kind in (list, *_LIKE_LISTS):
        raise SignatureFault(
            f"{what} is {shown}; of many messages take list[...] or Iterable[...], return list[...]"
        )
    raise SignatureFault(
        f"{what} is {shown}, not a Protocol Buffers message; annotate it with a message type"
    )


def read_many(annotation: Any) -> tuple[Any, str] | None:
    """Return what a ``list[...]`` or ``Iterable[...]`` holds, and which of them it is; None for anything else.

    ``Annotated[list[T], Named("x")]`` reads like ``list[Annotated[T, Named("x")]]``.
    """
    extras: tuple[Any, ...] = ()
    if typing.get_origin(annotation) is Annotated:
        annotation, *rest = typing.get_args(annotation)
        extras = tuple(rest)
    origin = typing.get_origin(annotation)
    if origin not in (list, Iterable) or len(typing.get_args(annotation)) != 1:
        return None
    (item,) = typing.get_args(annotation)
    return (Annotated[(item, *extras)] if extras else item), "list" if origin is list else "Iterable"


def _code(registration: Registration) -> Callable[..., Any]:
    """Return what has the signature of the step."""
    target, factory = registration.target, registration.factory
    if factory is not None:
        return _compute_of(target, factory)
    if isinstance(target, type):
        raise SignatureFault(
            f"{target.__name__} is a class; register an instance of it, or give factory= to build one per process"
        )
    compute = getattr(target, "compute", None)
    if compute is not None and not inspect.isroutine(target):
        return typing.cast("Callable[..., Any]", compute)
    if not callable(target):
        raise SignatureFault(f"{target!r} is neither a function nor an object with a compute method")
    return typing.cast("Callable[..., Any]", target)


def _compute_of(kind: Any, factory: Factory) -> Callable[..., Any]:
    """Return ``compute`` of a class as an instance of it will have it."""
    if not isinstance(kind, type):
        raise SignatureFault(
            f"factory= builds instances of a class, and {kind!r} is none; register the class, or drop factory="
        )
    if not callable(factory.make):
        raise SignatureFault(f"factory= is a function without parameters, not {factory.make!r}")
    compute = inspect.getattr_static(kind, "compute", None)
    if compute is None:
        raise SignatureFault(
            f"{kind.__name__} has no compute method; add one, with the step's inputs and result"
        )
    if isinstance(compute, (staticmethod, classmethod)):
        return typing.cast("Callable[..., Any]", getattr(kind, "compute"))  # noqa: B009 -- not an attribute of type
    # Any first argument will do: only the other parameters are looked at.
    return functools.partial(compute, None)


@dataclass(slots=True)
class _Signature:
    """What a signature says; the fields are those of `Step`."""

    output: ValueKey
    splits: bool
    inputs: list[ValueKey] = field(default_factory=list[ValueKey])
    gathered: list[str] = field(default_factory=list[str])
    positional: list[int] = field(default_factory=list[int])
    keywords: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])


def _signature(call: Callable[..., Any]) -> _Signature:
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError) as error:
        raise SignatureFault(
            f"its signature cannot be read ({error}); wrap it in a plain function"
        ) from error
    hints = _hints(call)
    if "return" not in hints:
        raise SignatureFault("its return annotation is missing; annotate it with the message type it returns")
    many = read_many(hints["return"])
    if many is not None and many[1] != "list":
        raise SignatureFault("its result is an Iterable[...]; a step that splits a value returns list[...]")
    found = _Signature(
        read_annotation(hints["return"] if many is None else many[0], "its result"), many is not None
    )
    for parameter in parameters:
        index = _parameter(parameter, hints, found)
        if index is None:
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            found.keywords.append((parameter.name, index))
        else:
            found.positional.append(index)
    return found


def _parameter(parameter: inspect.Parameter, hints: dict[str, Any], found: _Signature) -> int | None:
    """Return the index of the parameter's value, -1 for the context, None for one left to its default."""
    what = f"parameter {parameter.name!r}"
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        raise SignatureFault(f"{what} is variadic; name each input and annotate it with its message type")
    annotation = hints.get(parameter.name)
    if annotation is StepContext:
        return -1
    has_default = parameter.default is not inspect.Parameter.empty
    if annotation is None:
        if has_default:
            return None
        raise SignatureFault(f"{what} has no annotation; annotate it with its message type or StepContext")
    many = read_many(annotation)
    try:
        key = read_annotation(annotation if many is None else many[0], what)
    except SignatureFault:
        if has_default:
            return None
        raise
    found.inputs.append(key)
    found.gathered.append("" if many is None else many[1])
    return len(found.inputs) - 1


def _hints(call: Callable[..., Any]) -> dict[str, Any]:
    plain: Any = call
    while isinstance(plain, functools.partial):
        plain = plain.func
    if not inspect.isroutine(plain):
        plain = type(plain).__call__
    plain = inspect.unwrap(plain)
    function = getattr(plain, "__func__", plain)
    try:
        return typing.get_type_hints(function, localns=_closure(function) or None, include_extras=True)
    except NameError as error:
        raise SignatureFault(f"an annotation names something that is not defined: {error}") from error
    except (AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise SignatureFault(f"its annotations cannot be read: {error}") from error


def _closure(function: Any) -> dict[str, Any]:
    """Return the local names around *function* that it uses; one that is not assigned yet is left out."""
    found: dict[str, Any] = {}
    if inspect.isfunction(function):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):
                found[name] = cell.cell_contents
    return found


def _is_async(call: Callable[..., Any]) -> bool:
    plain: Any = call
    while isinstance(plain, functools.partial):
        plain = plain.func
    return inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(getattr(plain, "__call__", None))  # noqa: B004


def _classifier(options: StepOptions) -> Callable[[BaseException], bool] | None:
    retriable = options.retriable
    if retriable is None:
        return None
    if isinstance(retriable, (type, tuple)):
        kinds = cast("tuple[type[BaseException], ...]", retriable)
        return lambda error: isinstance(error, kinds)
    return retriable


def _check_gathers(registration: Registration, signature: _Signature) -> None:
    if registration.aggregates and not any(signature.gathered):
        raise SignatureFault("an aggregate takes all items of a fan-out; annotate a parameter with list[...]")
    if not registration.aggregates and any(signature.gathered):
        raise SignatureFault(
            "it takes a list, so it is an aggregate; use graph.aggregate or register_aggregate"
        )


def _check_options(options: StepOptions) -> None:
    _check_kinds(options)
    if options.key is not None and options.persist is not Scope.GLOBAL:
        raise SignatureFault("key= names GLOBAL checkpoints; add persist=Scope.GLOBAL or drop it")
    if options.cache is not None and options.persist is not Scope.GLOBAL:
        raise SignatureFault("cache= names where GLOBAL checkpoints are; add persist=Scope.GLOBAL or drop it")
    if options.ttl is not None and options.persist is None:
        raise SignatureFault("ttl= without persist= keeps nothing; add persist= or drop it")
    if options.on_input_change not in ("reuse", "error"):
        raise SignatureFault(f'on_input_change= is "reuse" or "error", not {options.on_input_change!r}')
    if options.on_input_change != "reuse" and options.persist is not Scope.WORKFLOW:
        raise SignatureFault(
            "on_input_change= concerns WORKFLOW checkpoints; add persist=Scope.WORKFLOW or drop it"
        )
    for name in ("timeout", "ttl"):
        value = getattr(options, name)
        try:
            _ = None if value is None else to_seconds(value, name)
        except ValueError as error:
            raise SignatureFault(str(error)) from error


def _check_kinds(options: StepOptions) -> None:
    """Refuse values that would be misread later, for callers without a type checker."""
    if options.persist is not None and not isinstance(options.persist, Scope):
        raise SignatureFault(f"persist= is Scope.GLOBAL or Scope.WORKFLOW, not {options.persist!r}")
    if options.retry is not None and not isinstance(options.retry, RetryPolicy):
        raise SignatureFault(f"retry= is a RetryPolicy(...), not {options.retry!r}")
    version: object = options.version
    if not isinstance(version, str) or not version.isprintable():
        raise SignatureFault(f"version= is text of printable characters, not {version!r}")
    if options.key is not None and not callable(options.key):
        raise SignatureFault(f"key= is a function of the step's inputs, not {options.key!r}")
    cache: object = options.cache
    if cache is not None and not (isinstance(cache, str) and 1 <= len(cache) <= 200 and cache.isprintable()):
        raise SignatureFault(f"cache= is a name of 1 to 200 printable characters, not {cache!r}")
    given: object = options.retriable
    kinds = cast("Sequence[object]", given) if isinstance(given, tuple) else [given]
    for kind in kinds:
        is_error = isinstance(kind, type) and issubclass(kind, BaseException)
        is_predicate = kind is options.retriable and not isinstance(kind, type) and callable(kind)
        if kind is not None and not is_error and not is_predicate:
            raise SignatureFault(f"retriable= is a predicate or exception types, not {kind!r}")
    most: Any = options.max_concurrent
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise SignatureFault(f"max_concurrent= is a whole number from 1, not {most!r}")
    former: Any = options.renamed_from
    if isinstance(former, str):
        raise SignatureFault("renamed_from= is a tuple of names, oldest first; write a comma: ('old',)")
    if not all(isinstance(name, str) and name and name.isprintable() for name in options.renamed_from):
        raise SignatureFault(f"renamed_from= is a tuple of names, oldest first, not {options.renamed_from!r}")
