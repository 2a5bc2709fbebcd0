"""A real Celery worker for a test, and the app of this process pointed at the same servers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from docket_celery.devserver.processes import signal_on_parent_death
from docket_celery.errors import InvalidArguments
from docket_celery.testing.modes import conf_of

if TYPE_CHECKING:
    from celery import Celery

_READY_WITHIN_S, _STOP_WITHIN_S, _POLL_S = 60.0, 15.0, 0.02
_TAIL_CHARS = 4000
_numbers = itertools.count(1)
_VARIABLES = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL")


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Where a test's servers are.

    Attributes:
        broker_url: Celery's broker.
        result_url: Celery's result backend.
        database_url: SQLAlchemy URL of the database, with this release's tables.
    """

    broker_url: str
    result_url: str
    database_url: str

    def environment(self) -> dict[str, str]:
        """Return the variables that have Celery use them whatever its configuration says."""
        return {
            **dict.fromkeys(_VARIABLES, self.broker_url),
            "CELERY_RESULT_BACKEND": self.result_url,
            "DOCKET_CELERY_DATABASE_URL": self.database_url,
        }


class Worker:
    """A running worker, in a process group of its own.

    Attributes:
        log: File with its output.

    Args:
        app: As for ``celery -A``.
        servers: What it works with.
        directory: For its log.
        argv: Arguments of ``celery worker``.
        env: Variables that are added.
        watched: For the crash matrix: the task's name, and the file with orders.

    Raises:
        RuntimeError: It ended instead of becoming ready; with the end of its output.
        TimeoutError: It did not become ready.
    """

    def __init__(
        self,
        app: str,
        servers: Servers,
        *,
        directory: Path,
        argv: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        watched: Mapping[str, str] | None = None,
    ) -> None:
        name = f"docket-test-{os.getpid()}-{next(_numbers)}"
        self.log = directory / f"{name}.log"
        self._ready = directory / f"{name}.ready"
        self._env = {**os.environ, **servers.environment(), **(env or {})}
        self._order = {
            "app": app,
            # The worker imports from where the test does, whatever put it on the path there.
            "path": [os.path.abspath(entry) for entry in sys.path],
            "argv": ["worker", "-n", f"{name}@localhost", "--without-mingle", "--without-gossip", *argv],
            "database_url": servers.database_url,
            "ready": os.fspath(self._ready),
            "watched": watched,
        }
        self._process = self._start()

    def __repr__(self) -> str:
        return f"<Worker {self._order['app']} pid={self.pid} running={self.running}>"

    @property
    def pid(self) -> int:
        """Process id of the main process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the main process is there."""
        return self._process.poll() is None

    def read_log(self) -> str:
        """Return its output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """Kill it and its children at once, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Ask it to end when its tasks are done; kill it after 15 s. May be called again."""
        if self.running:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_WITHIN_S)
        # Children that outlived it, too.
        self.kill()

    def restart(self) -> None:
        """Stop it, unless it ended, and start it again; return when it is ready."""
        self.stop()
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._ready.unlink(missing_ok=True)
        main = "docket_celery.testing.worker_main"
        with self.log.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 -- this interpreter, our own module
                [sys.executable, "-m", main, json.dumps(self._order)],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=signal_on_parent_death(signal.SIGKILL),  # noqa: PLW1509 -- one call into the kernel
            )
        try:
            self._await_ready(process)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return process

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + _READY_WITHIN_S
        while not self._ready.exists():
            tail = self.read_log()[-_TAIL_CHARS:]
            if process.poll() is not None:
                raise RuntimeError(f"the worker ended with status {process.returncode}:\n{tail}")
            if time.monotonic() > until:
                raise TimeoutError(f"the worker was not ready after {_READY_WITHIN_S:g} s:\n{tail}")
            time.sleep(_POLL_S)


def empty(*urls: str) -> None:
    """Empty the Redis databases *urls*."""
    import redis

    redis_class: Any = redis.Redis  # its types are incomplete
    for url in urls:
        with redis_class.from_url(url) as client:
            client.flushdb()


def find_path(app: Celery | str) -> str:
    """Return how another process names *app*: ``module:attribute``.

    Raises:
        InvalidArguments: No imported module has it.
    """
    if isinstance(app, str):
        return app
    for name, module in sorted(sys.modules.items()):
        found = (attribute for attribute, value in list(vars(module).items()) if value is app)
        if name != "__main__" and (attribute := next(found, None)) is not None:
            return f"{name}:{attribute}"
    raise InvalidArguments(
        "docket_worker", f"no module has {app!r}; pass its path, as for celery -A: 'shop:app'"
    )


def find_app(app: Celery | str) -> Celery:
    """Return the app itself, imported where it is a path."""
    if not isinstance(app, str):
        return app
    from celery.app.utils import find_app as find

    found: Celery = find(app)
    return found


@contextmanager
def pointed_at(app: Celery, servers: Servers) -> Generator[None]:
    """Point *app* in this process at *servers*, whatever its configuration and the environment say; then undo it."""
    values = {
        "broker_url": servers.broker_url,
        "result_backend": servers.result_url,
        "docket_database_url": servers.database_url,
    }
    before = {name: os.environ.get(name) for name in servers.environment()}
    os.environ.update(servers.environment())
    try:
        with conf_of(app, values):
            forget_connections(app)
            try:
                yield
            finally:
                forget_connections(app)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _let_go(app: Any, pool: Any) -> None:
    """Make *app* ask for another pool if it has that one."""
    amqp: Any = app.__dict__.get("amqp")
    if app._pool is pool:
        app._pool = None
    if amqp is not None and amqp._producer_pool is pool:
        amqp._producer_pool = None


def forget_connections(app: Any) -> None:
    """Close what the app has open; it opens it again by the configuration in force."""
    from celery import _state
    from kombu import pools

    amqp: Any = app.__dict__.get("amqp")
    opened: list[Any] = [app._pool, None if amqp is None else amqp._producer_pool]
    groups: list[Any] = [pools.connections, pools.producers]
    # kombu keeps pools by address for all apps; a closed one would be handed out again, and others may hold it.
    others: list[Any] = list(cast("Any", _state)._get_active_apps())
    for pool in opened:
        if pool is not None:
            pool.force_close_all()
            for group in groups:
                for key in [key for key, value in group.items() if value is pool]:
                    group.pop(key)  # which, unlike del, takes what keys() gives here
            for other in others:
                _let_go(other, pool)
    backend: Any = app._backend
    if backend is not None:
        client: Any = backend.__dict__.get("client")
        if hasattr(client, "connection_pool"):  # Redis's
            backend.result_consumer.stop()
            client.connection_pool.disconnect()
    app._pool = None
    if amqp is not None:
        amqp._producer_pool = None
    app._backend_cache = None
    app._local = threading.local()
