"""The user's side: starts a supervisor and holds the pipe that keeps it alive."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from docket_celery.devserver.supervisor import Order, remove_directory
from docket_celery.errors import InvalidArguments, ServersUnavailable

DATABASE_VARIABLE = "DOCKET_CELERY_DATABASE_URL"
BROKER_VARIABLE = "CELERY_BROKER_URL"
RESULT_VARIABLE = "CELERY_RESULT_BACKEND"
DEFAULT_DATA_DIR = Path(".docket")

# The supervisor gives a server 60 s to come up, and needs a moment to tell why one did not.
_STARTED_WITHIN_S = 150.0
_STOPPED_WITHIN_S = 30.0
# The supervisor imports from where its owner does, whatever put the package on the path there.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from docket_celery.devserver.supervisor import main; sys.exit(main(sys.argv[2]))"
)


class DevServers:
    """A Postgres and a Redis to work with: ours, or those that the environment names.

    Attributes:
        database_url: SQLAlchemy URL, ``postgresql+psycopg://...``.
        broker_url: Celery broker URL, ``redis://127.0.0.1:PORT/0`` when it is ours.
    """

    def __init__(
        self, *, database_url: str | None, broker_url: str | None, supervisor: _Supervisor | None
    ) -> None:
        self._database_url = database_url
        self._broker_url = broker_url
        self._supervisor = supervisor

    def __repr__(self) -> str:
        # The URLs stay out: they hold passwords, and representations end up in logs.
        return f"<DevServers supervisor={None if self._supervisor is None else self._supervisor.pid}>"

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the database.

        Raises:
            ServersUnavailable: They were started with ``postgres=False``.
        """
        return _started(self._database_url, "Postgres", "postgres=False")

    @property
    def broker_url(self) -> str:
        """Celery's broker URL.

        Raises:
            ServersUnavailable: They were started with ``redis=False``.
        """
        return _started(self._broker_url, "Redis", "redis=False")

    @property
    def result_url(self) -> str | None:
        """Celery's result backend: database 1 of our Redis.

        Else what CELERY_RESULT_BACKEND says, which also wins over ours; None if that is not set.
        """
        if (given := _given(RESULT_VARIABLE)) is not None:
            return given
        if self._broker_url is None or _given(BROKER_VARIABLE) is not None:
            return None
        return self._broker_url.rpartition("/")[0] + "/1"

    def environment(self) -> dict[str, str]:
        """Return the variables that tell a child process of the servers."""
        found = {
            DATABASE_VARIABLE: self._database_url,
            BROKER_VARIABLE: self._broker_url,
            RESULT_VARIABLE: self.result_url,
        }
        return {name: value for name, value in found.items() if value is not None}

    def stop(self) -> None:
        """Stop what was started, and remove its temporary files. May be called again."""
        if self._supervisor is not None:
            self._supervisor.stop()


@contextmanager
def dev_servers(
    *,
    data_dir: Path | None = None,
    durable: bool = False,
    postgres: bool = True,
    redis: bool = True,
    private: bool = False,
) -> Generator[DevServers]:
    """Run the servers for the length of a ``with`` block; see `start_dev_servers`."""
    servers = start_dev_servers(
        data_dir=data_dir, durable=durable, postgres=postgres, redis=redis, private=private
    )
    try:
        yield servers
    finally:
        servers.stop()


def start_dev_servers(
    *,
    data_dir: Path | None = None,
    durable: bool = False,
    postgres: bool = True,
    redis: bool = True,
    private: bool = False,
) -> DevServers:
    """Start a private Postgres and a private Redis, or take those that the environment names.

    They listen on free ports of 127.0.0.1 and end with this process, however it ends. A server is not started
    where DOCKET_CELERY_DATABASE_URL or CELERY_BROKER_URL is set.

    Args:
        data_dir: Where a durable server keeps its data; ``./.docket`` if None.
        durable: Keep the data, and survive a power cut. Else it is temporary, faster, and removed at the end.
        postgres: Whether a database is wanted.
        redis: Whether a broker is wanted.
        private: Start them whatever the environment names: for tests, which must not touch other servers.

    Raises:
        InvalidArguments: *data_dir* without *durable*.
        ServersUnavailable: No server program was found, or one did not start; the text says what to do.
    """
    order, database_url, broker_url = resolve(
        data_dir=data_dir,
        durable=durable,
        postgres=postgres,
        redis=redis,
        owner_pid=os.getpid(),
        private=private,
    )
    if not (order.postgres or order.redis):
        return DevServers(database_url=database_url, broker_url=broker_url, supervisor=None)
    supervisor = _Supervisor(order)
    told = supervisor.wait_until_started()
    return DevServers(
        database_url=told["database_url"] if order.postgres else database_url,
        broker_url=told["broker_url"] if order.redis else broker_url,
        supervisor=supervisor,
    )


def resolve(
    *,
    data_dir: Path | None,
    durable: bool,
    postgres: bool,
    redis: bool,
    owner_pid: int | None,
    private: bool = False,
) -> tuple[Order, str | None, str | None]:
    """Return what to start, and the database and broker URLs that the environment gives instead.

    Raises:
        InvalidArguments: *data_dir* without *durable*.
    """
    if data_dir is not None and not durable:
        raise InvalidArguments(
            "dev servers", "data_dir is for durable=True; temporary data has no fixed place"
        )
    database_url = _given(DATABASE_VARIABLE) if postgres and not private else None
    broker_url = _given(BROKER_VARIABLE) if redis and not private else None
    order = Order(
        postgres=postgres and database_url is None,
        redis=redis and broker_url is None,
        data_dir=str((DEFAULT_DATA_DIR if data_dir is None else data_dir).absolute()) if durable else None,
        owner_pid=owner_pid,
    )
    return order, database_url, broker_url


def _given(variable: str) -> str | None:
    """Return the value of *variable* if it is set and not empty."""
    return os.environ.get(variable) or None


def _started(url: str | None, server: str, option: str) -> str:
    if url is None:
        raise ServersUnavailable(server, f"the dev servers were started with {option}; leave that out")
    return url


class _Supervisor:
    """A supervisor process and the pipe whose end ends it."""

    def __init__(self, order: Order) -> None:
        self._owner_pid = os.getpid()
        self._directory: Path | None = None
        path = [os.path.abspath(entry) for entry in sys.path]
        heard, lifeline = os.pipe()
        output, told = os.pipe()
        self._lifeline = os.fdopen(lifeline, "wb")
        self._output = os.fdopen(output, "rb", buffering=0)
        try:
            self._process = subprocess.Popen(  # noqa: S603 -- this interpreter, our own module
                [sys.executable, "-P", "-c", _BOOT, json.dumps(path), order.to_json()],
                stdin=heard,
                stdout=told,
                # A Ctrl-C reaches the owner's whole group; the servers stay until the owner is done.
                start_new_session=True,
            )
        except BaseException:
            self._lifeline.close()
            self._output.close()
            raise
        finally:
            os.close(heard)
            os.close(told)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_started(self) -> Mapping[str, Any]:
        """Return what the supervisor printed; on any failure, an interrupt too, nothing of it is left."""
        try:
            told = self._read_line()
            if "error" in told:
                raise ServersUnavailable(*told["error"])
        except BaseException:
            self.stop()
            raise
        if told["directory"] is not None:
            self._directory = Path(told["directory"])
        return told

    def _read_line(self) -> Mapping[str, Any]:
        deadline = time.monotonic() + _STARTED_WITHIN_S
        line = b""
        with self._output as output:
            while not line.endswith(b"\n"):
                if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise ServersUnavailable("dev servers", f"not up after {_STARTED_WITHIN_S:g} s")
                part = os.read(output.fileno(), 65536)
                if not part:
                    status = self._process.wait()
                    raise ServersUnavailable("dev servers", f"their supervisor ended with status {status}")
                line += part
        told: Mapping[str, Any] = json.loads(line)
        return told

    def stop(self) -> None:
        """End the supervisor, which ends the servers, and wait for it."""
        if os.getpid() != self._owner_pid:
            return  # a forked child holds a copy of the object, not the servers
        self._lifeline.close()
        try:
            self._process.wait(_STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._directory is not None:
            # Only a supervisor that was killed leaves it; Linux has then ended the servers.
            remove_directory(self._directory)
