"""What a process has once: made on first use, freed with what it belongs to, never shared over a fork."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, signals

from docket_celery import Graph, Scope, SQLStore, graph_task
from docket_celery.engine.process.state import Process, process
from docket_celery.store import MemoryStore
from docket_celery.store.contract import Store
from tests.infra.processes import wait_until
from tests.unit.protos.shop_pb2 import Charge, Order

GRAPH = Graph("process")


@GRAPH.step(persist=Scope.WORKFLOW)
def charge(order: Order) -> Charge:
    """Answer with the order's own text."""
    return Charge(charge_id=order.order_id)


def holds_in_child(check: Callable[[], bool]) -> bool:
    """Tell whether *check* is true in a forked child."""
    child = os.fork()
    if child == 0:
        held = False
        try:
            held = check()
        finally:
            os._exit(0 if held else 1)
    return os.waitpid(child, 0)[1] == 0


def open_files(path: Path) -> int:
    """Return how many of this process's file descriptors are of the database *path*."""
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sum(link.startswith(str(path)) for link in links)


def run_once(store: Store, order: Order) -> list[weakref.ref[Any]]:
    """Execute with a store that nobody keeps; return what must be freed then."""
    GRAPH.execute(Charge, order, store=store)
    return [weakref.ref(store), weakref.ref(process.heartbeat(store))]


@pytest.mark.parametrize("kind", ["sqlite", "memory"])
def test_a_store_made_for_one_call_is_freed_after_it(kind: str, tmp_path: Path) -> None:
    """With its heartbeat, and with the connections of both."""
    path = tmp_path / "store.db"
    SQLStore(f"sqlite:///{path}").migrate()
    freed = list[weakref.ref[Any]]()
    for number in range(3):
        store = SQLStore(f"sqlite:///{path}") if kind == "sqlite" else MemoryStore()
        freed += run_once(store, Order(order_id=str(number)))
        del store
    gc.collect()
    # The thread of the heartbeat ends with its nap.
    wait_until(lambda: not any(each() for each in freed), within_s=10, what="all is freed")
    assert open_files(path) == 0


def test_a_kept_store_keeps_its_heartbeat() -> None:
    """One for all its runs."""
    store = MemoryStore()
    beats = process.heartbeat(store)
    gc.collect()
    assert process.heartbeat(store) is beats


def test_stores_that_compare_equal_have_heartbeats_of_their_own() -> None:
    """A user's store may define equality, which leaves it without a hash."""
    one, other = EqualStore(), EqualStore()
    assert process.heartbeat(one) is not process.heartbeat(other)
    assert process.heartbeat(one) is process.heartbeat(one)


class EqualStore(MemoryStore):
    """Equal to every other one, and therefore not hashable."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EqualStore)

    __hash__ = None  # type: ignore[assignment]


def test_a_forked_child_starts_with_nothing_and_frees_nothing(tmp_path: Path) -> None:
    """It has threads, stores and heartbeats of its own; the parent's objects stay, unused."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    opened, runtime = process.store(url), process.runtime(1)
    assert opened is not None
    parents = [weakref.ref(each) for each in (runtime, opened, process.heartbeat(opened))]
    del opened, runtime

    def check() -> bool:
        gc.collect()
        kept = [each() for each in parents]
        store = process.store(url)
        assert store is not None
        own = [process.runtime(1), store, process.heartbeat(store)]
        return None not in kept and not any(one is other for one in kept for other in own)

    assert holds_in_child(check)
    assert process.runtime(1) is parents[0]()
    assert process.store(url) is parents[1]()


def test_a_forked_child_keeps_what_the_process_was_told() -> None:
    """The host's settings, and those of `docket_celery.settings`."""
    fresh = Process()
    fresh.use_host(lambda: fresh.settings({"docket_threads": 3}))
    fresh.set({"docket_lease_seconds": 7})
    fresh.begin_in_child()
    assert (fresh.settings().threads, fresh.settings().lease_seconds) == (3, 7)


IMPORTS = """
import atexit, json, os, threading, weakref
import celery.signals as signals

hooks, at_exit = [], []

def note(kept, register):
    def noted(*args, **kwargs):
        kept.extend(call for call in (*args, *kwargs.values()) if callable(call))
        return register(*args, **kwargs)
    return noted

os.register_at_fork = note(hooks, os.register_at_fork)
atexit.register = note(at_exit, atexit.register)

import docket_celery, docket_celery.task.task, docket_celery.task.decorators, docket_celery.task.app_defaults

def ours(calls):
    names = [getattr(call, "__module__", None) or type(call).__module__ for call in calls]
    return [name for name in names if name.startswith("docket_celery")]

def receivers():
    found = {}
    for name, signal in vars(signals).items():
        if isinstance(signal, signals.Signal):
            calls = [call for _, call in signal.receivers or ()]
            found[name] = ours(call() if isinstance(call, weakref.ref) else call for call in calls)
    assert len(found) > 20
    return {name: names for name, names in found.items() if names}

told = {
    "receivers": receivers(), "threads": [each.name for each in threading.enumerate()],
    "at exit": ours(at_exit), "fork hooks": ours(hooks),
}
print(json.dumps(told))
"""


def test_an_import_has_no_effect_but_definitions() -> None:
    """No receiver of ours at Celery's signals, no thread, nothing at exit, and one hook for forks."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "receivers": {},
        "threads": ["MainThread"],
        "at exit": [],
        "fork hooks": ["docket_celery.engine.process.state"],
    }


def test_the_first_task_of_an_app_connects_to_celery_once() -> None:
    """However many tasks and apps there are, a signal has each receiver of ours once."""
    for number in range(2):
        app = Celery(f"connected{number}", set_as_current=False)
        for name in ("one", "two"):

            @graph_task(app, GRAPH, name=name, shared=False)
            def charge_order(order: Order) -> Charge:
                raise NotImplementedError

        app.finalize()
        assert [step.__name__ for step in app.steps["worker"]] == ["SweeperStep"]
    for signal in (signals.worker_init, signals.worker_process_init, signals.worker_process_shutdown):
        # Those of others may be held weakly.
        calls: list[Any] = [call() if isinstance(call, weakref.ref) else call for _, call in signal.receivers]
        names = [f"{call.__module__}.{call.__qualname__}" for call in calls if hasattr(call, "__qualname__")]
        ours = [name for name in names if name.startswith("docket_celery")]
        assert ours
        assert len(set(ours)) == len(ours)
