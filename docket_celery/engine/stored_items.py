"""The items of a run that are in a store, read page by page."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from google.protobuf.message import Message

from docket_celery.errors import GraphChanged, PayloadUnavailable, StepFailed
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.messages import from_bytes, type_name
from docket_celery.store.contract import BatchStore
from docket_celery.store.records import Checkpoint

PAGE = 1000
"""The most items in memory at once."""
ENVELOPE_BYTES = 100
"""What each item weighs in a task's message or result beside its own bytes: its type's name, and base64."""
GONE = "its row is gone: purged after docket_retention, or deleted; submit the job again"
OTHER_JOB = "it was purged, and its name has another job now; submit it under an execution_id of its own"


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredItems(Sequence[Message]):
    """Items of one value that are read from the store when they are looked at; those that failed are left out.

    *names* are those of the step that made them, present and former; '' for the batch itself. Of *total* items
    those at the indexes in *failed* may be missing. *job_digest* is that of the run that made them, as its row has
    it; None: the reader holds the run.
    """

    store: BatchStore
    graph: str
    execution_id: str
    names: tuple[str, ...]
    kind: type[Message]
    total: int
    failed: Collection[int] = ()
    job_digest: bytes | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Message]:
        return (message for lo in range(0, self.total, PAGE) for _, message in self.page(lo))

    def __getitem__(self, index: int | slice) -> Any:
        return list(iter(self))[index]

    def page(self, lo: int) -> list[tuple[int, Message]]:
        """Return index and message of the items of the page that begins at *lo*, in order.

        Raises `PayloadUnavailable` where one is missing that did not fail, or the run of that name has another job
        now.
        """
        hi = min(lo + PAGE, self.total)
        rows = self.store.read_items(
            self.graph, self.execution_id, self.names, lo, hi, job_digest=self.job_digest
        )
        if not rows and self.job_digest is not None:
            # Of another run nothing is read, so this need not be asked for each page; the row may be large.
            run = self.store.find_run(self.graph, self.execution_id)
            if run is None or run.job_digest != self.job_digest:
                raise PayloadUnavailable(self._shown, GONE if run is None else OTHER_JOB)
        found = [
            (int(row.item), read_item(self.kind, row)) for row in rows if row.item == str(row.item_index)
        ]
        self.check_complete(range(lo, hi), {index for index, _ in found})
        return found

    def check_complete(self, wanted: Iterable[int], found: Collection[int]) -> None:
        """Raise `PayloadUnavailable` where one is missing that did not fail: nobody would see the gap."""
        missing = [index for index in wanted if index not in found and index not in self.failed]
        if missing:
            problem = (
                f"item {missing[0]} (of {len(missing)} such) did not fail and is not there: its row was purged, or "
                f"the code has changed since the batch began; submit the batch under a new execution_id"
            )
            raise PayloadUnavailable(self._shown, problem)

    @functools.cached_property
    def _count(self) -> int:
        """How many there are. An item that failed may have a value all the same: a later step of it failed."""
        near = {index - index % PAGE for index in self.failed}
        made = {index for lo in near for index, _ in self.page(lo)}
        return self.total - sum(index not in made for index in self.failed)

    @property
    def _shown(self) -> str:
        return f"{self.names[0] or 'the batch'} of run {self.execution_id!r} of graph {self.graph!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBatch:
    """A batch's result that is too large to travel: of a `BatchResult`, which *collects*, with why items failed."""

    items: StoredItems
    collects: bool = False
    errors: Mapping[int, StepFailed] = field(default_factory=dict[int, StepFailed])

    def page(self, lo: int) -> list[Message | None]:
        """Return the results of the page that begins at *lo*: of a `BatchResult` with None for each that failed."""
        found = self.items.page(lo)
        if not self.collects:
            return [message for _, message in found]
        made = {index: message for index, message in found if index not in self.errors}
        return [made.get(index) for index in range(lo, min(lo + PAGE, self.items.total))]

    def load(self) -> list[Message] | BatchResult[Any]:
        """Return the whole result."""
        return self._whole([each for lo in range(0, self.items.total, PAGE) for each in self.page(lo)])

    def load_within(self, most_bytes: int) -> list[Message] | BatchResult[Any] | None:
        """Return the whole result; None if it weighs more than *most_bytes* in a message, without reading it all."""
        weight = (self.items.total - len(self.items.failed)) * ENVELOPE_BYTES
        found = list[Message | None]()
        for lo in range(0, self.items.total, PAGE):
            if weight > most_bytes:
                break
            page = self.page(lo)
            weight += sum(each.ByteSize() for each in page if each is not None)
            found += page
        return None if weight > most_bytes else self._whole(found)

    def _whole(self, found: Sequence[Message | None]) -> list[Message] | BatchResult[Any]:
        return BatchResult(tuple(found), self.errors) if self.collects else cast("list[Message]", found)


def read_item(kind: type[Message], row: Checkpoint) -> Message:
    """Return the message in *row*; raise `GraphChanged` for one of another type."""
    if row.output_type != type_name(kind):
        change = f"{row.step_name or 'the batch'} (made {row.output_type}, now {type_name(kind)})"
        raise GraphChanged(row.graph, row.execution_id or "", [change])
    return from_bytes(kind, row.output_data)
