"""What a Docker container is to pytest-celery, over a local process.

Attribute names and shapes are docker-py's (`docker.models.containers.Container`); only what pytest-celery and
pytest-docker-tools call is here.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docket_celery.devserver.accounts import can_enter, server_account
from docket_celery.devserver.processes import LOOPBACK, free_port
from tests.infra import server
from tests.infra.processes import ROOT, GuardedProcess, wait_until
from tests.infra.workers import checkout_environment

_UP_WITHIN_S = 60.0
_EXEC_WITHIN_S = 60.0
_NETSTAT = "cat /proc/net/tcp"
_LISTEN = "0A"


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """How a container is asked for.

    Attributes:
        image: Its name or id.
        command: Program and arguments; empty for the image's own.
        environment: Variables.
        network: Its name.
        volumes: From a directory of the host to where it is bound.
        labels: Kept for whoever set them.
    """

    image: str
    command: Sequence[str]
    environment: Mapping[str, str]
    network: str
    volumes: Mapping[Path, str]
    labels: Mapping[str, str]


class ProcessContainer(ABC):
    """A running program with the face of a container.

    Attributes:
        id: 64 hexadecimal digits.
        name: For reports.
        attrs: As ``docker inspect`` shows them.
        status: ``running`` or ``exited``, as of the last `reload`.
    """

    def __init__(self, creation: Creation, directory: Path) -> None:
        self.creation = creation
        self.id = uuid.uuid4().hex + uuid.uuid4().hex
        self.name = f"{type(self).__name__.lower()}-{self.id[:12]}"
        self.labels = dict(creation.labels)
        self.log = directory / f"{self.name}.log"
        self.process = self.start()
        self.status = "running"

    @abstractmethod
    def start(self) -> GuardedProcess:
        """Start the program and return it when it is up."""

    @property
    @abstractmethod
    def ports(self) -> Mapping[str, int]:
        """The host's ports by the container's (``6379/tcp``)."""

    @property
    def hostname(self) -> str:
        """How the other containers reach it."""
        return self.id[:12]

    @property
    def attrs(self) -> dict[str, Any]:
        bound = {inner: [{"HostIp": LOOPBACK, "HostPort": str(port)}] for inner, port in self.ports.items()}
        return {
            "Config": {
                "Env": [f"{name}={value}" for name, value in self.creation.environment.items()],
                "Hostname": self.hostname,
                "Labels": self.labels,
            },
            "HostConfig": {"PortBindings": bound},
            "NetworkSettings": {"Networks": {self.creation.network: {"IPAddress": LOOPBACK}}, "Ports": bound},
        }

    def reload(self) -> None:
        """Look at the program again."""
        self.status = "running" if self.process.running else "exited"

    def logs(self) -> bytes:
        """Return all output."""
        return self.process.log.read_bytes()

    def kill(self, signal: str | int | None = None) -> None:
        """Send *signal* to the program; SIGKILL ends its children too, as in a container."""
        number = _signal_number("SIGKILL" if signal is None else signal)
        if number == _signal_number("SIGKILL"):
            self.process.kill()
        else:
            self.process.send_signal(number)

    def restart(self, timeout: float = 10) -> None:
        """Stop the program within *timeout* seconds, and start it again with the same data and address."""
        self.process.stop(timeout)
        self.process.close(keep_directory=True)
        self.process = self.start()
        self.reload()

    def wait(self, timeout: float) -> dict[str, int]:
        """Wait for its end."""
        return {"StatusCode": self.process.wait(timeout)}

    def remove(self, *, force: bool = False) -> None:
        """End it at once, and remove its data."""
        assert force, "containers of tests are removed by force"
        self.process.kill()
        self.process.close()

    def exec_run(self, command: str) -> tuple[int, bytes]:
        """Run *command* where the program runs; return its exit status and output."""
        if command.startswith(_NETSTAT):
            return 0, self._netstat().encode()
        argv = shlex.split(command)
        if argv[0] == "python":
            argv[0] = sys.executable
        done = subprocess.run(
            argv,
            env=self.environment() | {"DOCKET_TEST_SESSION": str(self.process.pid)},
            cwd=self.directory(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_EXEC_WITHIN_S,
            check=False,
        )
        return done.returncode, done.stdout

    def environment(self) -> dict[str, str]:
        """Return the program's environment."""
        return checkout_environment(self.creation.environment)

    def directory(self) -> Path:
        """Return the program's working directory."""
        return ROOT

    def _netstat(self) -> str:
        """Return what ``/proc/net/tcp`` in the container would say of the ports that listen."""
        lines = [
            f"{row}: 00000000:{int(inner.partition('/')[0]):04X} 00000000:0000 {_LISTEN}"
            for row, (inner, port) in enumerate(self.ports.items())
            if _listens(port)
        ]
        return "\n".join(lines)


class Server(ProcessContainer):
    """A Redis or a Postgres of the development servers' kind."""

    kind: str
    inner_port: int

    def __init__(self, creation: Creation, directory: Path) -> None:
        self._port = free_port()
        # Made by the program, removed by its guard: so nothing stays if we are killed in between.
        self._data = _shared_temporary() / f"docket-test-{uuid.uuid4().hex}"
        super().__init__(creation, directory)

    @property
    def ports(self) -> Mapping[str, int]:
        return {f"{self.inner_port}/tcp": self._port}

    @property
    def hostname(self) -> str:
        # Where containers have names and well-known ports, processes have ports of their own.
        return f"{LOOPBACK}:{self._port}"

    def start(self) -> GuardedProcess:
        argv = [sys.executable, "-m", server.__name__, self.kind, os.fspath(self._data), str(self._port)]
        printed = self.log.stat().st_size if self.log.exists() else 0
        process = GuardedProcess(argv, log=self.log, env=self.environment(), remove=self._data)
        mark = f"{server.READY}\n".encode()
        return _when_up(process, lambda: self.log.read_bytes()[printed:].endswith(mark))

    def logs(self) -> bytes:
        own = server.log_file(self._data)
        return super().logs() + (own.read_bytes() if own.exists() else b"")


class Redis(Server):
    """For images ``redis:*`` and ``valkey/valkey:*``."""

    kind, inner_port = "redis", 6379


class Postgres(Server):
    """For images ``postgres:*``."""

    kind, inner_port = "postgres", 5432


class Worker(ProcessContainer):
    """A Celery worker, for images with ``worker`` in their name."""

    @property
    def ports(self) -> Mapping[str, int]:
        return {}

    def start(self) -> GuardedProcess:
        program, *arguments = self.creation.command
        assert program == "celery", f"a worker's command starts with celery, not {program!r}"
        argv = [sys.executable, "-m", "celery", *(a.replace("%h", self.id[:12]) for a in arguments)]
        printed = self.log.stat().st_size if self.log.exists() else 0
        process = GuardedProcess(argv, log=self.log, env=self.environment(), cwd=self.directory())
        # Celery's own line; a worker with a higher log level is up when its stock container class says so.
        return _when_up(process, lambda: b" ready." in self.log.read_bytes()[printed:])

    def environment(self) -> dict[str, str]:
        found = checkout_environment(self.creation.environment)
        bound = {inner: os.fspath(host) for host, inner in self.creation.volumes.items()}
        given = self.creation.environment.get("PYTHONPATH", "").split(os.pathsep)
        # The container's folders are the host's here; the checkout comes after them.
        path = [bound.get(entry, entry) for entry in given if entry]
        # A killed worker cannot remove its temporary files: they go with the test run's.
        own = {"PYTHONPATH": os.pathsep.join([*path, os.fspath(ROOT)]), "TMPDIR": os.fspath(self.log.parent)}
        return found | own

    def directory(self) -> Path:
        return next(iter(self.creation.volumes), ROOT)


def _when_up(process: GuardedProcess, is_up: Callable[[], bool]) -> GuardedProcess:
    """Return *process* once it is up, or has ended: callers look at its status, as they do with Docker."""
    try:
        wait_until(
            lambda: is_up() or not process.running,
            within_s=_UP_WITHIN_S,
            what=f"{process} is up; see its log",
        )
    except BaseException as error:
        error.add_note(process.log_tail())
        process.close()
        raise
    return process


def _signal_number(given: str | int) -> signal.Signals:
    if isinstance(given, int):
        return signal.Signals(given)
    return signal.Signals[given if given.startswith("SIG") else f"SIG{given}"]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((LOOPBACK, port)) == 0


def _shared_temporary() -> Path:
    """Return a temporary directory that the servers' account can enter."""
    for parent in map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp")):  # noqa: S108 -- made there 0700
        if parent.is_dir() and can_enter(server_account(parent), parent):
            return parent
    raise RuntimeError("no temporary directory that an unprivileged account can enter; set TMPDIR to one")
