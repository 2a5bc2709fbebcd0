"""One entry of a GLOBAL step: which step and inputs it belongs to, and how it is dropped."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import Message

from docket_celery.engine.checkpointing import shared_key
from docket_celery.errors import InvalidArguments
from docket_celery.plan.options import Scope
from docket_celery.plan.registry import Registry
from docket_celery.plan.step import Step
from docket_celery.store.contract import Store


def find_shared_step(registry: Registry, wanted: object, where: str) -> Step:
    """Return the GLOBAL step that *wanted* names.

    Args:
        registry: The graph.
        wanted: Its name, its output's message type, or what was registered.
        where: What is called, for the error.

    Raises:
        InvalidArguments: There is no such step, or it keeps nothing that is shared.
        GraphError: The graph has faults.
    """
    try:
        step = registry.find_step(wanted)
    except InvalidArguments:
        registry.validate()  # it may be missing for a fault of its own
        raise
    if step.persist is Scope.WORKFLOW:
        problem = "keeps its outputs for each run; submit the job under a new execution_id to have them computed anew"
        raise InvalidArguments(where, f"step {step.name!r} {problem}")
    if step.persist is None:
        raise InvalidArguments(where, f"step {step.name!r} keeps nothing; persist=Scope.GLOBAL would")
    return step


def check_inputs(step: Step, inputs: Sequence[object], where: str) -> list[Message]:
    """Return *inputs* if they are those of *step*: one for each value that it takes, in the order of its parameters.

    Raises:
        InvalidArguments: They are not.
    """
    wanted = list(dict.fromkeys(step.inputs))
    given = [value for value in inputs if isinstance(value, Message)]
    if [type(value) for value in inputs] != [key.kind for key in wanted]:
        shown = ", ".join(type(value).__name__ for value in inputs) or "nothing"
        names = ", ".join(str(key) for key in wanted) or "nothing"
        raise InvalidArguments(where, f"step {step.name!r} takes {names}, in this order; got {shown}")
    return given


def forget(store: Store, graph: str, step: Step, inputs: Sequence[Message]) -> bool:
    """Drop the entry for *inputs* and tell whether there was one that counted."""
    by_key = dict(zip(dict.fromkeys(step.inputs), inputs, strict=True))
    return store.forget(shared_key(graph, step, [by_key[key] for key in step.inputs], store))
