"""A step: the code to call, its signature and its options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from google.protobuf.message import Message

from docket_celery.plan.annotation import SignatureFault
from docket_celery.plan.context import StepContext
from docket_celery.plan.messages import Value, encoding_fault, may_not_encode, type_name
from docket_celery.plan.options import Scope, StepOptions, to_seconds
from docket_celery.plan.signature import Signature, is_async, plain, read_signature

_WAYS: dict[str, Callable[[Any], Any]] = {"": lambda value: value, "list": list, "Iterable": iter}
"""How an input is handed over: an aggregate may sort its list, and uses an iterator up."""


class Mark:
    """Names one registration of a step: what a process keeps for the step, it keeps under this."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True, kw_only=True, eq=False)
class Registration:
    """What was handed to the graph, before its signature is read: annotations may name later definitions.

    A signature may be read more than once; the *mark* stays. *make* is ``factory=``: it returns an instance of the
    class *target*, or a context manager to enter for it.
    """

    target: Any
    options: StepOptions
    name: str
    order: int
    where: str
    mark: Mark = field(default_factory=Mark)
    make: Callable[[], Any] | None = None
    aggregates: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Step(Registration, Signature):
    """A typed function with its policy.

    Attributes:
        call: The function or bound ``compute`` method; with `make`, that of the class.
        wrap: From the step, its code and the number of the attempt, what is called instead; None: the code.
    """

    call: Callable[..., Any]
    wrap: Callable[[Step, Callable[..., Any], int], Callable[..., Any]] | None = None

    @property
    def identity(self) -> str:
        return self.options.renamed_from[0] if self.options.renamed_from else self.name

    @cached_property
    def persist(self) -> Scope | None:
        return self.options.persist

    @cached_property
    def is_async(self) -> bool:
        return is_async(self.call)

    @cached_property
    def ends_here(self) -> bool:
        """Whether each call ends on the thread that makes it: it is synchronous, and no deadline ends it before."""
        return not self.is_async and self.timeout_s is None

    @cached_property
    def simple(self) -> bool:
        """Whether a step needs nothing but a thread, of whichever kind."""
        return self.ends_here and self.persist is None

    @cached_property
    def timeout_s(self) -> float | None:
        """Seconds for one attempt, or None."""
        return None if self.options.timeout is None else to_seconds(self.options.timeout, "timeout")

    @cached_property
    def ttl_s(self) -> float | None:
        return None if self.options.ttl is None else to_seconds(self.options.ttl, "ttl")

    @property
    def max_attempts(self) -> int:
        return 1 if self.options.retry is None else self.options.retry.max_attempts

    @cached_property
    def retriable(self) -> Callable[[BaseException], bool] | None:
        """Whether another attempt may cure an error; None: the default rule."""
        kinds = self.options.retriable
        if isinstance(kinds, (type, tuple)):
            return lambda error: isinstance(error, kinds)
        return kinds

    @property
    def result_name(self) -> str:
        """The full name of the type it returns."""
        name = type_name(self.output.kind)
        return f"list[{name}]" if self.splits else name

    def wrong_result(self, value: object) -> str | None:
        """Return what *value* is instead of a result: of another type, or not to be kept; None: it is a result."""
        kind = self.output.kind
        if not self.splits:
            if type(value) is not kind:
                return _kind_name(value)
            fault = encoding_fault(value)
        elif isinstance(value, list):
            held = cast("list[Message]", value)
            wrong = next((each for each in held if type(each) is not kind), self)
            if wrong is not self:
                return f"a list that holds {_kind_name(wrong)}"
            fault = next(filter(None, map(encoding_fault, held)), None)
        else:
            return _kind_name(value)
        return None if fault is None else f"one that cannot be kept ({fault})"

    @cached_property
    def sure_kind(self) -> type[Message] | None:
        """The type of its result, if each message of this type is one: it can always be written and read back."""
        return None if self.splits or may_not_encode(self.output.kind) else self.output.kind

    @cached_property
    def plain_code(self) -> Callable[..., Any] | None:
        """Its code, if that is called with the inputs as they are, each once, in their order."""
        special = self.make is not None or self.wrap is not None or self.aggregates or bool(self.keywords)
        return None if special or self.positional != tuple(range(len(self.inputs))) else self.call

    @cached_property
    def takes_context(self) -> bool:
        """Whether a call needs a StepContext."""
        return self.wrap is not None or any(i < 0 for i in (*self.positional, *dict(self.keywords).values()))

    def invoke(self, call: Callable[..., Any], values: Sequence[Value], context: StepContext | None) -> Any:
        """Call *call*, the step's code in this process; for ``async def`` this returns the coroutine.

        *context* is for a step that `takes_context`.
        """
        if self.wrap is not None and context is not None:
            call = self.wrap(self, call, context.attempt)
        handed: Sequence[Any] = values
        if self.aggregates:
            handed = [_WAYS[way](value) for way, value in zip(self.gathered, values, strict=True)]
        args = [context if i < 0 else handed[i] for i in self.positional]
        if not self.keywords:
            return call(*args)
        return call(*args, **{name: context if i < 0 else handed[i] for name, i in self.keywords})


def _kind_name(value: object) -> str:
    if inspect.iscoroutine(value):
        # Nobody will await it; closed, it does not complain about that as well.
        value.close()
        return "a coroutine (what decorates an async def step must be async def too)"
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
    found = plain(inspect.unwrap(target) if callable(target) else target)
    found = getattr(found, "__func__", found)
    code = getattr(found, "__code__", None)
    if code is None:
        compute = getattr(found if isinstance(found, type) else type(found), "compute", None)
        code = getattr(compute, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else repr(target)


def read_step(registration: Registration) -> Step:
    """Read the signature, not the options; SignatureFault: with all that is missing or unsupported."""
    code = _code(registration)
    signature = read_signature(code)
    if registration.aggregates and not any(signature.gathered):
        raise SignatureFault("an aggregate takes all items of a fan-out; annotate a parameter with list[...]")
    if not registration.aggregates and any(signature.gathered):
        raise SignatureFault(
            "it takes a list, so it is an aggregate; use graph.aggregate or register_aggregate"
        )
    return Step(**vars(registration), **vars(signature), call=code)


def _code(registration: Registration) -> Callable[..., Any]:
    """Return what has the signature of the step."""
    target = registration.target
    if registration.make is not None:
        return _compute_of(target, registration.make)
    if isinstance(target, classmethod):
        raise SignatureFault(
            "it is a classmethod that belongs to no class yet; register Class.method below the class"
        )
    if isinstance(target, staticmethod):
        return target.__func__
    if isinstance(target, type):
        raise SignatureFault(
            f"{target.__name__} is a class; register an instance of it, or give factory= to build one per process"
        )
    compute = getattr(target, "compute", None)
    if compute is not None and not inspect.isroutine(target):
        return cast("Callable[..., Any]", compute)
    if not callable(target):
        raise SignatureFault(f"{target!r} is neither a function nor an object with a compute method")
    return cast("Callable[..., Any]", target)


def _compute_of(kind: Any, make: object) -> Callable[..., Any]:
    """Return ``compute`` of a class as an instance of it will have it."""
    if not isinstance(kind, type):
        shown = getattr(kind, "__qualname__", None) or f"a {type(kind).__name__} object"
        raise SignatureFault(
            f"factory= builds instances of a class, and {shown} is none; register the class, or drop factory="
        )
    if not callable(make):
        raise SignatureFault(f"factory= is a function without parameters, not {make!r}")
    compute = inspect.getattr_static(kind, "compute", None)
    if compute is None:
        raise SignatureFault(
            f"{kind.__name__} has no compute method; add one, with the step's inputs and result"
        )
    if isinstance(compute, (staticmethod, classmethod)):
        return cast("Callable[..., Any]", getattr(kind, "compute"))  # noqa: B009 -- not an attribute of type
    # Any first argument will do: only the other parameters are looked at.
    return functools.partial(compute, None)
