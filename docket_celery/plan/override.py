"""Steps that others stand in for, within a block of a test: what `Graph.override` does.

The graph itself stays as it is: a plan is compiled over a copy of its wiring in which the steps are replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol, cast

from google.protobuf.message import Message

from docket_celery.errors import GraphError
from docket_celery.plan.annotation import SignatureFault, read_annotation
from docket_celery.plan.messages import copy_message, is_message_type, type_name
from docket_celery.plan.options import StepOptions
from docket_celery.plan.signature import unwrap
from docket_celery.plan.step import Mark, Registration, Step, locate, read_step
from docket_celery.plan.wiring import Wiring


class Computes(Protocol):
    """An object whose ``compute`` is the step."""

    @property
    def compute(self) -> Callable[..., Any]:
        """The step's code."""
        ...


Substitute = Message | Callable[..., Any] | Computes
"""What may stand in for a step: a message (its output, whatever the inputs), or something to call instead."""


class Overriding:
    """The replaced *steps* of one graph, by name, and its wiring with them."""

    def __init__(self, steps: Mapping[str, Step]) -> None:
        self.steps = dict(steps)
        self._made: tuple[Wiring, Wiring] | None = None

    def rewired(self, wiring: Wiring) -> Wiring:
        """Return *wiring* with the steps replaced; the same one each time, as plans are kept in it."""
        if self._made is None or self._made[0] is not wiring:
            steps = tuple(self.steps.get(step.name, step) for step in wiring.steps)
            producers = {step.output: step for step in reversed(steps)}
            self._made = wiring, replace(wiring, steps=steps, producers=producers, plans={})
        return self._made[1]


_overriding: ContextVar[Mapping[object, Overriding]] = ContextVar(
    "docket_celery_overriding", default=MappingProxyType({})
)
overridings = _overriding.get
"""Return what stands in for steps where this is called, by graph."""


@contextmanager
def overriding(graph: object, steps: Mapping[str, Step]) -> Generator[None]:
    """Put *steps* in the place of those of *graph* for what this thread or asyncio task does in the block."""
    outer = overridings().get(graph)
    inner = Overriding({**(outer.steps if outer else {}), **steps})
    token = _overriding.set({**_overriding.get(), graph: inner})
    try:
        yield
    finally:
        _overriding.reset(token)


def read_overrides(wiring: Wiring, given: Mapping[Any, Substitute]) -> dict[str, Step]:
    """Return the steps that stand in, by name; *given* has them by name, output type or what was registered.

    Raises:
        GraphError: With all faults: a key that is no step, something that cannot stand in for it.
    """
    faults = list(wiring.faults)
    found: dict[str, Step] = {}
    for key, substitute in given.items() if not faults else ():
        try:
            original = find_step(wiring, key)
            if original.name in found:
                raise SignatureFault(f"it is named twice, by {key!r} too; keep one")
            found[original.name] = _stand_in(original, substitute)
        except SignatureFault as fault:
            shown = f"step {key!r}" if isinstance(key, str) else getattr(key, "__name__", None) or repr(key)
            faults.append(f"DC118 override: {shown}: {fault}")
    if faults:
        raise GraphError(wiring.graph, faults)
    return found


def find_step(wiring: Wiring, key: Any) -> Step:
    """Return the step that *key* means, or raise the SignatureFault that lists what there is."""
    if isinstance(key, str):
        names = {step.name: step for step in wiring.steps}
        if key in names:
            return names[key]
        raise SignatureFault(f"the graph has no such step; it has {', '.join(names) or 'none'}")
    for step in wiring.steps:
        if step.target is key or (inspect.ismethod(key) and step.target == key):
            return step
    if not is_message_type(key) and not hasattr(key, "__metadata__"):
        raise SignatureFault("no such step; name it by its name, its output's type or what was registered")
    wanted = read_annotation(key, "the key")
    if wanted in wiring.producers:
        return wiring.producers[wanted]
    made = ", ".join(str(output) for output in wiring.producers)
    raise SignatureFault(f"no step returns {wanted}; the steps return {made or 'nothing'}")


def _stand_in(original: Step, substitute: object) -> Step:
    """Return a step that takes the place of *original*, or raise the SignatureFault that says why there is none."""
    if isinstance(substitute, Message):
        return _constant(original, substitute)
    if _is_bare(substitute):
        return _called_alike(original, cast("Callable[..., Any]", substitute))
    where = locate(substitute)
    step = read_step(
        Registration(
            target=substitute,
            options=original.options,
            name=original.name,
            order=original.order,
            where=where,
            mark=original.mark,
            aggregates=original.aggregates,
        )
    )
    if step.result_name != original.result_name:
        raise SignatureFault(
            f"it returns {_result(step)}, but the step returns {_result(original)} ({where})"
        )
    if step.options.key is not None and step.inputs != original.inputs:
        # key= is about the inputs of the step that is replaced.
        step = replace(step, options=replace(step.options, key=None))
    return replace(step, output=original.output)


def _constant(original: Step, value: Message) -> Step:
    """Return a step without inputs and options; each run gets a copy, as the value is the test's own."""
    if original.splits or type(value) is not original.output.kind:
        raise SignatureFault(f"it is a {type_name(value)}, but the step returns {_result(original)}")
    nothing: dict[str, Any] = dict.fromkeys(("inputs", "gathered", "positional", "keywords"), ())
    return replace(
        original,
        **nothing,
        call=lambda: copy_message(value),
        aggregates=False,
        options=StepOptions(name=original.name, renamed_from=original.options.renamed_from),
        mark=Mark(),
        make=None,
    )


def _called_alike(original: Step, call: Callable[..., Any]) -> Step:
    """Return the step with another function that takes the same arguments: a lambda, a mock."""
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        return replace(original, call=call, make=None)
    try:
        signature.bind(*original.positional, **dict(original.keywords))
    except TypeError as error:
        raise SignatureFault(
            f"without annotations it is called like the step itself, ({_arguments(original)}), and takes "
            f"{signature}: {error}; annotate its parameters, or take the same"
        ) from None
    return replace(original, call=call, make=None)


def _result(step: Step) -> str:
    return f"list[{step.output}]" if step.splits else str(step.output)


def _arguments(step: Step) -> str:
    shown = [str(key) for key in (*step.inputs, "StepContext")]  # the context is number -1
    named = [f"{name}={shown[index]}" for name, index in step.keywords]
    return ", ".join([*(shown[index] for index in step.positional), *named])


def _is_bare(target: object) -> bool:
    """Tell whether *target* is something to call without a single annotation."""
    if isinstance(target, type) or not callable(target) or hasattr(type(target), "compute"):
        return False
    return not getattr(unwrap(target), "__annotations__", None)
