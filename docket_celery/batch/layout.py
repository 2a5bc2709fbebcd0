"""What a plan means once its items are in a store: where values are, and which items belong to which chunk."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from docket_celery.engine.checkpointing import read_value
from docket_celery.engine.fan_out import find_fan_outs
from docket_celery.engine.run_context import RunContext
from docket_celery.engine.stored_items import StoredItems
from docket_celery.errors import StepFailed, from_record
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.messages import Value, from_bytes, type_name, value_bytes
from docket_celery.plan.plan import Plan
from docket_celery.plan.step import Step
from docket_celery.store.contract import BatchStore
from docket_celery.store.identity import item_key, workflow_key
from docket_celery.store.records import Checkpoint, ChunkRow

PAGE, PAGE_BYTES = 1000, 4 * 1024 * 1024
"""Most items, and about the most bytes of them, that go to the store in one statement."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the values of a run are stored: *makers* are the steps that make them.

    *fan_outs* are the fan-outs that values are made for each item of; '' is the batch.
    """

    plan: Plan
    execution_id: str
    makers: Mapping[ValueKey, Step]
    fan_outs: Mapping[ValueKey, str]

    @classmethod
    def of(cls, plan: Plan, execution_id: str) -> Layout:
        """Return the layout of *plan* for one run."""
        makers = {planned.step.output: planned.step for planned in plan.steps}
        return cls(plan, execution_id, makers, find_fan_outs(plan))

    def names(self, key: ValueKey) -> tuple[str, ...]:
        """Return the step names under which a value may be stored."""
        return step_names(self.makers[key]) if key in self.makers else ("",)

    def once_key(self, key: ValueKey) -> bytes:
        """Return the cache key of a value that is there once."""
        if key in self.makers:
            return workflow_key(self.plan.graph, self.execution_id, self.makers[key].identity)
        return item_key(self.plan.graph, self.execution_id, "", f"@{key}")

    def count_key(self, fan_out: str) -> bytes:
        """Return the cache key of the row that says how many items a fan-out has."""
        return item_key(self.plan.graph, self.execution_id, fan_out, "@count")

    def shared(self) -> list[ValueKey]:
        """Return the values that are there once: handed in, or made by what runs once."""
        return [key for key in (*self.plan.given, *self.makers) if key not in self.fan_outs]

    def splitters(self) -> list[str]:
        """Return the fan-outs whose items are cut from one value: of the batch, and of steps that run once."""
        return sorted({stage.fan_out for stage in self.plan.stages if stage.fan_out is not None})

    def read_shared(
        self, keys: Iterable[ValueKey], rows: Iterable[Checkpoint], context: RunContext
    ) -> dict[ValueKey, Value]:
        """Return those of *keys*, values that are there once, that *rows* have; raise as `read_value` does."""
        by_key = {row.key: row for row in rows}
        found: dict[ValueKey, Value] = {}
        for key in keys:
            if (row := by_key.get(self.once_key(key))) is not None:
                step, data = self.makers.get(key), row.output_data
                found[key] = from_bytes(key.kind, data) if step is None else read_value(step, row, context)
        return found

    def items(
        self,
        store: BatchStore,
        key: ValueKey,
        total: int,
        failed: Collection[int],
        job_digest: bytes | None = None,
    ) -> StoredItems:
        """Return the items of a value."""
        return StoredItems(
            store=store,
            graph=self.plan.graph,
            execution_id=self.execution_id,
            names=self.names(key),
            kind=key.kind,
            total=total,
            failed=failed,
            job_digest=job_digest,
        )

    def given_row(self, key: ValueKey, value: Value) -> Checkpoint:
        """Return the row of a value that was handed in once."""
        return self._row("", f"@{key}", None, self.once_key(key), type_name(key.kind), value_bytes(value))

    def count_row(self, fan_out: str, count: int) -> Checkpoint:
        """Return the row that says how many items a fan-out has; stored after them."""
        key = self.count_key(fan_out)
        return self._row(fan_out, "@count", None, key, "count", str(count).encode())

    def item_rows(self, fan_out: str, messages: Iterable[Value]) -> Iterator[Checkpoint]:
        """Yield the rows of a fan-out's items."""
        if fan_out:
            kind = next(type_name(key.kind) for key, step in self.makers.items() if step.name == fan_out)
        else:
            assert self.plan.batch is not None
            kind = type_name(self.plan.batch.kind)
        for index, message in enumerate(messages):
            key = item_key(self.plan.graph, self.execution_id, fan_out, str(index))
            yield self._row(fan_out, str(index), index, key, kind, value_bytes(message))

    def _row(
        self, step: str, item: str, index: int | None, key: bytes, output_type: str, data: bytes
    ) -> Checkpoint:
        return Checkpoint(
            key=key,
            graph=self.plan.graph,
            execution_id=self.execution_id,
            step_name=step,
            item=item,
            item_index=index,
            input_hash="",
            output_type=output_type,
            output_data=data,
        )


def paged(rows: Iterable[Checkpoint], every_s: float = math.inf) -> Iterator[list[Checkpoint]]:
    """Yield *rows* in pages that one statement can take, however large they are; *every_s* seconds at the latest."""
    page: list[Checkpoint] = []
    size, since = 0, time.monotonic()
    for row in rows:
        page.append(row)
        size += len(row.output_data)
        if len(page) == PAGE or size >= PAGE_BYTES or time.monotonic() - since >= every_s:
            yield page
            page, size, since = [], 0, time.monotonic()
    if page:
        yield page


def step_names(step: Step) -> tuple[str, ...]:
    """Return the names under which outputs of a step may be stored."""
    return tuple(dict.fromkeys((step.name, *step.options.renamed_from)))


def failures_of(rows: Iterable[ChunkRow]) -> dict[int, StepFailed]:
    """Return why items failed, by index."""
    found: dict[int, StepFailed] = {}
    for row in rows:
        for index, record in row.errors.items():
            error = from_record(record)
            if index == "fatal":
                continue
            if not isinstance(error, StepFailed):
                # Its text could not be stored or read; that it failed must not be lost with that.
                error = StepFailed.from_cause("of the stage", 1, False, error)
                error.place(index)
            found[int(index)] = error
    return found
