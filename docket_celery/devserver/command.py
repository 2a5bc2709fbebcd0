"""Running a user's command beside the servers, with signals passed on once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from docket_celery.devserver.processes import signal_on_parent_death

# What a terminal sends to every process of the foreground group at once.
_FROM_KEYBOARD = (signal.SIGINT, signal.SIGQUIT)
_FROM_OTHERS = (signal.SIGTERM, signal.SIGHUP)
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127


def run_command(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run *argv* with *environment* added to ours, and return its exit status as a shell would.

    At a terminal the command stays in the foreground group and gets Ctrl-C from the terminal. Else it gets a
    group of its own, and what we are sent is passed on: an interrupt to the group, a request to end to the
    command alone. So it never gets one signal twice, which some programs (Celery) take for an order to end at
    once.
    """
    at_terminal = _in_foreground()
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if process is None:
            early.append(number)
        else:
            _send(process, number, at_terminal=at_terminal)

    previous = {number: signal.signal(number, pass_on) for number in (*_FROM_KEYBOARD, *_FROM_OTHERS)}
    try:
        process = subprocess.Popen(  # noqa: S603 -- running what the user asks for is the point
            argv,
            env={**os.environ, **environment},
            process_group=None if at_terminal else 0,
            # If we are killed the servers are gone too; the command should not continue without them.
            preexec_fn=signal_on_parent_death(signal.SIGTERM),  # noqa: PLW1509 -- this process has one thread
        )
        for number in early:
            _send(process, number, at_terminal=at_terminal)
        status = process.wait()
    except FileNotFoundError as error:
        return _refused(argv[0], error, _NOT_FOUND)
    except OSError as error:
        return _refused(argv[0], error, _NOT_EXECUTABLE)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status


def _refused(program: str, error: OSError, status: int) -> int:
    sys.stderr.write(f"cannot run {program}: {error.strerror}\n")
    return status


def _in_foreground() -> bool:
    """Tell whether our process group is the one that reads from a terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


def _send(process: subprocess.Popen[bytes], number: int, *, at_terminal: bool) -> None:
    if number in _FROM_OTHERS:
        process.send_signal(number)
    elif not at_terminal and process.poll() is None:
        os.killpg(process.pid, number)
