"""One delivery of a batch over several workers: from stage to stage.

Everything that a delivery needs to know is in the store, so any delivery of the run can continue it: the one that
opened it, the body of a chord, a copy of either, or a later submission under the same execution id.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from google.protobuf.message import Message

from docket_celery.batch.layout import Layout, failures_of, paged, step_names
from docket_celery.batch.options import BatchOptions
from docket_celery.engine.execution import join_failures
from docket_celery.engine.fan_out import make_item, policy_of, tolerant_fan_out, too_many
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run import Run
from docket_celery.engine.run_context import Ending, OpenStage, RunOutcome, Submission
from docket_celery.engine.run_row import frame_job
from docket_celery.engine.stored_items import StoredBatch, StoredItems
from docket_celery.errors import (
    DocketError,
    GraphChanged,
    RunNotFound,
    RunQuarantined,
    StepFailed,
    from_record,
)
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.batch import BatchPolicy
from docket_celery.plan.messages import Value
from docket_celery.plan.plan import Plan, Stage
from docket_celery.store.contract import BatchStore
from docket_celery.store.records import Checkpoint, ChunkRow, Lease, Progress, RunRequest, RunRow, RunState

_UNDONE = (RunState.QUEUED, RunState.RUNNING)


class BatchRun(Run):
    """Drives one delivery of a run whose stages other tasks work on; without *inputs* they are in the store.

    A run that was lost is continued with *message*.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Value] | None,
        submission: Submission,
        settings: Settings,
        store: BatchStore,
        options: BatchOptions,
        message: bytes | None = None,
    ) -> None:
        super().__init__(plan, inputs or (), replace(submission, has_row=True), settings, store)
        self._batches, self._options, self._message = store, options, message
        self._given = None if inputs is None else dict(zip(plan.given, inputs, strict=True))
        self._layout = Layout.of(plan, submission.execution_id)
        self._values: dict[ValueKey, Any] = {}
        self._counts: dict[str, int] = {}
        self._chunks: list[ChunkRow] = []
        self._failures: dict[str, dict[int, StepFailed]] = {}

    def _request(self) -> RunRequest:
        # The items are in rows of their own.
        shared = {key: value for key, value in (self._given or {}).items() if key != self._plan.batch}
        return replace(super()._request(), job=frame_job(shared, shared.values()))

    def _ask(self, request: RunRequest) -> Lease | RunRow:
        return self._batches.acquire(request)

    def _advance(self, lease: Lease) -> None:
        self.context.keeps = frozenset(
            planned.step.name
            for stage in self._plan.stages
            for planned in stage.plan.steps
            if stage.fan_out is None and planned.step.output in stage.outputs and not planned.step.splits
        )
        self._load(lease)
        self._life = self._run_stages(lease)
        self._go_on()

    def _load(self, lease: Lease) -> None:
        """Read what is stored already; a delivery that has the job adds what is missing of that.

        Raises `GraphChanged` for outputs of steps that are gone, and `RunNotFound` where the job is.
        """
        plan = self._plan
        if lease.epoch > 1 or self._given is None:
            layout = self._layout
            keys = [layout.once_key(key) for key in layout.shared()]
            keys += [layout.count_key(fan_out) for fan_out in layout.splitters()]
            stored = {one.key: one for one in self._batches.restore(lease, keys)}
            found = self._batches.find_names(lease.graph, lease.execution_id)
            if gone := found - plan.known_names - {""}:
                raise GraphChanged(lease.graph, lease.execution_id, sorted(gone))
            self._take(stored)
            self._chunks = self._batches.find_chunks(lease.graph, lease.execution_id)
        if self._given is not None:
            self._store_job(lease, self._given)
        elif any(key not in self._values and key != plan.batch for key in plan.given) or (
            plan.batch is not None and "" not in self._counts
        ):
            raise RunNotFound(lease.graph, lease.execution_id)

    def _take(self, stored: Mapping[bytes, Checkpoint]) -> None:
        """Take the values that are there once, and how many items there are."""
        layout = self._layout
        names = {name: p.step.name for p in self._plan.steps for name in step_names(p.step)}
        once = [one for one in stored.values() if one.item == "" and one.step_name in names]
        # Of two rows the first counts.
        self.context.stored = {(names[one.step_name], ""): one for one in reversed(once)}
        for fan_out in layout.splitters():
            if (row := stored.get(layout.count_key(fan_out))) is not None:
                self._counts[fan_out] = int(row.output_data)
        self._values |= layout.read_shared(layout.shared(), stored.values(), self.context)

    def _store_job(self, lease: Lease, given: Mapping[ValueKey, Value]) -> None:
        batch = self._plan.batch
        shared = {key: value for key, value in given.items() if key != batch}
        rows = [self._layout.given_row(key, shared[key]) for key in shared if key not in self._values]
        self._values |= shared
        if batch is not None and "" not in self._counts:
            self._store_items(lease, "", cast("Sequence[Message]", given[batch]), rows)
        elif rows:
            self._batches.save_many(lease, rows)

    def _store_items(
        self, lease: Lease, fan_out: str, messages: Sequence[Any], beside: Sequence[Checkpoint] = ()
    ) -> None:
        for page in paged(self._layout.item_rows(fan_out, messages)):
            self._batches.put_items(lease, page)
        # After the items: a reader that finds how many there are finds them all.
        count = len(messages)
        self._batches.close_items(lease, fan_out, count, [*beside, self._layout.count_row(fan_out, count)])
        self._counts[fan_out] = count

    def _go_on(self, values: Sequence[Any] | None = None, error: BaseException | None = None) -> None:
        """Continue with the *values* of a stage that has run here."""
        self._execution = None
        try:
            if error is not None:
                self._end((), error)
                return
            with contextlib.suppress(StopIteration):
                self._begin(self._life.send(values))
        except Exception as failure:  # noqa: BLE001 -- the lease is held: the run must end in order
            self._end((), failure)

    def _run_stages(self, lease: Lease) -> Generator[Ending, Any]:
        """Run a stage here, pass one that is done, or open one for others and conclude."""
        for number, stage in enumerate(self._plan.stages, 1):
            error: BaseException | None = self.context.cancellation.error
            if error is None and stage.fan_out is not None:
                rows = [row for row in self._chunks if row.chunk.stage == number]
                total = self._counts[stage.fan_out]
                policy = policy_of(self._plan, stage, self._options.policy)
                failures = self._failures.setdefault(stage.fan_out, {})
                allowed = policy.allowed(total) - len(failures)
                failures |= failures_of(rows)
                error = self._find_failure(rows, failures, policy, total)
                if error is None and self._open_stage(lease, number, rows, total, allowed):
                    return
            elif error is None and (outputs := [key for key in stage.outputs if not self._is_made(key)]):
                self._take_made(lease, outputs, (yield self._run_once(stage, outputs)))
            if error is not None:
                self._end((), error)
                return
        self.context.failed = self._failures.get(tolerant_fan_out(self._plan) or "", {})
        self._end((self._result(),), None)

    def _is_made(self, key: ValueKey) -> bool:
        fan_out = self._layout.fan_outs.get(key)
        return key in self._values if fan_out is None else fan_out in self._counts

    def _run_once(self, stage: Stage, outputs: Sequence[ValueKey]) -> Ending:
        def ended(values: Sequence[Any], error: BaseException | None) -> None:
            self.context.runtime.submit_or_retry(functools.partial(self._go_on, values, error))

        inputs = [self._gather(key, stage) for key in stage.plan.given]
        return make_item(stage, inputs, self.context, ended, outputs)

    def _take_made(self, lease: Lease, outputs: Sequence[ValueKey], values: Sequence[Any]) -> None:
        """Store and take what a stage made that runs once."""
        if kept := self.context.kept:
            self._batches.save_many(lease, kept)
            kept.clear()
        for key, value in zip(outputs, values, strict=True):
            if key in self._layout.fan_outs:
                self._store_items(lease, self._layout.fan_outs[key], value)
            else:
                self._values[key] = value

    def _find_failure(
        self, rows: Sequence[ChunkRow], failures: Mapping[int, StepFailed], policy: BatchPolicy, total: int
    ) -> DocketError | None:
        """Return what fails the run, by the chunks of a stage."""
        states, context = {row.state for row in rows}, self.context
        fatal = (from_record(row.errors["fatal"]) for row in rows if "fatal" in row.errors)
        error: DocketError | None = next(fatal, None)
        if error is None and RunState.QUARANTINED in states:
            return RunQuarantined(context.graph, context.execution_id, context.settings.max_deliveries)
        error = error or too_many(policy, failures, total)
        if error is None and states & {RunState.FAILED, RunState.CANCELLED}:
            # Under the policy that the stage was opened with it has failed, whatever this submission would allow:
            # items of such a chunk were never worked on. Submitting the batch again puts them back.
            return join_failures([failures[index] for index in sorted(failures)])
        return error

    def _open_stage(
        self, lease: Lease, number: int, rows: Sequence[ChunkRow], total: int, allowed: int
    ) -> bool:
        """Open a stage for other tasks and conclude; False: nothing of it is to be done."""
        chunks = [row.chunk for row in rows] or self._options.cut(number, total)
        undone = [row.chunk for row in rows if row.state in _UNDONE] if rows else chunks
        if not undone:
            return False
        done = sum(row.chunk.hi - row.chunk.lo for row in rows if row.state is RunState.SUCCEEDED)
        stages = [n for n, each in enumerate(self._plan.stages, 1) if each.fan_out is not None]
        progress = Progress(done=done, total=total, stage=stages.index(number) + 1, stages=len(stages))
        lanes = self._batches.open_stage(
            lease,
            number,
            [] if rows else chunks,
            allowed,
            self.context.rows,
            progress=progress,
            lanes=self._options.lanes(len(chunks)),
            message=self._message,
        )
        if self.context.held is not None:
            self.context.heartbeat().unwatch(self.context.held)
        opened = OpenStage(
            stage=number,
            chunks=tuple(undone),
            chunk_size=chunks[0].hi - chunks[0].lo,
            progress=progress,
            lanes=lanes,
        )
        self._conclude(RunOutcome(opened=opened))
        return True

    def _gather(self, key: ValueKey, stage: Stage) -> Any:
        """Return a value as a step that runs once sees it; a list only where one is asked for."""
        if key not in self._layout.fan_outs:
            return self._values.get(key)
        items = self._items(key)
        steps = [planned.step for planned in stage.plan.steps if key in planned.step.inputs]
        # An async step would read the store on the loop.
        lazy = all(not step.is_async and step.gathered[step.inputs.index(key)] != "list" for step in steps)
        return items if lazy else list(iter(items))

    def _items(self, key: ValueKey, job_digest: bytes | None = None) -> StoredItems:
        fan_out = self._layout.fan_outs[key]
        failed = self._failures.get(fan_out, {}).keys()
        return self._layout.items(self._batches, key, self._counts[fan_out], failed, job_digest)

    def _result(self) -> Any:
        target = self._plan.target
        if not self._plan.collects:
            return self._values[target]
        digest = self.context.submission.job_digest
        items = self._items(target, None if digest is None else self._batches.hmac_digest(digest))
        collects = self._options.policy.on_error == "collect"
        errors = self._failures.get(self._layout.fan_outs[target], {})
        batch = StoredBatch(items=items, collects=collects, errors=errors)
        small = batch.load_within(self.context.settings.max_list_bytes)
        return batch if small is None else small
