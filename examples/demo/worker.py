"""The worker of the demo: ``celery -A workers worker`` as a process, and whatever it may leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from docket_celery.devserver.processes import log_tail, signal_on_parent_death
from examples.demo.claims import ClaimFailed

ROOT = Path(__file__).resolve().parents[2]
CONCURRENCY = 2
#: A warm shutdown lets steps finish; what takes longer than this is ended.
STOPPED_WITHIN_S = 5.0


def celery_command(*arguments: str) -> list[str]:
    """Return the command line ``celery -A workers ...`` of this environment."""
    return [sys.executable, "-m", "celery", "-A", "workers", *arguments]


def migrate(environment: Mapping[str, str]) -> None:
    """Make the tables.

    Raises:
        ClaimFailed: The command failed; the text is what it printed.
    """
    done = subprocess.run(  # noqa: S603 -- our own command
        celery_command("docket", "migrate"),
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ClaimFailed(f"celery -A workers docket migrate succeeds; it said:\n{done.stdout}{done.stderr}")


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
    with log.open("wb") as output:
        process = _start(
            celery_command("worker", *options),
            {**environment, "WAREHOUSE_CLOSED_FILE": str(gate)},
            output.fileno(),
        )
        try:
            yield Worker(process=process, log=log, gate=gate)
        except Exception:
            print(f"\nThe end of the worker's log:\n{log_tail(log)}", file=sys.stderr)
            raise
        finally:
            gate.unlink(missing_ok=True)
            _stop(process)


def _start(command: Sequence[str], environment: Mapping[str, str], output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 -- our own command
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        # Ctrl-C at a terminal reaches the whole group; the worker is told to stop by us, once and in order.
        start_new_session=True,
        preexec_fn=signal_on_parent_death(signal.SIGTERM),  # noqa: PLW1509 -- no thread runs yet
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOPPED_WITHIN_S)
    # Whatever is left of its session, the pool's processes included.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
