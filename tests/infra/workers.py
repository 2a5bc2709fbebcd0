"""A Celery worker as a local process: started, watched, killed, started again."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.infra import ready
from tests.infra.processes import ROOT, GuardedProcess, wait_until

APP = "tests.integration.app"
_READY_WITHIN_S = 40.0
_STOP_WITHIN_S = 15.0
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """How to run a worker.

    Attributes:
        pool: Celery's name: prefork, threads, solo, gevent.
        concurrency: Processes, threads or greenlets; solo has one.
        app: Module with the app, for ``-A``.
        env: Variables beside the URLs of broker, results and database; these win.
        args: More arguments of ``celery worker``; these come last and win.
    """

    pool: str = "prefork"
    concurrency: int = 2
    app: str = APP
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    args: Sequence[str] = ()

    def arguments(self) -> list[str]:
        """Return what the stock command line of a worker lacks."""
        return [f"--pool={self.pool}", f"--concurrency={self.concurrency}", *self.args]


class WorkerProcess:
    """A running worker; a context manager that stops it.

    Attributes:
        node_name: Celery's name of the node, for ``inspect(destination=[...])``.
        spec: How it is run.
        log: File with its output, over all restarts.

    Args:
        spec: How to run it.
        directory: For its log and its sign of readiness.
        env: The whole environment, URLs included; *spec*'s is added.

    Raises:
        RuntimeError: It ended instead of becoming ready; with its last output.
        TimeoutError: It did not become ready.
    """

    def __init__(self, spec: WorkerSpec, *, directory: Path, env: Mapping[str, str]) -> None:
        name = f"docket{os.getpid()}-{next(_numbers)}"
        self.node_name = f"{name}@localhost"
        self.spec = spec
        self.log = directory / f"{name}.log"
        self._ready_file = directory / f"{name}.ready"
        # A killed worker cannot remove its temporary files: they go with the test's.
        own = {"TMPDIR": os.fspath(directory), ready.VARIABLE: os.fspath(self._ready_file)}
        self._env = {**env, **own, **spec.env}
        self._process = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.node_name} pid={self.pid} status={self.status}>"

    @property
    def pid(self) -> int:
        """Process id of the main process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the main process is there."""
        return self._process.running

    @property
    def status(self) -> int | None:
        """Exit status of the main process, negative for a signal; None while it runs."""
        return self._process.status

    def children(self) -> list[psutil.Process]:
        """Return its living children: under prefork, the pool's."""
        return self._process.children()

    def read_log(self) -> str:
        """Return its output so far."""
        return self._process.read_log()

    def wait_for_log(self, text: str, *, within_s: float = 15.0) -> None:
        """Wait until *text* stands in the log.

        Raises:
            TimeoutError: Not in time.
        """
        wait_until(lambda: text in self.read_log(), within_s=within_s, what=f"{text!r} in {self.log}")

    def wait(self, within_s: float) -> int:
        """Wait for the end of the main process; return its exit status.

        Raises:
            TimeoutError: It still runs.
        """
        return self._process.wait(within_s)

    def send_signal(self, number: signal.Signals) -> None:
        """Send *number* to the main process."""
        self._process.send_signal(number)

    def kill_child(self, pid: int | None = None) -> int:
        """Kill child *pid*, by default the first, with SIGKILL; return its id once it is gone.

        Raises:
            LookupError: There is no such child.
        """
        chosen = next((child for child in self.children() if pid in (None, child.pid)), None)
        if chosen is None:
            raise LookupError(f"{self} has no child {pid}" if pid is not None else f"{self} has no child")
        chosen.kill()
        wait_until(
            lambda: chosen.pid not in {child.pid for child in self.children()},
            within_s=10.0,
            what=f"the end of child {chosen.pid}",
        )
        return chosen.pid

    def kill_main(self) -> None:
        """Kill the main process alone with SIGKILL; its children may go on for a while."""
        self.send_signal(signal.SIGKILL)
        self.wait(_STOP_WITHIN_S)

    def kill(self) -> None:
        """Kill the main process and all its children at once, as a power cut would."""
        self._process.kill()

    def stop(self, within_s: float = _STOP_WITHIN_S) -> None:
        """Ask it to end when its tasks are done; kill it after *within_s* seconds. May be called again."""
        try:
            self._process.stop(within_s)
        finally:
            self._process.close()

    def restart(self, *, within_s: float = _STOP_WITHIN_S) -> None:
        """Stop it, unless it ended, and start it again under the same name; return when it is ready."""
        self.stop(within_s)
        self._process = self._start()

    def _start(self) -> GuardedProcess:
        self._ready_file.unlink(missing_ok=True)
        process = GuardedProcess(self._argv(), log=self.log, env=self._env)
        try:
            wait_until(
                lambda: self._ready_file.exists() or not process.running,
                within_s=_READY_WITHIN_S,
                what=f"worker {self.node_name} becomes ready",
            )
            if not process.running:
                raise RuntimeError(f"worker ended with status {process.status}:\n{process.log_tail()}")
        except BaseException as error:
            process.close()
            if isinstance(error, TimeoutError):
                error.add_note(process.log_tail())
            raise
        return process

    def _argv(self) -> list[str]:
        return [
            *(sys.executable, "-m", "celery", "-A", self.spec.app, "worker"),
            *("-n", self.node_name, "--loglevel=INFO", f"--include={ready.__name__}"),
            # Looking for other workers takes a second of each start.
            *("--without-mingle", "--without-gossip"),
            *self.spec.arguments(),
        ]


def checkout_environment(urls: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with *urls* added, and the checkout importable."""
    path = os.pathsep.join(filter(None, (os.fspath(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **urls}
