"""Where steps are registered, checked and planned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, Unpack, overload

from google.protobuf.message import Message

from docket_celery.errors import GraphError, InvalidArguments
from docket_celery.plan.annotation import SignatureFault, ValueKey, read_many
from docket_celery.plan.messages import is_message_type
from docket_celery.plan.options import StepOptionFields, StepOptions, is_name, nearest_option
from docket_celery.plan.override import (
    Computes,
    Substitute,
    find_step,
    overriding,
    overridings,
    read_overrides,
)
from docket_celery.plan.plan import Plan
from docket_celery.plan.stages import compile_plan, find_faults
from docket_celery.plan.step import Registration, Step, default_name, locate
from docket_celery.plan.wiring import Wiring, read_wiring

C = TypeVar("C", bound=Computes)
Makes = Callable[[], C] | Callable[[], AbstractContextManager[C]]
"""Returns the instance, or a context manager to enter for it."""
F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=Message)


class Registry:
    """The steps of a graph and the plans made of them.

    Args:
        name: Names the graph in the store, in logs and in every identity; 1 to 200 printable characters.
        defaults: Options of all steps that do not set their own.
    """

    def __init__(self, name: str, defaults: StepOptions | None = None) -> None:
        if not is_name(name):
            raise InvalidArguments("Graph", f"name must be 1 to 200 printable characters, got {name!r}")
        self.name = name
        self.defaults = StepOptions() if defaults is None else defaults
        if not isinstance(self.defaults, StepOptions):
            raise InvalidArguments("Graph", f"defaults= is a StepOptions, not {defaults!r}")
        if named := [each for each in ("name", "renamed_from") if getattr(self.defaults, each)]:
            problem = f"defaults= cannot have {', '.join(named)}: each step has a name of its own"
            raise InvalidArguments("Graph", problem)
        self.registrations: list[Registration] = []
        self._read_last: tuple[int, Wiring] | None = None
        self._frozen = False

    def __repr__(self) -> str:
        return f"<Graph {self.name!r}: {len(self.registrations)} steps>"

    # --- registering -------------------------------------------------------------------------------------------

    @overload
    def step(self, function: F, /) -> F: ...

    @overload
    def step(
        self, preset: StepOptions | None = None, /, **options: Unpack[StepOptionFields]
    ) -> Callable[[F], F]: ...

    def step(self, preset: Any = None, /, **options: Any) -> Any:
        """Decorate a function as a step and return it unchanged.

        Use as ``@graph.step``, ``@graph.step(persist=..., retry=...)`` or ``@graph.step(PRESET, timeout=5)``.

        Args:
            preset: `StepOptions` to start from.
            **options: The fields of `StepOptions`.

        Raises:
            TypeError: An option does not exist.
            GraphError: The graph is frozen because it has run, or the step needs ``name=``.
        """
        return self._decorate(preset, options, aggregates=False)

    @overload
    def aggregate(self, function: F, /) -> F: ...

    @overload
    def aggregate(
        self, preset: StepOptions | None = None, /, **options: Unpack[StepOptionFields]
    ) -> Callable[[F], F]: ...

    def aggregate(self, preset: Any = None, /, **options: Any) -> Any:
        """Decorate a function as a step that sees all items of a fan-out at once; used like `step`.

        It takes them as ``list[T]``, or as ``Iterable[T]`` where it looks at one after the other. The items are those
        of a batch, or what a step returned as ``list[T]``.

        Arguments and errors as for `step`.
        """
        return self._decorate(preset, options, aggregates=True)

    def _decorate(self, preset: Any, options: dict[str, Any], *, aggregates: bool) -> Any:
        chosen = self._options(None if callable(preset) else preset, options)

        def decorate(function: F) -> F:
            self._add(function, chosen, aggregates=aggregates)
            return function

        return decorate(preset) if callable(preset) else decorate

    @overload
    def register(
        self,
        target: type[C],
        preset: StepOptions | None = None,
        /,
        *,
        factory: Makes[C],
        **options: Unpack[StepOptionFields],
    ) -> None: ...

    @overload
    def register(
        self, target: object, preset: StepOptions | None = None, /, **options: Unpack[StepOptionFields]
    ) -> None: ...

    def register(
        self,
        target: object,
        preset: StepOptions | None = None,
        /,
        *,
        factory: Callable[[], object] | None = None,
        **options: Unpack[StepOptionFields],
    ) -> None:
        """Add a function, a bound method or an object with ``compute`` as a step.

        Args:
            target: What to call, or a class with ``compute`` if there is a factory.
            preset: `StepOptions` to start from.
            factory: Returns the instance to call, or a context manager that is entered for it. It is called once
                per process, at the step's first call and on its thread; an error of it is the step's, and the next
                attempt calls it again. When the process ends the context manager is left, or ``close()`` called
                where the instance has one.
            **options: The fields of `StepOptions`.

        Raises:
            TypeError: An option does not exist.
            GraphError: The graph is frozen because it has run, or the step needs ``name=``.
        """
        self._add(target, self._options(preset, {**options}), factory)

    def register_aggregate(
        self, target: object, preset: StepOptions | None = None, /, **options: Unpack[StepOptionFields]
    ) -> None:
        """Add an aggregate, as `aggregate` does, that is a function, a bound method or an object with ``compute``.

        Arguments and errors as for `register`.
        """
        self._add(target, self._options(preset, {**options}), aggregates=True)

    def _options(self, preset: StepOptions | None, options: dict[str, Any]) -> StepOptions:
        if preset is not None and not isinstance(preset, StepOptions):
            raise TypeError(f"a step is decorated with options or a StepOptions preset, not {preset!r}")
        try:
            return (self.defaults if preset is None else preset.over(self.defaults)).override(**options)
        except TypeError as error:
            hints = [nearest_option(name) for name in options if name not in StepOptions.__dataclass_fields__]
            near = ", ".join(hint for hint in hints if hint)
            raise TypeError(f"{error}; did you mean {near}?" if near else str(error)) from None

    def _add(
        self,
        target: Any,
        options: StepOptions,
        make: Callable[[], Any] | None = None,
        *,
        aggregates: bool = False,
    ) -> None:
        name = options.name if options.name is not None else default_name(target)
        where = locate(target)
        fault = None
        if not name:
            fault = f"DC110 no name: lambdas and partials have none of their own; give this one name=... ({where})"
        elif not is_name(name):
            fault = f"DC110 bad name: name= is 1 to 200 printable characters, got {name!r} ({where})"
        elif self._frozen:
            late = f"step {name!r} ({where}) comes after the first run"
            fault = f"DC116 frozen: {late}; register all steps before running"
        if fault is not None:
            raise GraphError(self.name, [fault])
        self.registrations.append(
            Registration(
                target=target,
                options=options,
                name=str(name),
                order=len(self.registrations),
                where=where,
                make=make,
                aggregates=aggregates,
            )
        )

    # --- checking and planning ---------------------------------------------------------------------------------

    def validate(self, *given: type[Message | list[Any]]) -> None:
        """Check all signatures and the wiring.

        Args:
            *given: The types callers hand in, a batch as ``list[T]``. Without any, each type that no step returns
                counts as handed in.

        Raises:
            GraphError: With all faults in one report, each with its code, its place and the fix.
        """
        keys, batch = given_keys(given, "validate")
        wiring = self._read()
        wiring.check(keys, complete=bool(given))
        faults = find_faults(wiring, keys, batch)
        if faults:
            raise GraphError(self.name, faults)

    def plan(self, target: type[Message | list[M]], /, *given: type[Message | list[Any]]) -> Plan:
        """Return the minimal ordered steps from *given* to *target*.

        A batch is given as ``list[T]``; what is made for each item is asked for as ``list[T]``.

        Args:
            target: The message type to make.
            *given: The types handed in. Without any, each type that no step returns counts as handed in.

        Raises:
            GraphError: The graph has faults, or a needed value has no producer.
        """
        (wanted,), collected = given_keys([target], "plan")
        keys, batch = given_keys(given, "plan")
        if not given:
            wiring = self._read()
            keys = tuple(dict.fromkeys(key for _, key in wiring.missing(wiring.steps, ())))
            batch = next((key for key in keys if key in wiring.gathered()), None)
        return self.compiled(wanted, keys, batch, collects=collected is not None)

    def compiled(
        self,
        target: ValueKey,
        given: tuple[ValueKey, ...],
        batch: ValueKey | None = None,
        *,
        collects: bool = False,
    ) -> Plan:
        """Return the plan for these values, compiled once.

        *batch* is the one of *given* that comes as a list, item by item; *collects*: the target is wanted for each.
        """
        wiring = self.wiring()
        asked = target, given, batch, collects
        found = wiring.plans.get(asked)
        if found is None:
            found = wiring.plans[asked] = compile_plan(wiring, *asked)
        return found

    def unplanned(self, plans: Iterable[Plan]) -> list[Step]:
        """Return the steps that are in none of *plans*.

        Raises:
            GraphError: The graph has faults.
        """
        planned = {name for plan in plans for name in plan}
        return [step for step in self._read().steps if step.name not in planned]

    def missing(self, target: ValueKey, given: Collection[ValueKey]) -> list[ValueKey]:
        """Return what the way to *target* needs besides *given* and no step returns."""
        wiring = self._read()
        found = [key for _, key in wiring.missing(wiring.needed(target, given).values(), given)]
        made = target in wiring.producers or target in given
        return list(dict.fromkeys(found if made else [target]))

    # --- replacing ---------------------------------------------------------------------------------------------

    @contextmanager
    def override(self, steps: Mapping[Any, Substitute]) -> Generator[None]:
        """Replace steps in a ``with`` block, for tests; the graph itself stays as it is.

        Holds for what this thread or asyncio task executes in the block, however deep, and for no other. Blocks
        inside each other add up.

        Args:
            steps: What stands in, by the step's name, its output's message type, or what was registered. A message
                is the output at once: no inputs, no options. Anything to call is wired by its own signature and keeps
                the step's options; without a single annotation (a lambda, a mock) it is called like the step itself.

        Raises:
            GraphError: With all faults: a key that is no step, something that cannot stand in for it.
        """
        with overriding(self, read_overrides(self._read(), steps)):
            yield

    def find_step(self, key: Any) -> Step:
        """Return the step that *key* means: a name, an output's message type, or what was registered.

        Raises:
            InvalidArguments: There is none; the text lists what there is.
        """
        try:
            found = find_step(self._read(), key)
        except SignatureFault as fault:
            raise InvalidArguments(f"graph {self.name!r}", f"{key!r}: {fault}") from None
        replaced = overridings().get(self)
        return found if replaced is None else replaced.steps.get(found.name, found)

    def wiring(self) -> Wiring:
        """Return the steps as they are wired where this is called, with what stands in for them there."""
        wiring, replaced = self._read(), overridings().get(self)
        return wiring if replaced is None else replaced.rewired(wiring)

    def _read(self) -> Wiring:
        # No lock: where two threads come first at once, both read the same.
        count, found = len(self.registrations), self._read_last
        if found is None or found[0] != count:
            found = self._read_last = count, read_wiring(self.name, self.registrations[:count])
        return found[1]

    def freeze(self) -> None:
        """Refuse further steps: a run of these has begun."""
        self._frozen = True


def given_keys(kinds: Sequence[object], where: str) -> tuple[tuple[ValueKey, ...], ValueKey | None]:
    """Return the values that *kinds* stand for, and which of them is a batch: the one written ``list[T]``.

    InvalidArguments: one is no message type, or two are lists.
    """
    read = [(value_key(item, where), many) for item, many in (read_many(k) or (k, "") for k in kinds)]
    lists = [key for key, many in read if many]
    if len(lists) > 1:
        raise InvalidArguments(where, f"{', '.join(map(str, lists))} are all lists; a run has one batch")
    return tuple(key for key, _ in read), lists[0] if lists else None


def value_key(kind: object, where: str) -> ValueKey:
    """Return what stands for values of the message type *kind*; InvalidArguments: it is none."""
    if not is_message_type(kind):
        shown = kind.__name__ if isinstance(kind, type) else repr(kind)
        raise InvalidArguments(where, f"expected a Protocol Buffers message type, got {shown}")
    return ValueKey(kind)
