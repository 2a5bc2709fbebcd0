"""One delivery of a batch over several workers: of the run from stage to stage, or of one chunk of a stage.

Everything that a delivery needs to know lies in the store, so any delivery of the run can carry on from there: the
one that opened it, the body of a chord, a copy of either, or a later submission under the same execution id.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from google.protobuf.message import Message

from docket_celery.batch.layout import (
    Layout,
    failures_of,
    fatal_of,
    find_progress,
    is_undone,
    paged,
    stage_rows,
    step_names,
)
from docket_celery.batch.options import BatchOptions
from docket_celery.engine.checkpointing import read_value
from docket_celery.engine.ending import Ending, Outcome
from docket_celery.engine.execution import join_failures
from docket_celery.engine.fan_out import make_item, policy_of, tolerant_fan_out, too_many
from docket_celery.engine.job import job_parts
from docket_celery.engine.outcome import OpenStage, RunOutcome, Submission
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run import Run
from docket_celery.engine.stored_items import ItemPlace, StoredBatch, StoredItems
from docket_celery.errors import DocketError, GraphChanged, RunNotFound, RunQuarantined, StepFailed
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.messages import Value, frame, from_bytes
from docket_celery.plan.plan import Plan, Stage
from docket_celery.store.contract import BatchStore, Store
from docket_celery.store.records import Checkpoint, ChunkRow, Lease, RunRequest, RunState


class BatchRun(Run):
    """Drives one delivery of a run whose stages other tasks work on.

    Args:
        plan: What to do; a part of it runs for each item.
        inputs: The given values, in the order of ``plan.given``; None: they lie in the store.
        submission: Who asks for it.
        settings: Those in force.
        store: Where everything lies.
        options: How the batch is to be worked on.
        message: What whoever finds the run lost needs to go on with it.
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
        super().__init__(plan, inputs or (), submission, settings, store)
        self._message = message
        self._batches, self._options, self._is_first = store, options, inputs is not None
        self._layout = Layout.of(plan, submission.execution_id)
        self._values: dict[ValueKey, Any] = {}
        self._counts: dict[str, int] = {}
        self._chunks: list[ChunkRow] = []
        self._stored: dict[tuple[str, str], Checkpoint] = {}
        self._failures: dict[str, dict[int, StepFailed]] = {}

    def _request(self, store: Store) -> RunRequest:
        request = super()._request(store)
        given = zip(self._plan.given, self._inputs, strict=False)
        shared = {key: value for key, value in given if key != self._plan.batch}
        job = frame(
            part for name, data in job_parts(shared, shared.values()) for part in (name.encode(), data)
        )
        # The items lie in rows of their own.
        return replace(request, job=job)

    # --- what is stored ----------------------------------------------------------------------------------------

    def _advance(self, lease: Lease) -> None:
        self._delivery = self._new_delivery(lease.epoch)
        self._delivery.keeps = frozenset(
            planned.step.name
            for part in self._plan.stages
            for planned in part.plan.steps
            if part.fan_out is None and planned.step.output in part.outputs and not planned.step.splits
        )
        try:
            self._load(lease)
            self._carry_on(0)
        except Exception as error:  # noqa: BLE001 -- the lease is held: the run must end in order
            self._end(Outcome(error=error))

    def _load(self, lease: Lease) -> None:
        """Read what is stored already; a delivery that has the job adds what is missing of that."""
        stored: dict[bytes, Checkpoint] = {}
        if lease.epoch > 1 or not self._is_first:
            layout = self._layout
            keys = [layout.once_key(key) for key in layout.shared()]
            keys += [layout.count_key(fan_out) for fan_out in layout.splitters()]
            stored = {one.key: one for one in self._batches.restore(lease, keys)}
            self._check_names(lease)
            self._note_stored(stored.values())
            self._chunks = self._batches.find_chunks(lease.graph, lease.execution_id)
        self._take(stored)
        if self._is_first:
            self._store_job(lease)
        elif any(key not in self._values and key != self._plan.batch for key in self._plan.given) or (
            self._plan.batch is not None and "" not in self._counts
        ):
            raise RunNotFound(lease.graph, lease.execution_id)

    def _check_names(self, lease: Lease) -> None:
        """Look for outputs of steps that are gone.

        Raises:
            GraphChanged: There are some.
        """
        found = self._batches.find_names(lease.graph, lease.execution_id)
        if gone := found - self._plan.known_names - {""}:
            raise GraphChanged(lease.graph, lease.execution_id, sorted(gone))

    def _note_stored(self, stored: Iterable[Checkpoint]) -> None:
        """Note what steps that run once have stored."""
        names = {name: p.step.name for p in self._plan.steps for name in step_names(p.step)}
        for one in stored:
            if one.item == "" and one.step_name in names:
                self._stored.setdefault((names[one.step_name], ""), one)

    def _take(self, stored: Mapping[bytes, Checkpoint]) -> None:
        layout = self._layout
        for fan_out in layout.splitters():
            if (row := stored.get(layout.count_key(fan_out))) is not None:
                self._counts[fan_out] = int(row.output_data)
        for key in layout.shared():
            if (row := stored.get(layout.once_key(key))) is not None:
                step = layout.makers.get(key)
                read = from_bytes(key.kind, row.output_data) if step is None else None
                self._values[key] = read if step is None else read_value(step, row, self._delivery)

    def _store_job(self, lease: Lease) -> None:
        given = dict(zip(self._plan.given, self._inputs, strict=True))
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
        # After the items: whoever finds how many there are finds them all.
        count = len(messages)
        self._batches.close_items(lease, fan_out, count, [*beside, self._layout.count_row(fan_out, count)])
        self._counts[fan_out] = count

    # --- part by part ------------------------------------------------------------------------------------------

    def _carry_on(self, index: int) -> None:
        """Go on with part *index*: run it, open it for others, or pass it if it is done."""
        for number, part in enumerate(self._plan.stages[index:], index):
            if self._cancellation.error is not None:
                self._end(Outcome(error=self._cancellation.error))
                return
            if part.fan_out is None:
                outputs = [key for key in part.outputs if not self._is_made(key)]
                if outputs:
                    self._run_once(number, part, outputs)
                    return
            elif not self._is_past(number + 1, part, part.fan_out):
                return
        failed = self._failures.get(tolerant_fan_out(self._plan) or "", {})
        self._end(Outcome(values=(self._result(),), failed=failed))

    def _is_made(self, key: ValueKey) -> bool:
        fan_out = self._layout.fan_outs.get(key)
        return key in self._values if fan_out is None else fan_out in self._counts

    def _run_once(self, number: int, part: Stage, outputs: Sequence[ValueKey]) -> None:
        inputs = [self._gather(key, part) for key in part.plan.given]

        def ended(outcome: Outcome) -> None:
            self._runtime.submit_or_retry(functools.partial(self._once_ended, number, outputs, outcome))

        execution: Ending = make_item(
            part,
            outputs,
            inputs,
            self._delivery,
            ended,
            stored=self._stored,
            limit=max(1, self._settings.threads),
        )
        execution.start()
        self._execution = execution
        if self._cancellation.error is not None:
            execution.abort(self._cancellation.error)
        elif not execution.closed:
            execution.dispatch()

    def _once_ended(self, number: int, outputs: Sequence[ValueKey], outcome: Outcome) -> None:
        self._execution = None
        try:
            if outcome.error is not None or self._held is None:
                self._end(outcome)
                return
            lease = self._held.lease
            values = dict(zip(outputs, outcome.values, strict=True))
            if kept := list(self._delivery.kept):
                self._batches.save_many(lease, kept)
                self._delivery.kept.clear()
            for key, value in values.items():
                if key in self._layout.fan_outs:
                    self._store_items(lease, self._layout.fan_outs[key], value)
                else:
                    self._values[key] = value
            self._carry_on(number + 1)
        except Exception as error:  # noqa: BLE001 -- the lease is held: the run must end in order
            self._end(Outcome(error=error))

    def _is_past(self, stage: int, part: Stage, fan_out: str) -> bool:
        """Tell whether a stage is done; else open it for others, or fail."""
        rows, total = stage_rows(self._chunks, stage), self._counts[fan_out]
        policy = policy_of(self._plan, part, self._options.policy)
        failures = self._failures.setdefault(fan_out, {})
        earlier = len(failures)
        failures |= failures_of(rows)
        error = fatal_of(rows) or self._quarantine(rows) or too_many(policy, failures, total)
        if error is None and any(row.state in {RunState.FAILED, RunState.CANCELLED} for row in rows):
            # Under the policy of whoever opened the stage it has failed, whatever another submission would allow:
            # items of such a chunk were never worked on. Submitting the batch again puts them back.
            error = join_failures([failures[index] for index in sorted(failures)])
        if error is not None:
            self._end(Outcome(error=error))
            return False
        chunks = [row.chunk for row in rows] or self._options.cut(stage, total)
        undone = [row.chunk for row in rows if is_undone(row)] if rows else chunks
        if not undone:
            return True
        assert self._held is not None
        progress = find_progress(self._plan, stage, rows, total)
        size = chunks[0].hi - chunks[0].lo
        lanes = self._batches.open_stage(
            self._held.lease,
            stage,
            [] if rows else chunks,
            policy.allowed(total) - earlier,
            self._delivery.rows,
            progress=progress,
            lanes=self._options.lanes(len(chunks)),
            message=self._message,
        )
        self._delivery.heartbeat().unwatch(self._held)
        opened = OpenStage(stage=stage, chunks=tuple(undone), total=total, chunk_size=size, lanes=lanes)
        self._conclude(RunOutcome(opened=opened, progress=progress))
        return False

    def _quarantine(self, rows: Sequence[ChunkRow]) -> DocketError | None:
        if not any(row.state is RunState.QUARANTINED for row in rows):
            return None
        lease = self._layout
        return RunQuarantined(lease.graph, lease.execution_id, self._settings.max_deliveries)

    # --- values ------------------------------------------------------------------------------------------------

    def _gather(self, key: ValueKey, part: Stage) -> Any:
        """Return a value as a step that runs once sees it; a list only where one is asked for."""
        if key not in self._layout.fan_outs:
            return self._values.get(key)
        items = self._items(key)
        steps = [planned.step for planned in part.plan.steps if key in planned.step.inputs]
        # An async step would read the store on the loop.
        lazy = all(not step.is_async and step.gathered[step.inputs.index(key)] != "list" for step in steps)
        return items if lazy else list(items)

    def _items(self, key: ValueKey, job_digest: bytes | None = None) -> StoredItems:
        layout = self._layout
        place = ItemPlace(
            graph=layout.graph,
            execution_id=layout.execution_id,
            names=layout.names(key),
            kind=key.kind,
            total=self._counts[layout.fan_outs[key]],
            failed=self._failures.get(layout.fan_outs[key], {}).keys(),
            job_digest=job_digest,
        )
        return StoredItems(self._batches, place)

    def _result(self) -> Any:
        target = self._plan.target
        if not self._plan.collects:
            return self._values[target]
        digest = self.submission.job_digest
        items = self._items(target, None if digest is None else self._batches.hmac_digest(digest))
        collects = self._options.policy.on_error == "collect"
        errors = self._failures.get(self._layout.fan_outs[target], {})
        batch = StoredBatch(items=items, collects=collects, errors=errors)
        found: list[Any] | BatchResult[Any] | StoredBatch = batch
        if items.weight() <= self._settings.max_list_bytes:
            found = batch.load()
        return found
