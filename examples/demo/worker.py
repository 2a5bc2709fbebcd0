"""The worker of the demo: ``celery -A workers worker`` as a process, and whatever it may leave behind."""

from __future__ import annotations

import subprocess
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from examples import local
from examples.demo.claims import ClaimFailed

CONCURRENCY = 2


def migrate(environment: Mapping[str, str]) -> None:
    """Make the tables.

    Raises:
        ClaimFailed: The command failed; the text is what it printed.
    """
    try:
        local.migrate("workers", environment)
    except RuntimeError as error:
        raise ClaimFailed(f"celery -A workers docket migrate succeeds; {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A running worker.

    Attributes:
        log: File with what it printed.
        gate: While this file exists, the warehouse ships nothing.
    """

    process: subprocess.Popen[bytes]
    log: Path
    gate: Path

    def check(self) -> None:
        """Look whether it still runs.

        Raises:
            ClaimFailed: It ended.
        """
        if self.process.poll() is not None:
            raise ClaimFailed(f"the worker goes on running; it ended with status {self.process.returncode}")


@contextmanager
def running_worker(folder: Path, environment: Mapping[str, str]) -> Generator[Worker]:
    """Run a prefork worker for the length of a ``with`` block; its log is shown if the block fails."""
    log, gate = folder / "worker.log", folder / "warehouse-closed"
    options = ("--concurrency", str(CONCURRENCY), "--loglevel", "INFO", "--hostname", "demo@%h")
    closed = {**environment, "WAREHOUSE_CLOSED_FILE": str(gate)}
    with local.worker_process("workers", options, closed, log) as process:
        try:
            yield Worker(process=process, log=log, gate=gate)
        finally:
            gate.unlink(missing_ok=True)
