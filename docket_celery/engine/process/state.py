"""What a run uses when neither the call nor the graph says: the settings and the store of the process.

The host of the process fills this in: the Celery side for workers and apps, `settings()` for plain scripts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from docket_celery.engine.process.settings import Settings, check_environment
from docket_celery.store.codec import Codec
from docket_celery.store.contract import Store


class Defaults:
    """The process's sources of settings and stores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: dict[str, Any] = {}
        self._host: Callable[[], Mapping[str, Any]] = dict[str, Any]
        self._in_task: Callable[[], bool] = bool
        self._open: Callable[[str, Codec | None], Store] | None = None
        self._stores: dict[tuple[str, int], Store] = {}
        self._environment_checked = False

    def use_host(self, host: Callable[[], Mapping[str, Any]], in_task: Callable[[], bool] = bool) -> None:
        """Say where ``docket_*`` values come from, and which threads the host may interrupt in their work."""
        self._host, self._in_task = host, in_task

    def may_help(self) -> bool:
        """Tell whether the calling thread may run steps: the host does not interrupt what it does."""
        return not self._in_task()

    def use_opener(self, opener: Callable[[str, Codec | None], Store]) -> None:
        """Say how a database URL and a codec become a store."""
        self._open = opener

    def set(self, values: Mapping[str, Any]) -> Settings:
        """Add ``docket_*`` values of this process; None takes one back. They win over the host's.

        Raises:
            InvalidSettings: A key is unknown or a value cannot be used; nothing was changed.
        """
        with self._lock:
            merged = {key: value for key, value in {**self._own, **values}.items() if value is not None}
            settings = Settings.read(merged)
            self._own = merged
        return settings

    def settings(self, host: Mapping[str, Any] | None = None) -> Settings:
        """Return the settings in force.

        Args:
            host: The values of one app; default: whatever the host of the process names.

        Raises:
            InvalidSettings: A value cannot be used, or the environment sets what does not exist.
        """
        if not self._environment_checked:
            check_environment()
            self._environment_checked = True  # once for each process: every run asks for its settings
        base = self._host() if host is None else host
        return Settings.read({**base, **self._own} if self._own else base)

    def store(self, url: str | None, codec: Codec | None = None) -> Store | None:
        """Return the process's store for *url* and *codec*, opened on first use; None without a URL or an opener."""
        if url is None or self._open is None:
            return None
        # The store keeps its codec, so no other object can get that id.
        name = url, id(codec)
        with self._lock:
            found = self._stores.get(name)
            if found is None:
                found = self._stores[name] = self._open(url, codec)
            return found

    def close(self) -> None:
        """Close the stores opened here."""
        with self._lock:
            stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            store.close()

    def after_fork(self) -> None:
        """Take a fresh lock: another thread of the parent may have held the old one at the fork."""
        self._lock = threading.Lock()


process_defaults = Defaults()
os.register_at_fork(after_in_child=process_defaults.after_fork)
