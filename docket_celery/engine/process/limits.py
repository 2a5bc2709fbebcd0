"""``max_concurrent``: a limit on the calls of a step at once; slots are given in the order of asking."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import Context, ContextVar


class Slots:
    """The *limit* slots of one step in one process. No thread waits for one: `Slot.turn` is called instead."""

    def __init__(self, limit: int) -> None:
        self.lock = threading.Lock()
        self.free = limit
        self.line: dict[Slot, None] = {}

    def lent(self, base: Context) -> bool:
        """Tell whether what runs in *base* is part of a call that holds one of these slots.

        Such a call waits for what it has started; a second slot could be one that never comes.
        """
        held = base.get(_held, ())
        return any(slot.held and slot.slots is self for slot in held)


class Slot:
    """One call's place in the line, then its slot, which is *held*.

    *turn* is called once when another call gives its slot to this one, unless `take` was successful.
    """

    __slots__ = ("held", "slots", "turn")

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.turn: Callable[[], None]
        self.held = False

    def take(self) -> bool:
        """Take a free slot; False: there is none, this one is in the line."""
        with self.slots.lock:
            if self.slots.free:
                self.slots.free -= 1
                self.held = True
            else:
                self.slots.line[self] = None
            return self.held

    def cancel(self) -> None:
        """Give the slot to the next in the line, or leave the line; may be called again."""
        slots = self.slots
        with slots.lock:
            slots.line.pop(self, None)
            if not self.held:
                return
            self.held = False
            following = next(iter(slots.line), None)
            if following is None:
                slots.free += 1
            else:
                del slots.line[following]
                following.held = True
        if following is not None:
            following.turn()

    def bind(self) -> None:
        """Share this slot with what is started within the present `contextvars` context."""
        _held.set((*_held.get(), self))


_held: ContextVar[tuple[Slot, ...]] = ContextVar("docket_celery_slots", default=())
