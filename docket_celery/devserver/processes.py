"""A server process of ours: started with an account, a log and a signal for its parent's death."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from docket_celery.devserver.accounts import Account
from docket_celery.errors import ServersUnavailable

LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1
_LOG_TAIL_LINES = 12
_PORT_TRIES = 5
_POLL_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class StopSignal:
    """One way to ask a server to end, and how long it may take."""

    number: signal.Signals
    wait_s: float


class ServerProcess:
    """A running server. `stop` ends it in order, `kill` as a crash would.

    Attributes:
        name: For messages.
        url: How to reach it; a Postgres URL holds the password.
        port: On 127.0.0.1.
        log: File with what the server printed.
    """

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        *,
        url: str,
        port: int,
        log: Path,
        stop_signals: Sequence[StopSignal],
        crash_signal: signal.Signals,
    ) -> None:
        self.name, self.url, self.port, self.log = name, url, port, log
        self._process = process
        self._stop_signals = tuple(stop_signals)
        self._crash_signal = crash_signal

    def __repr__(self) -> str:
        # The URL stays out: it holds the password, and representations end up in logs.
        return f"<{self.name} pid={self.pid} port={self.port} running={self.running}>"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End the server in order, and by force if it takes too long. Does nothing when it has ended."""
        for step in self._stop_signals:
            if self._ended_by(step):
                return
        self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        """End the server at once, without a checkpoint or a save, as a crash would."""
        if not self._ended_by(StopSignal(number=self._crash_signal, wait_s=10.0)):
            self._process.kill()
            self._process.wait()

    def _ended_by(self, step: StopSignal) -> bool:
        if not self.running:
            return True
        self._process.send_signal(step.number)
        try:
            self._process.wait(step.wait_s)
        except subprocess.TimeoutExpired:
            return False
        return True


def free_port() -> int:
    """Return a loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to bring one kind of server up.

    Attributes:
        name: For messages.
        log: Where it prints.
        start: Starts it on a port.
        ready: Tells whether this process, and no stranger, serves on the port.
        within_s: How long it may take, in seconds.
    """

    name: str
    log: Path
    start: Callable[[int], subprocess.Popen[bytes]]
    ready: Callable[[subprocess.Popen[bytes], int], bool]
    within_s: float


def bring_up(launch: Launch, port: int | None) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server on *port*, or on free ports until one holds; return it when ready, with its port.

    Raises:
        ServersUnavailable: It ended, or was not ready in time; with its last output.
    """
    for tries_left in reversed(range(1 if port is not None else _PORT_TRIES)):
        chosen = free_port() if port is None else port
        printed_before = launch.log.stat().st_size if launch.log.exists() else 0
        process = launch.start(chosen)
        if _becomes_ready(launch, process, chosen):
            return process, chosen
        # Between the choice of a port and the server's bind another process may take it.
        if not tries_left or b"Address already in use" not in launch.log.read_bytes()[printed_before:]:
            break
    raise ServersUnavailable(launch.name, f"did not start; it said:\n{log_tail(launch.log)}")


def _becomes_ready(launch: Launch, process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + launch.within_s
    ready = False
    try:
        while process.poll() is None and time.monotonic() < deadline:
            ready = launch.ready(process, port)
            if ready:
                break
            time.sleep(_POLL_S)
    finally:
        if not ready:  # a KeyboardInterrupt must not leave it either
            process.kill()
            process.wait()
    return ready


def spawn(
    argv: Sequence[str | os.PathLike[str]],
    *,
    account: Account | None,
    cwd: Path,
    log: Path,
    parent_death: signal.Signals | None = None,
) -> subprocess.Popen[bytes]:
    """Start *argv* as *account* in *cwd*, with a bare environment and all its output in *log*.

    Args:
        argv: Program and arguments.
        account: Who runs it; None for the current user.
        cwd: Its working directory, and its HOME.
        log: File for its output; see `open_private`.
        parent_death: Signal that Linux sends it when the calling *thread* ends; for a process with one
            thread. Elsewhere it has no effect.

    Raises:
        ServersUnavailable: The program cannot be started.
    """
    on_death = None if parent_death is None else signal_on_parent_death(parent_death)
    with open_private(log, account) as output:
        try:
            return subprocess.Popen(  # noqa: S603 -- programs that we located, with our own arguments
                argv,
                cwd=cwd,
                env=_server_environment(cwd),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                user=None if account is None else account.uid,
                group=None if account is None else account.gid,
                extra_groups=None if account is None else [],
                umask=0o077,
                # Runs after the change of user, which would clear the setting.
                preexec_fn=on_death,  # noqa: PLW1509 -- asked for by processes with one thread
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ServersUnavailable(f"program {argv[0]}", f"cannot be started: {error}") from error


@contextmanager
def open_private(path: Path, account: Account | None) -> Generator[int]:
    """Open the file *path* for appending, 0600 and owned by *account*; a link in its place is refused."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if account is not None:
            os.fchown(file, account.uid, account.gid)
        yield file
    finally:
        os.close(file)


def _server_environment(home: Path) -> Mapping[str, str]:
    """Return an environment without the user's PG*, LD_* and other variables that change how servers act."""
    path = os.environ.get("PATH", os.defpath)
    return {"PATH": path, "HOME": str(home), "LC_ALL": "C", "TZ": "UTC"}


def signal_on_parent_death(number: signal.Signals) -> Callable[[], None] | None:
    """Return a ``preexec_fn``: Linux then signals the child when the thread that started it ends; or None."""
    if sys.platform != "linux":
        return None
    # Loaded here: between fork and exec nothing may take the loader's locks.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), number)

    return ask_kernel


def log_tail(log: Path) -> str:
    """Return the last lines of *log*, for an error's text."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"(its log cannot be read: {error})"
    return "\n".join(lines[-_LOG_TAIL_LINES:])
