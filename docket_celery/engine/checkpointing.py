"""What is stored of steps: checkpoints, claims on shared ones, rows for people, and the entries of GLOBAL steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

from google.protobuf.message import Message

from docket_celery.engine.run_context import Restored, RunContext
from docket_celery.errors import CacheMismatch, DocketError, GraphChanged, InvalidArguments
from docket_celery.plan.messages import (
    Value,
    check_size,
    from_bytes,
    many_from_bytes,
    to_view,
    value_bytes,
    value_name,
)
from docket_celery.plan.options import Scope
from docket_celery.plan.plan import Plan
from docket_celery.plan.registry import Registry
from docket_celery.plan.shapes import check_shape, message_shape
from docket_celery.plan.step import Step
from docket_celery.store.contract import Store
from docket_celery.store.identity import cache_key, global_key, input_digest, workflow_key
from docket_celery.store.records import Checkpoint, Lease, StepExecution

_logger = logging.getLogger("docket_celery.checkpointing")
_MOST_CHARS = 2000


class StepRecord:
    """The stored side of a step in a delivery that has a store; *began* is a time of the run's clock."""

    def __init__(
        self, step: Step, values: Sequence[Value], context: RunContext, store: Store, began: float
    ) -> None:
        self._step, self._values, self._context, self._store = step, values, context, store
        self._began, self._started_at = began, datetime.now(UTC)
        self.claims = False
        self._key: bytes | None = None

    @property
    def _shared_key(self) -> bytes:
        # Not a cached_property: its frame would come first in the traceback of a user's ``key=``.
        if self._key is None:
            self._key = shared_key(self._context.graph, self._step, self._values, self._store)
        return self._key

    @property
    def _claimant(self) -> str:
        """The owner of the claim: of steps and items of one delivery that need one checkpoint, one computes."""
        return f"{self._context.owner}/{self._context.item}/{self._step.name}"

    def look_up(self) -> Checkpoint | bool:
        """Return the GLOBAL checkpoint; True: this step computes it; False: another one does.

        A refresh neither looks nor claims: it always computes.
        """
        context, lease_s = self._context, self._context.settings.lease_seconds
        if context.submission.refreshes:
            return True
        hit = self.row("SUCCEEDED", attempts=0, cached=True)
        found = self._store.lookup(self._shared_key, self._claimant, lease_s, hit)
        if found is True:
            # Watched before `claims` says so: an abort that finds the claim then ends its watch too.
            context.heartbeat().watch_claim(self._shared_key, self._claimant, lease_s)
            self.claims = True
        return found

    def keep(self, value: Value) -> None:
        """Note *value* for the delivery's next save, if others need it and it is not saved in this run by itself."""
        if self._step.name in self._context.keeps and self._step.persist is not Scope.WORKFLOW:
            self._context.kept.append(self.checkpoint(value, shared=False))

    def checkpoint(self, value: Value, *, shared: bool) -> Checkpoint:
        """Return the checkpoint to save for *value*, for all runs or for this one; raise `PayloadTooLarge`."""
        step, context = self._step, self._context
        own_key = workflow_key(context.graph, context.execution_id, step.identity, context.item)
        data = value_bytes(value)
        what = f"the output of step {step.name!r} of run {context.execution_id!r}"
        check_size(what, len(data), context.settings.max_stored_bytes, "docket_max_stored_bytes")
        return Checkpoint(
            key=self._shared_key if shared else own_key,
            graph=context.graph,
            execution_id=None if shared else context.execution_id,
            step_name=step.name,
            step_version=step.options.version,
            input_hash=hash_inputs(self._values, self._store),
            item=context.item,
            item_index=int(context.item.partition("/")[0]) if context.item else None,
            output_type=step.result_name,
            output_data=data,
            output_json=to_view(value) if self._store.codec is None else None,
            output_shape=message_shape(step.output.kind),
            ttl_s=step.ttl_s,
        )

    def save(self, checkpoint: Checkpoint, row: StepExecution) -> Checkpoint:
        """Store *checkpoint* with its row and return the one that counts: that of the first saver.

        After `StoreUnavailable` it may be tried again.
        """
        context = self._context
        if checkpoint.execution_id is None:
            refreshes = context.submission.refreshes
            winner = self._store.publish(checkpoint, self._claimant, row, replace=refreshes)
        else:
            assert context.held is not None
            winner = self._store.save(context.held.lease, checkpoint, row)
        self._release_claim()
        return winner

    def drop_claim(self) -> None:
        """Leave the GLOBAL checkpoint for another run to compute, if this step claimed to."""
        if self._release_claim():
            try:
                self._store.release_claim(self._shared_key, self._claimant)
            except DocketError as error:
                _logger.warning("a claim stays until it expires: %s", error)

    def _release_claim(self) -> bool:
        claims, self.claims = self.claims, False
        if claims:
            self._context.heartbeat().unwatch_claim(self._shared_key, self._claimant)
        return claims

    def row(
        self, status: str, *, attempts: int, cached: bool = False, error: DocketError | None = None
    ) -> StepExecution:
        """Return the row of this step execution as of now."""
        context = self._context
        return StepExecution(
            graph=context.graph,
            execution_id=context.execution_id,
            step_name=self._step.name,
            item=context.item,
            delivery=context.number,
            attempts=attempts,
            cached=cached,
            status=status,
            started_at=self._started_at,
            duration_ms=(context.cancellation.now() - self._began) * 1000,
            error_code=None if error is None else error.code,
            error_message=None if error is None else str(error)[:_MOST_CHARS],
            worker=context.submission.worker,
            task_id=context.submission.task_id,
        )


def shared_key(graph: str, step: Step, values: Sequence[Value], store: Store) -> bytes:
    """Return the key of a GLOBAL step's checkpoint for these inputs; raise `InvalidArguments` for a bad ``key=``."""
    # With `Named` in them: swapped names of two values of one type are other inputs.
    inputs = [
        (key.label(value_name(value)), value_bytes(value))
        for key, value in zip(step.inputs, values, strict=True)
    ]
    if step.options.key is not None:
        inputs = [_named_key(step, step.options.key(*values))]
    if step.options.cache is not None:
        return store.hmac_digest(cache_key(step.options.cache, step.options.version, inputs))
    return store.hmac_digest(global_key(graph, step.name, step.options.version, inputs))


def _named_key(step: Step, named: object) -> tuple[str, bytes]:
    """Return the name and bytes to hash of what ``key=`` returned; no message type has a name with a colon."""
    if isinstance(named, Message):
        return value_name(named), value_bytes(named)
    if isinstance(named, str):
        # Any text has bytes, lone surrogates too.
        return ":str", named.encode("utf-8", "surrogatepass")
    if isinstance(named, bytes):
        return ":bytes", named
    problem = f"returned {type(named).__name__}; it must return the message, str or bytes to hash"
    raise InvalidArguments(f"key= of step {step.name!r}", problem)


def hash_inputs(values: Sequence[Value], store: Store) -> str:
    """Return `input_digest` of a step's input values in hex, as *store* keeps it."""
    return store.hmac_digest(input_digest((value_name(value), value_bytes(value)) for value in values)).hex()


def find_keys(plan: Plan, execution_id: str) -> list[bytes]:
    """Return under which keys a run of *plan* may have checkpoints, those of steps under former names too."""
    kept = (planned.step for planned in plan.steps if planned.step.persist is Scope.WORKFLOW)
    names = (name for step in kept for name in (*step.options.renamed_from, step.name))
    return [workflow_key(plan.graph, execution_id, name) for name in names]


def take_checkpoints(plan: Plan, lease: Lease, restored: Sequence[Checkpoint]) -> Restored:
    """Return what was restored of a run, by step name and path of the item.

    Raises `GraphChanged` for a checkpoint of a step that is gone, or that keeps nothing for the run any more.
    """
    if not restored:
        return {}  # mostly: no delivery before this one has advanced it
    names: dict[str, str] = {}
    other_scope: dict[str, str] = {}
    for planned in plan.steps:
        step = planned.step
        for name in (*step.options.renamed_from, step.name):
            if step.persist is Scope.WORKFLOW:
                names[name] = step.name
            elif not plan.stages:
                # A run that fans out keeps what its chunks need of such steps, in the same form.
                now = "has no persist=" if step.persist is None else f"has persist={step.persist}"
                other_scope[name] = f"{step.name} (kept its output for the run, now {now})"
    found: dict[tuple[str, str], Checkpoint] = {}
    changed: list[str] = []
    for checkpoint in restored:
        if (present := names.get(checkpoint.step_name)) is not None:
            found.setdefault((present, checkpoint.item), checkpoint)
        elif checkpoint.step_name not in plan.known_names:
            changed.append(checkpoint.step_name)
        elif checkpoint.step_name in other_scope:
            changed.append(other_scope[checkpoint.step_name])
    if changed:
        raise GraphChanged(lease.graph, lease.execution_id, sorted(set(changed)))
    return found


def read_value(step: Step, checkpoint: Checkpoint, context: RunContext) -> Value:
    """Return the stored output of *step*.

    Of another type than the step returns now it raises `CacheMismatch` if it is shared, else `GraphChanged`;
    `DecodeFailed` where a field of the type has changed its kind since.
    """
    expected = step.result_name
    if checkpoint.output_type != expected and checkpoint.execution_id is None:
        raise CacheMismatch(context.graph, step.name, step.options.cache, checkpoint.output_type, expected)
    if checkpoint.output_type != expected:
        change = f"{step.name} (returned {checkpoint.output_type}, now {expected})"
        raise GraphChanged(context.graph, context.execution_id, [change])
    check_shape(step.output.kind, checkpoint.output_shape)
    read = many_from_bytes if step.splits else from_bytes
    return read(step.output.kind, checkpoint.output_data)


def find_entry(
    registry: Registry, wanted: object, inputs: Sequence[object], where: str
) -> tuple[Step, list[Message]]:
    """Return the GLOBAL step that *wanted* names, and *inputs*, one for each value that it takes, in their order.

    Raises `InvalidArguments`, which names *where*: there is no such step, it shares nothing, or takes other inputs.
    """
    try:
        step = registry.find_step(wanted)
    except InvalidArguments:
        registry.validate()  # it may be missing for a fault of its own
        raise
    if step.persist is not Scope.GLOBAL:
        problem = (
            "keeps nothing; persist=Scope.GLOBAL would"
            if step.persist is None
            else "keeps its outputs for each run; submit the job under a new execution_id to compute them again"
        )
        raise InvalidArguments(where, f"step {step.name!r} {problem}")
    keys = list(dict.fromkeys(step.inputs))
    if [type(value) for value in inputs] != [key.kind for key in keys]:
        shown = ", ".join(type(value).__name__ for value in inputs) or "nothing"
        names = ", ".join(str(key) for key in keys) or "nothing"
        raise InvalidArguments(where, f"step {step.name!r} takes {names}, in this order; got {shown}")
    return step, [value for value in inputs if isinstance(value, Message)]


def forget(store: Store, graph: str, step: Step, inputs: Sequence[Message]) -> bool:
    """Drop the entry for *inputs* and tell whether there was one that counted."""
    by_key = dict(zip(dict.fromkeys(step.inputs), inputs, strict=True))
    return store.forget(shared_key(graph, step, [by_key[key] for key in step.inputs], store))
