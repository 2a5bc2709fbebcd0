"""One private Postgres: TCP on a free loopback port, scram, no unix socket."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from docket_celery.devserver.accounts import Account, can_enter, make_private, server_account
from docket_celery.devserver.binaries import PostgresBinaries, find_postgres
from docket_celery.devserver.processes import (
    LOOPBACK,
    Launch,
    ServerProcess,
    StopSignal,
    bring_up,
    log_tail,
    spawn,
)
from docket_celery.errors import ServersUnavailable

# A crashed durable cluster replays its log before it is ready.
_READY_WITHIN_S = 60.0
_USER = "docket"
# Line numbers in postmaster.pid, from 0.
_PID_LINE, _STATUS_LINE = 0, 7
_SETTINGS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "max_connections": "200",  # test runs keep a pool in each of many worker processes
    "timezone": "UTC",
    "log_timezone": "UTC",
}
# synchronous_commit stays on: a killed server then keeps what it committed, only a power cut loses it.
_EPHEMERAL_SETTINGS = {"fsync": "off", "full_page_writes": "off"}
_CLOSED = " (the account {!r} cannot walk to this folder: choose a data_dir that it can)"
_STOP = (
    StopSignal(number=signal.SIGINT, wait_s=10.0),  # "fast": ends the sessions, writes a checkpoint
    StopSignal(
        number=signal.SIGQUIT, wait_s=6.0
    ),  # "immediate"; the server itself waits 5 s for its children
)


def start_postgres(
    directory: Path,
    *,
    binaries: PostgresBinaries | None = None,
    durable: bool = False,
    port: int | None = None,
    parent_death: signal.Signals | None = None,
) -> ServerProcess:
    """Start a Postgres in *directory* and return when it accepts connections.

    The directory is created 0700 and keeps the cluster, the password and the log; starting there again uses
    the same data and password.

    Args:
        directory: Private to this server. Remove it after `stop` if the data is not wanted.
        binaries: From `find_postgres`; found if None. They are copied into *directory* where needed.
        durable: Survive a power cut (fsync). Off is faster and loses nothing when only the server crashes.
        port: On 127.0.0.1; a free one if None.
        parent_death: Signal for the server when the calling thread ends (Linux).

    Returns:
        The process; its ``url`` is SQLAlchemy's, for psycopg 3, as superuser in the database ``postgres``.

    Raises:
        ServersUnavailable: No program, no account for root, or the server did not come up (with its output).
    """
    account = server_account(directory)
    make_private(directory, account)
    binaries = (binaries or find_postgres()).readable_by(account, copy_to=directory)
    data, log = directory / "data", directory / "log"
    password = _password(directory, account)
    if not (data / "PG_VERSION").exists():
        _make_cluster(binaries, data, log, account, durable=durable, parent_death=parent_death)

    def start(chosen: int) -> subprocess.Popen[bytes]:
        argv = _command(binaries, data, account, port=chosen, durable=durable)
        return spawn(argv, account=account, cwd=data, log=log, parent_death=parent_death)

    process, chosen = bring_up(
        Launch(
            name=f"Postgres in {directory}",
            log=log,
            start=start,
            ready=lambda process, _: _is_ready(process, data),
            within_s=_READY_WITHIN_S,
        ),
        port,
    )
    return ServerProcess(
        "Postgres",
        process,
        url=f"postgresql+psycopg://{_USER}:{password}@{LOOPBACK}:{chosen}/postgres",
        port=chosen,
        log=log,
        stop_signals=_STOP,
        crash_signal=signal.SIGQUIT,
    )


def _password(directory: Path, account: Account | None) -> str:
    """Return the password kept in *directory*, or make one; the file is 0600 and the server account's."""
    file = directory / "password"
    if file.exists():
        return file.read_text().strip()
    password = secrets.token_urlsafe(24)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(password + "\n")
    if account is not None:
        os.chown(file, account.uid, account.gid, follow_symlinks=False)
    return password


def _make_cluster(
    binaries: PostgresBinaries,
    data: Path,
    log: Path,
    account: Account | None,
    *,
    durable: bool,
    parent_death: signal.Signals | None,
) -> None:
    # Under its real name only when complete: a killed initdb leaves half a cluster behind.
    fresh = data.with_name("data.new")
    shutil.rmtree(fresh, ignore_errors=True)
    make_private(fresh, account)
    argv = [
        os.fspath(binaries.initdb),
        f"--pgdata={_reachable_name(fresh, account)}",
        f"--username={_USER}",
        "--pwfile=../password",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--no-locale",
        *([] if durable else ["--no-sync"]),
    ]
    process = spawn(argv, account=account, cwd=fresh, log=log, parent_death=parent_death)
    try:
        status = process.wait(_READY_WITHIN_S)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if process.poll() is None:
            process.terminate()  # initdb then removes what it made
            process.wait()
    if status != 0:
        # Before release 16 initdb goes by paths only.
        closed = "" if account is None or can_enter(account, fresh) else _CLOSED.format(account.name)
        problem = f"initdb failed{closed}; it said:\n{log_tail(log)}"
        raise ServersUnavailable(f"Postgres in {data.parent}", problem)
    fresh.rename(data)


def _command(
    binaries: PostgresBinaries, data: Path, account: Account | None, *, port: int, durable: bool
) -> list[str]:
    settings = _SETTINGS if durable else _SETTINGS | _EPHEMERAL_SETTINGS
    options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    return [os.fspath(binaries.postgres), "-D", _reachable_name(data, account), "-p", str(port), *options]


def _reachable_name(directory: Path, account: Account | None) -> str:
    """Return a name by which *account*, started in *directory*, can open it.

    Below a 0700 home of root the path itself is closed to the account. The kernel's link to the working
    directory is not: following it checks no parent.
    """
    if can_enter(account, directory) or sys.platform != "linux":
        return os.fspath(directory)
    return "/proc/self/cwd"


def _is_ready(process: subprocess.Popen[bytes], data: Path) -> bool:
    """Tell whether the server says in its own lock file that it is ready.

    Asking the port instead could reach a stranger who took it first.
    """
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return False
    return (
        len(lines) > _STATUS_LINE
        and lines[_PID_LINE] == str(process.pid)
        and lines[_STATUS_LINE].strip() == "ready"
    )
