"""Real servers and a real worker for an example: on free local ports, gone when it ends, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from celery import Celery

from docket_celery.devserver import dev_servers
from docket_celery.devserver.processes import log_tail, signal_on_parent_death

ROOT = Path(__file__).resolve().parents[1]
#: A warm shutdown lets steps finish; what takes longer than this is ended.
STOPPED_WITHIN_S = 5.0
READY_WITHIN_S = 60.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOT_OURS = (
    "DOCKET_CELERY_DATABASE_URL",
    "PAYMENTS_DATABASE_URL",
    "CELERY_BROKER_URL",
    "CELERY_BROKER_READ_URL",
    "CELERY_BROKER_WRITE_URL",
    "CELERY_RESULT_BACKEND",
)


def leave_others_alone() -> None:
    """Take out of the environment what names servers that somebody works with.

    An example shows its own: a worker on another broker would take that one's messages.
    """
    for name in NOT_OURS:
        os.environ.pop(name, None)


def celery_command(app: str, *arguments: str) -> list[str]:
    """Return the command line ``celery -A APP ...`` of this environment."""
    return [sys.executable, "-m", "celery", "-A", app, *arguments]


def migrate(app: str, environment: Mapping[str, str]) -> None:
    """Make the tables.

    Raises:
        RuntimeError: The command failed; the text is what it printed.
    """
    done = subprocess.run(  # noqa: S603 -- our own command
        celery_command(app, "docket", "migrate"),
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"celery -A {app} docket migrate failed:\n{done.stdout}{done.stderr}")


@contextmanager
def worker_process(
    app: str, options: Sequence[str], environment: Mapping[str, str], log: Path
) -> Generator[subprocess.Popen[bytes]]:
    """Run a worker for the length of a ``with`` block; the end of its log is shown if the block fails."""
    with log.open("wb") as output:
        process = _start(celery_command(app, "worker", *options), environment, output.fileno())
        try:
            yield process
        except Exception:
            print(f"\nThe end of the worker's log:\n{log_tail(log)}", file=sys.stderr)
            raise
        finally:
            _stop(process)


@contextmanager
def local_worker(module: str, concurrency: int = 2) -> Generator[None]:
    """Run Postgres, Redis and a prefork worker of the app in *module*, and point this process at them.

    Import *module* inside of the block: its app reads the addresses from the environment.

    Raises:
        RuntimeError: The worker did not start.
    """
    leave_others_alone()
    with (
        dev_servers(private=True) as servers,
        tempfile.TemporaryDirectory(prefix="docket-example-") as folder,
    ):
        os.environ.update(servers.environment())
        migrate(module, os.environ)
        options = ("--concurrency", str(concurrency), "--loglevel", "INFO", "--without-mingle")
        with worker_process(module, options, os.environ, Path(folder) / "worker.log") as process:
            _await_answer(process)
            with _needed(process):
                yield


def run(main: Callable[[], bool]) -> int:
    """Call *main*, which tells whether all that it compared was right, and return the exit status.

    Ctrl-C and SIGTERM leave in order.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    sys.unraisablehook = _raise_again
    try:
        return 0 if main() else 1
    except SystemExit as interrupted:
        print("\nInterrupted; everything is stopped.", file=sys.stderr)
        return int(interrupted.code or 0)


class Interrupted(SystemExit):
    """A signal came; its number and 128 are the status."""


class WorkerEnded(RuntimeError):
    """The worker is gone."""


def _interrupt(number: int, _frame: object) -> None:
    """Leave in order, once: impatience must not cut the clean-up short."""
    for again in SIGNALS:
        signal.signal(again, signal.SIG_IGN)
    raise Interrupted(128 + number)


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised while a finalizer runs (Celery's results have one): raise it a moment later."""
    error = unraisable.exc_value
    if not isinstance(error, (Interrupted, WorkerEnded)):
        sys.__unraisablehook__(unraisable)
        return

    def raise_now(_number: int, _frame: object) -> None:
        raise error

    signal.signal(signal.SIGALRM, raise_now)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _await_answer(process: subprocess.Popen[bytes]) -> None:
    # Whatever app: it asks all workers on this broker, and there is one.
    control = Celery(set_as_current=False).control
    until = time.monotonic() + READY_WITHIN_S
    while not control.ping(timeout=0.3, limit=1):
        if process.poll() is not None:
            raise RuntimeError(f"the worker ended with status {process.returncode}")
        if time.monotonic() > until:
            raise RuntimeError(f"the worker did not answer within {READY_WITHIN_S:g} s")


@contextmanager
def _needed(process: subprocess.Popen[bytes]) -> Generator[None]:
    """Fail at once where *process* ends within the block: nobody else would answer."""

    def look(_number: int, _frame: object) -> None:
        if process.poll() is not None:
            raise WorkerEnded(f"the worker ended with status {process.returncode}")

    before = signal.signal(signal.SIGCHLD, look)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


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
        # Not SIGTERM: a task that ends now would wait for the broker, which dies too, and the worker for the task.
        preexec_fn=signal_on_parent_death(signal.SIGKILL),  # noqa: PLW1509 -- no thread runs yet
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOPPED_WITHIN_S)
    # Whatever is left of its session, the pool's processes included.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
