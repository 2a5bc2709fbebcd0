"""Steps that others stand in for, within a block of a test: what `Graph.override` does.

The graph itself stays as it is: a plan is compiled over a copy of its wiring in which the steps are replaced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

from google.protobuf.message import Message

from docket_celery.errors import GraphError
from docket_celery.plan.annotation import SignatureFault, read_annotation
from docket_celery.plan.messages import is_message_type, type_name
from docket_celery.plan.options import StepOptions
from docket_celery.plan.plan import Plan
from docket_celery.plan.stages import Asked, compile_asked
from docket_celery.plan.step import Mark, Registration, Step, locate, read_step
from docket_celery.plan.wiring import Wiring


class Computes(Protocol):
    """An object whose ``compute`` is the step."""

    @property
    def compute(self) -> Callable[..., Any]: ...


Substitute = Message | Callable[..., Any] | Computes
"""What may stand in for a step: a message (its output, whatever the inputs), or something to call instead."""


class Overriding:
    """The replaced steps of one graph, and the plans over them.

    Args:
        steps: By name; those of the graph that are not named stay.
    """

    def __init__(self, steps: Mapping[str, Step]) -> None:
        self.steps = dict(steps)
        self._source: Wiring | None = None
        self._wiring: Wiring | None = None
        self._plans: dict[Asked, Plan] = {}

    def compiled(self, wiring: Wiring, asked: Asked) -> Plan:
        """Return the plan over *wiring* with the steps replaced, compiled once.

        Raises:
            GraphError: The graph has faults, or a needed value has no producer.
        """
        if wiring is not self._source or self._wiring is None:
            self._source, self._wiring, self._plans = wiring, self._replace(wiring), {}
        found = self._plans.get(asked)
        if found is None:
            found = self._plans[asked] = compile_asked(self._wiring, asked)
        return found

    def _replace(self, wiring: Wiring) -> Wiring:
        steps = tuple(self.steps.get(step.name, step) for step in wiring.steps)
        producers = {step.output: step for step in reversed(steps)}
        return replace(wiring, steps=steps, producers=producers)


def read_overrides(
    wiring: Wiring, registrations: Iterable[Registration], given: Mapping[Any, Substitute]
) -> dict[str, Step]:
    """Return the steps that stand in, by name.

    Args:
        wiring: The graph's own.
        registrations: What was registered; functions and objects are found by them.
        given: By a step's name, its output's type, or what was registered.

    Raises:
        GraphError: With all faults: a key that is no step, something that cannot stand in for it.
    """
    faults = list(wiring.faults)
    targets = [(registration.target, registration.name) for registration in registrations]
    found: dict[str, Step] = {}
    for key, substitute in given.items() if not faults else ():
        try:
            original = find_step(wiring, targets, key)
            if original.name in found:
                raise SignatureFault(f"it is named twice, by {key!r} too; keep one")
            found[original.name] = stand_in(original, substitute)
        except SignatureFault as fault:
            faults.append(f"DC118 override: {_shown(key)}: {fault}")
    if faults:
        raise GraphError(wiring.graph, faults)
    return found


def find_step(wiring: Wiring, targets: Iterable[tuple[Any, str]], key: Any) -> Step:
    """Return the step that *key* means.

    Raises:
        SignatureFault: There is none; the text lists what there is.
    """
    steps = {step.name: step for step in wiring.steps}
    if isinstance(key, str):
        if key in steps:
            return steps[key]
        raise SignatureFault(f"the graph has no such step; it has {', '.join(steps) or 'none'}")
    for target, name in targets:
        if (target is key or (inspect.ismethod(key) and target == key)) and name in steps:
            return steps[name]
    if not is_message_type(key) and not hasattr(key, "__metadata__"):
        raise SignatureFault("no such step; name it by its name, its output's type or what was registered")
    wanted = read_annotation(key, "the key")
    if wanted in wiring.producers:
        return wiring.producers[wanted]
    made = ", ".join(str(output) for output in wiring.producers)
    raise SignatureFault(f"no step returns {wanted}; the steps return {made or 'nothing'}")


def stand_in(original: Step, substitute: object) -> Step:
    """Return a step that takes the place of *original*.

    Raises:
        SignatureFault: *substitute* is of another type, or cannot be called as a step.
    """
    if isinstance(substitute, Message):
        return _constant(original, substitute)
    options = original.options
    if _is_bare(substitute):
        return _called_alike(original, cast("Callable[..., Any]", substitute))
    where = locate(substitute)
    step = _read(original, substitute, options, where)
    if step.result_name != original.result_name:
        raise SignatureFault(
            f"it returns {_result(step)}, but the step returns {_result(original)} ({where})"
        )
    if options.key is not None and step.inputs != original.inputs:
        # key= speaks of the inputs of the step that is replaced.
        step = _read(original, substitute, options.override(key=None), where)
    return replace(step, output=original.output, mark=original.mark)


def _read(original: Step, substitute: object, options: StepOptions, where: str) -> Step:
    return read_step(
        Registration(
            target=substitute,
            options=options,
            name=original.name,
            order=original.order,
            where=where,
            aggregates=original.aggregates,
        )
    )


def _constant(original: Step, value: Message) -> Step:
    """Return a step without inputs and options; each run gets a copy, as the value is the test's own."""
    if original.wrong_result(value) is not None:
        raise SignatureFault(f"it is a {type_name(value)}, but the step returns {_result(original)}")

    def give() -> Message:
        copy = type(value)()
        copy.CopyFrom(value)
        return copy

    return replace(
        original,
        call=give,
        inputs=(),
        gathered=(),
        aggregates=False,
        positional=(),
        keywords=(),
        is_async=False,
        options=StepOptions(name=original.name, renamed_from=original.options.renamed_from),
        timeout_s=None,
        ttl_s=None,
        max_attempts=1,
        retriable=None,
        mark=Mark(),
        make=None,
    )


def _called_alike(original: Step, call: Callable[..., Any]) -> Step:
    """Return the step with another function that takes the same arguments: a lambda, a mock."""
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        arguments = [None] * len(original.positional)
        try:
            signature.bind(*arguments, **dict.fromkeys(name for name, _ in original.keywords))
        except TypeError as error:
            raise SignatureFault(
                f"without annotations it is called like the step itself, ({_arguments(original)}), and takes "
                f"{signature}: {error}; annotate its parameters, or take the same"
            ) from None
    is_async = inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)
    return replace(original, call=call, is_async=is_async, make=None)


def _result(step: Step) -> str:
    return f"list[{step.output}]" if step.splits else str(step.output)


def _arguments(step: Step) -> str:
    def shown(index: int) -> str:
        return "StepContext" if index < 0 else str(step.inputs[index])

    named = [f"{name}={shown(index)}" for name, index in step.keywords]
    return ", ".join([*map(shown, step.positional), *named])


def _is_bare(target: object) -> bool:
    """Tell whether *target* is something to call without a single annotation."""
    if isinstance(target, type) or not callable(target) or hasattr(type(target), "compute"):
        return False
    plain: Any = target
    while isinstance(plain, functools.partial):
        plain = plain.func
    if not inspect.isroutine(plain):
        plain = type(plain).__call__
    return not getattr(inspect.unwrap(plain), "__annotations__", None)


def _shown(key: object) -> str:
    if isinstance(key, str):
        return f"step {key!r}"
    return getattr(key, "__name__", None) or repr(key)
