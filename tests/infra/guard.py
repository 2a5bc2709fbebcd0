"""Runs one program in a process group of its own and ends that group when the guard's owner ends.

The kernel closes the guard's standard input when its owner ends, even by SIGKILL: then the whole group is
killed, and a directory removed if one was named. Only the standard library is imported, and no site
packages, so that a guard costs some 30 ms: ``python -I -S guard.py ORDER`` with a JSON object of ``argv`` and
``remove`` (a path or null). On standard output it tells one JSON object a line: ``pid`` or ``error``, later
``status``. The program writes to the guard's standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time

KEEP = b"keep"
"""Written before the end of input: the directory stays."""
_REMOVE_WITHIN_S = 5.0


def main(order_json: str) -> int:
    """Carry out the order; return the guard's exit status."""
    order = json.loads(order_json)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    keep = False
    try:
        process = subprocess.Popen(  # the tests' own programs
            order["argv"], stdin=subprocess.DEVNULL, stdout=2, stderr=2, start_new_session=True
        )
    except OSError as error:
        _tell(error=str(error))
        return 1
    try:
        _tell(pid=process.pid)
        threading.Thread(target=_tell_end, args=(process,), daemon=True).start()
        keep = _wait_for_owner(os.getppid()) == KEEP
    finally:
        # Members that outlived the program count too.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if order["remove"] is not None and not keep:
            _remove(order["remove"])
    return 0


def _tell(**fields: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(1, (json.dumps(fields) + "\n").encode())


def _tell_end(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "linux":
        # Left unreaped: so no stranger can get the id of the group that is killed at the end.
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    else:
        status = process.wait()
    _tell(status=status)


def _wait_for_owner(owner_pid: int) -> bytes:
    """Wait for the end of standard input or of the owner, and return what was written there."""
    watched = [0]
    if sys.platform == "linux":
        # A forked child of the owner may hold our input open. An error says that the owner has ended.
        with contextlib.suppress(OSError):
            watched.append(os.pidfd_open(owner_pid))
    said = b""
    while True:
        readable, _, _ = select.select(watched, [], [])
        if 0 not in readable:
            return said
        part = os.read(0, 4096)
        if not part:
            return said
        said += part


def _remove(directory: str) -> None:
    """Remove *directory*, though a process that was just killed may still be writing there."""
    deadline = time.monotonic() + _REMOVE_WITHIN_S
    while os.path.lexists(directory) and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        if os.path.lexists(directory):
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
