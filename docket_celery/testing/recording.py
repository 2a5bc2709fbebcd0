"""Writes down what happened in runs, for a test to read."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import overload

from docket_celery.engine.overrides import overridden
from docket_celery.graph import Graph
from docket_celery.observe.events import Event, EventKind

_ENDS = (EventKind.STEP_SUCCEEDED, EventKind.STEP_RESTORED)


class Events(Sequence[Event]):
    """The events of a `record_events` block, in the order in which they were told. Safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._closed = False

    def __call__(self, event: Event, /) -> None:
        """Take *event*; after the block it is ignored."""
        with self._lock:
            if not self._closed:
                self._events.append(event)

    @overload
    def __getitem__(self, index: int) -> Event: ...

    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...

    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        return self._copy()[index]

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._copy())

    def of(self, step: str = "") -> list[Event]:
        """Return the events of *step*; without a name, those of the runs themselves."""
        return [event for event in self if event.step == step]

    def kinds(self, step: str = "") -> list[EventKind]:
        """Return what happened to *step*, in order; without a name, to the runs."""
        return [event.kind for event in self.of(step)]

    def steps(self, kind: EventKind = EventKind.STEP_STARTED) -> list[str]:
        """Return the names of the steps to which *kind* happened, in order; each attempt counts."""
        return [event.step for event in self if event.kind is kind]

    def assert_order(self, *steps: str) -> None:
        """Check that each of *steps* had its value before the next one began.

        Raises:
            AssertionError: One had not, or did not take part; with all that was recorded.
        """
        done = -1
        events = self._copy()
        for step in steps:
            begins = [n for n, e in enumerate(events) if e.step == step and e.kind is EventKind.STEP_STARTED]
            ends = [n for n, e in enumerate(events) if e.step == step and e.kind in _ENDS]
            if not ends or min(begins or ends) < done:
                what = "has no value" if not ends else "began too early"
                raise AssertionError(
                    f"expected {' -> '.join(steps)}, but {step!r} {what}:\n{self.describe()}"
                )
            done = ends[0]

    def describe(self) -> str:
        """Return one line for each event."""
        return "\n".join(
            f"  {event.at:.3f} {event.kind} {event.step}{f' #{event.attempt}' if event.attempt else ''}".rstrip()
            for event in self
        )

    def __repr__(self) -> str:
        return f"<Events: {len(self)}>\n{self.describe()}"

    def close(self) -> None:
        """Take no more."""
        with self._lock:
            self._closed = True

    def _copy(self) -> list[Event]:
        with self._lock:
            return list(self._events)


@contextmanager
def record_events(*graphs: Graph) -> Generator[Events]:
    """Write down the events of runs; nothing is recorded after the block, though a run may continue.

    Args:
        *graphs: Record all runs of these graphs in this process, wherever they began. Without any: the runs of all
            graphs that are begun in the block, by this thread or asyncio task.
    """
    events = Events()
    with ExitStack() as stack:
        stack.callback(events.close)
        if not graphs:
            stack.enter_context(overridden(listeners=(events,)))
        for graph in dict.fromkeys(graphs):
            graph.listeners.append(events)
            stack.callback(_forget, graph, events)
        yield events


def _forget(graph: Graph, events: Events) -> None:
    graph.listeners[:] = [listener for listener in graph.listeners if listener is not events]
