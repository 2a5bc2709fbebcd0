"""`Graph`: the steps of a registry, run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast, overload

from google.protobuf.message import Message

from docket_celery.engine.checkpointing import find_entry, forget
from docket_celery.engine.handles import StartedRun
from docket_celery.engine.process.loops import CallerLoop
from docket_celery.engine.process.state import process
from docket_celery.engine.waiting import read_outcome, read_value, run_on_loop
from docket_celery.plan.batch import BatchPolicy, BatchResult, OnError
from docket_celery.plan.messages import Value
from docket_celery.plan.options import Seconds
from docket_celery.plan.registry import value_key
from docket_celery.runner import Runner, make_submission
from docket_celery.store.contract import Store

T = TypeVar("T", bound=Message)


class Graph(Runner):
    """A set of typed steps; their types are the graph.

    Args:
        name: Names the graph in the store, in logs and in every identity; 1 to 200 printable characters.
        store: Where steps that persist keep their outputs; default: ``docket_database_url``.
        defaults: Options of all steps that do not set their own, in a preset or at the step.
    """

    def execute(
        self,
        target: type[T],
        /,
        *inputs: Value,
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        max_concurrency: int | None = None,
        timeout: Seconds | None = None,
        store: Store | None = None,
    ) -> T:
        """Run what *target* needs, here and now, and return it.

        Args:
            target: The message type to make.
            *inputs: The job, at most one message of each type; a list is a batch, for aggregates.
            execution_id: Names the run, so that submitting it again resumes or returns it; default: a new name.
            context: Values for ``ctx.values``.
            max_concurrency: Most steps at once, or, where the graph fans out, most items; default: as many as there
                are threads.
            timeout: Seconds or timedelta for the whole run, waiting for another holder included.
            store: Where to persist; default: the graph's, then ``docket_database_url``.

        Raises:
            StepFailed: A step failed for good.
            AbortError: A step stopped the run.
            InvalidArguments: The inputs do not fit.
            GraphError: The graph has faults.
            StoreMissing: A step persists and there is no store.
            RunTimedOut, RunConflict, RunCancelled, RunQuarantined, GraphChanged: As they say.
        """
        submission = make_submission(
            self.listeners, execution_id, context, max_concurrency, timeout, process.may_help()
        )
        return read_value(self.deliver(value_key(target, "execute"), inputs, submission, store=store), target)

    async def aexecute(
        self,
        target: type[T],
        /,
        *inputs: Value,
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        max_concurrency: int | None = None,
        timeout: Seconds | None = None,  # noqa: ASYNC109 -- a deadline of the run, as in execute
        store: Store | None = None,
    ) -> T:
        """Like `execute`, for a handler on an asyncio loop, which it never blocks.

        ``async def`` steps run on the running loop, so clients made there work in them; synchronous steps and SQL
        run on the pool. Cancelling the awaiting task cancels the run: what is saved is kept, and submitting it again
        under the same execution id goes on.

        Arguments as for `execute`.

        Raises:
            asyncio.CancelledError: The awaiting task was cancelled; the lease was given back before.
            DocketError: As from `execute`.
        """
        submission = make_submission(self.listeners, execution_id, context, max_concurrency, timeout)
        loop = CallerLoop(asyncio.get_running_loop())
        run = self.prepare(value_key(target, "aexecute"), inputs, submission, store=store, loop=loop)
        return read_value(await run_on_loop(run, loop), target)

    def start(
        self,
        target: type[T],
        /,
        *inputs: Value,
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        max_concurrency: int | None = None,
        timeout: Seconds | None = None,
        store: Store | None = None,
    ) -> StartedRun[T]:
        """Like `execute`, but return at once; the run goes on in the background, in this process.

        Arguments as for `execute`.

        Returns:
            A handle that waits for the message, or cancels the run.

        Raises:
            InvalidArguments, GraphError, StoreMissing, TooManyAbandoned: Before anything ran.
        """
        submission = make_submission(self.listeners, execution_id, context, max_concurrency, timeout)
        return StartedRun(self.prepare(value_key(target, "start"), inputs, submission, store=store), target)

    @overload
    def execute_batch(
        self,
        target: type[T],
        items: Iterable[Message],
        /,
        *inputs: Message,
        on_error: Literal["fail"] = "fail",
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        max_concurrency: int | None = None,
        timeout: Seconds | None = None,
        store: Store | None = None,
    ) -> list[T]: ...

    @overload
    def execute_batch(
        self,
        target: type[T],
        items: Iterable[Message],
        /,
        *inputs: Message,
        on_error: Literal["collect"],
        max_failed: float | None = None,
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        max_concurrency: int | None = None,
        timeout: Seconds | None = None,
        store: Store | None = None,
    ) -> BatchResult[T]: ...

    def execute_batch(
        self,
        target: type[T],
        items: Iterable[Message],
        /,
        *inputs: Message,
        on_error: OnError = "fail",
        max_failed: float | None = None,
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        max_concurrency: int | None = None,
        timeout: Seconds | None = None,
        store: Store | None = None,
    ) -> list[T] | BatchResult[T]:
        """Make *target* for each of *items*, here and now; aggregates see all of them.

        Args:
            target: The message type to make for each item.
            items: Messages of one type; there may be none.
            *inputs: What all items share, at most one message of each type.
            on_error: ``fail``: the first item that fails fails the batch. ``collect``: the others go on.
            max_failed: ``collect`` only: how many items may fail, as a count, or as a share (a float from 0 to 1).
            execution_id: Names the run, so that submitting it again resumes or returns it; default: a new name.
            context: Values for ``ctx.values``.
            max_concurrency: Most items at once; steps of one item may run together. Default: as many as there
                are threads.
            timeout: Seconds or timedelta for the whole batch.
            store: Where to persist; default: the graph's, then ``docket_database_url``.

        Returns:
            The results in the order of *items*; with ``on_error="collect"`` a `BatchResult`.

        Raises:
            BatchFailed: More items failed than *max_failed* allows.
            StepFailed, AbortError, GraphError, InvalidArguments: As from `execute`; an item is named by its index.
        """
        submission = replace(
            make_submission(self.listeners, execution_id, context, max_concurrency, timeout),
            policy=BatchPolicy(on_error, max_failed),
        )
        key = value_key(target, "execute_batch")
        outcome = self.deliver(key, [*inputs, list(items)], submission, store=store, collects=True)
        return cast("list[T] | BatchResult[T]", read_outcome(outcome))

    def forget(self, step: object, /, *inputs: Message, store: Store | None = None) -> bool:
        """Drop the entry of a GLOBAL step for these inputs: the next run that needs it computes it.

        A computation that is under way goes on, and its result is stored; `refresh` computes after it.

        Args:
            step: The step's name, its output's message type, or what was registered.
            *inputs: The step's inputs, in the order of its parameters.
            store: Where; default: the graph's, then ``docket_database_url``.

        Returns:
            Whether there was an entry that counted.

        Raises:
            InvalidArguments: There is no such step, it keeps nothing shared, or the inputs are not its own.
            StoreMissing: There is no store.
        """
        found, values = find_entry(self, step, inputs, "forget")
        plan = self.compiled(found.output, tuple(dict.fromkeys(found.inputs)))
        settings = process.settings()
        return forget(self.find_store(plan, settings, store), self.name, found, values)

    @overload
    def refresh(
        self,
        step: Callable[..., Coroutine[Any, Any, T]],
        /,
        *inputs: Message,
        context: Mapping[str, Any] | None = None,
        timeout: Seconds | None = None,
        store: Store | None = None,
    ) -> T: ...

    @overload
    def refresh(
        self,
        step: Callable[..., T],
        /,
        *inputs: Message,
        context: Mapping[str, Any] | None = None,
        timeout: Seconds | None = None,
        store: Store | None = None,
    ) -> T: ...

    @overload
    def refresh(
        self,
        step: object,
        /,
        *inputs: Message,
        context: Mapping[str, Any] | None = None,
        timeout: Seconds | None = None,
        store: Store | None = None,
    ) -> Message: ...

    def refresh(
        self,
        step: object,
        /,
        *inputs: Message,
        context: Mapping[str, Any] | None = None,
        timeout: Seconds | None = None,
        store: Store | None = None,
    ) -> Message:
        """Compute the output of a GLOBAL step anew, under its policy, replace its entry, and return it.

        Others read the old entry until the new one is stored. One at a time computes: where another one does, this
        waits, then computes itself, unless somebody has begun to after this was called. It is a run of its own.

        Args:
            step: The step's name, its output's message type, or what was registered.
            *inputs: The step's inputs, in the order of its parameters.
            context: Values for ``ctx.values``.
            timeout: Seconds or timedelta for all of it, waiting for another one included.
            store: Where; default: the graph's, then ``docket_database_url``.

        Raises:
            InvalidArguments: There is no such step, it keeps nothing shared, or the inputs are not its own.
            DocketError: As from `execute`; the old entry stays.
        """
        found, values = find_entry(self, step, inputs, "refresh")
        submission = make_submission(self.listeners, None, context, None, timeout)
        outcome = self.deliver(
            found.output,
            values,
            replace(submission, refreshes=True),
            given=tuple(dict.fromkeys(found.inputs)),
            store=store,
        )
        return read_value(outcome, found.output.kind)
