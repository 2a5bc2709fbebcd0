"""`Graph`: the steps of a registry, run."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

from google.protobuf.message import Message

from docket_celery.ambient import ambient
from docket_celery.cache import check_inputs, find_shared_step, forget
from docket_celery.checkpoint import Store, check_execution_id
from docket_celery.configuration import Settings
from docket_celery.defaults import process_defaults
from docket_celery.errors import InvalidArguments, InvalidSettings, StoreMissing
from docket_celery.events import Listener
from docket_celery.mutation import checked
from docket_celery.outcome import RunOutcome, Submission
from docket_celery.plan import Plan
from docket_celery.policy import Seconds, to_seconds
from docket_celery.registry import Registry, value_key
from docket_celery.run import Run
from docket_celery.runtime import CallerLoop
from docket_celery.step import ValueKey
from docket_celery.waiting import StartedRun, read_value, run_here, run_on_loop

T = TypeVar("T", bound=Message)


class Graph(Registry):
    """A set of typed steps; their types are the graph.

    Args:
        name: Names the graph in the store, in logs and in every identity; 1 to 200 printable characters.
        store: Where steps that persist keep their outputs; default: ``docket_database_url``.
    """

    def __init__(self, name: str, *, store: Store | None = None) -> None:
        super().__init__(name)
        self.store = store
        self.listeners: list[Listener] = []

    def execute(
        self,
        target: type[T],
        /,
        *inputs: Message,
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        max_concurrency: int | None = None,
        timeout: Seconds | None = None,
        store: Store | None = None,
    ) -> T:
        """Run what *target* needs, here and now, and return it.

        Args:
            target: The message type to make.
            *inputs: The job, at most one message of each type.
            execution_id: Names the run, so that submitting it again resumes or returns it; default: a new name.
            context: Values for ``ctx.values``.
            max_concurrency: Most steps at once; default: as many as there are threads.
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
        submission = _submission(
            self.listeners, execution_id, context, max_concurrency, timeout, process_defaults.may_help()
        )
        return read_value(self.deliver(value_key(target, "execute"), inputs, submission, store=store), target)

    async def aexecute(
        self,
        target: type[T],
        /,
        *inputs: Message,
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
        submission = _submission(self.listeners, execution_id, context, max_concurrency, timeout)
        loop = CallerLoop(asyncio.get_running_loop())
        run = self._run(value_key(target, "aexecute"), inputs, submission, store=store, loop=loop)
        return read_value(await run_on_loop(run, loop), target)

    def start(
        self,
        target: type[T],
        /,
        *inputs: Message,
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
        submission = _submission(self.listeners, execution_id, context, max_concurrency, timeout)
        return StartedRun(self._run(value_key(target, "start"), inputs, submission, store=store), target)

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
        found = find_shared_step(self, step, "forget")
        values = check_inputs(found, inputs, "forget")
        plan = self.compiled(found.output, tuple(dict.fromkeys(found.inputs)))
        settings = process_defaults.settings()
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
        found = find_shared_step(self, step, "refresh")
        values = check_inputs(found, inputs, "refresh")
        submission = _submission(self.listeners, None, context, None, timeout)
        outcome = self.deliver(
            found.output,
            values,
            replace(submission, refreshes=True),
            given=tuple(dict.fromkeys(found.inputs)),
            store=store,
        )
        return read_value(outcome, found.output.kind)

    def deliver(
        self,
        target: ValueKey,
        inputs: Sequence[Message],
        submission: Submission,
        *,
        given: tuple[ValueKey, ...] | None = None,
        settings: Settings | None = None,
        store: Store | None = None,
    ) -> RunOutcome:
        """Run one delivery and return how it ended; for hosts such as `GraphTask`.

        Raises:
            InvalidArguments, GraphError, StoreMissing, TooManyAbandoned: Before anything ran.
        """
        return run_here(self._run(target, inputs, submission, given=given, settings=settings, store=store))

    def _run(
        self,
        target: ValueKey,
        inputs: Sequence[Message],
        submission: Submission,
        *,
        given: tuple[ValueKey, ...] | None = None,
        settings: Settings | None = None,
        store: Store | None = None,
        loop: CallerLoop | None = None,
    ) -> Run:
        plan = self.compiled(target, _given(inputs) if given is None else given)
        self.freeze()
        settings = process_defaults.settings() if settings is None else settings
        around, clock = ambient(), None
        if around is not None:
            settings, clock = around.adjust(settings), around.clock
            if around.listeners:
                submission = replace(submission, listeners=(*submission.listeners, *around.listeners))
        if settings.check_mutation:
            plan = checked(plan)
        chosen = self.find_store(plan, settings, store) if plan.persists else None
        return Run(plan, inputs, submission, settings, chosen, loop, clock)

    def find_store(self, plan: Plan, settings: Settings, store: Store | None = None) -> Store:
        """Return the store in force: the call's, else the graph's, else ``docket_database_url``'s.

        One that a test has put around this call comes before the graph's.

        Raises:
            StoreMissing: There is none.
            InvalidSettings: ``docket_codec`` is set, and the store was given without a codec.
        """
        around = ambient()
        candidates = (store, None if around is None else around.store, self.store)
        given = next((candidate for candidate in candidates if candidate is not None), None)
        if given is not None:
            if settings.codec is not None and given.codec is None and given.persistent:
                problem = (
                    f"graph {self.name!r} was given a store without a codec; pass SQLStore(..., codec=...)"
                )
                raise InvalidSettings("docket_codec", problem)
            return given
        found = process_defaults.store(settings.database_url, settings.codec)
        if found is None:
            first = next(p.step.name for p in plan.steps if p.step.persist is not None)
            raise StoreMissing(self.name, first)
        return found


def _given(inputs: Sequence[object]) -> tuple[ValueKey, ...]:
    for value in inputs:
        if not isinstance(value, Message):
            shown = value.__name__ if isinstance(value, type) else type(value).__name__
            raise InvalidArguments("execute", f"inputs are Protocol Buffers messages, got {shown}")
    return tuple(ValueKey(type(value)) for value in inputs if isinstance(value, Message))


def _submission(
    listeners: Sequence[Listener],
    execution_id: str | None,
    context: Mapping[str, Any] | None,
    max_concurrency: int | None,
    timeout: Seconds | None,
    may_help: bool = False,
) -> Submission:
    return Submission(
        execution_id=str(uuid.uuid4()) if execution_id is None else check_execution_id(execution_id),
        values=context or {},
        timeout_s=None if timeout is None else to_seconds(timeout, "timeout"),
        max_concurrency=_concurrency(max_concurrency),
        may_help=may_help,
        listeners=listeners,
    )


def _concurrency(value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidArguments("execute", f"max_concurrency must be at least 1, got {value!r}")
    return value
