"""`Graph`: the steps of a registry, run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack, cast, overload

from google.protobuf.message import Message

from docket_celery.engine.checkpointing import find_entry, forget
from docket_celery.engine.handles import StartedRun
from docket_celery.engine.overrides import overrides
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.run import Run
from docket_celery.engine.run_context import RunOutcome, Submission
from docket_celery.engine.waiting import read_outcome, read_value, run_here, run_on_loop
from docket_celery.errors import InvalidArguments, InvalidSettings, StoreMissing
from docket_celery.observe.events import Listener
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.batch import BatchPolicy, BatchResult, OnError
from docket_celery.plan.messages import Value
from docket_celery.plan.mutation import checked
from docket_celery.plan.options import Seconds, StepOptions, to_seconds
from docket_celery.plan.override import overridings
from docket_celery.plan.plan import Plan
from docket_celery.plan.registry import Registry, value_key
from docket_celery.store.contract import BatchStore, Store
from docket_celery.store.identity import check_execution_id, new_name

if TYPE_CHECKING:
    from docket_celery.engine.process.loops import StepLoop

T = TypeVar("T", bound=Message)


class RefreshOptions(TypedDict, total=False):
    """The options of `Graph.refresh`, as `Graph.execute` explains them."""

    context: Mapping[str, Any] | None
    timeout: Seconds | None
    store: Store | None


class RunOptions(RefreshOptions, total=False):
    """The options of `Graph.execute`, which explains them."""

    execution_id: str | None
    max_concurrency: int | None


_RUN_OPTIONS = frozenset(RunOptions.__annotations__)


class Graph(Registry):
    """A set of typed steps; their types are the graph.

    Args:
        name: Names the graph in the store, in logs and in every identity; 1 to 200 printable characters.
        store: Where steps that persist keep their outputs; default: ``docket_database_url``.
        defaults: Options of all steps that do not set their own, in a preset or at the step.
    """

    def __init__(self, name: str, *, store: Store | None = None, defaults: StepOptions | None = None) -> None:
        super().__init__(name, defaults)
        self.store = store
        self.listeners: list[Listener] = []

    def execute(self, target: type[T], /, *inputs: Value, **options: Unpack[RunOptions]) -> T:
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
        plan = self.plan_for(value_key(target, "execute"), inputs)
        submission = _submission(self, "execute", options, may_help=process.may_help())
        return read_value(self.deliver(plan, inputs, submission, store=options.get("store")), target)

    async def aexecute(self, target: type[T], /, *inputs: Value, **options: Unpack[RunOptions]) -> T:
        """Like `execute`, for a handler on an asyncio loop, which it never blocks.

        ``async def`` steps run on the running loop, so clients made there work in them; synchronous steps and SQL
        run on the pool. Cancelling the awaiting task cancels the run: what is saved is kept, and submitting it again
        under the same execution id resumes it.

        Arguments as for `execute`.

        Raises:
            asyncio.CancelledError: The awaiting task was cancelled; the lease was given back before.
            DocketError: As from `execute`.
        """
        from docket_celery.engine.process.loops import running_loop

        plan = self.plan_for(value_key(target, "aexecute"), inputs)
        submission, loop = _submission(self, "aexecute", options), running_loop()
        run = self.prepare(plan, inputs, submission, store=options.get("store"), loop=loop)
        return read_value(await run_on_loop(run, loop), target)

    def start(self, target: type[T], /, *inputs: Value, **options: Unpack[RunOptions]) -> StartedRun[T]:
        """Like `execute`, but return at once; the run is executed in the background, in this process.

        Arguments as for `execute`.

        Returns:
            A handle that waits for the message, or cancels the run.

        Raises:
            InvalidArguments, GraphError, StoreMissing, TooManyAbandoned: Before anything ran.
        """
        plan = self.plan_for(value_key(target, "start"), inputs)
        submission = _submission(self, "start", options)
        return StartedRun(self.prepare(plan, inputs, submission, store=options.get("store")), target)

    @overload
    def execute_batch(
        self,
        target: type[T],
        items: Iterable[Message],
        /,
        *inputs: Message,
        on_error: Literal["fail"] = "fail",
        **options: Unpack[RunOptions],
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
        **options: Unpack[RunOptions],
    ) -> BatchResult[T]: ...

    def execute_batch(
        self,
        target: type[T],
        items: Iterable[Message],
        /,
        *inputs: Message,
        on_error: OnError = "fail",
        max_failed: float | None = None,
        **options: Unpack[RunOptions],
    ) -> list[T] | BatchResult[T]:
        """Make *target* for each of *items*, here and now; aggregates see all of them.

        Args:
            target: The message type to make for each item.
            items: Messages of one type; there may be none.
            *inputs: What all items share, at most one message of each type.
            on_error: ``fail``: the first item that fails fails the batch. ``collect``: the others are made.
            max_failed: ``collect`` only: how many items may fail, as a count, or as a share (a float from 0 to 1).
            **options: As for `execute`; ``max_concurrency`` counts items, of which several steps may run together.

        Returns:
            The results in the order of *items*; with ``on_error="collect"`` a `BatchResult`.

        Raises:
            BatchFailed: More items failed than *max_failed* allows.
            StepFailed, AbortError, GraphError, InvalidArguments: As from `execute`; an item is named by its index.
        """
        job: list[Value] = [*inputs, list(items)]
        plan = self.plan_for(value_key(target, "execute_batch"), job, collects=True)
        policy = BatchPolicy(on_error, max_failed)
        submission = _submission(self, "execute_batch", options, policy=policy)
        outcome = self.deliver(plan, job, submission, store=options.get("store"))
        return cast("list[T] | BatchResult[T]", read_outcome(outcome))

    def forget(self, step: object, /, *inputs: Message, store: Store | None = None) -> bool:
        """Drop the entry of a GLOBAL step for these inputs: the next run that needs it computes it.

        A computation that is under way is not stopped, and its result is stored; `refresh` computes after it.

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
        return forget(self.find_store(plan, process.settings(), store), self.name, found, values)

    @overload
    def refresh(
        self,
        step: Callable[..., Coroutine[Any, Any, T]],
        /,
        *inputs: Message,
        **options: Unpack[RefreshOptions],
    ) -> T: ...

    @overload
    def refresh(
        self, step: Callable[..., T], /, *inputs: Message, **options: Unpack[RefreshOptions]
    ) -> T: ...

    @overload
    def refresh(self, step: object, /, *inputs: Message, **options: Unpack[RefreshOptions]) -> Message: ...

    def refresh(self, step: object, /, *inputs: Message, **options: Unpack[RefreshOptions]) -> Message:
        """Compute the output of a GLOBAL step again, under its policy, replace its entry, and return it.

        Others read the old entry until the new one is stored. Where another run computes it, this waits, then
        computes it itself. It is a run of its own.

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
        plan = self.compiled(found.output, tuple(dict.fromkeys(found.inputs)))
        submission = _submission(self, "refresh", options, refreshes=True)
        outcome = self.deliver(plan, values, submission, store=options.get("store"))
        return read_value(outcome, found.output.kind)

    # --- for hosts ---------------------------------------------------------------------------------------------

    def plan_for(self, target: ValueKey, inputs: Sequence[Value], *, collects: bool = False) -> Plan:
        """Return the plan that makes *target* of *inputs*: their types say what is given, and a list is a batch.

        Raises:
            InvalidArguments, GraphError: As they say.
        """
        plans, asked = self.wiring().plans, (target, tuple(map(type, inputs)), collects)
        if (found := plans.get(asked)) is not None:
            return found
        lists = [value for value in inputs if isinstance(value, (list, tuple))]
        shared = [_kind(value) for value in inputs if not isinstance(value, (list, tuple))]
        if not lists:
            plans[asked] = found = self.compiled(target, tuple(shared), collects=collects)
            return found
        # Of an empty list there is nothing to read the type from: it is the one that is missing.
        batch, given = _item_kind(lists) or _only(self.missing(target, shared)), iter(shared)
        keys = tuple(batch if isinstance(value, (list, tuple)) else next(given) for value in inputs)
        return self.compiled(target, keys, batch, collects=collects)

    def deliver(
        self,
        plan: Plan,
        inputs: Sequence[Value],
        submission: Submission,
        settings: Settings | None = None,
        *,
        store: Store | None = None,
    ) -> RunOutcome:
        """Run one delivery and return how it ended; arguments and errors as for `prepare`."""
        return run_here(self.prepare(plan, inputs, submission, settings, store=store))

    def prepare(
        self,
        plan: Plan,
        inputs: Sequence[Value],
        submission: Submission,
        settings: Settings | None = None,
        *,
        store: Store | None = None,
        loop: StepLoop | None = None,
    ) -> Run:
        """Return the run of one delivery, not begun, or raise what `find_store` does.

        *inputs* are the job in the order of ``plan.given``; a list is a batch. *settings* and *loop*: None stands for
        those of the process.
        """
        self.freeze()
        settings = process.settings() if settings is None else settings
        around, clock = overrides(), None
        if around is not None:
            settings, clock = replace(settings, **around.settings), around.clock
            if around.listeners:
                submission = replace(submission, listeners=(*submission.listeners, *around.listeners))
        if settings.check_mutation:
            plan = checked(plan)
        chosen = self.find_store(plan, settings, store) if plan.persists else None
        return Run(plan, inputs, submission, settings, chosen, loop, clock)

    def find_batch_store(self, plan: Plan, settings: Settings) -> BatchStore | None:
        """Return the store over which several workers can share a run of *plan*; None: one of them does it all.

        Raises what `find_store` does if the plan persists.
        """
        if not plan.fans_out or overrides() is not None or self in overridings():
            return None
        found = self.find_store(plan, settings) if plan.persists else self.choose_store(settings)
        return found if isinstance(found, BatchStore) and found.persistent else None

    def find_store(self, plan: Plan, settings: Settings, store: Store | None = None) -> Store:
        """Return the store in force: the call's, a test's, the graph's or that of ``docket_database_url``.

        Raises:
            StoreMissing, InvalidSettings: There is none, or ``docket_codec`` is set and it was given without a codec.
        """
        found = self.choose_store(settings, store)
        if found is None:
            first = next(p.step.name for p in plan.steps if p.step.persist is not None)
            raise StoreMissing(self.name, first)
        return found

    def choose_store(self, settings: Settings, store: Store | None = None) -> Store | None:
        """Like `find_store`, or None if there is none."""
        around = overrides()
        stores = (store, None if around is None else around.store, self.store)
        given = next((each for each in stores if each is not None), None)
        if given is None:
            return process.store(settings.database_url, settings.codec)
        if settings.codec is not None and given.codec is None and given.persistent:
            problem = f"graph {self.name!r} was given a store without a codec; pass SQLStore(..., codec=...)"
            raise InvalidSettings("docket_codec", problem)
        return given


def _submission(
    graph: Graph, where: str, options: RefreshOptions, *, may_help: bool = False, **more: Any
) -> Submission:
    """Return who asks for a run in process, or raise TypeError or InvalidArguments for an option."""
    if not options.keys() <= _RUN_OPTIONS:
        unknown = min(options.keys() - _RUN_OPTIONS)
        raise TypeError(f"{where}() got an unexpected keyword argument {unknown!r}")
    given = cast("RunOptions", options)
    named, timeout, most = given.get("execution_id"), given.get("timeout"), given.get("max_concurrency")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise InvalidArguments("execute", f"max_concurrency must be at least 1, got {most!r}")
    return Submission(
        execution_id=new_name() if named is None else check_execution_id(named),
        values=given.get("context") or {},
        timeout_s=None if timeout is None else to_seconds(timeout, "timeout"),
        max_concurrency=most,
        may_help=may_help,
        listeners=graph.listeners,
        **more,
    )


def _item_kind(lists: Sequence[Sequence[object]]) -> ValueKey | None:
    """Return what the items of the batch are values of; None: there are no items."""
    if len(lists) > 1:
        raise InvalidArguments("execute", f"a run has one batch, got {len(lists)} lists")
    kinds = dict.fromkeys(map(_kind, lists[0]))
    return _only(kinds) if kinds else None


def _only(kinds: Collection[ValueKey]) -> ValueKey:
    if len(kinds) != 1:
        shown = ", ".join(sorted(map(str, kinds))) or "nothing that the graph needs"
        raise InvalidArguments("execute", f"the items of a batch are of one type, got {shown}")
    return next(iter(kinds))


def _kind(value: object) -> ValueKey:
    if not isinstance(value, Message):
        shown = value.__name__ if isinstance(value, type) else type(value).__name__
        raise InvalidArguments("execute", f"inputs are Protocol Buffers messages, got {shown}")
    return ValueKey(type(value))
