"""Runs one part of a plan for a range of its items, for one delivery of a chunk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from docket_celery.engine.delivery import Delivery
from docket_celery.engine.execution import Outcome
from docket_celery.engine.fan_out import Stored, make_item
from docket_celery.engine.items import Items, Runs
from docket_celery.errors import StepFailed
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.batch import BatchPolicy
from docket_celery.plan.messages import Value
from docket_celery.plan.plan import Part
from docket_celery.store.records import Chunk


class ChunkExecution:
    """The items of one chunk, side by side.

    Args:
        part: What to do for each of them.
        chunk: Which they are.
        each: The items' own given values, by index.
        shared: The given values that are the same for all.
        delivery: What the steps share.
        on_end: Called once with the outcome, on whichever thread ended it.
        stored: The checkpoints of these items.
        policy: How items are treated.
        skips: Items that failed before.
        limit: Most at once.
        max_concurrency: What the batch said, if anything: then no further items at once within an item.
    """

    def __init__(
        self,
        part: Part,
        chunk: Chunk,
        each: Mapping[ValueKey, Mapping[int, Value]],
        shared: Mapping[ValueKey, Value | None],
        delivery: Delivery,
        on_end: Callable[[Outcome], None],
        *,
        stored: Stored,
        policy: BatchPolicy,
        skips: Collection[int],
        limit: int,
        max_concurrency: int | None = None,
    ) -> None:
        self.closed = False
        self._part, self._chunk, self._each, self._shared = part, chunk, each, shared
        self._delivery, self._on_end, self._stored, self._limit = delivery, on_end, stored, limit
        self._max_concurrency = max_concurrency
        self._lock = threading.Lock()
        self._skips = frozenset(skips)
        count = chunk.hi - chunk.lo
        allowed = 0 if policy.on_error == "fail" else count
        self._items = Items(count, self._make, self._ended, limit=limit, allowed=allowed)
        # Left out by being given a failure; it is none of this chunk's.
        left_out = StepFailed("", 0, False, "", "")
        self._items.skip({index - chunk.lo: left_out for index in self._skips})

    @property
    def failures(self) -> dict[int, StepFailed]:
        """Why items failed in this chunk, by index."""
        lo = self._chunk.lo
        found = {lo + number: failure for number, failure in self._items.failures.items()}
        return {index: failure for index, failure in found.items() if index not in self._skips}

    @property
    def complete(self) -> bool:
        """Whether each item was begun, and none was cut short."""
        return self._items.complete

    def dispatch(self) -> None:
        """Begin with the first items."""
        self._items.fill()

    def hold(self) -> None:
        """Start nothing more; what is running finishes and is saved, then the execution ends."""
        self._items.hold()

    def abort(self, error: BaseException) -> None:
        """End at once with *error*: nothing new starts, contexts are cancelled, late results are discarded."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        self._delivery.cancellation.cancel(error)
        self._items.abort(error)
        self._on_end(Outcome(error=error))

    def _make(self, number: int, on_end: Callable[[Outcome], None]) -> Runs:
        index, part = self._chunk.lo + number, self._part
        inputs = [
            self._each[key][index] if key in part.each else self._shared.get(key) for key in part.plan.given
        ]
        delivery = replace(self._delivery, item=str(index))
        return make_item(
            part,
            part.outputs,
            inputs,
            delivery,
            on_end,
            stored=self._stored,
            limit=self._limit,
            max_concurrency=self._max_concurrency,
        )

    def _ended(self, items: Items) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed = True
        self._on_end(Outcome(error=items.fatal))
