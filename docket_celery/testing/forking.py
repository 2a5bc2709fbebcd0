"""Runs a function in a forked child, so that it can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docket_celery.errors import InvalidArguments

_POLL_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a child ended.

    Attributes:
        killed: By SIGKILL.
        value: What the function returned, as JSON has it; None if it did not return.
        error: The traceback if it raised, or what else went wrong; '' if nothing did.
    """

    killed: bool
    value: Any = None
    error: str = ""


def in_child(work: Callable[[], Any], *, within_s: float) -> Ended:
    """Call *work* in a forked child and wait for its end.

    The child has everything that this process has (objects, closures, context variables) but its threads. It ends
    without running what the parent does at its own end.

    Args:
        work: Returns a JSON value.
        within_s: Seconds after which the child is killed, which is an error.

    Raises:
        InvalidArguments: There is no fork on this system.
    """
    if not hasattr(os, "fork"):
        raise InvalidArguments("crash_matrix", "needs os.fork, which this system does not have")
    with tempfile.TemporaryDirectory(prefix="docket-child-") as folder:
        answer = Path(folder) / "answer"
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        pid = _fork()
        if pid == 0:
            _answer(work, answer)
        status = _wait(pid, within_s)
        if status is None:
            return Ended(killed=False, error=f"it had not ended after {within_s:g} s")
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            error = "" if number == signal.SIGKILL else f"it was ended by {signal.Signals(number).name}"
            return Ended(killed=number == signal.SIGKILL, error=error)
        if not answer.exists():
            return Ended(killed=False, error=f"it ended with status {os.WEXITSTATUS(status)}")
        told = json.loads(answer.read_text(encoding="utf-8"))
        return Ended(killed=False, value=told.get("value"), error=told.get("error", ""))


def _fork() -> int:
    with warnings.catch_warnings():
        # From 3.12 on forking warns where there are threads. The child runs none of theirs, and only this library.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _answer(work: Callable[[], Any], answer: Path) -> None:
    """In the child: work, tell, and leave without a trace."""
    try:
        told = {"value": work()}
    except BaseException:  # noqa: BLE001 -- whatever it is, the parent reports it
        told = {"error": traceback.format_exc()}
    try:
        partial = answer.with_suffix(".partial")
        partial.write_text(json.dumps(told), encoding="utf-8")
        partial.rename(answer)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(0)


def _wait(pid: int, within_s: float) -> int | None:
    """Return the child's status; None if it had to be killed."""
    until = time.monotonic() + within_s
    ended = False
    try:
        while time.monotonic() < until:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended = True
                return status
            time.sleep(_POLL_S)
    finally:
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return None
