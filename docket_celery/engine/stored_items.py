"""The items of a run that lie in a store, read page by page."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

from google.protobuf.message import Message

from docket_celery.errors import GraphChanged, PayloadUnavailable, StepFailed
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.messages import from_bytes, type_name
from docket_celery.store.contract import BatchStore
from docket_celery.store.records import Checkpoint

PAGE = 1000
"""So many items are in memory at once."""
ENVELOPE_BYTES = 100
"""What each item weighs in a task's message or result beside its own bytes: its type's name, and base64."""
GONE = "its row is gone: purged after docket_retention, or deleted; submit the job again"
OTHER_JOB = "it was purged, and its name has another job now; submit it under an execution_id of its own"


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemPlace:
    """Where the items of one value lie in a store.

    Attributes:
        names: The step that made them, by its present and former names; '' for the batch itself.
        kind: Their message type.
        total: How many there were to be made.
        failed: Indexes of those that may be missing.
        job_digest: Of the run that made them, as its row has it; None: whoever reads them holds the run.
    """

    graph: str
    execution_id: str
    names: tuple[str, ...]
    kind: type[Message]
    total: int
    failed: Collection[int] = ()
    job_digest: bytes | None = None

    def describe(self) -> str:
        """Return what an error calls it."""
        return f"{self.names[0] or 'the batch'} of run {self.execution_id!r} of graph {self.graph!r}"


class StoredItems(Sequence[Message]):
    """Items that are read from the store when they are looked at; those that failed are not among them.

    Args:
        store: Where they lie.
        place: Which they are.
    """

    def __init__(self, store: BatchStore, place: ItemPlace) -> None:
        self._store, self.place = store, place
        self._length: int | None = None

    def __len__(self) -> int:
        if self._length is None:
            self._length = self.measure()[0]
        return self._length

    def __iter__(self) -> Iterator[Message]:
        return (message for _, message in self.numbered())

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        return list(self)[index]

    def numbered(self) -> Iterator[tuple[int, Message]]:
        """Yield index and message of each item that is there, in order."""
        for lo in range(0, self.place.total, PAGE):
            yield from self.page(lo)

    def page(self, lo: int) -> list[tuple[int, Message]]:
        """Return index and message of the items of the page that begins at *lo*, in order.

        Raises:
            PayloadUnavailable: One is missing that did not fail: it was purged, or made by other code. Or the run of
                that name has another job now.
        """
        place = self.place
        hi = min(lo + PAGE, place.total)
        run, digest = (place.graph, place.execution_id), place.job_digest
        rows = self._store.read_items(*run, place.names, lo, hi, job_digest=digest)
        if not rows:
            self._check_run()
        found = [
            (int(row.item), read_item(place.kind, row)) for row in rows if row.item == str(row.item_index)
        ]
        check_complete(place, range(lo, hi), {index for index, _ in found})
        return found

    def _check_run(self) -> None:
        """Look whether the run is still the one that made the items: its name becomes free when it is purged.

        Of any other nothing is read, so this need not be asked for each page; the row may be big.

        Raises:
            PayloadUnavailable: It is not.
        """
        place = self.place
        if place.job_digest is None:
            return
        row = self._store.find_run(place.graph, place.execution_id)
        if row is None or row.job_digest != place.job_digest:
            raise PayloadUnavailable(place.describe(), GONE if row is None else OTHER_JOB)

    def weight(self) -> int:
        """Return about how many bytes they would have in a message."""
        count, size = self.measure()
        return count * ENVELOPE_BYTES + size

    def measure(self) -> tuple[int, int]:
        """Return how many there are, and their bytes together."""
        place = self.place
        found = [self._store.measure_items(place.graph, place.execution_id, name) for name in place.names]
        return sum(count for count, _ in found), sum(size for _, size in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBatch:
    """A batch's result that is too big to travel.

    Attributes:
        items: The results.
        collects: It is a `BatchResult`, with *errors*.
        errors: Why items failed, by index.
    """

    items: StoredItems
    collects: bool = False
    errors: Mapping[int, StepFailed] = field(default_factory=dict[int, StepFailed])

    def page(self, lo: int) -> list[Message | None]:
        """Return the results of the page that begins at *lo*: of a `BatchResult` with None for each that failed."""
        found = self.items.page(lo)
        if not self.collects:
            return [message for _, message in found]
        made = {index: message for index, message in found if index not in self.errors}
        return [made.get(index) for index in range(lo, min(lo + PAGE, self.items.place.total))]

    def load(self) -> list[Message] | BatchResult[Any]:
        """Return the whole result."""
        found = [each for lo in range(0, self.items.place.total, PAGE) for each in self.page(lo)]
        return BatchResult(tuple(found), self.errors) if self.collects else cast("list[Message]", found)


def check_complete(place: ItemPlace, wanted: Iterable[int], found: Collection[int]) -> None:
    """Look whether all items are there that did not fail: a result with a gap that nobody sees would be wrong.

    Raises:
        PayloadUnavailable: One is missing.
    """
    missing = [index for index in wanted if index not in found and index not in place.failed]
    if missing:
        problem = (
            f"item {missing[0]} (of {len(missing)} such) did not fail and is not there: its row was purged, or the "
            f"code has changed since the batch began; submit the batch under a new execution_id"
        )
        raise PayloadUnavailable(place.describe(), problem)


def read_item(kind: type[Message], row: Checkpoint) -> Message:
    """Return the message in *row*.

    Raises:
        GraphChanged: It is of another type.
        DecodeFailed: The bytes cannot be read.
    """
    if row.output_type != type_name(kind):
        change = f"{row.step_name or 'the batch'} (made {row.output_type}, now {type_name(kind)})"
        raise GraphChanged(row.graph, row.execution_id or "", [change])
    return from_bytes(kind, row.output_data)
