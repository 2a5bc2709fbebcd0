"""What all steps of one pick-up of a run share."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from docket_celery.engine.process.heartbeat import Heartbeat, HeldLease
from docket_celery.engine.process.hooks import StepHook
from docket_celery.engine.process.loops import StepLoop
from docket_celery.engine.process.runtime import Runtime
from docket_celery.engine.process.state import process
from docket_celery.engine.step_scope import MakeScope
from docket_celery.observe.events import Event, EventKind, Listener, emit
from docket_celery.plan.context import Cancellation
from docket_celery.store.contract import Store
from docket_celery.store.records import Checkpoint, StepExecution


@dataclass(slots=True, kw_only=True)
class Delivery:
    """What all steps of one pick-up of a run share.

    Attributes:
        number: From 1.
        item: Path of the item that the steps work on, or ''.
        values: The caller's ``context=``.
        base: The caller's contextvars; each call gets a copy.
        held: The run's lease; None when nothing is persisted.
        passthrough: Exceptions that stop the run and reach the caller as they are.
        max_stored_bytes: Largest output of a step that is stored.
        scopes: Context managers of the host, entered around each stretch of a step on a thread.
        hooks: Entered once around each call of a step.
        loop: Runs ``async def`` steps; None: the loop thread of the process.
        beats: Keeps the lease and claims alive; None: the heartbeat of the process.
        refreshes: Compute GLOBAL outputs anew and replace those that are stored.
        rows: Step executions that no save has carried yet.
        keeps: Steps whose outputs others need, whatever their ``persist`` says.
        kept: Their outputs, not yet saved.
    """

    graph: str
    execution_id: str
    runtime: Runtime
    cancellation: Cancellation
    base: contextvars.Context
    number: int = 1
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    store: Store | None = None
    held: HeldLease | None = None
    lease_s: float = 30.0
    max_stored_bytes: int = 64 * 1024 * 1024
    owner: str = ""
    listeners: Sequence[Listener] = ()
    passthrough: tuple[type[BaseException], ...] = ()
    scopes: Sequence[MakeScope] = ()
    hooks: Sequence[StepHook] = ()
    worker: str = ""
    task_id: str | None = None
    item: str = ""
    loop: StepLoop | None = None
    beats: Heartbeat | None = None
    refreshes: bool = False
    rows: list[StepExecution] = field(default_factory=list[StepExecution])
    keeps: frozenset[str] = frozenset()
    kept: list[Checkpoint] = field(default_factory=list[Checkpoint])

    def step_loop(self) -> StepLoop:
        """Return where ``async def`` steps run."""
        return self.runtime.loop if self.loop is None else self.loop

    def heartbeat(self) -> Heartbeat:
        """Return what keeps the lease and claims of this delivery alive."""
        assert self.store is not None
        return process.heartbeat(self.store) if self.beats is None else self.beats

    def tell(self, kind: EventKind, step: str = "", attempt: int = 0, **facts: Any) -> None:
        """Tell the listeners."""
        if self.listeners:
            event = Event(
                kind=kind,
                graph=self.graph,
                execution_id=self.execution_id,
                step=step,
                item=self.item,
                attempt=attempt,
                delivery=self.number,
                at=self.cancellation.now(),
                **facts,
            )
            emit(self.listeners, event)
