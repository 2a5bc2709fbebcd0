"""What a caller says of a batch, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from google.protobuf.message import Message

from docket_celery.errors import InvalidArguments, StepFailed

R = TypeVar("R", bound=Message)
OnError = Literal["fail", "collect"]


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How a fan-out treats its items.

    Args:
        on_error: ``fail``: the first failed item stops the run. ``collect``: the others continue.
        max_failed: ``collect`` only: how many items may fail; a float from 0 to 1 is a share of all. None: any.
        max_concurrency: Most items at once; None: as many as there are threads.

    Raises:
        InvalidArguments: A value cannot be used.
    """

    on_error: OnError = "fail"
    max_failed: float | None = None
    max_concurrency: int | None = None

    def __post_init__(self) -> None:
        if self.on_error not in ("fail", "collect"):
            raise InvalidArguments("on_error", f'must be "fail" or "collect", not {self.on_error!r}')
        if self.max_failed is None:
            return
        if self.on_error != "collect":
            raise InvalidArguments("max_failed", 'needs on_error="collect"; with "fail" none may fail')
        share = isinstance(self.max_failed, float)
        number = isinstance(self.max_failed, (int, float)) and not isinstance(self.max_failed, bool)
        if not number or self.max_failed < 0 or (share and not self.max_failed <= 1):
            raise InvalidArguments(
                "max_failed", f"must be a count, or a share as a float from 0 to 1, not {self.max_failed!r}"
            )

    def allowed(self, total: int) -> int:
        """Return how many of *total* items may fail."""
        if self.on_error == "fail":
            return 0
        if self.max_failed is None:
            return total
        if isinstance(self.max_failed, int):
            return self.max_failed
        # 0.29 of 100 is 28.999999999999996 in binary.
        return math.floor(round(self.max_failed * total, 9))


ONE_FAILS = BatchPolicy()
"""One failed item stops the run."""


@dataclass(frozen=True, slots=True)
class BatchResult(Generic[R]):
    """The results of a batch whose items may fail one by one (``on_error="collect"``).

    Attributes:
        results: One for each item, in the order of the items; None where it failed.
        errors: Why items failed, by index.
    """

    results: tuple[R | None, ...]
    errors: Mapping[int, StepFailed] = field(default_factory=dict[int, StepFailed])

    def __len__(self) -> int:
        return len(self.results)

    def succeeded(self) -> Iterator[tuple[int, R]]:
        """Yield index and result of each item that has one, in order."""
        return ((index, result) for index, result in enumerate(self.results) if result is not None)
