"""Brings a registry's plan, a submission, the settings and a store together as a run."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from google.protobuf.message import Message

from docket_celery.engine.overrides import overridden, overrides
from docket_celery.engine.process.loops import CallerLoop
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.run import Run
from docket_celery.engine.run_context import RunOutcome, Submission
from docket_celery.engine.waiting import run_here
from docket_celery.errors import InvalidArguments, InvalidSettings, StoreMissing
from docket_celery.observe.events import Listener
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.messages import Value
from docket_celery.plan.mutation import checked
from docket_celery.plan.options import Seconds, StepOptions, to_seconds
from docket_celery.plan.override import Overriding, Substitute
from docket_celery.plan.plan import Plan
from docket_celery.plan.registry import Registry
from docket_celery.store.contract import BatchStore, Store
from docket_celery.store.identity import check_execution_id


class Runner(Registry):
    """A registry whose plans can be run.

    Args:
        name: As for `Registry`.
        store: Where steps that persist keep their outputs; default: ``docket_database_url``.
        defaults: Options of all steps that do not set their own, in a preset or at the step.
    """

    def __init__(self, name: str, *, store: Store | None = None, defaults: StepOptions | None = None) -> None:
        super().__init__(name, lambda: process.lock, defaults)
        self.store = store
        self.listeners: list[Listener] = []

    def replaced(self) -> Overriding | None:
        around = overrides()
        return None if around is None else around.replaced.get(self)

    @contextmanager
    def override(self, steps: Mapping[Any, Substitute]) -> Generator[None]:
        """Replace steps in a ``with`` block, for tests; the graph itself stays as it is.

        Holds for what this thread or asyncio task executes in the block, however deep, and for nobody else. Blocks
        inside each other add up.

        Args:
            steps: What stands in, by the step's name, its output's message type, or what was registered. A message
                is the output at once: no inputs, no options. Anything to call is wired by its own signature and keeps
                the step's options; without a single annotation (a lambda, a mock) it is called like the step itself.

        Raises:
            GraphError: With all faults: a key that is no step, something that cannot stand in for it.
        """
        outer = self.replaced()
        found = self.read_overrides(steps)
        with overridden(replaced={self: Overriding({**(outer.steps if outer else {}), **found})}):
            yield

    def deliver(
        self,
        target: ValueKey,
        inputs: Sequence[Value],
        submission: Submission,
        *,
        given: tuple[ValueKey, ...] | None = None,
        batch: ValueKey | None = None,
        collects: bool = False,
        settings: Settings | None = None,
        store: Store | None = None,
    ) -> RunOutcome:
        """Run one delivery and return how it ended; for hosts such as `GraphTask`.

        Raises:
            InvalidArguments, GraphError, StoreMissing, TooManyAbandoned: Before anything ran.
        """
        run = self.prepare(
            target,
            inputs,
            submission,
            given=given,
            batch=batch,
            collects=collects,
            settings=settings,
            store=store,
        )
        return run_here(run)

    def prepare(
        self,
        target: ValueKey,
        inputs: Sequence[Value],
        submission: Submission,
        *,
        given: tuple[ValueKey, ...] | None = None,
        batch: ValueKey | None = None,
        collects: bool = False,
        settings: Settings | None = None,
        store: Store | None = None,
        loop: CallerLoop | None = None,
    ) -> Run:
        """Return the run of one delivery, not begun.

        Args:
            target: What to make.
            inputs: The job; a list is a batch.
            submission: Who asks for it, and how.
            given: What *inputs* are values of; None: their types tell.
            batch: Which of *given* is a batch.
            collects: *target* is wanted for each item.
            settings: Those in force; None: the process's.
            store: As for `find_store`.
            loop: Runs ``async def`` steps; None: the loop thread of the process.

        Raises:
            InvalidArguments, GraphError, StoreMissing: As they say.
        """
        if given is None:
            given, batch = self._given(target, inputs)
        plan = self.compiled(target, given, batch, collects=collects)
        self.freeze()
        settings = process.settings() if settings is None else settings
        around, clock = overrides(), None
        if around is not None:
            settings, clock = around.adjust(settings), around.clock
            if around.listeners:
                submission = replace(submission, listeners=(*submission.listeners, *around.listeners))
        if settings.check_mutation:
            plan = checked(plan)
        chosen = self.find_store(plan, settings, store) if plan.persists else None
        return Run(plan, inputs, submission, settings, chosen, loop, clock)

    def _given(
        self, target: ValueKey, inputs: Sequence[object]
    ) -> tuple[tuple[ValueKey, ...], ValueKey | None]:
        """Return what *inputs* are values of, and which of them is a batch."""
        lists = [cast("Sequence[object]", value) for value in inputs if isinstance(value, (list, tuple))]
        shared = [_kind(value) for value in inputs if not isinstance(value, (list, tuple))]
        if not lists:
            return tuple(shared), None
        if len(lists) > 1:
            raise InvalidArguments("execute", f"a run has one batch, got {len(lists)} lists")
        kinds = {_kind(item) for item in lists[0]}
        if not kinds:
            # Nothing to read the type from: it is the one that is missing.
            kinds = set(self.missing(target, shared))
        if len(kinds) != 1:
            shown = ", ".join(sorted(map(str, kinds))) or "nothing that the graph needs"
            raise InvalidArguments("execute", f"the items of a batch are of one type, got {shown}")
        batch = kinds.pop()
        given = iter(shared)
        return tuple(batch if isinstance(value, (list, tuple)) else next(given) for value in inputs), batch

    def find_batch_store(self, plan: Plan, settings: Settings) -> BatchStore | None:
        """Return the store over which several workers can share a run of *plan*; None: one of them does it all.

        Raises:
            StoreMissing, InvalidSettings: As from `find_store`, if the plan persists.
        """
        if not plan.fans_out or overrides() is not None:
            return None
        if plan.persists or self.store is not None:
            found: Store | None = self.find_store(plan, settings)
        else:
            found = process.store(settings.database_url, settings.codec)
        return found if isinstance(found, BatchStore) and found.persistent else None

    def find_store(self, plan: Plan, settings: Settings, store: Store | None = None) -> Store:
        """Return the store in force: the call's, else the graph's, else ``docket_database_url``'s.

        One that a test has put around this call comes before the graph's.

        Raises:
            StoreMissing: There is none.
            InvalidSettings: ``docket_codec`` is set, and the store was given without a codec.
        """
        found = self.choose_store(settings, store)
        if found is None:
            first = next(p.step.name for p in plan.steps if p.step.persist is not None)
            raise StoreMissing(self.name, first)
        return found

    def choose_store(self, settings: Settings, store: Store | None = None) -> Store | None:
        """Like `find_store`, or None if there is none.

        Raises:
            InvalidSettings: ``docket_codec`` is set, and the store was given without a codec.
        """
        around = overrides()
        candidates = (store, None if around is None else around.store, self.store)
        given = next((candidate for candidate in candidates if candidate is not None), None)
        if given is not None:
            if settings.codec is not None and given.codec is None and given.persistent:
                problem = (
                    f"graph {self.name!r} was given a store without a codec; pass SQLStore(..., codec=...)"
                )
                raise InvalidSettings("docket_codec", problem)
            return given
        return process.store(settings.database_url, settings.codec)


def _kind(value: object) -> ValueKey:
    if not isinstance(value, Message):
        shown = value.__name__ if isinstance(value, type) else type(value).__name__
        raise InvalidArguments("execute", f"inputs are Protocol Buffers messages, got {shown}")
    return ValueKey(type(value))


def make_submission(
    listeners: Sequence[Listener],
    execution_id: str | None,
    context: Mapping[str, Any] | None,
    max_concurrency: int | None,
    timeout: Seconds | None,
    may_help: bool = False,
) -> Submission:
    """Return who asks for a run in process.

    Raises:
        InvalidArguments: The name or the limit cannot be used.
    """
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
