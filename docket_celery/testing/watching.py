"""Writes down every boundary that a run crosses, in a file that a kill cannot touch, and kills at one of them."""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from docket_celery.observe.events import Event, EventKind
from docket_celery.plan.step import Step
from docket_celery.store.contract import Store
from docket_celery.store.records import Checkpoint, Lease, RunEnd

BODY, RETURNED, SAVE, SAVED, END, ENDED, OVER = (
    *("body", "returned", "save", "saved"),
    *("end", "ended", "over"),
)
_WORDS: Final = {
    BODY: "before the body of {step!r}",
    RETURNED: "after the body of {step!r}",
    SAVE: "before the save of {step!r}",
    SAVED: "after the save of {step!r}",
    END: "before the run's end is written",
    ENDED: "after the run's end is written, before the ack",
    OVER: "after the run, before the ack",
}
CLAIM, RAISED = "claim", "raised"


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """A moment in a run at which its process may die.

    Attributes:
        kind: What happens there.
        step: Of which step; '' for the run itself.
        number: From 1: the how-manieth of its kind in the process.
    """

    kind: str
    step: str = ""
    number: int = 1

    def __str__(self) -> str:
        words = _WORDS[self.kind].format(step=self.step)
        return words if self.number == 1 else f"{words}, time {self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of the journal.

    Attributes:
        process: 1 is the one that is killed, 2 the one that continues.
        key: Of a GLOBAL checkpoint, in hex.
        owner: Who claimed it.
    """

    process: int
    kind: str
    step: str = ""
    number: int = 1
    key: str = ""
    owner: str = ""

    @property
    def boundary(self) -> Boundary:
        return Boundary(kind=self.kind, step=self.step, number=self.number)


class Journal:
    """What the processes of one job did, in a file: each line is written at once and whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, entry: Entry) -> None:
        """Write *entry* down."""
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, (json.dumps(asdict(entry)) + "\n").encode())
        finally:
            os.close(handle)

    def read(self, process: int | None = None) -> list[Entry]:
        """Return all entries, or those of one process."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines()
        found = [Entry(**json.loads(line)) for line in lines]
        return [entry for entry in found if process in (None, entry.process)]


class Watch:
    """Follows one process, and kills it at *deadly*.

    Args:
        journal: Where it is written down.
        process: Which process this is.
        deadly: Where it must die; None: nowhere.
    """

    def __init__(self, journal: Journal, process: int, deadly: Boundary | None = None) -> None:
        self._journal, self._process, self._deadly = journal, process, deadly
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def reach(self, kind: str, step: str = "", **facts: str) -> None:
        """Write down that a boundary is reached, and die there if it is the deadly one."""
        with self._lock:
            self._look()
            self._counts[kind, step] += 1
            number = self._counts[kind, step]
            self._journal.add(Entry(process=self._process, kind=kind, step=step, number=number, **facts))
            if self._deadly == Boundary(kind=kind, step=step, number=number):
                os.kill(os.getpid(), signal.SIGKILL)

    def _look(self) -> None:
        """Find out which process this is, where that may change."""

    def __call__(self, event: Event, /) -> None:
        """As a listener: the end of a run that keeps nothing."""
        if event.kind is EventKind.RUN_ENDED:
            self.reach(OVER)

    def steps(self, steps: Sequence[Step]) -> dict[str, Step]:
        """Return *steps* by name, each telling when its body begins and returns."""
        return {step.name: replace(step, call=self._watched(step)) for step in steps}

    def store(self, store: Store) -> Store:
        """Return *store*, telling before and after everything that it writes."""
        return cast("Store", _WatchedStore(store, self))

    def _watched(self, step: Step) -> Callable[..., Any]:
        call = step.call

        async def call_async(*args: Any, **kwargs: Any) -> Any:
            self.reach(BODY, step.name)
            try:
                value = await call(*args, **kwargs)
            except BaseException:
                self.reach(RAISED, step.name)
                raise
            self.reach(RETURNED, step.name)
            return value

        def call_here(*args: Any, **kwargs: Any) -> Any:
            self.reach(BODY, step.name)
            try:
                value = call(*args, **kwargs)
            except BaseException:
                self.reach(RAISED, step.name)
                raise
            self.reach(RETURNED, step.name)
            return value

        return functools.wraps(call)(call_async if step.is_async else call_here)


class Orders:
    """What a watched worker is to do: a file that its test writes again for each playing."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def give(self, journal: Path, process: int, deadly: Boundary | None) -> None:
        """Say which journal to write, as which process, and where to die."""
        partial = self._path.with_suffix(".partial")
        told = [os.fspath(journal), process, None if deadly is None else asdict(deadly)]
        partial.write_text(json.dumps(told), encoding="utf-8")
        partial.rename(self._path)

    def read(self) -> tuple[Path, int, Boundary | None]:
        """Return what was given last."""
        journal, process, deadly = json.loads(self._path.read_text(encoding="utf-8"))
        return Path(journal), process, None if deadly is None else Boundary(**deadly)


class WorkerWatch(Watch):
    """Follows whichever process of a worker has the job: what is to be done changes with each playing.

    Args:
        orders: Say what.
    """

    def __init__(self, orders: Orders) -> None:
        super().__init__(Journal(Path(os.devnull)), 0)
        self._orders = orders
        self._present: tuple[Path, int] | None = None

    def _look(self) -> None:
        path, process, deadly = self._orders.read()
        if self._present != (path, process):
            self._present, self._journal = (path, process), Journal(path)
            self._counts.clear()
            died = any(entry.boundary == deadly for entry in self._journal.read(1))
            # Told to be the first, but that one has died: this is the next delivery.
            self._process, self._deadly = (2, None) if process == 1 and died else (process, deadly)


class _WatchedStore:
    """The user's store; what is not told here goes straight through."""

    def __init__(self, store: Store, watch: Watch) -> None:
        self._store, self._watch = store, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def save(self, lease: Lease, checkpoint: Checkpoint, *more: Any, **options: Any) -> Checkpoint:
        self._watch.reach(SAVE, checkpoint.step_name)
        kept = self._store.save(lease, checkpoint, *more, **options)
        self._watch.reach(SAVED, checkpoint.step_name)
        return kept

    def publish(self, checkpoint: Checkpoint, owner: str, *more: Any, **options: Any) -> Checkpoint:
        self._watch.reach(SAVE, checkpoint.step_name)
        kept = self._store.publish(checkpoint, owner, *more, **options)
        self._watch.reach(SAVED, checkpoint.step_name, key=checkpoint.key.hex())
        return kept

    def lookup(self, key: bytes, owner: str, *more: Any, **options: Any) -> Checkpoint | bool:
        found = self._store.lookup(key, owner, *more, **options)
        if found is True:
            self._watch.reach(CLAIM, key=key.hex(), owner=owner)
        return found

    def end(self, lease: Lease, end: RunEnd) -> None:
        self._watch.reach(END)
        self._store.end(lease, end)
        if end.checkpoint is not None:
            self._watch.reach(SAVED, end.checkpoint.step_name)
        self._watch.reach(ENDED)
