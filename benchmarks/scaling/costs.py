"""Measures what runs cost on a real worker, Postgres (with fsync) and Redis; the result is one JSON object."""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf.wrappers_pb2 import Int64Value

from benchmarks import results
from benchmarks.process import ROOT
from benchmarks.scaling.meters import Meters, Reading, difference, flush_times, quietest
from benchmarks.servers import Servers, databases
from benchmarks.ways.celery_worker import environment, worker
from docket_celery.store import SQLStore
from docket_celery.store.records import Lease
from tests.conformance.samples import request

APP = "benchmarks.ways.scaling_app"
KINDS = ("plain", "persisted_1", "persisted_4", "persisted_8", "hits_4")
BATCH = 2000
"""Items of a batch."""
WAITS_S = 120.0
UPKEEP_CALLS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long is measured.

    Attributes:
        jobs: Jobs in a round of each kind.
        rounds: Of which the one is kept that other work has disturbed least, after one of warm-up.
    """

    jobs: int = 200
    rounds: int = 4


def measure(effort: Effort, tell: Callable[[str], None]) -> dict[str, Any]:
    """Start servers and a worker with two children, measure, and return what docs/scaling.md is computed from."""
    folder = results.KEPT / "scaling"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "commit": measured_commit(),
        "machine": results.machine(),
        "load": results.load_average(),
    }
    with Servers(folder) as servers:
        options = {"redis": servers.url("redis"), "database": servers.url("postgres")}
        with databases(options["database"], ["costs"]) as made:
            options["database"] = made["costs"]
            found["flush"] = flush_times(Path(folder))
            store = SQLStore(options["database"])
            store.migrate()
            with _meters(options) as meters:
                found |= _of_tasks(options, meters, effort, tell)
                tell("upkeep")
                found["upkeep"] = _of_upkeep(store, meters)
            store.close()
    return found


@contextmanager
def _meters(options: dict[str, str]) -> Generator[Meters]:
    meters = Meters(options["database"], options["redis"])
    try:
        yield meters
    finally:
        meters.close()


def measured_commit() -> str:
    """Return the last commit that changed the package."""
    command = ["git", "log", "-1", "--format=%h", "--", "docket_celery"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _of_tasks(
    options: dict[str, str], meters: Meters, effort: Effort, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measure each kind of task on one worker, and one persisted job at a time."""
    os.environ |= environment(options)
    app = importlib.import_module(APP)
    costs: dict[str, Reading] = {}
    with worker(APP, "-P", "prefork") as process:

        def measured(jobs: int, call: Callable[[], None]) -> Reading:
            call()
            rounds: list[Reading] = []
            for _ in range(effort.rounds):
                before = meters.read(process.pid)
                call()
                rounds.append(difference(before, meters.read(process.pid), jobs))
            return quietest(rounds)

        for kind in KINDS:
            tell(kind)
            task: Any = getattr(app, kind)
            sizes = meters.sizes()
            costs[kind] = measured(effort.jobs, partial(_burst, task, effort.jobs))
            runs = effort.jobs * (effort.rounds + 1)
            costs[kind] |= {
                f"{name}_bytes": bytes_ for name, bytes_ in difference(sizes, meters.sizes(), runs).items()
            }
        tell("items")
        values = [Int64Value(value=number) for number in range(BATCH)]
        costs["items"] = measured(BATCH, lambda: _get(app.items.delay(values)))
        tell("one at a time")
        alone = measured(effort.jobs, lambda: _one_by_one(app.persisted_4, effort.jobs))
        connections, memory = meters.connections(), meters.connection_bytes()
    return {"costs": costs, "alone": alone, "connections": connections, "connection_bytes": memory}


def _get(sent: Any) -> Any:
    return sent.get(timeout=WAITS_S, interval=0.001)


def _burst(task: Any, jobs: int) -> None:
    for sent in [task.delay(Int64Value()) for _ in range(jobs)]:
        _get(sent)


def _one_by_one(task: Any, jobs: int) -> None:
    for _ in range(jobs):
        _get(task.delay(Int64Value()))


def _of_upkeep(store: SQLStore, meters: Meters) -> dict[str, Reading]:
    """Measure a heartbeat of one lease, a look for lost runs, and the purge of a run of four persisted steps."""
    lease = store.acquire(request())
    assert isinstance(lease, Lease)
    names = [f"{APP}.items"]

    def cost(count: int, call: Callable[[], object], calls: int = 1) -> Reading:
        before = meters.read()
        for _ in range(calls):
            call()
        return difference(before, meters.read(), count)

    found = {
        "heartbeat": cost(UPKEEP_CALLS, lambda: store.extend([lease]), UPKEEP_CALLS),
        "sweep": cost(UPKEEP_CALLS, lambda: store.find_lost(names, 30.0, 10, 20), UPKEEP_CALLS),
    }
    due = "graph = 'persisted-4' AND expires_at IS NOT NULL"
    past = "SET expires_at = now() - interval '1 minute'"
    runs = meters.sql.execute(f"UPDATE docket_runs {past} WHERE {due}").rowcount
    meters.sql.execute(f"UPDATE docket_cache {past} WHERE {due}")
    found["purge"] = cost(runs, lambda: _purge(store))
    return found


def _purge(store: SQLStore) -> None:
    while store.purge(1000):
        pass
