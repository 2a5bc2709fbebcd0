"""One delivery of one chunk: some items of a stage, read in one statement and written in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from docket_celery.batch.layout import Layout, earlier_stages, failures_of, find_stage, step_names
from docket_celery.batch.options import BatchOptions
from docket_celery.engine.checkpointing import read_value
from docket_celery.engine.ending import Ending, Outcome
from docket_celery.engine.fan_out import Stored, make_item, policy_of
from docket_celery.engine.items import ItemGroup
from docket_celery.engine.outcome import RunOutcome, Submission
from docket_celery.engine.process.heartbeat import HeldLease
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run import Run
from docket_celery.engine.stored_items import ItemPlace, check_complete, read_item
from docket_celery.errors import (
    CodecFailed,
    DocketError,
    GraphChanged,
    LeaseLost,
    RunCancelled,
    StepFailed,
    StoreUnavailable,
    to_record,
)
from docket_celery.observe.events import EventKind
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.messages import Value, from_bytes
from docket_celery.plan.plan import Plan, Stage
from docket_celery.store.contract import BatchStore
from docket_celery.store.records import (
    Checkpoint,
    Chunk,
    ChunkEnd,
    ChunkRefusal,
    ChunkRequest,
    ChunkStop,
    Halt,
    Lease,
    Progress,
    RunState,
)


class ChunkRun(Run):
    """Drives one delivery of a chunk.

    Args:
        plan: The whole run's.
        submission: Who asks for it.
        settings: Those in force.
        store: Where everything lies.
        options: How the batch is to be worked on.
        stage: Which stage, counted from 1.
        lo: Index of the chunk's first item.
        limit: Most items at once; None: as many as there are threads.
    """

    def __init__(
        self,
        plan: Plan,
        submission: Submission,
        settings: Settings,
        store: BatchStore,
        options: BatchOptions,
        stage: int,
        lo: int,
        limit: int | None = None,
    ) -> None:
        super().__init__(plan, (), submission, settings, store)
        self._most = limit
        self._limit = max(1, settings.threads if limit is None else min(limit, settings.threads))
        self._stopped = RunCancelled(submission.execution_id, "its batch was stopped")
        self._progress: Progress | None = None
        self._batches, self._options, self._stage, self._lo = store, options, stage, lo
        self._policy = options.policy
        self._layout = Layout.of(plan, submission.execution_id)
        self._work: ItemGroup | None = None
        self._skips: frozenset[int] = frozenset()
        self._ending = ChunkEnd(state=RunState.QUEUED)

    # --- beginning ---------------------------------------------------------------------------------------------

    def _acquire(self) -> Lease | None:
        asked_at, submission, settings = self._cancellation.now(), self.submission, self._settings
        if self._cancellation.error is not None:
            self._conclude(RunOutcome(error=self._cancellation.error))
            return None
        found = self._batches.lease_chunk(
            ChunkRequest(
                graph=self._plan.graph,
                execution_id=submission.execution_id,
                stage=self._stage,
                lo=self._lo,
                owner=self._owner,
                lease_s=settings.lease_seconds,
                max_deliveries=settings.max_deliveries,
                task_id=submission.task_id,
                retries=submission.retries,
                ended_cleanly=submission.ended_cleanly,
            )
        )
        if isinstance(found, ChunkRefusal):
            busy = found.lease_left_s if found.reason is ChunkStop.BUSY else None
            receipt = None if busy is not None else {"lo": self._lo, "state": found.reason.value}
            self._conclude(RunOutcome(busy_s=busy, receipt=receipt))
            return None
        self._held = HeldLease(found, asked_at, settings.trust_margin_s, self._cancellation.now)
        self._delivery.heartbeat().watch(self._held)
        return found

    def _advance(self, lease: Lease) -> None:
        part = find_stage(self._plan, self._stage)
        self._delivery = self._new_delivery(lease.epoch)
        try:
            if part is None or lease.chunk is None:
                raise GraphChanged(lease.graph, lease.execution_id, [f"stage {self._stage} of the batch"])
            work = self._work = self._make(part, lease.chunk)
            self._execution = work
            if self._cancellation.error is not None:
                work.abort(self._cancellation.error)
            else:
                work.dispatch()
        except Exception as error:  # noqa: BLE001 -- the lease is held: the chunk must end in order
            self._end(Outcome(error=error))

    def _make(self, part: Stage, chunk: Chunk) -> ItemGroup:
        layout, plan = self._layout, self._plan
        self._policy = policy_of(plan, part, self._options.policy)
        steps = {name: planned.step for planned in part.plan.steps for name in step_names(planned.step)}
        made = {planned.step.name for planned in part.plan.steps if planned.step.output in part.outputs}
        self._delivery.keeps = frozenset(made)
        each = {key: layout.names(key) for key in part.plan.given if key in part.each}
        shared = [key for key in part.plan.given if key not in part.each]
        names = sorted({*steps, *(name for names in each.values() for name in names)})
        keys = [layout.once_key(key) for key in shared]
        run = (plan.graph, self.submission.execution_id)
        rows = self._batches.read_items(*run, names, chunk.lo, chunk.hi, keys)
        values = {key: _by_index(key, rows, names) for key, names in each.items()}
        skips: set[int] = set()
        if earlier := earlier_stages(plan, self._stage):
            found = self._batches.find_failed(*run, chunk.lo, chunk.hi)
            skips |= failures_of(row for row in found if row.chunk.stage in earlier).keys()
        for key, found_values in values.items():
            place = ItemPlace(
                graph=plan.graph,
                execution_id=self.submission.execution_id,
                names=each[key],
                kind=key.kind,
                total=chunk.hi,
                failed=skips,
            )
            check_complete(place, range(chunk.lo, chunk.hi), found_values)
        self._skips = frozenset(skips & set(range(chunk.lo, chunk.hi)))
        stored = {(steps[row.step_name].name, row.item): row for row in rows if row.step_name in steps}
        return self._group(part, chunk, {**self._read_shared(shared, rows), **values}, stored)

    def _group(self, part: Stage, chunk: Chunk, values: Mapping[ValueKey, Any], stored: Stored) -> ItemGroup:
        """Return the items of the chunk.

        Args:
            part: What to do for each of them.
            chunk: Which they are.
            values: The given values; those that each item has its own of by index.
            stored: The checkpoints of these items.
        """

        def make(number: int, on_end: Callable[[Outcome], None]) -> Ending:
            index = chunk.lo + number
            return make_item(
                part,
                part.outputs,
                [values[key][index] if key in part.each else values.get(key) for key in part.plan.given],
                replace(self._delivery, item=str(index)),
                on_end,
                stored=stored,
                limit=self._limit,
                max_concurrency=self._most,
            )

        count = chunk.hi - chunk.lo
        allowed = 0 if self._policy.on_error == "fail" else count
        items = ItemGroup(count, make, self._end_on_pool, limit=self._limit, allowed=allowed)
        # Left out by being given a failure; it is none of this chunk's.
        left_out = StepFailed("", 0, False, "", "")
        items.skip({index - chunk.lo: left_out for index in self._skips})
        return items

    def _failures(self) -> dict[int, StepFailed]:
        """Return why items failed in this chunk, by index."""
        if self._work is None:
            return {}
        found = {self._lo + number: failure for number, failure in self._work.failures.items()}
        return {index: failure for index, failure in found.items() if index not in self._skips}

    def _read_shared(self, keys: Sequence[ValueKey], rows: Sequence[Checkpoint]) -> dict[ValueKey, Value]:
        found: dict[ValueKey, Value] = {}
        by_key = {row.key: row for row in rows}
        for key in keys:
            row, step = by_key.get(self._layout.once_key(key)), self._layout.makers.get(key)
            if row is None:
                raise GraphChanged(self._plan.graph, self.submission.execution_id, [f"{key} of the batch"])
            found[key] = (
                from_bytes(key.kind, row.output_data)
                if step is None
                else read_value(step, row, self._delivery)
            )
        return found

    # --- while it runs -----------------------------------------------------------------------------------------

    def poll(self) -> float:
        """As for any run; and end early where the rest of the stage has come to nothing."""
        wait_s = super().poll()
        halt = None if self._held is None else self._held.halt
        if halt is Halt.STOPPED:
            self.stop(self._stopped)
        elif halt is Halt.FAILING and self._work is not None:
            self._work.hold()
        return wait_s

    # --- ending ------------------------------------------------------------------------------------------------

    def _end(self, outcome: Outcome) -> None:
        """Write how the chunk ended, then report."""
        failures = self._failures()
        parked = None if outcome.error is self._stopped else self._find_parked(outcome.error, failures)
        if self._held is None:
            self._conclude(parked or self.parked_or_failed(outcome.error or RuntimeError("no lease")))
            return
        delivery = self._delivery
        state, errors = RunState.SUCCEEDED, {str(i): to_record(error) for i, error in failures.items()}
        if parked is not None:
            state, errors = RunState.QUEUED, {}
        elif outcome.error is self._stopped:
            state = RunState.FAILED
        elif outcome.error is not None:
            state, errors["fatal"] = RunState.FAILED, self._fatal_record(outcome.error)
        elif (failures and self._policy.on_error == "fail") or not (self._work and self._work.complete):
            state = RunState.FAILED
        self._ending = ChunkEnd(
            state=state,
            checkpoints=tuple(delivery.kept),
            executions=tuple(delivery.rows),
            errors=errors,
            stops="fatal" in errors,
            wake_in_s=(parked and parked.park_s) or 0.0,
        )
        receipt = {"lo": self._lo, "state": state.value, "failed": len(failures)}
        self._write_end(parked or RunOutcome(receipt=receipt), self._held, tries=1)

    def _find_parked(
        self, error: BaseException | None, failures: Mapping[int, StepFailed]
    ) -> RunOutcome | None:
        """Return how the delivery ends if another one shall go on with the chunk."""
        submission = self.submission
        # A chunk's retries are Celery's own: the run's row counts those of the run.
        lease = None if self._held is None else replace(self._held.lease, failures=submission.retries)
        for each in (error,) if error is not None else failures.values():
            found = self.parked_or_failed(each, lease)
            if found.park_s is not None:
                return found
        if error is None:
            return None
        ends_process = not isinstance(error, Exception)
        if ends_process or isinstance(error, (LeaseLost, StoreUnavailable, *submission.hands_back)):
            return RunOutcome(error=error)
        return None

    def _fatal_record(self, error: BaseException) -> dict[str, object]:
        if not isinstance(error, DocketError):
            error = RunCancelled(self.submission.execution_id, repr(error))
        return to_record(error)

    def _write(self, result: RunOutcome, lease: Lease) -> None:
        ending = self._ending
        if isinstance(result.error, CodecFailed):
            # An output cannot be stored as it must be; the batch ends all the same, with that as its error.
            errors = {"fatal": to_record(result.error)}
            ending = ChunkEnd(state=RunState.FAILED, errors=errors, stops=True)
        self._progress = self._batches.end_chunk(lease, ending)

    def _conclude(self, outcome: RunOutcome) -> None:
        """Tell how far the stage is, too."""
        progress = self._progress
        if progress is not None:
            self._delivery.tell(EventKind.BATCH_PROGRESS, done=progress.done, total=progress.total)
        super()._conclude(replace(outcome, progress=progress))


def _by_index(key: ValueKey, rows: Sequence[Checkpoint], names: Sequence[str]) -> dict[int, Value]:
    """Return the items' own values of one type."""
    return {
        int(row.item): read_item(key.kind, row)
        for row in rows
        if row.step_name in names and row.item == str(row.item_index)
    }
