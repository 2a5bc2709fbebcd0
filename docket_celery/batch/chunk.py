"""One delivery of one chunk: some items of a stage, read in one statement and written in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from docket_celery.batch.layout import Layout, failures_of, step_names
from docket_celery.batch.options import BatchOptions
from docket_celery.engine.fan_out import ItemGroup, make_item, policy_of
from docket_celery.engine.process.heartbeat import HeldLease
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run import Run
from docket_celery.engine.run_context import Ending, OnEnd, RunOutcome, Submission
from docket_celery.engine.stored_items import read_item
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
from docket_celery.plan.plan import Plan, Stage
from docket_celery.store.contract import BatchStore
from docket_celery.store.records import (
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
    """Drives one delivery of a chunk: of the stage *number* of *plan*, from 1, the items from index *lo*.

    At most *limit* items run at once; None: as many as there are threads.
    """

    def __init__(
        self,
        plan: Plan,
        submission: Submission,
        settings: Settings,
        store: BatchStore,
        options: BatchOptions,
        number: int,
        lo: int,
        limit: int | None = None,
    ) -> None:
        super().__init__(plan, (), replace(submission, max_concurrency=limit, has_row=True), settings, store)
        self._batches, self._number, self._lo = store, number, lo
        self._policy = options.policy
        self._layout = Layout.of(plan, submission.execution_id)
        self._stopped = RunCancelled(submission.execution_id, "its batch was stopped")
        self._skips: frozenset[int] = frozenset()
        self._work: ItemGroup | None = None
        self._ending = ChunkEnd(state=RunState.QUEUED)
        self._progress: Progress | None = None

    def _acquire(self, asked_at: float) -> HeldLease | None:
        context, submission, settings = self.context, self.context.submission, self.context.settings
        found = self._batches.lease_chunk(
            ChunkRequest(
                graph=context.graph,
                execution_id=context.execution_id,
                stage=self._number,
                lo=self._lo,
                owner=context.owner,
                lease_s=settings.lease_seconds,
                max_deliveries=settings.max_deliveries,
                task_id=submission.task_id,
                retries=submission.retries,
                ended_cleanly=submission.ended_cleanly,
            )
        )
        if not isinstance(found, ChunkRefusal):
            return self._hold(found, asked_at)
        if found.reason is ChunkStop.BUSY:
            self._conclude(RunOutcome(busy_s=found.lease_left_s))
        else:
            self._conclude(RunOutcome(receipt={"lo": self._lo, "state": found.reason.value}))
        return None

    def _advance(self, lease: Lease) -> None:
        stages = self._plan.stages
        stage = stages[self._number - 1] if 0 < self._number <= len(stages) else None
        if stage is None or stage.fan_out is None or lease.chunk is None:
            raise GraphChanged(lease.graph, lease.execution_id, [f"stage {self._number} of the batch"])
        self._policy = policy_of(self._plan, stage, self._policy)
        made = {planned.step.name for planned in stage.plan.steps if planned.step.output in stage.outputs}
        self.context.keeps = frozenset(made)
        self._work = self._read_items(stage, lease.chunk)
        self._begin(self._work)

    def _read_items(self, stage: Stage, chunk: Chunk) -> ItemGroup:
        """Return the items of the chunk, with what is stored of them."""
        layout, run = self._layout, (self.context.graph, self.context.execution_id)
        steps = {name: planned.step for planned in stage.plan.steps for name in step_names(planned.step)}
        each = {key: layout.names(key) for key in stage.plan.given if key in stage.each}
        shared = [key for key in stage.plan.given if key not in stage.each]
        names = sorted({*steps, *(name for names in each.values() for name in names)})
        keys = [layout.once_key(key) for key in shared]
        rows = self._batches.read_items(*run, names, chunk.lo, chunk.hi, keys)
        skips: set[int] = set()
        before = enumerate(self._plan.stages[: self._number - 1], 1)
        if earlier := {number for number, each in before if each.fan_out == stage.fan_out}:
            found = self._batches.find_failed(*run, chunk.lo, chunk.hi)
            skips |= failures_of(row for row in found if row.chunk.stage in earlier).keys()
        values: dict[ValueKey, Any] = layout.read_shared(shared, rows, self.context)
        if missing := [key for key in shared if key not in values]:
            raise GraphChanged(*run, [f"{missing[0]} of the batch"])
        own = [row for row in rows if row.item == str(row.item_index)]
        for key, names_of in each.items():
            made = {int(row.item): read_item(key.kind, row) for row in own if row.step_name in names_of}
            values[key] = made
            layout.items(self._batches, key, chunk.hi, skips).check_complete(range(chunk.lo, chunk.hi), made)
        self._skips = frozenset(skips & set(range(chunk.lo, chunk.hi)))
        self.context.stored = {
            (steps[row.step_name].name, row.item): row for row in rows if row.step_name in steps
        }

        def make(place: int, on_end: OnEnd) -> Ending:
            index = chunk.lo + place
            inputs = [values[key][index] if key in stage.each else values[key] for key in stage.plan.given]
            return make_item(stage, inputs, replace(self.context, item=str(index)), on_end, stage.outputs)

        count = chunk.hi - chunk.lo
        # Left out by being given a failure; it is none of this chunk's.
        left_out = StepFailed("", 0, False, "", "")
        return ItemGroup(
            count,
            make,
            self._end_on_pool,
            limit=self.context.most_items,
            allowed=0 if self._policy.on_error == "fail" else count,
            failed={index - chunk.lo: left_out for index in self._skips},
        )

    def poll(self) -> float:
        """As for any run; and end early where the rest of the stage is stopped or failing."""
        wait_s = super().poll()
        halt = None if self.context.held is None else self.context.held.halt
        if halt is Halt.STOPPED:
            self.stop(self._stopped)
        elif halt is Halt.FAILING and self._work is not None:
            self._work.hold()
        return wait_s

    def _end(self, _: Sequence[Any], error: BaseException | None, /) -> None:
        """Write how the chunk ended, then report."""
        context, work = self.context, self._work
        failures = {} if work is None else {self._lo + place: each for place, each in work.failures.items()}
        failures = {index: each for index, each in failures.items() if index not in self._skips}
        parked = None if error is self._stopped else self._find_parked(error, failures)
        if context.held is None:
            self._conclude(parked or self.parked_or_failed(error or RuntimeError("no lease")))
            return
        state, errors = RunState.SUCCEEDED, {str(i): to_record(each) for i, each in failures.items()}
        if parked is not None:
            state, errors = RunState.QUEUED, {}
        elif error is not None:
            state = RunState.FAILED
            if error is not self._stopped:
                if not isinstance(error, DocketError):
                    error = RunCancelled(context.execution_id, repr(error))
                errors["fatal"] = to_record(error)
        elif (failures and self._policy.on_error == "fail") or work is None or not work.complete:
            state = RunState.FAILED
        self._ending = ChunkEnd(
            state=state,
            checkpoints=tuple(context.kept),
            executions=tuple(context.rows),
            errors=errors,
            stops="fatal" in errors,
            wake_in_s=(parked and parked.park_s) or 0.0,
        )
        receipt = {"lo": self._lo, "state": state.value, "failed": len(failures)}
        self._write_end(parked or RunOutcome(receipt=receipt), context.held, tries=1)

    def _find_parked(
        self, error: BaseException | None, failures: Mapping[int, StepFailed]
    ) -> RunOutcome | None:
        """Return how the delivery ends if another one is to continue the chunk."""
        submission, held = self.context.submission, self.context.held
        # A chunk's retries are Celery's own: the run's row counts those of the run.
        lease = None if held is None else replace(held.lease, failures=submission.retries)
        for each in (error,) if error is not None else failures.values():
            found = self.parked_or_failed(each, lease)
            if found.park_s is not None:
                return found
        hands_back = (LeaseLost, StoreUnavailable, *submission.hands_back)
        if error is not None and (not isinstance(error, Exception) or isinstance(error, hands_back)):
            return RunOutcome(error=error)
        return None

    def _write(self, result: RunOutcome, lease: Lease) -> None:
        ending = self._ending
        if isinstance(result.error, CodecFailed):
            # An output cannot be stored as it must be; the batch ends all the same, with that as its error.
            errors = {"fatal": to_record(result.error)}
            ending = ChunkEnd(state=RunState.FAILED, errors=errors, stops=True)
        self._progress = self._batches.end_chunk(lease, ending)

    def _conclude(self, outcome: RunOutcome) -> None:
        """Tell listeners how far the stage is, too."""
        progress = self._progress
        if progress is not None:
            self.context.tell(EventKind.BATCH_PROGRESS, done=progress.done, total=progress.total)
        super()._conclude(outcome)
