"""Looks for batches that no worker advances, and sends a task that continues them. One process of each worker looks.

Chords are the fast path, the store is the truth. Where Redis loses a counter, the broker a message, or a worker dies
with a chunk, the rows still say what is to be done; a copy of the body's task does it.
"""

from __future__ import annotations

import logging
import mmap
import random
import struct
import threading
import time
from typing import Any, ClassVar

from celery import Celery, _state, bootsteps, signals
from celery.exceptions import OperationalError

from docket_celery.errors import DocketError, StoreUnavailable
from docket_celery.store.contract import BatchStore
from docket_celery.store.records import LostRun
from docket_celery.task import checks
from docket_celery.task.app_settings import app_settings, this_worker
from docket_celery.task.chords import revive
from docket_celery.task.retries import LONGEST_WAIT_S

MOST_AT_ONCE = 20
"""Most runs that one look takes; the next look finds the others."""
_TRIES = 20
"""Most tries to send the task of one run; by then the store finds the run lost once more."""
_logger = logging.getLogger("docket_celery.sweeper")


class Schedule:
    """When the processes of one worker look next; forked children share it.

    Some children end after a single task: with a schedule of its own each would look too often or never.
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
    """Sweeps the stores of an app's batch tasks every half a lease, until `stop` or the end of the process.

    All processes of the worker share the schedule: one of them looks at a time.
    """

    def __init__(self, app: Celery, schedule: Schedule) -> None:
        self._app, self._schedule = app, schedule
        self._over = threading.Event()
        self._unsent: dict[tuple[str, str], tuple[LostRun, int]] = {}

    def start(self) -> bool:
        """Start the thread, if the app has tasks whose batches several workers share; tell whether it has."""
        if not self._tasks():
            return False
        threading.Thread(target=self._run, name="docket-sweep", daemon=True).start()
        return True

    def stop(self) -> None:
        """Look no more; a look that is under way is finished."""
        self._over.set()

    def sweep(self) -> int:
        """Look once; return how many tasks were sent: for lost runs, and those that could not be sent before.

        The first look after an outage takes nothing for lost: leases expired meanwhile, and the deliveries that held
        them come back within `LONGEST_WAIT_S`.

        Raises:
            DocketError: A store cannot be asked.
        """
        settings = app_settings(self._app)
        if self._schedule.away:
            for store, _ in self._tasks():
                store.find_run("", "")
            self._schedule.set_next(time.monotonic() + settings.lease_seconds + LONGEST_WAIT_S)
            return self._send()
        try:
            for store, names in self._tasks():
                found = store.find_lost(names, settings.lease_seconds, settings.max_deliveries, MOST_AT_ONCE)
                for lost in found:
                    _logger.warning(
                        "run %r of graph %r is not advanced by any worker; task %s continues it",
                        *(lost.execution_id, lost.graph, lost.task_name),
                    )
                    self._unsent[lost.graph, lost.execution_id] = (lost, 0)
        finally:
            sent = self._send()
        return sent

    def _send(self) -> int:
        """Send the tasks of lost runs; what cannot be sent is kept, as the store finds it lost again much later."""
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
                _logger.exception("the task of run %r could not be sent", lost.execution_id)
            if tries + 1 < _TRIES:
                self._unsent[name] = (lost, tries + 1)
        return sent

    def _run(self) -> None:
        while True:
            half_s = app_settings(self._app).lease_seconds / 2
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
        settings = app_settings(self._app)
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
    """Begins and ends the sweeper of a worker; Celery's signal tells of a warm shutdown only.

    Under prefork the children sweep, with the schedule that is made here before any of them is forked.
    """

    schedule: ClassVar[Schedule | None] = None
    sweeper: ClassVar[Sweeper | None] = None

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        _end()  # that of an earlier worker in this process
        SweeperStep.schedule = Schedule()

    def start(self, parent: Any) -> None:
        """Begin where tasks run in the main process; that of a prefork pool runs no SQL."""
        if not this_worker.forks and SweeperStep.sweeper is None:
            _begin(parent.app)

    def stop(self, parent: Any) -> None:  # noqa: ARG002 -- Celery's signature
        """End it."""
        _end()

    terminate = stop


def connect(app: Celery) -> None:
    """Make the workers of *app* sweep."""
    app.steps["worker"].add(SweeperStep)
    signals.worker_process_init.connect(_on_process_init, weak=False)
    signals.worker_process_shutdown.connect(_end, weak=False)


def _on_process_init(**_: Any) -> None:
    """Begin in a child of a prefork pool. One that was spawned knows its app alone, and has its own schedule."""
    if this_worker.forks or this_worker.app is None:
        _begin(this_worker.app or _state.get_current_app())


def _begin(app: Celery) -> None:
    _end()
    SweeperStep.sweeper = Sweeper(app, SweeperStep.schedule or Schedule())
    SweeperStep.sweeper.start()


def _end(**_: Any) -> None:
    if SweeperStep.sweeper is not None:
        SweeperStep.sweeper.stop()
        SweeperStep.sweeper = None
