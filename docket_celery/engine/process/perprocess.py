"""Values that every process makes for itself: a forked child starts with none and never touches its parent's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Forks:
    """How often the line of processes that led here has forked."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1


_forks = _Forks()
os.register_at_fork(after_in_child=_forks.add)


class PerProcess(Generic[T]):
    """A value made on first use in each process.

    Args:
        make: Makes it, quickly and without effect on anything else: where two threads come first at once, one of
            the two values is dropped.
    """

    __slots__ = ("_make", "_values")

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        # A parent's value is kept, not freed: finalizing it here could touch what the parent still uses.
        self._values: dict[int, T] = {}

    def get(self) -> T:
        """Return this process's value."""
        found = self._values.get(_forks.count)
        # No lock: one that another thread held while the process forked would stay held in the child.
        return self._values.setdefault(_forks.count, self._make()) if found is None else found
