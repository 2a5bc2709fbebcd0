"""A listener that prints steps as they start and finish, and keeps the figures."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from docket_celery.observe.events import Event, EventKind


@dataclass(slots=True)
class Timeline:
    """What one run did, as its events told it; append it to a graph's ``listeners``.

    Attributes:
        running: Steps between their start and their end, now.
        most_running: The most there were at once.
        step_s: Seconds each finished step took.
        total_s: Seconds from the run's start to its end.
    """

    running: int = 0
    most_running: int = 0
    step_s: dict[str, float] = field(default_factory=dict[str, float])
    total_s: float = 0.0
    # Steps report from their own threads.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, event: Event, /) -> None:
        """Take one event."""
        with self._lock:
            if event.kind is EventKind.STEP_STARTED:
                self.running += 1
                self.most_running = max(self.most_running, self.running)
                print(f"   -> {event.step} started (concurrent: {self.running})")
            elif event.kind is EventKind.STEP_SUCCEEDED:
                self.running -= 1
                self.step_s[event.step] = event.elapsed_s or 0.0
                print(f"   <- {event.step} finished")
            elif event.kind is EventKind.RUN_ENDED:
                self.total_s = event.elapsed_s or 0.0

    @property
    def sequential_s(self) -> float:
        """Seconds the same steps would take one after another: the sum of what each one took."""
        return sum(self.step_s.values())
