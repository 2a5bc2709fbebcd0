"""What is stored of one step in one delivery: its checkpoint, its claim on a shared one, and its row for people."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

from google.protobuf.message import Message

from docket_celery.engine.delivery import Delivery
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
from docket_celery.plan.shapes import check_shape, message_shape
from docket_celery.plan.step import Step
from docket_celery.store.contract import Store
from docket_celery.store.identity import cache_key, global_key, input_digest, workflow_key
from docket_celery.store.records import Checkpoint, Lease, StepExecution

_logger = logging.getLogger("docket_celery.checkpointing")
_MOST_CHARS = 2000


class StepRecord:
    """The stored side of a step call.

    Args:
        step: The step.
        delivery: The delivery it belongs to.
    """

    __slots__ = ("_claimed", "_delivery", "_looked_up", "_started_at", "_step", "_values", "began")

    def __init__(self, step: Step, delivery: Delivery) -> None:
        self._step, self._delivery = step, delivery
        self._values: Sequence[Value] = ()
        self._claimed: bytes | None = None
        self._looked_up: bytes | None = None
        self.began = 0.0
        self._started_at: datetime | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since `begin`."""
        return self._delivery.cancellation.now() - self.began

    @property
    def claims(self) -> bool:
        """Whether others wait for this step to compute a GLOBAL checkpoint."""
        return self._claimed is not None

    @property
    def _claimant(self) -> str:
        """Who claims: of steps and items of one delivery that need one checkpoint, one computes."""
        return f"{self._delivery.owner}/{self._delivery.item}/{self._step.name}"

    def begin(self, values: Sequence[Value] = ()) -> None:
        """Note the inputs and when the step began."""
        self._values, self.began = values, self._delivery.cancellation.now()
        if self._delivery.store is not None:
            self._started_at = datetime.now(UTC)

    # --- checkpoints -------------------------------------------------------------------------------------------

    def look_up(self) -> Checkpoint | bool:
        """Return the GLOBAL checkpoint; True: this step computes it; False: another one does.

        A refresh neither looks nor claims: it always computes.
        """
        delivery = self._delivery
        assert delivery.store is not None
        self._looked_up = key = self._looked_up or self._key()
        if delivery.refreshes:
            return True
        found = delivery.store.lookup(key, self._claimant, delivery.lease_s)
        if found is True:
            # Watched before it is known: whoever aborts drops the claims that it finds, watch included.
            delivery.heartbeat().watch_claim(key, self._claimant, delivery.lease_s)
            self._claimed = key
        return found

    def checkpoint(self, value: Value) -> Checkpoint:
        """Return the checkpoint to save for *value*.

        Raises:
            PayloadTooLarge: It is too large to be stored.
        """
        shared = self._step.persist is Scope.GLOBAL
        return self._checkpoint(value, self._looked_up or self._key(), shared=shared)

    def keep(self, value: Value) -> None:
        """Note *value* for the delivery's next save, if others need it and it is not saved in this run by itself."""
        step, delivery = self._step, self._delivery
        if step.name in delivery.keeps and step.persist is not Scope.WORKFLOW:
            key = workflow_key(delivery.graph, delivery.execution_id, step.identity, delivery.item)
            delivery.kept.append(self._checkpoint(value, key, shared=False))

    def _checkpoint(self, value: Value, key: bytes, *, shared: bool) -> Checkpoint:
        step, delivery = self._step, self._delivery
        assert delivery.store is not None
        data = value_bytes(value)
        what = f"the output of step {step.name!r} of run {delivery.execution_id!r}"
        check_size(what, len(data), delivery.max_stored_bytes, "docket_max_stored_bytes")
        return Checkpoint(
            key=key,
            graph=delivery.graph,
            execution_id=None if shared else delivery.execution_id,
            step_name=step.name,
            step_version=step.options.version,
            input_hash=hash_inputs(self._values, delivery.store),
            item=delivery.item,
            item_index=int(delivery.item.partition("/")[0]) if delivery.item else None,
            output_type=step.result_name,
            output_data=data,
            output_json=to_view(value) if delivery.store.codec is None else None,
            output_shape=message_shape(step.output.kind),
            ttl_s=step.ttl_s,
        )

    def save(self, checkpoint: Checkpoint, row: StepExecution) -> Checkpoint:
        """Store *checkpoint* with its row and return the one that counts: whoever saved first.

        Raises:
            StoreUnavailable: It may be tried again.
            LeaseLost: The run is another worker's.
            CorruptCheckpoint: The winner's row is damaged.
        """
        delivery = self._delivery
        assert delivery.store is not None
        assert delivery.held is not None
        if checkpoint.execution_id is None:
            winner = delivery.store.publish(checkpoint, self._claimant, row, replace=delivery.refreshes)
        else:
            winner = delivery.store.save(delivery.held.lease, checkpoint, row)
        self._release_claim()
        return winner

    def drop_claim(self) -> None:
        """Let another run compute the GLOBAL checkpoint, if this step claimed to."""
        key, store = self._claimed, self._delivery.store
        self._release_claim()
        if key is not None and store is not None:
            try:
                store.release_claim(key, self._claimant)
            except DocketError as error:
                _logger.warning("a claim stays until it expires: %s", error)

    def _release_claim(self) -> None:
        key, self._claimed = self._claimed, None
        if key is not None and self._delivery.store is not None:
            self._delivery.heartbeat().unwatch_claim(key, self._claimant)

    def _key(self) -> bytes:
        step, delivery = self._step, self._delivery
        if step.persist is Scope.WORKFLOW:
            return workflow_key(delivery.graph, delivery.execution_id, step.identity, delivery.item)
        assert delivery.store is not None
        return shared_key(delivery.graph, step, self._values, delivery.store)

    # --- rows --------------------------------------------------------------------------------------------------

    def report(
        self, status: str, *, attempts: int, cached: bool = False, error: DocketError | None = None
    ) -> None:
        """Keep a row for the run's next statement; nothing without a store."""
        if self._delivery.store is not None:
            self._delivery.rows.append(self.row(status, attempts=attempts, cached=cached, error=error))

    def row(
        self, status: str, *, attempts: int, cached: bool = False, error: DocketError | None = None
    ) -> StepExecution:
        """Return the row of this step execution as it stands now."""
        delivery = self._delivery
        return StepExecution(
            graph=delivery.graph,
            execution_id=delivery.execution_id,
            step_name=self._step.name,
            item=delivery.item,
            delivery=delivery.number,
            attempts=attempts,
            cached=cached,
            status=status,
            started_at=self._started_at or datetime.now(UTC),
            duration_ms=self.elapsed_s * 1000,
            error_code=None if error is None else error.code,
            error_message=None if error is None else str(error)[:_MOST_CHARS],
            worker=delivery.worker,
            task_id=delivery.task_id,
        )


def shared_key(graph: str, step: Step, values: Sequence[Value], store: Store) -> bytes:
    """Return the key of a GLOBAL step's checkpoint for these inputs, as *store* keeps it.

    Raises:
        InvalidArguments: ``key=`` returned neither a message nor str nor bytes.
    """
    # With `Named` in them: swapped names of two values of one type are other inputs.
    inputs = [
        (key.label(value_name(value)), value_bytes(value))
        for key, value in zip(step.inputs, values, strict=True)
    ]
    if step.options.key is not None:
        named: object = step.options.key(*values)
        inputs = [_named_key(step, named)]
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
    plain = input_digest((value_name(value), value_bytes(value)) for value in values)
    return store.hmac_digest(bytes.fromhex(plain)).hex()


def read_checkpoints(plan: Plan, store: Store, lease: Lease) -> dict[tuple[str, str], Checkpoint]:
    """Return the run's checkpoints, by step name and path of the item.

    Raises:
        GraphChanged: One is of a step that the graph no longer has, or that keeps nothing for the run any more.
    """
    if not plan.keeps_run and (not plan.persists or lease.epoch == 1):
        # Nothing to restore; a run that an earlier delivery advanced may hold what another deploy has kept.
        return {}
    names: dict[str, str] = {}
    other_scope: dict[str, str] = {}
    keys: list[bytes] = []
    for planned in plan.steps:
        step = planned.step
        for name in (*step.options.renamed_from, step.name):
            if step.persist is Scope.WORKFLOW:
                names[name] = step.name
                keys.append(workflow_key(lease.graph, lease.execution_id, name))
            elif not plan.stages:
                # A run that fans out keeps what its chunks need of such steps, in the same form.
                now = "has no persist=" if step.persist is None else f"has persist={step.persist}"
                other_scope[name] = f"{step.name} (kept its output for the run, now {now})"
    found: dict[tuple[str, str], Checkpoint] = {}
    changed: list[str] = []
    for checkpoint in store.restore(lease, keys, items=bool(plan.stages)):
        if (present := names.get(checkpoint.step_name)) is not None:
            found.setdefault((present, checkpoint.item), checkpoint)
        elif checkpoint.step_name not in plan.known_names:
            changed.append(checkpoint.step_name)
        elif checkpoint.step_name in other_scope:
            changed.append(other_scope[checkpoint.step_name])
    if changed:
        raise GraphChanged(lease.graph, lease.execution_id, sorted(set(changed)))
    return found


def read_value(step: Step, checkpoint: Checkpoint, delivery: Delivery) -> Value:
    """Return the stored output of *step*.

    Raises:
        CacheMismatch: It is shared, and of another type than the step returns.
        GraphChanged: It is the run's own, and of another type than the step returns now.
        DecodeFailed: The bytes cannot be read, or a field of the type has changed its kind since.
    """
    expected = step.result_name
    if checkpoint.output_type != expected and checkpoint.execution_id is None:
        raise CacheMismatch(delivery.graph, step.name, step.options.cache, checkpoint.output_type, expected)
    if checkpoint.output_type != expected:
        change = f"{step.name} (returned {checkpoint.output_type}, now {expected})"
        raise GraphChanged(delivery.graph, delivery.execution_id, [change])
    check_shape(step.output.kind, checkpoint.output_shape)
    read = many_from_bytes if step.splits else from_bytes
    return read(step.output.kind, checkpoint.output_data)
