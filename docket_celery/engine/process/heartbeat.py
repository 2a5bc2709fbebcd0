"""Keeps the leases and claims of this process alive: one thread, one statement for all of a store's runs.

The thread only writes plain attributes, which the waiting thread of a run reads. So it may be a native thread even
where gevent has patched `threading`: a step that hogs the CPU then costs no lease.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from docket_celery.engine.process.timer import Clock, system_clock
from docket_celery.errors import DocketError, LeaseLost, StoreUnavailable
from docket_celery.store.contract import Store
from docket_celery.store.records import Halt, Lease

_logger = logging.getLogger("docket_celery.process")


class HeldLease:
    """A lease that this process holds, and until when it may be trusted without asking the database.

    Of a chunk *halt* is the state of the rest of its stage, as of the last heartbeat.
    """

    __slots__ = ("_margin_s", "_now", "halt", "lease", "lost", "trusted_until")

    def __init__(
        self,
        lease: Lease,
        asked_at: float,
        margin_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lease, self._margin_s, self._now, self.lost = lease, margin_s, now, False
        self.halt: Halt | None = None
        self.renew(asked_at)

    def renew(self, asked_at: float) -> None:
        """Count the lease from *asked_at*, the moment before the database was asked."""
        self.trusted_until = asked_at + self.lease.lease_s - self._margin_s

    def trusted(self) -> bool:
        """Tell whether the run is surely still ours; False means: start nothing, save nothing."""
        return not self.lost and self._now() < self.trusted_until

    def fault(self) -> LeaseLost | StoreUnavailable:
        """Return why the lease is no longer trusted: another one has the run, or the database is away.

        In an outage nothing says that the run was taken over: it is given back as soon as that can be written.
        """
        lease = self.lease
        if self.lost:
            return LeaseLost(lease.graph, lease.execution_id, lease.epoch)
        return StoreUnavailable(
            "extend the lease", f"run {lease.execution_id!r} was held until it could expire"
        )


class Heartbeat:
    """Extends what is watched in *store*, at a quarter of the shortest lease, on a thread that ends when idle.

    With a *clock*, `beat_if_due` is called instead by the thread that runs the steps, whose time this is.
    """

    def __init__(self, store: Store, clock: Clock | None = None) -> None:
        self._clock, self._threaded = clock or system_clock, clock is None
        used = store.clone() if self._threaded else store
        # Weakly, where it is *store* itself: the process keeps this for as long as the store is kept elsewhere.
        self._store, self._own = weakref.ref(used), None if used is store else used
        self._lock = _native("_thread", "allocate_lock")()
        self._held: dict[int, HeldLease] = {}
        self._claims: dict[tuple[bytes, str], float] = {}
        self._beat_at = self._clock.monotonic()
        self._alive = False

    def watch(self, held: HeldLease) -> None:
        """Keep *held* alive until `unwatch`."""
        with self._lock:
            self._held[id(held)] = held
            self._ensure_thread()

    def unwatch(self, held: HeldLease) -> None:
        """Stop extending *held*."""
        with self._lock:
            self._held.pop(id(held), None)

    def watch_claim(self, key: bytes, owner: str, lease_s: float) -> None:
        """Keep the claim on a GLOBAL checkpoint alive until `unwatch_claim`."""
        with self._lock:
            self._claims[key, owner] = lease_s
            self._ensure_thread()

    def unwatch_claim(self, key: bytes, owner: str) -> None:
        """Stop extending *owner*'s claim; another owner's on the same key is still extended."""
        with self._lock:
            self._claims.pop((key, owner), None)

    def beat_if_due(self) -> float | None:
        """Extend what is watched if that is due; return the seconds until it is due, or None: nothing is watched."""
        now = self._clock.monotonic()
        with self._lock:
            if not self._held and not self._claims:
                self._alive = False
                return None
            leases = [held.lease.lease_s for held in self._held.values()]
            due_s = self._beat_at + min([*leases, *self._claims.values()]) / 4 - now
        if due_s <= 0:
            self._beat_at = now
            self._beat(now)
        return due_s

    def _ensure_thread(self) -> None:
        if self._threaded and not self._alive:
            _start_native(self._run)
            self._alive = True

    def _run(self) -> None:
        sleep: Callable[[float], None] = _native("time", "sleep")
        self._beat_at = self._clock.monotonic()
        while (due_s := self.beat_if_due()) is not None:
            # Short naps instead of a condition: the thread may not touch patched locks, and ends when idle.
            sleep(min(max(0.0, due_s), 0.25))

    def _beat(self, asked_at: float) -> None:
        with self._lock:
            held = list(self._held.values())
            claims = [(key, owner, lease_s) for (key, owner), lease_s in self._claims.items()]
        store = self._store()
        if store is None:
            return
        try:
            kept = store.extend([h.lease for h in held], claims)
        except DocketError as error:
            _logger.warning("the heartbeat of %d runs failed: %s", len(held), error)
            return
        except Exception:
            # Without this thread every run of the process would lose its lease, not only these.
            _logger.exception("the heartbeat of %d runs failed", len(held))
            return
        newest = {one.lease.name: one.lease.epoch for one in sorted(held, key=lambda one: one.lease.epoch)}
        for one in held:
            # The store names runs: where this process took a run over from itself, the older epoch is gone.
            if one.lease.name in kept and one.lease.epoch == newest[one.lease.name]:
                told = kept[one.lease.name]
                if told is Halt.LOCKED:
                    _logger.warning(
                        "the row of run %r is locked; its lease was not extended", one.lease.execution_id
                    )
                    continue
                one.halt = told
                one.renew(asked_at)
            else:
                one.lost = True


def _native(module: str, name: str) -> Any:
    """Return an attribute as it was before gevent patched it, where gevent did."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module, name)
    return getattr(sys.modules[module], name)


def _start_native(target: Callable[[], None]) -> None:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        monkey.get_original("_thread", "start_new_thread")(target, ())
        return
    threading.Thread(target=target, name="docket-heartbeat", daemon=True).start()
