"""The one object that holds what a process has once."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from docket_celery.engine.process.heartbeat import Heartbeat
from docket_celery.engine.process.instances import Factory
from docket_celery.engine.process.limits import Slots
from docket_celery.engine.process.pool import Pool
from docket_celery.engine.process.runtime import Runtime
from docket_celery.engine.process.settings import ENVIRONMENT, VARIABLES, Settings, check_environment
from docket_celery.engine.process.timer import Timer
from docket_celery.plan.step import Mark, Step
from docket_celery.store.codec import Codec
from docket_celery.store.contract import Store


class Process:
    """Threads, stores, heartbeats, instances and slots of this process, each made on first use.

    A forked child starts with none of them, and neither uses nor frees those of its parent. It keeps what the
    parent was told: the host, and `own`, the values of `docket_celery.settings`. The `lock` guards what is made
    once.
    """

    def __init__(self) -> None:
        self._host: Callable[[], Settings | None] = lambda: None
        self._in_task: Callable[[], bool] = bool
        self.own: dict[str, Any] = {}
        self._parents: list[dict[str, Any]] = []
        self._closes_at_exit = False
        self._begin()

    def _begin(self) -> None:
        self.lock = threading.RLock()
        self._environment_checked = False
        self._last_read: tuple[object, list[Any], Settings] | None = None
        self._runtimes: dict[int, Runtime] = {}
        self._stores: dict[tuple[str, int], Store] = {}
        # For the life of a store, which may be that of one call; by its id, since equal stores are still two.
        self._heartbeats: dict[int, Heartbeat] = {}
        self._slots: weakref.WeakKeyDictionary[Mark, Slots] = weakref.WeakKeyDictionary()
        self._factories: weakref.WeakKeyDictionary[Mark, Factory] = weakref.WeakKeyDictionary()
        self._built: list[Factory] = []

    def begin_in_child(self) -> None:
        """Start with nothing, after a fork."""
        # Kept, not freed: finalizing the parent's loops and connections would end what the parent still uses.
        self._parents.append(vars(self).copy())
        self._begin()

    def use_host(self, find: Callable[[], Settings | None], in_task: Callable[[], bool] = bool) -> None:
        """Say what returns the settings of the host, if it has any, and tells the threads that it may interrupt."""
        self._host, self._in_task = find, in_task

    def may_help(self) -> bool:
        """Tell whether the calling thread may run steps: the host does not interrupt what it does."""
        return not self._in_task()

    def set(self, values: Mapping[str, Any]) -> Settings:
        """Add ``docket_*`` values of this process; None takes one back. `InvalidSettings` leaves all as it was."""
        with self.lock:
            merged: dict[str, Any] = {}
            for key, value in {**self.own, **values}.items():
                if value is not None:
                    # What is added to a list later would never be checked.
                    merged[key] = value.copy() if isinstance(value, list) else value
            settings = Settings.read(merged)
            self.own = merged
        return settings

    def settings(self, values: Mapping[str, Any] | None = None) -> Settings:
        """Return the settings in force.

        They have the ``docket_*`` *values* of one app; None: what the host says, else the environment alone. Raises
        `InvalidSettings`, also where the environment sets what does not exist.
        """
        if not self._environment_checked:
            check_environment()
            self._environment_checked = True
        if values is not None:
            return Settings.read({**values, **self.own})
        if (found := self._host()) is not None:
            return found
        own, seen, last = self.own, [*map(ENVIRONMENT.get, VARIABLES)], self._last_read
        if last is None or last[0] is not own or last[1] != seen:
            last = self._last_read = own, seen, Settings.read(own)
        return last[2]

    def store(self, url: str | None, codec: Codec | None = None) -> Store | None:
        """Return the process's store for *url* and *codec*, opened on first use; None without a URL."""
        if url is None:
            return None
        # The store keeps its codec, so no other object can get that id.
        name = url, id(codec)
        with self.lock:
            found = self._stores.get(name)
            if found is None:
                from docket_celery.store import SQLStore  # SQLAlchemy: runs without a database do not need it

                found = self._stores[name] = SQLStore(url, codec=codec)
            return found

    def runtime(self, threads: int) -> Runtime:
        """Return the runtime with *threads* step threads."""
        found = self._runtimes.get(threads)
        if found is None:
            with self.lock:
                found = self._runtimes.get(threads)
                if found is None:
                    found = self._runtimes[threads] = Runtime(Pool(threads), Timer())
        return found

    def heartbeat(self, store: Store) -> Heartbeat:
        """Return what keeps this process's leases in *store* alive, over connections of its own."""
        with self.lock:
            found = self._heartbeats.get(id(store))
            if found is None:
                found = Heartbeat(store)
                # Before it is kept: the id of a store that takes no weak references could come again.
                weakref.finalize(store, self._heartbeats.pop, id(store), None).atexit = False
                self._heartbeats[id(store)] = found
            return found

    def slots_of(self, step: Step) -> Slots | None:
        """Return the slots of *step*, or None if it has no limit."""
        if (most := step.options.max_concurrent) is None:
            return None
        return self._slots.get(step.mark) or self._slots.setdefault(step.mark, Slots(most))

    def factory_of(self, step: Step, make: Callable[[], Any]) -> Factory:
        """Return what builds the instance of *step* with its *make*."""
        found = self._factories.get(step.mark)
        return found or self._factories.setdefault(step.mark, Factory(step.target, make, self._note_built))

    def holds_thread(self, step: Step) -> bool:
        """Tell whether a call keeps the thread that makes it: a coroutine's does while its instance is built."""
        return not step.is_async or (step.make is not None and not self.factory_of(step, step.make).built)

    def _note_built(self, factory: Factory) -> None:
        self._built.append(factory)
        if not self._closes_at_exit:
            self._closes_at_exit = True
            atexit.register(self.close_instances)

    def close_instances(self) -> None:
        """Close what factories have built, the latest first; a step that is called after that builds another."""
        while self._built:
            self._built.pop().close()

    def close_stores(self) -> None:
        """Close the stores opened here."""
        with self.lock:
            stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            store.close()

    def close_runtimes(self) -> None:
        """End the threads; the next run starts new ones."""
        with self.lock:
            runtimes, self._runtimes = list(self._runtimes.values()), {}
        for runtime in runtimes:
            runtime.close()


process = Process()
os.register_at_fork(after_in_child=process.begin_in_child)
