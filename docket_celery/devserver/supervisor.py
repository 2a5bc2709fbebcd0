"""The process that owns the servers, and that ends when its own owner does.

It prints one JSON line (``database_url``, ``broker_url`` and ``directory``, or ``error``), then blocks on its
standard input. The kernel closes that when the owner ends, however it ends, and the supervisor stops the
servers and removes what they wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from docket_celery.devserver.accounts import can_enter, make_private, server_account
from docket_celery.devserver.binaries import find_postgres, find_redis
from docket_celery.devserver.postgres import start_postgres
from docket_celery.devserver.processes import ServerProcess, log_tail, open_private
from docket_celery.devserver.redis import start_redis
from docket_celery.errors import ServersUnavailable

PREFIX = "docket-dev-"
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STDIN = 0
_REMOVE_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a supervisor must start.

    Attributes:
        postgres: Whether to start Postgres.
        redis: Whether to start Redis.
        data_dir: Absolute path of the folder that keeps the data; None for a temporary one.
        owner_pid: Process whose end ends the servers too, should a forked child of it hold our input open.
    """

    postgres: bool
    redis: bool
    data_dir: str | None
    owner_pid: int | None

    def to_json(self) -> str:
        """Return the order as a command line argument."""
        return json.dumps(asdict(self))


def main(order_json: str) -> int:
    """Carry out the order *order_json* (see `Order.to_json`); return the exit status."""
    return supervise(Order(**json.loads(order_json)))


def supervise(order: Order, *, database_url: str | None = None, broker_url: str | None = None) -> int:
    """Start the servers of *order*, print their URLs, and stop them when standard input ends.

    Args:
        order: What to start.
        database_url: Printed when *order* starts no Postgres.
        broker_url: Printed when *order* starts no Redis.

    Returns:
        The exit status: 1 if the servers could not be started.
    """
    for number in _END_SIGNALS:
        signal.signal(number, _exit)
    try:
        with ExitStack() as stack:
            wakeup = stack.enter_context(_child_signals())
            directory = _directory(order, stack)
            servers = _start(order, directory, stack)
            urls = {server.name: server.url for server in servers}
            _report(
                database_url=urls.get("Postgres", database_url),
                broker_url=urls.get("Redis", broker_url),
                directory=str(directory) if directory is not None and order.data_dir is None else None,
            )
            _wait_for_owner(servers, order.owner_pid, wakeup)
    except ServersUnavailable as error:
        _report(error=list(error.args))
        return 1
    except OSError as error:
        _report(error=["development servers", str(error)])
        return 1
    return 0


def _exit(number: int, _frame: FrameType | None) -> None:
    _ignore_signals()
    raise SystemExit(128 + number)


def _ignore_signals() -> None:
    """Ignore signals during the clean-up."""
    for number in _END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _report(**fields: object) -> None:
    # The owner may be gone already; then there is nobody to tell, and the end of input says the rest.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, (json.dumps(fields) + "\n").encode())


@contextlib.contextmanager
def _child_signals() -> Generator[int]:
    """Yield a descriptor that becomes readable when a child process ends."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) if sys.platform == "linux" else os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


def _directory(order: Order, stack: ExitStack) -> Path | None:
    """Return the folder for the servers' own folders; a temporary one is removed when *stack* closes."""
    if not (order.postgres or order.redis):
        return None
    if order.data_dir is None:
        return _temporary_directory(stack)
    data_dir = Path(order.data_dir)
    account = server_account(data_dir)
    make_private(data_dir, account)
    lock = stack.enter_context(open_private(data_dir / "lock", account))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ServersUnavailable(
            f"directory {data_dir}",
            "other development servers are using it; stop them or choose another data_dir",
        ) from None
    ignore = data_dir / ".gitignore"
    if not ignore.exists():
        with open_private(ignore, account) as file:
            os.write(file, b"*\n")
    return data_dir


def _temporary_directory(stack: ExitStack) -> Path:
    for parent in map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp")):  # noqa: S108 -- mkdtemp makes it safe
        account = server_account(parent)
        if parent.is_dir() and can_enter(account, parent):
            directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            stack.callback(remove_directory, directory)
            return make_private(directory, account)
    raise ServersUnavailable(
        f"temporary directory {tempfile.gettempdir()}",
        "the account that runs the servers cannot enter it; set TMPDIR to one that everyone can",
    )


def _start(order: Order, directory: Path | None, stack: ExitStack) -> list[ServerProcess]:
    if directory is None:
        return []
    durable = order.data_dir is not None
    account = server_account(directory)
    # Kept data may be below a home that the account cannot enter; programs run from where it can.
    copies = _temporary_directory(stack) if durable and account is not None else directory
    # Both are looked up before anything starts: a missing server is told at once.
    binary = find_redis().readable_by(account, copy_to=copies) if order.redis else None
    binaries = find_postgres().readable_by(account, copy_to=copies) if order.postgres else None
    servers: list[ServerProcess] = []
    if binary is not None:
        server = start_redis(directory / "redis", binary=binary, durable=durable, parent_death=signal.SIGTERM)
        stack.callback(server.stop)
        servers.append(server)
    if binaries is not None:
        server = start_postgres(
            directory / "postgres", binaries=binaries, durable=durable, parent_death=signal.SIGINT
        )
        stack.callback(server.stop)
        servers.append(server)
    return servers


def _wait_for_owner(servers: list[ServerProcess], owner_pid: int | None, wakeup: int) -> None:
    """Return when standard input or the owner ends; tell on standard error of a server that ended before."""
    watched = [_STDIN, wakeup]
    owner = _open_process(owner_pid)
    if owner is not None:
        watched.append(owner)
    told: set[int] = set()
    while True:
        for server in servers:
            if server.status is not None and server.pid not in told:
                told.add(server.pid)
                sys.stderr.write(
                    f"{server.name} ended with status {server.status}:\n{log_tail(server.log)}\n"
                )
                sys.stderr.flush()
        readable, _, _ = select.select(watched, [], [])
        if owner in readable or (_STDIN in readable and _ended(_STDIN)):
            _ignore_signals()
            return
        if wakeup in readable:
            os.read(wakeup, 4096)


def _open_process(pid: int | None) -> int | None:
    """Return a descriptor that becomes readable when process *pid* ends; None where there is none such."""
    if pid is None or sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        # It ended, which our input says too, or the kernel is older than 5.3.
        return None


def _ended(stream: int) -> bool:
    try:
        return os.read(stream, 4096) == b""
    except OSError:
        return True


def remove_directory(directory: Path) -> None:
    """Remove *directory*, though a process that was just killed may still be writing there."""
    deadline = time.monotonic() + _REMOVE_WITHIN_S
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        if directory.exists():
            time.sleep(0.05)
