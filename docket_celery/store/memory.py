"""A store in this process's memory: for tests, notebooks and eager runs. It keeps the SQL stores' rules."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from docket_celery.errors import LeaseLost
from docket_celery.store.codec import Codec
from docket_celery.store.records import (
    Checkpoint,
    Halt,
    Lease,
    Purged,
    RunEnd,
    RunRequest,
    RunRow,
    RunState,
    StepExecution,
)
from docket_celery.store.rows import (
    SCHEMA_VERSION,
    check_owner,
    dump_json,
    end_values,
    lease_from,
    read_run,
)
from docket_celery.store.rules import KEPT_FOR_DELIVERY, take


@dataclass(slots=True)
class _Stored:
    checkpoint: Checkpoint
    checksum: bytes
    expires_at: float | None

    @property
    def run(self) -> tuple[str, str | None]:
        return self.checkpoint.graph, self.checkpoint.execution_id

    def read(self, lease: Lease | None = None) -> Checkpoint:
        run = ("", None) if lease is None else (lease.graph, lease.execution_id)
        return check_owner(self.checkpoint.verify(self.checksum), *run)


@dataclass(slots=True)
class _Claim:
    owner: str
    lease_until: float


@dataclass(slots=True)
class _Run:
    """A row of ``docket_runs``; times in seconds of the store's clock."""

    request: RunRequest
    state: RunState = RunState.QUEUED
    epoch: int = 0
    owner: str | None = None
    lease_until: float | None = None
    lost: int = 0
    failures: int = 0
    error: str | None = None
    result: bytes | None = None
    result_checksum: bytes | None = None
    expires_at: float | None = None

    def is_due(self, now: float) -> bool:
        """Tell whether the run has ended, or its message may never come, and it has been kept for long enough."""
        over = self.state.ended or self.state is RunState.QUEUED
        return over and self.expires_at is not None and self.expires_at <= now

    def columns(self, now: float) -> dict[str, Any]:
        """Return the run as a row of the SQL stores."""
        names = ("graph", "execution_id", "target", "job_digest", "retries", "task_name", "task_id")
        left_s = None if self.lease_until is None else self.lease_until - now
        return {
            **{name: getattr(self.request, name) for name in names},
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "lease_left_s": left_s,
            "expired": left_s is not None and left_s <= 0,
            "kept": False,
            "progress": None,
        }


class MemoryStore:
    """Keeps checkpoints and runs in memory, for one process and as long as it lives.

    Args:
        clock: Seconds since any fixed moment; tests pass their own.
    """

    persistent = False
    codec: Codec | None = None

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._cache: dict[bytes, _Stored] = {}
        self._runs: dict[tuple[str, str | None], _Run] = {}
        self._claims: dict[bytes, _Claim] = {}
        self._executions: list[StepExecution] = []

    def enqueue(self, request: RunRequest, keep_s: float) -> RunRow | None:
        """See `Store.enqueue`."""
        with self._lock:
            now = self._clock()
            name = request.graph, request.execution_id
            run = self._runs.setdefault(name, _Run(request, expires_at=now + keep_s))
            if (run.request.target, run.request.job_digest) != (request.target, request.job_digest):
                return read_run(run.columns(now))
            if run.expires_at is not None and run.state in KEPT_FOR_DELIVERY:
                run.expires_at = max(run.expires_at, now + keep_s)
            return None

    def acquire(self, request: RunRequest) -> Lease | RunRow:
        """See `Store.acquire`."""
        with self._lock:
            now = self._clock()
            run = self._runs.setdefault((request.graph, request.execution_id), _Run(request))
            changes = take(request, run.columns(now))
            if changes is None:
                return read_run(run.columns(now))
            run.state, run.lost = changes["state"], changes["lost"]
            if run.state is RunState.QUARANTINED:
                run.lease_until = None
                return read_run(run.columns(now))
            run.request = replace(request, retries=changes["retries"])
            run.epoch, run.failures, run.owner = changes["epoch"], changes["failures"], request.owner
            run.lease_until = now + request.lease_s
            run.error = run.result = run.result_checksum = run.expires_at = None
            return lease_from(request, request.target, epoch=run.epoch, lost=run.lost, failures=run.failures)

    def acquire_and_restore(
        self, request: RunRequest, keys: Callable[[], Sequence[bytes]], *, items: bool = False
    ) -> tuple[Lease, Callable[[], list[Checkpoint]]] | RunRow:
        """See `Store.acquire_and_restore`."""
        found = self.acquire(request)
        if not isinstance(found, Lease):
            return found
        return found, lambda: [] if found.epoch == 1 else self.restore(found, keys(), items=items)

    def restore(self, lease: Lease, keys: Sequence[bytes], *, items: bool = False) -> list[Checkpoint]:
        """See `Store.restore`."""
        wanted = frozenset(keys)
        with self._lock:
            found = [
                stored
                for key, stored in self._cache.items()
                if key in wanted or (stored.run == lease.name and (items or stored.checkpoint.item == ""))
            ]
            checkpoints = [stored.read(lease) for stored in found]
            if self._held(lease) is not None:
                self._date_checkpoints(lease.name, None)
        return checkpoints

    def save(self, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None) -> Checkpoint:
        """See `Store.save`."""
        with self._lock:
            if self._held(lease) is None:
                raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
            stored = self._cache.get(checkpoint.key)
            if stored is not None:
                return stored.read(lease)
            if execution is not None:
                self._executions.append(execution)
            return self._store(checkpoint)

    def lookup(
        self, key: bytes, owner: str, lease_s: float, hit: StepExecution | None = None
    ) -> Checkpoint | bool:
        """See `Store.lookup`."""
        with self._lock:
            now = self._clock()
            stored = self._live(key, now)
            if stored is not None:
                if hit is not None:
                    self._executions.append(hit)
                return stored.read()
            claim = self._claims.get(key)
            if claim is not None and claim.owner != owner and claim.lease_until > now:
                return False
            self._claims[key] = _Claim(owner, now + lease_s)
            return True

    def publish(
        self, checkpoint: Checkpoint, owner: str, execution: StepExecution | None, *, replace: bool = False
    ) -> Checkpoint:
        """See `Store.publish`."""
        with self._lock:
            now = self._clock()
            self.release_claim(checkpoint.key, owner)
            if execution is not None and execution not in self._executions:
                self._executions.append(execution)
            stored = self._live(checkpoint.key, now)
            if stored is not None and not replace:
                return stored.read()
            return self._store(checkpoint, None if checkpoint.ttl_s is None else now + checkpoint.ttl_s)

    def forget(self, key: bytes) -> bool:
        """See `Store.forget`."""
        with self._lock:
            live, stored = self._live(key, self._clock()), self._cache.get(key)
            if stored is None or stored.checkpoint.execution_id is not None:
                return False
            del self._cache[key]
            return live is not None

    def release_claim(self, key: bytes, owner: str) -> None:
        """See `Store.release_claim`."""
        with self._lock:
            claim = self._claims.get(key)
            if claim is not None and claim.owner == owner:
                del self._claims[key]

    def extend(
        self, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]] = ()
    ) -> dict[tuple[str | int, ...], Halt | None]:
        """See `Store.extend`."""
        held: dict[tuple[str | int, ...], Halt | None] = {}
        with self._lock:
            now = self._clock()
            for lease in leases:
                if (run := self._held(lease)) is not None:
                    run.lease_until = now + lease.lease_s
                    held[lease.name] = None
            for key, owner, lease_s in claims:
                claim = self._claims.get(key)
                if claim is not None and claim.owner == owner:
                    claim.lease_until = now + lease_s
        return held

    def end(self, lease: Lease, end: RunEnd) -> None:
        """See `Store.end`."""
        with self._lock:
            now = self._clock()
            run = self._held(lease)
            if run is None:
                if self._held(lease, end.state) is None:
                    raise LeaseLost(lease.graph, lease.execution_id, lease.epoch)
                return
            values = end_values(lease, end)
            run.state, run.lease_until, run.error = end.state, None, values["error"]
            run.result, run.result_checksum = values["result"], values["result_checksum"]
            run.failures += end.failed_once
            if end.wake_in_s is not None:
                run.request = replace(run.request, retries=run.request.retries + 1)
            self._executions.extend(end.executions)
            if end.checkpoint is not None:
                self._store(end.checkpoint)
            if end.state.ended:
                run.expires_at = None if end.retention_s is None else now + end.retention_s
                self._date_checkpoints(lease.name, now)

    def cancel(
        self, graph: str, execution_id: str, error: dict[str, Any], retention_s: float
    ) -> RunRow | None:
        """See `Store.cancel`."""
        with self._lock:
            now, run = self._clock(), self._runs.get((graph, execution_id))
            if run is None:
                return None
            if not run.state.ended:
                run.state, run.lease_until = RunState.CANCELLED, None
                run.error, run.expires_at = dump_json(error), now + retention_s
                self._date_checkpoints((graph, execution_id), now)
            return read_run(run.columns(now))

    def find_run(self, graph: str, execution_id: str) -> RunRow | None:
        """See `Store.find_run`."""
        with self._lock:
            run = self._runs.get((graph, execution_id))
            return None if run is None else read_run(run.columns(self._clock()))

    def find_job(self, graph: str, execution_id: str) -> bytes | None:
        """See `Store.find_job`."""
        with self._lock:
            run = self._runs.get((graph, execution_id))
            return None if run is None else run.request.job

    def purge(self, limit: int) -> Purged:
        """See `Store.purge`; other calls wait for it, and *limit* bounds how long."""
        with self._lock:
            now = self._clock()
            due = [key for key, run in self._runs.items() if run.is_due(now)][:limit]
            for key in due:
                del self._runs[key]
            gone = [key for key, stored in self._cache.items() if self._may_go(stored, now, due)]
            for cache_key in gone:
                del self._cache[cache_key]
            kept = [row for row in self._executions if (row.graph, row.execution_id) not in due]
            executions = len(self._executions) - len(kept)
            self._executions = kept
            dead = [key for key, claim in self._claims.items() if claim.lease_until <= now]
            for cache_key in dead:
                del self._claims[cache_key]
        return Purged(runs=len(due), checkpoints=len(gone), executions=executions, claims=len(dead))

    def migrate(self) -> int:
        """Return the version of the rules; there are no tables."""
        return SCHEMA_VERSION

    def check_schema(self) -> None:
        """Do nothing: memory is always of this release's version."""

    def hmac_digest(self, digest: bytes) -> bytes:
        """See `Store.hmac_digest`; memory has no codec."""
        return digest

    def clone(self) -> MemoryStore:
        """See `Store.clone`."""
        return self

    def close(self) -> None:
        """Do nothing: there are no connections, and what is stored stays."""

    @property
    def executions(self) -> list[StepExecution]:
        """All step executions written so far, oldest first."""
        with self._lock:
            return list(self._executions)

    def _held(self, lease: Lease, state: RunState = RunState.RUNNING) -> _Run | None:
        run = self._runs.get((lease.graph, lease.execution_id))
        held = run is not None and (run.state, run.owner, run.epoch) == (state, lease.owner, lease.epoch)
        return run if held else None

    def _live(self, key: bytes, now: float) -> _Stored | None:
        stored = self._cache.get(key)
        if stored is None or (stored.expires_at is not None and stored.expires_at <= now):
            return None
        return stored

    def _store(self, checkpoint: Checkpoint, expires_at: float | None = None) -> Checkpoint:
        kept = replace(checkpoint, output_json=None)
        self._cache[kept.key] = _Stored(kept, kept.checksum(), expires_at)
        return checkpoint

    def _may_go(self, stored: _Stored, now: float, purged: Collection[tuple[str, str | None]]) -> bool:
        """Tell whether a checkpoint is of a purged run, or past its date and of no run that may still need it."""
        if stored.run in purged:
            return True
        run = self._runs.get(stored.run)
        over = stored.expires_at is not None and stored.expires_at <= now
        return over and (run is None or run.state.ended)

    def _date_checkpoints(self, name: tuple[str | int | None, ...], ended_at: float | None) -> None:
        for stored in self._cache.values():
            if stored.run == name and (ttl_s := stored.checkpoint.ttl_s) is not None:
                stored.expires_at = None if ended_at is None else ended_at + ttl_s
