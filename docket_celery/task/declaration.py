"""What a GraphTask's declared function says: which messages go in, which comes out, and how arguments become them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from google.protobuf.message import Message

from docket_celery.engine.process.settings import Settings
from docket_celery.errors import InvalidArguments, InvalidDeclaration
from docket_celery.graph import Graph
from docket_celery.plan.annotation import (
    SignatureFault,
    ValueKey,
    is_context,
    read_annotation,
    read_many,
    resolve,
)
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.messages import (
    STORED_BYTES,
    Value,
    check_size,
    did_you_mean,
    encoding_fault,
    from_json_object,
    is_json_form,
    type_name,
    value_digest,
)
from docket_celery.plan.plan import Plan
from docket_celery.plan.signature import read_hints
from docket_celery.store.identity import job_digest
from docket_celery.task.envelope import Result, Undecodable, is_large
from docket_celery.task.envelope import types as known_types
from docket_celery.task.options import (
    check_name_function,
    check_options,
    check_serializer,
    read_batch_options,
    take_routing,
)
from docket_celery.task.retries import with_causes

if TYPE_CHECKING:
    from docket_celery.task.references import Arguments
    from docket_celery.task.task import AnyTask
NameFunction = (
    Callable[[Any], str]
    | Callable[[Any, Any], str]
    | Callable[[Any, Any, Any], str]
    | Callable[[Any, Any, Any, Any], str]
    | Callable[[Any, Any, Any, Any, Any], str]
)
"""From a task's messages, the name of their run. By arity, since strict checkers refuse a lambda for ``...``."""
_EMPTY_BODIES = (
    "pass",
    "raise NotImplementedError",
    "raise NotImplementedError()",
    "raise NotImplementedError('text')",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """The typed face of a task.

    Attributes:
        signature: Binds arguments; parameters in the order of `given`.
        given: What goes in, one for each parameter.
        named: The parameters that are given by name only.
        labels: What a job's digest calls each of them, as `run_row.digest_job` does.
        target: What comes out.
        batch: Which of `given` comes as a list.
        form: How the target comes: 'one' message, a 'list' of them, or a 'BatchResult'.
    """

    task: str
    signature: inspect.Signature
    given: tuple[ValueKey, ...]
    named: tuple[str, ...]
    labels: tuple[str, ...]
    target: ValueKey
    batch: ValueKey | None = None
    form: Literal["one", "list", "BatchResult"] = "one"

    def compile(self, graph: Graph) -> Plan:
        """Return what *graph* does for it, or raise the graph's faults as a GraphError."""
        return graph.compiled(self.target, self.given, self.batch, collects=self.form != "one")

    def digest(self, values: Iterable[Value]) -> bytes:
        """Return the digest of the job that `bind` returned."""
        return job_digest(zip(self.labels, map(value_digest, values), strict=True))

    def is_ordinary(self, values: Iterable[Value], settings: Settings) -> bool:
        """Tell whether a job has single messages only, none too large to travel: it enters no module of others."""
        return self.batch is None and not any(is_large(value, settings) for value in values)

    def check_sizes(self, values: Iterable[Value], settings: Settings, *, lists: bool = True) -> None:
        """Raise PayloadTooLarge for a message that is too large to travel, or, among *lists*, for all of one list."""
        for value in values:
            messages = [value] if isinstance(value, Message) else value
            sizes = [message.ByteSize() for message in messages]
            for message, size in zip(messages, sizes, strict=True):
                check_size(f"{type_name(message)} of task {self.task}", size, settings.max_message_bytes)
            if lists and not isinstance(value, Message):
                what, limit = f"the list of task {self.task}", settings.max_stored_bytes
                check_size(what, sum(sizes), limit, STORED_BYTES)

    def blank(self) -> tuple[tuple[None, ...], dict[str, None]]:
        """Return arguments that fit in number only."""
        return (None,) * (len(self.given) - len(self.named)), dict.fromkeys(self.named)

    def bind(self, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> tuple[Value, ...]:
        """Return the messages for a call's arguments, in the order of `given`.

        An argument is a message, its JSON form as a dict, or the result of an earlier task.

        Raises:
            InvalidArguments: One is missing, too many, or of another type.
            UnknownMessageType, DecodeFailed, PayloadTooLarge: One arrived in a state that cannot be read.
        """
        values = args or ()
        if kwargs or len(values) != len(self.given) or self.named:
            values = self._by_position(values, kwargs or {})
        return tuple(
            self._value(name, key, value) for (name, key), value in zip(self._named(), values, strict=True)
        )

    def bind_item(self, index: int, value: Any) -> Message:
        """Return the message for an item of the batch; one of another type raises InvalidArguments."""
        assert self.batch is not None
        name = list(self.signature.parameters)[self.given.index(self.batch)]
        return self._message(f"{name}[{index}]", self.batch, value)

    def bind_others(self, values: Sequence[Any]) -> tuple[Message, ...]:
        """Return the messages that all items of a batch share, in the order of the other parameters.

        One that is missing, too many or of another type raises InvalidArguments, as does a task that takes no batch.
        """
        if self.batch is None:
            raise self._refusal("it takes no list[...]; submit its job with delay or apply_async")
        named = [(name, key) for name, key in self._named() if key != self.batch]
        if len(named) != len(values):
            shown = ", ".join(name for name, _ in named) or "nothing"
            raise self._refusal(
                f"submit_batch takes the items, then {shown}; got {len(values)} beside the items"
            )
        return tuple(
            self._message(name, key, value) for (name, key), value in zip(named, values, strict=True)
        )

    def as_given(self, values: Iterable[Any], named: Iterable[str]) -> Arguments:
        """Return a value for each parameter as arguments of a call, those that are *named* by name."""
        by_name = dict(zip(self.signature.parameters, values, strict=True))
        kwargs = {name: by_name.pop(name) for name in named}
        return tuple(by_name.values()), kwargs

    def join(self, items: Sequence[Any], others: Sequence[Message]) -> tuple[Any, ...]:
        """Return the arguments of a job by position: the batch, and what all its items share."""
        rest = iter(others)
        return tuple(items if key == self.batch else next(rest) for key in self.given)

    def _by_position(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """Return a call's arguments in the order of the parameters; raise InvalidArguments if they do not fit."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            # Python tells of the missing name first, `celery call` only on the worker.
            strange = kwargs.keys() - self.signature.parameters.keys()
            hints = [
                f"; {name!r} is none of them{did_you_mean(name, self.signature.parameters)}"
                for name in strange
            ]
            raise self._refusal(str(error) + "".join(sorted(hints))) from None
        return [bound.arguments[name] for name in self.signature.parameters]

    def _value(self, name: str, key: ValueKey, value: Any) -> Value:
        if key != self.batch:
            return self._message(name, key, value)
        if isinstance(value, Result):
            value = value.value
        if isinstance(value, BatchResult):
            value = [each for _, each in typing.cast("BatchResult[Message]", value).succeeded()]
        if isinstance(value, (str, bytes, dict, Message)) or not isinstance(value, Iterable):
            wanted = f"must be a list of {type_name(key.kind)}, not {value!r:.100}"
            raise self._refusal(f"argument {name!r} {wanted}")
        items: Iterable[Any] = value  # pyright: ignore[reportUnknownVariableType]  # of whatever it is
        return [self._message(f"{name}[{index}]", key, item) for index, item in enumerate(items)]

    def _message(self, name: str, key: ValueKey, value: Any) -> Message:
        if type(value) is not key.kind:
            value = self._read(name, key, value)
        fault = encoding_fault(value)
        if fault is not None:
            raise self._refusal(f"argument {name!r} of {type_name(value)}: {fault}")
        return typing.cast("Message", value)

    def _read(self, name: str, key: ValueKey, value: Any) -> Message:
        """Return the message that an argument stands for; raise InvalidArguments if there is none."""
        if isinstance(value, Undecodable):
            raise value.error
        if isinstance(value, Result):
            value = value.value
        if is_json_form(key.kind, value):
            value = from_json_object(key.kind, value)
        if type(value) is key.kind:
            return value
        actual = type_name(value) if isinstance(value, Message) else type(value).__name__
        wanted = f"must be a {type_name(key.kind)}, not a {actual}"
        fix = f"pass {key.kind.__name__}(...), or its JSON form as a dict"
        if actual == type_name(key.kind):
            wanted = f"is a {actual} of another descriptor pool"
            declared = f"{key.kind.__module__}.{key.kind.__qualname__}"
            fix = f"make it with the class that the task is declared with ({declared})"
        raise self._refusal(f"argument {name!r} {wanted}; {fix}")

    def _named(self) -> Iterator[tuple[str, ValueKey]]:
        return zip(self.signature.parameters, self.given, strict=True)

    def _refusal(self, problem: str) -> InvalidArguments:
        kinds = {name: key.kind.__name__ for name, key in self._named()}
        shown = (
            f"{name}: list[{kinds[name]}]" if key == self.batch else f"{name}: {kinds[name]}"
            for name, key in self._named()
        )
        return InvalidArguments(f"{self.task}({', '.join(shown)})", problem)


def read_function(task: str, function: Callable[..., Any]) -> Declaration:
    """Read the declared function of a task; raises InvalidDeclaration, as for a body that is not empty."""
    with _explained(task):
        if not is_empty(function):
            raise SignatureFault(
                "its body would never run, since the graph does the work; leave it empty (raise NotImplementedError)"
            )
        signature, hints = inspect.signature(function), read_hints(function)
        for name, parameter in signature.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise SignatureFault(f"parameter {name!r} is variadic; name each message")
            if parameter.default is not parameter.empty:
                raise SignatureFault(f"parameter {name!r} has a default; a job is always given whole")
            if is_context(hints.get(name)):
                raise SignatureFault(f"parameter {name!r} is a StepContext; only steps get one")
        return _declaration(task, signature, hints)


def read_generic(task: str, arguments: tuple[Any, ...]) -> Declaration:
    """Read the types of ``class X(GraphTask[[Order], Shipment])``; raises InvalidDeclaration."""
    with _explained(task):
        if len(arguments) != 2 or not isinstance(arguments[0], (list, tuple)):
            raise SignatureFault("write GraphTask[[InputType], OutputType]")
        kinds = {f"input_{n}": kind for n, kind in enumerate(typing.cast("Sequence[Any]", arguments[0]), 1)}
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in kinds]
        return _declaration(task, inspect.Signature(parameters), {**kinds, "return": arguments[1]})


@contextlib.contextmanager
def _explained(task: str) -> Generator[None]:
    try:
        yield
    except SignatureFault as fault:
        raise InvalidDeclaration(task, str(fault)) from fault


def declare(cls: type[AnyTask], base: type[AnyTask]) -> None:
    """Check a new subclass of *base*, `GraphTask`, and write what it declares onto it.

    One that cannot work raises InvalidDeclaration or InvalidArguments.
    """
    own = cls.__dict__
    name, decorated = str(own.get("name") or cls.__name__), bool(own.get("_decorated"))
    named: Callable[..., Any] | None = own.get("execution_id")
    if callable(named) and hasattr(named, "__get__") and not isinstance(named, type):
        # A function in a class body is a method; this one takes the messages alone.
        cls.execution_id = staticmethod(named)
    if "graph" not in own:
        if decorated:
            raise InvalidDeclaration(name, "it names no graph, so its body would run; pass graph=")
        return
    if not isinstance(cls.graph, Graph):
        raise InvalidDeclaration(name, f"graph= must be a docket_celery.Graph, not {cls.graph!r}")
    cls.abstract = False
    check_options(name, own, dir(base) if decorated else None)
    cls.declaration = _read_class(cls, base, name)
    if cls.execution_id is not None:
        check_name_function(name, cls.execution_id, cls.declaration.given)
    cls.declared_max_retries = cls.max_retries
    cls.routing = take_routing(cls)
    cls.throws = with_causes(cls.throws)
    check_serializer(cls.serializer)
    read_batch_options(cls)
    for key in (*cls.declaration.given, cls.declaration.target):
        known_types.allow(key.kind)


def _read_class(cls: type[AnyTask], base: type[AnyTask], name: str) -> Declaration:
    """Read the declared function or the generic arguments, and let *base*'s `run` take the function's place."""
    declared = cls.__dict__.get("run")
    if declared is None:
        for generic in cls.__dict__.get("__orig_bases__", ()):
            arguments = getattr(generic, "__args__", ())
            if getattr(generic, "__origin__", None) is base and arguments:
                return read_generic(name, arguments)
        raise InvalidDeclaration(name, "write class X(GraphTask[[InputType], OutputType]) or declare run()")
    if not isinstance(declared, staticmethod):
        if cls.__dict__.get("_decorated"):
            raise InvalidDeclaration(name, "bind=True hands the task to a body that never runs; drop it")
        raise InvalidDeclaration(name, "declare the types as GraphTask[[...], ...] and drop its run method")
    del cls.run
    cls.declared = staticmethod(declared.__func__)
    return read_function(name, declared.__func__)


_apps: weakref.WeakKeyDictionary[Graph, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
"""The apps on which tasks of a graph were declared."""
_first_tasks: weakref.WeakKeyDictionary[Any, dict[str, tuple[weakref.ref[Graph], str, str]]] = (
    weakref.WeakKeyDictionary()
)
"""Of each app, by a graph's name: the graph, its first task, and where that is declared."""


def note_graph(app: Any, task: str, graph: Graph, where: str, *, is_declared: bool = False) -> None:
    """Note that *task* of *app* runs *graph*: runs and checkpoints are kept by the graph's name.

    A task that is declared again, as by a reload of its module, brings its graph along. One that is not declared
    on this app (*is_declared*) is taken by it from where it is.

    Raises:
        InvalidDeclaration: Another graph of that name has tasks in this app.
    """
    app = getattr(app, "_get_current_object", lambda: app)()
    apps = _apps.setdefault(graph, weakref.WeakSet())
    if is_declared:
        apps.add(app)
    elif apps and app not in apps:
        # Celery gives each app's tasks to all other apps of the process: this one is another app's own.
        return
    reference, first, place = _first_tasks.setdefault(app, {}).setdefault(
        graph.name, (weakref.ref(graph), task, where)
    )
    known = reference()
    if known is None or (first == task and known is not graph):
        _first_tasks[app][graph.name] = weakref.ref(graph), task, where
    elif known is not graph:
        raise InvalidDeclaration(
            task,
            f"its graph ({where}) is another Graph object named {graph.name!r} than that of task {first} ({place}); "
            "runs are stored by the graph's name and would be one another's: share one Graph, or rename one of them",
        )


def is_empty(function: Callable[..., Any]) -> bool:
    """Tell whether a body is nothing but a docstring, ``...``, ``pass`` or ``raise NotImplementedError``."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return isinstance(code, types.CodeType) and _body(code) in _empty_bodies()


@functools.cache
def _empty_bodies() -> frozenset[tuple[Any, ...]]:
    """Return what the running interpreter makes of bodies that do nothing."""
    codes: list[types.CodeType] = []
    for text in (*_EMPTY_BODIES, *(f"'text'; {body}" for body in _EMPTY_BODIES)):
        module = compile(f"def empty(): {text}", "empty", "exec", dont_inherit=True)
        codes += [each for each in module.co_consts if isinstance(each, types.CodeType)]
    return frozenset(_body(code) for code in codes)


def _body(code: types.CodeType) -> tuple[Any, ...]:
    """Return what *code* does, whatever its parameters and texts are."""
    texts = tuple("text" if isinstance(each, str) else each for each in code.co_consts)
    kind = code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
    return code.co_code, code.co_names, texts, kind


def _declaration(task: str, signature: inspect.Signature, hints: Mapping[str, Any]) -> Declaration:
    """Return the declaration of a signature whose types are *hints*, that of the result as ``return``."""
    given: list[ValueKey] = []
    batches: list[ValueKey] = []
    for name in signature.parameters:
        what = f"parameter {name!r}"
        hint = _hint(hints, name, what)
        many = read_many(hint)
        given.append(read_annotation(hint if many is None else many[0], what))
        if many is not None:
            batches.append(given[-1])
    if len(batches) > 1:
        raise SignatureFault(f"it takes {len(batches)} lists; a batch has one list of items")
    if not given:
        raise SignatureFault("it takes no message; a job is at least one")
    if len(set(given)) != len(given):
        raise SignatureFault('it takes two messages of one type; tell them apart with Named("...")')
    target, form = _target(_hint(hints, "return", "its result"))
    batch = batches[0] if batches else None
    return Declaration(
        task=task,
        signature=signature,
        given=tuple(given),
        named=tuple(name for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY),
        labels=tuple(key.label("list" if key == batch else type_name(key.kind)) for key in given),
        target=target,
        batch=batch,
        form=form,
    )


def _target(result: Any) -> tuple[ValueKey, Literal["one", "list", "BatchResult"]]:
    kind, _ = resolve(result)
    if typing.get_origin(kind) is BatchResult:
        return read_annotation(typing.get_args(kind)[0], "its result"), "BatchResult"
    many = read_many(result)
    if many is None:
        return read_annotation(result, "its result"), "one"
    if many[1] != "list":
        raise SignatureFault("its result is an Iterable[...]; a batch returns list[...]")
    return read_annotation(many[0], "its result"), "list"


def _hint(hints: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in hints:
        raise SignatureFault(f"{what} has no annotation; annotate it with its message type")
    return hints[name]
