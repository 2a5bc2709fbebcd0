"""A program that a test started, and that cannot outlive the test run."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.infra.guard import KEEP

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
POLL_S = 0.02
_GUARD = Path(__file__).with_name("guard.py")
_GUARD_WITHIN_S = 15.0
_TAIL_LINES = 60


def wait_until(condition: Callable[[], bool], *, within_s: float, what: str) -> None:
    """Poll *condition* until it holds.

    Args:
        condition: Asked again and again.
        within_s: Seconds.
        what: For the error: what was awaited.

    Raises:
        TimeoutError: It did not hold in time.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s:g} s: {what}")
        time.sleep(POLL_S)


class GuardedProcess:
    """A program in a process group of its own, under a guard that ends it if we are killed.

    Attributes:
        pid: Of the program, which leads its process group.
        log: File with all that it printed; earlier content is kept.

    Args:
        argv: Program and arguments.
        log: Opened for appending.
        env: The whole environment.
        cwd: Its working directory.
        remove: Directory to remove when the process is closed, or when we are killed; it need not exist yet.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str],
        cwd: Path = ROOT,
        remove: Path | None = None,
    ) -> None:
        self.log = log
        self._status: int | None = None
        order = json.dumps({"argv": list(argv), "remove": None if remove is None else os.fspath(remove)})
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", os.fspath(_GUARD), order],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=dict(env),
                cwd=cwd,
                bufsize=0,
                # Ctrl-C reaches the tests' group alone; they end their processes in order.
                start_new_session=True,
            )
        self.pid = self._read_pid(argv[0])

    def _read_pid(self, program: str) -> int:
        try:
            told = self._read(_GUARD_WITHIN_S)
            if told is None or "pid" not in told:
                raise RuntimeError(f"{program} was not started: {told}; see {self.log}")
        except BaseException:
            self.close()
            raise
        return int(told["pid"])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} pid={self.pid} status={self.status}>"

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        self._look(0.0)
        return self._status

    @property
    def running(self) -> bool:
        """Whether the program itself is there."""
        return self.status is None

    def wait(self, within_s: float) -> int:
        """Wait for its end and return its exit status.

        Raises:
            TimeoutError: It still runs after *within_s* seconds.
        """
        self._look(within_s)
        if self._status is None:
            raise TimeoutError(f"process {self.pid} still runs after {within_s:g} s")
        return self._status

    def read_log(self) -> str:
        """Return all that it printed."""
        return self.log.read_text(errors="replace")

    def log_tail(self) -> str:
        """Return the last lines that it printed, for a report."""
        return "\n".join(self.read_log().splitlines()[-_TAIL_LINES:])

    def children(self) -> list[psutil.Process]:
        """Return its living descendants."""
        try:
            found = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [child for child in found if _is_alive(child)]

    def send_signal(self, number: signal.Signals) -> None:
        """Send *number* to the program itself; nothing if it ended."""
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it and all its children at once, as a power cut would, and wait."""
        if self.running:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait(_GUARD_WITHIN_S)

    def stop(self, within_s: float) -> None:
        """Ask it to end (SIGTERM); end it by force if it takes longer than *within_s* seconds."""
        self.send_signal(signal.SIGTERM)
        try:
            self.wait(within_s)
        except TimeoutError:
            self.kill()

    def close(self, *, keep_directory: bool = False) -> None:
        """Kill what is left of its group, and end the guard. May be called again.

        Args:
            keep_directory: Whether the directory to remove shall stay this time.
        """
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        if not self._guard.stdin.closed:
            self._look(0.0)
            with contextlib.suppress(BrokenPipeError):  # a guard that ended did its work before
                if keep_directory:
                    self._guard.stdin.write(KEEP)
                self._guard.stdin.close()
            try:
                self._guard.wait(_GUARD_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()
            self._guard.stdout.close()
            if self._status is None:
                self._status = -int(signal.SIGKILL)

    def _look(self, within_s: float) -> None:
        """Take the exit status over, if the guard tells one within *within_s* seconds."""
        assert self._guard.stdout is not None
        if self._status is None and not self._guard.stdout.closed:
            told = self._read(within_s)
            if told is not None:
                # A guard that ended has taken the program along.
                self._status = told.get("status", -int(signal.SIGKILL))

    def _read(self, within_s: float) -> dict[str, Any] | None:
        """Return what the guard tells next; None if nothing in time, empty if the guard ended."""
        stream = self._guard.stdout
        assert stream is not None
        if not select.select([stream], [], [], within_s)[0]:
            return None
        # Written at once and shorter than a pipe's atomic size; the program cannot have ended before `pid`
        # was read, or else both lines come together.
        lines = stream.read(4096)
        told: dict[str, Any] = {}
        for line in (lines or b"").splitlines():
            told |= json.loads(line)
        if "pid" in told and "status" in told:
            self._status = told["status"]
        return told


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
