"""`Graph`: where steps are registered, checked, planned and run."""

from __future__ import annotations

import asyncio
import difflib
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Unpack, overload

from google.protobuf.message import Message

from docket_celery.checkpoint import Store, check_execution_id
from docket_celery.configuration import Settings
from docket_celery.defaults import process_defaults
from docket_celery.errors import GraphError, InvalidArguments, StoreMissing
from docket_celery.events import Listener
from docket_celery.messages import is_message_type
from docket_celery.outcome import RunOutcome, Submission
from docket_celery.plan import Plan, compile_plan
from docket_celery.policy import Seconds, StepOptionFields, StepOptions, to_seconds
from docket_celery.run import Run
from docket_celery.runtime import CallerLoop
from docket_celery.step import Registration, ValueKey, default_name, locate
from docket_celery.waiting import StartedRun, read_value, run_here, run_on_loop
from docket_celery.wiring import Wiring, read_wiring

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound=Message)
M = TypeVar("M", bound=Message)

_ATTEMPTS = "retry=RetryPolicy(max_attempts=...)"
# What Celery and others call it: spelling alone would lead from retries to retriable.
_ELSEWHERE = {
    **dict.fromkeys(("retries", "max_retries", "attempts", "max_attempts"), _ATTEMPTS),
    **dict.fromkeys(("backoff", "retry_backoff", "retry_policy"), "retry=RetryPolicy(backoff=...)"),
    **dict.fromkeys(("autoretry_for", "retry_on", "retry_for"), "retriable="),
    **dict.fromkeys(("time_limit", "soft_time_limit", "deadline"), "timeout="),
    **dict.fromkeys(
        ("cache", "cached", "checkpoint", "persistence", "scope"), "persist=Scope.WORKFLOW or GLOBAL"
    ),
    "expires": "ttl=",
}


class Graph:
    """A set of typed steps; their types are the graph.

    Args:
        name: Names the graph in the store, in logs and in every identity; 1 to 200 printable characters.
        store: Where steps that persist keep their outputs; default: ``docket_database_url``.
    """

    def __init__(self, name: str, *, store: Store | None = None) -> None:
        if not isinstance(name, str) or not name or len(name) > 200 or not name.isprintable():
            raise InvalidArguments("Graph", f"name must be 1 to 200 printable characters, got {name!r}")
        self.name = name
        self.store = store
        self.listeners: list[Listener] = []
        self._registrations: list[Registration] = []
        self._wiring: Wiring | None = None
        self._plans: dict[tuple[ValueKey, tuple[ValueKey, ...]], Plan] = {}
        self._frozen = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Graph {self.name!r}: {len(self._registrations)} steps>"

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
        if callable(preset) and not isinstance(preset, StepOptions):
            self._add(preset, _options(None, options))
            return preset
        chosen = _options(preset, options)

        def decorate(function: F) -> F:
            self._add(function, chosen)
            return function

        return decorate

    def register(
        self, target: object, preset: StepOptions | None = None, /, **options: Unpack[StepOptionFields]
    ) -> None:
        """Add a function, a bound method or an object with ``compute`` as a step.

        Args:
            target: What to call.
            preset: `StepOptions` to start from.
            **options: The fields of `StepOptions`.

        Raises:
            TypeError: An option does not exist.
            GraphError: The graph is frozen because it has run, or the step needs ``name=``.
        """
        self._add(target, _options(preset, {**options}))

    def _add(self, target: Any, options: StepOptions) -> None:
        name = options.name if options.name is not None else default_name(target)
        if not name:
            where = locate(target)
            raise GraphError(self.name, [f"DC110 no name: lambdas and partials need name=... ({where})"])
        if not isinstance(name, str) or len(name) > 200 or not name.isprintable():
            raise GraphError(
                self.name,
                [f"DC110 bad name: name= is 1 to 200 printable characters, got {name!r} ({locate(target)})"],
            )
        with self._lock:
            if self._frozen:
                raise GraphError(
                    self.name,
                    [
                        f"DC116 frozen: step {name!r} comes after the first run; register all steps before running"
                    ],
                )
            self._registrations.append(
                Registration(
                    target=target,
                    options=options,
                    name=name,
                    order=len(self._registrations),
                    where=locate(target),
                )
            )
            self._wiring = None
            self._plans.clear()

    # --- checking and planning ---------------------------------------------------------------------------------

    def validate(self, *given: type[Message]) -> None:
        """Check all signatures and the wiring.

        Args:
            *given: The types callers hand in. Without any, each type that no step returns counts as handed in.

        Raises:
            GraphError: With all faults in one report, each with its code, its place and the fix.
        """
        self._read().check([_key(kind, "validate") for kind in given], complete=bool(given))

    def plan(self, target: type[Message], /, *given: type[Message]) -> Plan:
        """Return the minimal ordered steps from *given* to *target*.

        Args:
            target: The message type to make.
            *given: The types handed in. Without any, each type that no step returns counts as handed in.

        Raises:
            GraphError: The graph has faults, or a needed value has no producer.
        """
        wanted = _key(target, "plan")
        if given:
            return self.compiled(wanted, tuple(_key(kind, "plan") for kind in given))
        wiring = self._read()
        sources = dict.fromkeys(key for step in wiring.steps for key in step.inputs)
        return self.compiled(wanted, tuple(key for key in sources if key not in wiring.producers))

    def compiled(self, target: ValueKey, given: tuple[ValueKey, ...]) -> Plan:
        """Return the plan for these values, compiled once."""
        found = self._plans.get((target, given))
        if found is None:
            wiring = self._read()
            wiring.check(given)
            found = compile_plan(wiring, target, given)
            with self._lock:
                if wiring is self._wiring:
                    self._plans[target, given] = found
        return found

    def _read(self) -> Wiring:
        with self._lock:
            if self._wiring is None:
                self._wiring = read_wiring(self.name, self._registrations)
            return self._wiring

    # --- running -----------------------------------------------------------------------------------------------

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
        return read_value(self.deliver(_key(target, "execute"), inputs, submission, store=store), target)

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
        run = self._run(_key(target, "aexecute"), inputs, submission, store=store, loop=loop)
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
        return StartedRun(self._run(_key(target, "start"), inputs, submission, store=store), target)

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
        self._frozen = True
        settings = process_defaults.settings() if settings is None else settings
        chosen = self.find_store(plan, settings, store) if plan.persists else None
        return Run(plan, inputs, submission, settings, chosen, loop)

    def find_store(self, plan: Plan, settings: Settings, store: Store | None = None) -> Store:
        """Return the store in force: the call's, else the graph's, else ``docket_database_url``'s.

        Raises:
            StoreMissing: There is none.
        """
        for candidate in (store, self.store):
            if candidate is not None:
                return candidate
        found = process_defaults.store(settings.database_url)
        if found is None:
            first = next(p.step.name for p in plan.steps if p.step.persist is not None)
            raise StoreMissing(self.name, first)
        return found


def _options(preset: StepOptions | None, options: dict[str, Any]) -> StepOptions:
    if preset is not None and not isinstance(preset, StepOptions):
        raise TypeError(f"a step is decorated with options or a StepOptions preset, not {preset!r}")
    try:
        return (preset or StepOptions()).override(**options)
    except TypeError as error:
        hints = [_nearest(name) for name in options if name not in StepOptions.__dataclass_fields__]
        near = ", ".join(hint for hint in hints if hint)
        raise TypeError(f"{error}; did you mean {near}?" if near else str(error)) from None


def _nearest(name: str) -> str:
    """Return the option that *name* stands for in other libraries, or the one spelled most like it, or ''."""
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    close = difflib.get_close_matches(name, StepOptions.__dataclass_fields__, n=1)
    return f"{close[0]}=" if close else ""


def _key(kind: object, where: str) -> ValueKey:
    if not is_message_type(kind):
        shown = kind.__name__ if isinstance(kind, type) else repr(kind)
        raise InvalidArguments(where, f"expected a Protocol Buffers message type, got {shown}")
    return ValueKey(kind)


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
