"""Executions of one stage of a plan, one for each item, a limited number at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from docket_celery.engine.run_context import Ending, OnEnd
from docket_celery.errors import StepFailed


class ItemGroup(Ending):
    """Executions of one stage, one for each item, a limited number at once.

    Args:
        count: How many there are.
        make: Returns the execution of an item, given its index and what to call at its end.
        on_end: Called once, after the last one, or when one of them ended the run: with that error.
        limit: Most at once.
        allowed: How many may fail without stopping the others.
        failed: Items that failed in an earlier stage, by index: they are left out.
        on_item: Called after each with how many have ended, failed ones too, and how many there are.
    """

    def __init__(
        self,
        count: int,
        make: Callable[[int, OnEnd], Ending],
        on_end: OnEnd,
        *,
        limit: int,
        allowed: int,
        failed: Mapping[int, StepFailed] | None = None,
        on_item: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(None, on_end)
        self.results: list[Sequence[Any] | None] = [None] * count
        self.failures: dict[int, StepFailed] = dict(failed or {})
        self._make, self._limit, self._allowed, self._on_item = make, limit, allowed, on_item
        self._fatal: BaseException | None = None
        self._done = len(self.failures)
        self._cut = False
        self._running: dict[int, Ending] = {}
        self._next = 0
        self._asked = 0

    @property
    def complete(self) -> bool:
        """Whether each of them was begun, and none was cut short."""
        return self._next >= len(self.results) and not self._cut

    def start(self) -> None:
        """Start items while there is room, and see whether all have ended. One thread at a time does it."""
        with self.lock:
            self._asked += 1
            if self._asked > 1:
                return  # the thread that does it looks again
        while True:
            while (begun := self._begin()) is not None:
                index, execution = begun
                try:
                    execution.start()
                except Exception as error:  # noqa: BLE001 -- whatever it is, the run must end
                    self._ended(index, (), error)
            with self.lock:
                over = not self._running and (self._idle() or self._fatal is not None)
                again, self._asked = self._asked > 1, 1
                if not again:
                    self._asked = 0
            if over:
                self.end(error=self._fatal)
            if not again:
                return

    def hold(self) -> None:
        """Start nothing more; what is running finishes and is saved."""
        with self.lock:
            self.failing = True
            running = list(self._running.values())
        for execution in running:
            execution.hold()
        self.start()

    def _seize(self) -> None:
        self.failing = True

    def _let_go(self, error: BaseException) -> None:
        for execution in list(self._running.values()):
            execution.abort(error)

    def _idle(self) -> bool:
        return self.failing or self._next >= len(self.results)

    def _begin(self) -> tuple[int, Ending] | None:
        with self.lock:
            while not self._idle() and self._next in self.failures:
                self._next += 1
            if self._idle() or len(self._running) >= self._limit:
                return None
            index, self._next = self._next, self._next + 1
            execution = self._make(index, functools.partial(self._ended, index))
            self._running[index] = execution
            return index, execution

    def _ended(self, index: int, values: Sequence[Any], error: BaseException | None) -> None:
        stopped: list[Ending] = []
        with self.lock:
            if self._running.pop(index, None) is None or self.closed:
                return
            self._done = done = self._done + 1
            if error is None:
                self.results[index] = values or None
                # Held between two of its steps it ends without an error, and without what it was to make.
                self._cut = self._cut or not values
            elif isinstance(error, StepFailed):
                self.failures[index] = error
                if len(self.failures) > self._allowed and not self.failing:
                    self.failing = True
                    stopped = list(self._running.values())
            elif self._fatal is None:
                self._fatal, self.failing = error, True
                stopped = list(self._running.values())
        for execution in stopped:
            if self._fatal is None:
                execution.hold()
            else:
                execution.abort(self._fatal)
        if self._on_item is not None:
            self._on_item(done, len(self.results))
        self.start()
