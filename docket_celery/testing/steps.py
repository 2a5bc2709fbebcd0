"""One step at a time: a context to call it with, or the step with its whole policy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import Message

from docket_celery.engine.process.inline import InlineCancellation, InlineRuntime
from docket_celery.engine.process.state import process
from docket_celery.engine.run_context import Submission
from docket_celery.engine.waiting import read_value
from docket_celery.errors import InvalidArguments
from docket_celery.graph import Graph
from docket_celery.plan.context import Cancellation, StepContext
from docket_celery.plan.options import Seconds, to_seconds
from docket_celery.store.contract import Store
from docket_celery.store.identity import check_execution_id, idempotency_key
from docket_celery.testing.clocks import FakeClock
from docket_celery.testing.modes import overriding_store


def step_context(
    *,
    graph: str = "test",
    execution_id: str = "test",
    step: str = "test",
    attempt: int = 1,
    delivery: int = 1,
    item: str = "",
    values: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
    timeout: Seconds | None = None,
    cancelled: BaseException | None = None,
    clock: FakeClock | None = None,
) -> StepContext:
    """Return a context to call a step's function with; whatever is left out has a plain value.

    Args:
        graph: Name of the graph.
        execution_id: Name of the run.
        step: Name of the step.
        attempt: Which call this is, from 1.
        delivery: Which pick-up of the run this is, from 1.
        item: Path of the item in a batch, else ''.
        values: The caller's ``context=``.
        idempotency_key: Default: the one that the step has in that run.
        timeout: Seconds (or timedelta) until ``deadline``.
        cancelled: Why the run has stopped already; ``ctx.cancelled.cancel(error)`` stops it later.
        clock: What ``sleep()`` and ``deadline`` go by; default: the machine's time.
    """
    flag = Cancellation() if clock is None else InlineCancellation(InlineRuntime(clock))
    if cancelled is not None:
        flag.cancel(cancelled)
    return StepContext(
        graph=graph,
        execution_id=check_execution_id(execution_id),
        step=step,
        make_key=_key_maker(graph, execution_id, step, item, idempotency_key),
        attempt=attempt,
        delivery=delivery,
        item=item,
        values=values or {},
        deadline=None if timeout is None else flag.now() + to_seconds(timeout, "timeout"),
        cancelled=flag,
    )


def run_step(
    graph: Graph,
    step: Any,
    /,
    *inputs: Message,
    execution_id: str = "test",
    context: Mapping[str, Any] | None = None,
    timeout: Seconds | None = None,
    store: Store | None = None,
) -> Any:
    """Run one step of *graph* alone, with its whole policy: retries, timeout, classifier, checkpoint.

    Args:
        graph: Where the step is registered; a replaced step (`Graph.override`) counts.
        step: Its name, what was registered, or the message type that it returns.
        *inputs: Its messages in the order of its parameters, `Named` ones too.
        execution_id: Names the run; the same id and store find the checkpoint of an earlier call.
        context: Values for ``ctx.values``.
        timeout: Seconds or timedelta for the whole run.
        store: Where it persists; default: that of `inline` around, else a new `MemoryStore`.

    Returns:
        The step's message.

    Raises:
        InvalidArguments: There is no such step, or the messages are not those of its parameters.
        StepFailed: The step failed for good; and the other errors of `Graph.execute`.
    """
    found = graph.find_step(step)
    given = tuple(dict.fromkeys(found.inputs))
    if [type(message) for message in inputs] != [key.kind for key in given]:
        wanted = ", ".join(map(str, given)) or "nothing"
        got = ", ".join(type(message).__name__ for message in inputs) or "nothing"
        raise InvalidArguments(f"run_step of {found.name!r}", f"takes {wanted} in this order, got {got}")
    if store is None and found.persist is not None:
        store = overriding_store()
    if store is None and found.persist is not None:
        from docket_celery.store import MemoryStore

        store = MemoryStore()
    submission = Submission(
        execution_id=check_execution_id(execution_id),
        values=context or {},
        timeout_s=None if timeout is None else to_seconds(timeout, "timeout"),
        may_help=process.may_help(),
        listeners=graph.listeners,
    )
    outcome = graph.deliver(graph.compiled(found.output, given), inputs, submission, store=store)
    return read_value(outcome, found.output.kind)


def _key_maker(graph: str, execution_id: str, step: str, item: str, chosen: str | None) -> Callable[[], str]:
    if chosen is not None:
        return lambda: chosen
    return functools.partial(idempotency_key, graph, execution_id, step, item)
