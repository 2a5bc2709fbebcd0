"""A RabbitMQ of the test run's own: no wheel holds one, so the system's program runs in our folder, on our ports.

Nothing is shared with a broker of the system: node name, cookie, data, configuration, plugins and Erlang's port
mapper (epmd) are this server's own, and all that listens does so on loopback.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import kombu

from docket_celery.devserver.processes import LOOPBACK, free_port
from tests.infra.processes import GuardedProcess, wait_until

# First the program itself: the one that Debian has on PATH changes to the account of the system's broker.
_FOLDERS = ("/usr/lib/rabbitmq/bin", *os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/sbin")
_USER = "docket"
_READY_WITHIN_S = 90.0
_PORT_TRIES = 3
_CONFIGURATION = """\
listeners.tcp.1 = {loopback}:{port}
default_user = {user}
default_pass = {password}
log.console = true
log.file = false
"""


class RabbitMQ:
    """A running RabbitMQ; a context manager that ends it and its port mapper, and removes its data.

    Attributes:
        url: Celery's broker URL, with the password.
        log: File with what both printed.

    Args:
        directory: For the log, and for a folder with all that the server writes.

    Raises:
        RuntimeError: RabbitMQ is not installed, or it ended instead of becoming ready; with its last output.
        TimeoutError: It did not become ready.
    """

    def __init__(self, directory: Path) -> None:
        self._program, self._mapper_program = find_program("rabbitmq-server"), find_program("epmd")
        self._home, self.log = directory / "node", directory / "rabbitmq.log"
        for tries_left in reversed(range(_PORT_TRIES)):
            port = free_port()
            self.url = f"amqp://{_USER}:{secrets.token_hex(16)}@{LOOPBACK}:{port}//"
            self._processes = list[GuardedProcess]()
            try:
                self._start(port)
                return
            except BaseException as error:
                self.stop()
                # Between the choice of a port and the server's bind another process may take it.
                taken = "eaddrinuse" in self.log.read_text(errors="replace")
                if not (isinstance(error, RuntimeError) and taken and tries_left):
                    raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End both at once: nobody needs the data any more. May be called again."""
        for process in reversed(self._processes):
            process.close()

    def drop_queue(self, name: str) -> None:
        """Forget the queue *name* and the messages in it."""
        with kombu.Connection(self.url) as connection:
            channel: Any = connection.default_channel
            channel.queue_delete(name)

    def _start(self, port: int) -> None:
        env = self._prepare(port)
        # Started here, in the foreground: the server would start one that leaves its process group and stays.
        mapper = [self._mapper_program, "-address", LOOPBACK, "-port", env["ERL_EPMD_PORT"]]
        self._processes.append(GuardedProcess(mapper, log=self.log, env=env))
        server = GuardedProcess([self._program], log=self.log, env=env, remove=self._home)
        self._processes.append(server)
        wait_until(
            lambda: self._answers() or not server.running,
            within_s=_READY_WITHIN_S,
            what=f"RabbitMQ becomes ready; see {self.log}",
        )
        if not server.running:
            raise RuntimeError(f"RabbitMQ ended with status {server.status}:\n{server.log_tail()}")

    def _prepare(self, port: int) -> Mapping[str, str]:
        """Write the configuration, and return the environment of both programs."""
        shutil.rmtree(self._home, ignore_errors=True)
        self._home.mkdir(mode=0o700)
        home = os.fspath(self._home)
        password = self.url.removeprefix(f"amqp://{_USER}:").partition("@")[0]
        text = _CONFIGURATION.format(loopback=LOOPBACK, port=port, user=_USER, password=password)
        (self._home / "rabbitmq.conf").write_text(text)
        (self._home / "enabled_plugins").write_text("[].\n")
        (self._home / "rabbitmq-env.conf").touch()
        return {
            "PATH": os.pathsep.join(_FOLDERS),
            # The cookie is made there.
            "HOME": home,
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_EPMD_PORT": str(free_port()),
            "RABBITMQ_NODENAME": f"docket-{os.getpid()}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONF_ENV_FILE": f"{home}/rabbitmq-env.conf",
            "RABBITMQ_CONFIG_FILE": f"{home}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{home}/advanced.config",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{home}/generated",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{home}/enabled_plugins",
            "RABBITMQ_MNESIA_BASE": home,
            "RABBITMQ_LOG_BASE": home,
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": f"{home}/pid",
        }

    def _answers(self) -> bool:
        """Tell whether it lets us in: a stranger on the port does not know the password."""
        with kombu.Connection(self.url, connect_timeout=2.0) as connection:
            try:
                connection.connect()
            except (*connection.connection_errors, *connection.channel_errors):
                return False
        return True


def find_program(name: str) -> str:
    """Return the path of one of RabbitMQ's programs.

    Raises:
        RuntimeError: It is not installed.
    """
    found = shutil.which(name, path=os.pathsep.join(_FOLDERS))
    if found is None:
        raise RuntimeError(f"{name} is not installed; `make rabbitmq` installs RabbitMQ, or says how")
    return found
