"""A real worker with a client in this process, for one task of `celery_app`."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from benchmarks.host import Run, repeat
from benchmarks.ways import by_hand, celery_ready
from docket_celery.devserver.processes import signal_on_parent_death
from docket_celery.store import SQLStore

WAITS_S = 60.0


def environment(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that name the servers of a way."""
    found = {
        "CELERY_BROKER_URL": str(options.get("rabbitmq", options["redis"])),
        "CELERY_RESULT_BACKEND": str(options["redis"]),
        celery_ready.QUEUE_VARIABLE: f"bench-{os.getpid()}",
    }
    if "database" in options:
        found["DOCKET_CELERY_DATABASE_URL"] = str(options["database"])
    return found


@contextmanager
def worker(app: str, *arguments: str, python: str = sys.executable) -> Generator[subprocess.Popen[bytes]]:
    """Run a worker that is ready, with two children or threads; all of it ends with the block.

    Raises:
        RuntimeError: It ended instead.
    """
    command = [python, "-P", "-m", "celery", "-A", app, "worker", "-c", "2", "-l", "WARNING"]
    # RabbitMQ refuses a second worker of one name.
    command += ["-n", f"bench-{os.getpid()}@%h"]
    ready, told = os.pipe()
    with subprocess.Popen(
        [*command, "--without-gossip", "--without-mingle", *arguments],
        stdout=2,
        stdin=subprocess.DEVNULL,
        env={**os.environ, celery_ready.VARIABLE: str(told)},
        pass_fds=[told],
        preexec_fn=signal_on_parent_death(signal.SIGTERM),  # noqa: PLW1509 -- no thread runs yet
    ) as process:
        os.close(told)
        try:
            # The end of the pipe comes with the end of the worker.
            if not os.read(ready, 5):
                raise RuntimeError(f"the worker ended with status {process.wait()}")
            yield process
        finally:
            os.close(ready)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


@contextmanager
def task(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """The task ``options["task"]`` on a worker of the pool ``options["pool"]``."""
    os.environ |= environment(options)
    name = "celery_store_app" if "database" in options else "celery_app"
    # Apps read the environment where they are made.
    app = importlib.import_module(f"benchmarks.ways.{name}")
    if "database" in options:
        SQLStore(options["database"]).migrate()
        by_hand.make_tables(options).close()
    send, unread = _senders(str(options["task"]), app)
    with worker(f"benchmarks.ways.{name}", "-P", str(options["pool"])):

        def get(sent: Any) -> Any:
            return sent.get(timeout=WAITS_S, interval=0.001)

        def throughput(count: int) -> None:
            for sent in [send() for _ in range(count)]:
                get(sent)

        figures: dict[str, Run] = {"throughput": throughput, "latency": repeat(lambda: get(send()))}
        if unread is not None:
            figures["delay"] = repeat(unread)
        if options["task"] in {"no_op", "one", "canvas"}:
            figures["wake_up"] = lambda count: _wake_up(lambda: get(send()), count)
        yield figures


def _wake_up(call: Callable[[], Any], count: int) -> float:
    """Return the median seconds from the end of the last step to the caller's result."""
    waits: list[float] = []
    for _ in range(count):
        made = call()
        waits.append((time.time_ns() - getattr(made, "value", made)) / 1e9)
    return sorted(waits)[count // 2]


def _senders(name: str, app: Any) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """Return what sends a job, and what sends one that no worker reads: then only the sender is measured."""
    if name == "canvas":
        return lambda: app.send_canvas("u"), None
    task: Any = getattr(app, name)
    argument: Any = "u"
    if name == "persisted_chain":
        argument = app.Int64Value()
    elif name not in {"no_op", "seven_statements"}:
        argument = app.UserID(id="u")
    return lambda: task.delay(argument), lambda: task.apply_async((argument,), queue="unread")
