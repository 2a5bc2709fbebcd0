"""How a batch is worked on."""

from __future__ import annotations

from dataclasses import dataclass, field

from docket_celery.errors import InvalidArguments
from docket_celery.plan.batch import BatchPolicy
from docket_celery.store.records import Chunk, Lanes

CHUNKS = 64
"""About the number of chunks of a stage without ``chunk_size``: enough to spread, few enough to be cheap to join."""
CHUNKS_OF_A_SLOT = 4
"""Least number of chunks for each task that a worker runs at once, so that the last ones end together."""
MOST_ITEMS = 500
"""Without ``chunk_size``, most items of a chunk: what one statement reads and one task holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How a batch is worked on.

    Without *chunk_size* that of a chunk is chosen from the number of items and from *slots*, which is how many
    tasks the worker that began the batch runs at once; each of them runs *threads* items at once. At most
    *max_concurrency* items run at once over all workers; None: as many as there are threads.
    """

    policy: BatchPolicy = field(default_factory=BatchPolicy)
    chunk_size: int | None = None
    max_concurrency: int | None = None
    slots: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("chunk_size", "max_concurrency"):
            value: object = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidArguments(name, f"must be at least 1, not {value!r}")

    def cut(self, stage: int, count: int) -> list[Chunk]:
        """Return the chunks of a stage of *count* items."""
        wanted = max(CHUNKS, CHUNKS_OF_A_SLOT * self.slots)
        size = self.chunk_size or min(MOST_ITEMS, -(-count // wanted))
        return [Chunk(stage, lo, min(lo + size, count)) for lo in range(0, count, max(1, size))]

    def lanes(self, chunks: int) -> Lanes | None:
        """Return the lanes of a stage; None: there is no limit over all workers.

        There are as many as this worker runs tasks at once, or as it takes to reach the limit with *threads* items
        in each, and at most one for each of the stage's *chunks*.
        """
        most = self.max_concurrency
        if most is None:
            return None
        return Lanes(most, max(1, min(most, chunks, max(self.slots, -(-most // self.threads)))))
