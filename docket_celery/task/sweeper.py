"""Looks for batches that nobody advances, and has them go on: each worker does, with whichever process comes first.

Chords are the fast path, the store is the truth. Where Redis loses a counter, the broker a message, or a worker its
life with a chunk, the rows still say what is to be done; a copy of the body's task does it.
"""

from __future__ import annotations

import logging
import mmap
import random
import struct
import threading
import time
from typing import Any

from celery import Celery, _state, bootsteps, signals
from celery.exceptions import OperationalError

from docket_celery.errors import DocketError, StoreUnavailable
from docket_celery.store.contract import BatchStore
from docket_celery.store.records import LostRun
from docket_celery.task import app_settings, checks
from docket_celery.task.chords import revive
from docket_celery.task.retries import OUTAGE_MOST_S

MOST_AT_ONCE = 20
"""So many runs does one look take at most: whoever looks next finds the others."""
_TRIES = 20
"""So often is it tried to send a run on; by then the store finds it lost once more."""
_logger = logging.getLogger("docket_celery.sweeper")


class Schedule:
    """When the processes of one worker look next; forked children share it.

    Children come and go, some after a single task: with a schedule of its own each would look either too often or
    never.
    """

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 9)
        self.set_next(time.monotonic())

    @property
    def away(self) -> bool:
        """Whether the database did not answer the last look."""
        return bool(self._shared[8])

    def left_s(self) -> float:
        """Return the seconds until the next look is due; the clock is the same in all processes."""
        (due,) = struct.unpack("d", self._shared[:8])
        return float(due) - time.monotonic()

    def set_next(self, at: float, *, away: bool = False) -> None:
        """Set when the next look is due, on `time.monotonic`'s clock."""
        self._shared[:] = struct.pack("d?", at, away)


class Sweeper:
    """Sweeps the stores of an app's batch tasks every half a lease, for as long as its process lives.

    Args:
        app: The app, with its tasks imported.
        schedule: Shared by all processes of the worker: one of them looks at a time.
    """

    def __init__(self, app: Celery, schedule: Schedule) -> None:
        self._app, self._schedule = app, schedule
        self._over = threading.Event()
        self._unsent: dict[tuple[str, str], tuple[LostRun, int]] = {}

    def start(self) -> bool:
        """Begin, if the app has tasks whose batches several workers share; tell whether it has."""
        if not self._tasks():
            return False
        threading.Thread(target=self._run, name="docket-sweep", daemon=True).start()
        return True

    def stop(self) -> None:
        """Look no more; a look that is under way comes to its end."""
        self._over.set()

    def sweep(self) -> int:
        """Look once; return how many runs were sent on: those found lost, and those that could not be sent before.

        The first look after an outage takes nothing for lost: leases expired meanwhile, and the deliveries that held
        them come back within `OUTAGE_MOST_S`.

        Raises:
            DocketError: A store cannot be asked.
        """
        settings = app_settings.app_settings(self._app)
        if self._schedule.away:
            for store, _ in self._tasks():
                store.find_run("", "")
            self._schedule.set_next(time.monotonic() + settings.lease_seconds + OUTAGE_MOST_S)
            return self._send()
        try:
            for store, names in self._tasks():
                for lost in store.find_lost(
                    names, settings.lease_seconds, settings.max_deliveries, MOST_AT_ONCE
                ):
                    _logger.warning(
                        "run %r of graph %r is not advanced by anybody; task %s goes on with it",
                        *(lost.execution_id, lost.graph, lost.task_name),
                    )
                    self._unsent[lost.graph, lost.execution_id] = (lost, 0)
        finally:
            sent = self._send()
        return sent

    def _send(self) -> int:
        """Send on what was found lost; what cannot be sent now is kept: the store tells of it again much later."""
        waiting, self._unsent = self._unsent, {}
        sent, is_reached = 0, True
        for name, (lost, tries) in waiting.items():
            try:
                if is_reached:
                    revive(self._app, lost)
                    sent += 1
                    continue
            except OperationalError:
                # The broker is away: each of the others would take as long to find that out.
                is_reached = False
                _logger.warning("the broker cannot be reached; lost batches have to wait", exc_info=True)
            except Exception:
                # The others of this look must not wait for theirs.
                _logger.exception("run %r could not be sent on", lost.execution_id)
            if tries + 1 < _TRIES:
                self._unsent[name] = (lost, tries + 1)
        return sent

    def _run(self) -> None:
        while True:
            half_s = app_settings.app_settings(self._app).lease_seconds / 2
            left_s = self._schedule.left_s()
            # Not over half a lease, whatever another process wrote.
            if self._over.wait(min(max(0.0, left_s), half_s)):
                return
            if self._schedule.left_s() > 0:
                self._send()
                continue
            # Spread: the workers of a deployment started at one moment.
            pause_s = half_s * random.uniform(0.7, 1.3)  # noqa: S311 -- spreads load, keeps no secret
            self._schedule.set_next(time.monotonic() + pause_s, away=self._schedule.away)
            try:
                self.sweep()
            except StoreUnavailable as error:
                if not self._schedule.away:
                    _logger.warning("lost batches cannot be looked for: %s", error)
                self._schedule.set_next(time.monotonic() + pause_s, away=True)
            except Exception:
                _logger.exception("looking for lost batches failed")

    def _tasks(self) -> list[tuple[BatchStore, list[str]]]:
        """Return the stores over which batches are spread, with the names of the tasks."""
        settings = app_settings.app_settings(self._app)
        found: dict[int, tuple[BatchStore, list[str]]] = {}
        for task in checks.graph_tasks(self._app):
            try:
                store = task.graph.find_batch_store(task.plan(), settings)
            except DocketError:
                continue  # it has been reported, and cannot have run
            if store is not None:
                found.setdefault(id(store), (store, []))[1].append(task.name)
        return list(found.values())


class SweeperStep(bootsteps.StartStopStep):
    """Ends the sweeper of a worker that ends, however it does: Celery's signal comes after a warm shutdown only."""

    requires = ("celery.worker.components:Pool",)

    def start(self, parent: Any) -> None:
        """Nothing to do: the worker's signals begin."""

    def stop(self, parent: Any) -> None:  # noqa: ARG002 -- Celery's signature
        """End it."""
        _end()

    terminate = stop


def watch(app: Celery) -> None:
    """Have the workers of *app* end their sweepers."""
    app.steps["worker"].add(SweeperStep)


class _Process:
    """The sweeper of this process, and the schedule that it shares with its worker's other processes."""

    def __init__(self) -> None:
        self.sweeper: Sweeper | None = None
        self.schedule: Schedule | None = None


_process = _Process()


def _on_worker_init(**_: Any) -> None:
    """Make the schedule before any child is forked."""
    _end()
    _process.schedule = Schedule()


def _on_process_init(**_: Any) -> None:
    """Begin in a child of a prefork pool, or in a solo worker."""
    _begin()


def _on_worker_ready(**_: Any) -> None:
    """Begin where tasks run in the main process; under prefork that one runs no SQL."""
    if not app_settings.forks() and _process.sweeper is None:
        _begin()


def _begin() -> None:
    # A child that was spawned instead of forked knows its app, and has a schedule of its own.
    app = app_settings.worker_app() or _state.get_current_app()
    schedule = _process.schedule or Schedule()
    _end()
    _process.sweeper = Sweeper(app, schedule)
    _process.sweeper.start()


def _on_shutdown(**_: Any) -> None:
    _end()


def _end() -> None:
    """Stop the sweeper of the process, be it that of an earlier worker."""
    if _process.sweeper is not None:
        _process.sweeper.stop()
        _process.sweeper = None


def install() -> None:
    """Connect to Celery; done once, when GraphTask is imported."""
    signals.worker_init.connect(_on_worker_init, weak=False)
    signals.worker_process_init.connect(_on_process_init, weak=False)
    signals.worker_ready.connect(_on_worker_ready, weak=False)
    signals.worker_process_shutdown.connect(_on_shutdown, weak=False)
    signals.worker_shutdown.connect(_on_shutdown, weak=False)
