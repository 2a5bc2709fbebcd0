"""A listener that prints each attempt of a step and how long the wait before it really was."""

from __future__ import annotations

from dataclasses import dataclass, field

from docket_celery.observe.events import Event, EventKind


@dataclass(slots=True)
class Attempts:
    """The attempts of one step, as the events of its run told them; append it to a graph's ``listeners``.

    Attributes:
        step: Whose attempts.
        waits_s: Seconds between the end of each failed attempt and the start of the next.
        made: Attempts started.
    """

    step: str
    waits_s: list[float] = field(default_factory=list[float])
    made: int = 0
    _failed_at: float | None = None

    def __call__(self, event: Event, /) -> None:
        """Take one event."""
        # A step's own events come one after another, so no lock is needed.
        if event.step != self.step:
            return
        if event.kind is EventKind.STEP_STARTED:
            self.made += 1
            waited = ""
            if self._failed_at is not None:
                self.waits_s.append(event.at - self._failed_at)
                waited = f" after a wait of {self.waits_s[-1] * 1000:.0f} ms"
            print(f"   attempt {event.attempt}{waited}")
        elif event.kind is EventKind.STEP_RETRYING:
            self._failed_at = event.at
