"""One private Valkey or Redis on a free loopback port."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

from docket_celery.devserver.accounts import make_private, server_account
from docket_celery.devserver.binaries import RedisBinary, find_redis
from docket_celery.devserver.processes import (
    LOOPBACK,
    Launch,
    ServerProcess,
    StopSignal,
    bring_up,
    spawn,
)

_READY_WITHIN_S = 30.0
_DATABASES = 64  # test workers take database numbers of their own
_STOP = (StopSignal(number=signal.SIGTERM, wait_s=10.0),)


def start_redis(
    directory: Path,
    *,
    binary: RedisBinary | None = None,
    durable: bool = False,
    port: int | None = None,
    parent_death: signal.Signals | None = None,
) -> ServerProcess:
    """Start a Redis-compatible server in *directory* and return when it answers.

    Args:
        directory: Private to this server, created 0700. Remove it after `stop` if the data is not wanted.
        binary: From `find_redis`; found if None. It is copied into *directory* where needed.
        durable: Keep the data in an append-only file, flushed every second. Else nothing is written.
        port: On 127.0.0.1; a free one if None.
        parent_death: Signal for the server when the calling thread ends (Linux).

    Returns:
        The process; its ``url`` is of database 0 of 64.

    Raises:
        ServersUnavailable: No program, no account for root, or the server did not come up (with its output).
    """
    account = server_account(directory)
    make_private(directory, account)
    binary = (binary or find_redis()).readable_by(account, copy_to=directory)
    data, log = make_private(directory / "data", account), directory / "log"

    def start(chosen: int) -> subprocess.Popen[bytes]:
        argv = _command(binary, port=chosen, durable=durable)
        return spawn(argv, account=account, cwd=data, log=log, parent_death=parent_death)

    process, chosen = bring_up(
        Launch(name=f"Redis in {directory}", log=log, start=start, ready=_is_ready, within_s=_READY_WITHIN_S),
        port,
    )
    return ServerProcess(
        "Redis",
        process,
        url=f"redis://{LOOPBACK}:{chosen}/0",
        port=chosen,
        log=log,
        stop_signals=_STOP,
        crash_signal=signal.SIGKILL,
    )


def _command(binary: RedisBinary, *, port: int, durable: bool) -> list[str]:
    options = {
        "bind": LOOPBACK,
        "port": str(port),
        # Relative: the account may not be able to walk to the directory that it is started in.
        "dir": "./",
        "databases": str(_DATABASES),
        "daemonize": "no",
        "save": "",
        "appendonly": "yes" if durable else "no",
    }
    return [
        os.fspath(binary.server),
        *(part for key, value in options.items() for part in (f"--{key}", value)),
    ]


def _is_ready(process: subprocess.Popen[bytes], port: int) -> bool:
    """Tell whether *process* itself, not a stranger on its port, answers there and has loaded its data."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\nINFO server\r\n")
            answer = b""
            while b"process_id:" not in answer.rpartition(b"\r\n")[0] and (part := connection.recv(4096)):
                answer += part
    except OSError:
        return False
    reported = re.search(rb"process_id:(\d+)", answer)
    return answer.startswith(b"+PONG") and reported is not None and int(reported[1]) == process.pid
