"""The demo as ``make demo`` runs it: to its end, and interrupted in the middle."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 90.0


@contextmanager
def started_demo(folder: Path) -> Generator[subprocess.Popen[str]]:
    """Start the demo with *folder* for its temporary files; end it with all it started if the test fails."""
    # Servers that do not answer: the demo uses its own, whatever the environment names.
    elsewhere = {
        "CELERY_BROKER_URL": "redis://127.0.0.1:1/0",
        "DOCKET_CELERY_DATABASE_URL": "postgresql://127.0.0.1:1/x",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "examples.demo"],
        cwd=ROOT,
        env={**os.environ, **elsewhere, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        try:
            yield demo
        finally:
            for process in descendants(demo):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            demo.kill()


def descendants(demo: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return all processes under *demo*, wherever their sessions are."""
    try:
        return psutil.Process(demo.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def read_until(demo: subprocess.Popen[str], text: str) -> None:
    """Read what *demo* prints up to the line with *text*."""
    assert demo.stdout is not None
    assert any(text in line for line in demo.stdout), f"the demo ended before {text!r}"


def worker_of(demo: subprocess.Popen[str]) -> psutil.Process | None:
    """Return the worker's main process, if it is there."""
    for process in descendants(demo):
        with suppress(psutil.NoSuchProcess):
            if "worker" in process.cmdline():
                return process
    return None


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    """Wait for *condition*, at most WITHIN_S seconds."""
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {WITHIN_S:g} s"
        time.sleep(0.05)


def listening_ports(processes: list[psutil.Process]) -> set[int]:
    """Return the TCP ports that *processes* listen on."""
    found: set[int] = set()
    for process in processes:
        # Postgres starts and ends processes all the time.
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections("tcp")
            found |= {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def accepts(port: int) -> bool:
    """Tell whether anybody listens on *port* of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def folder() -> Generator[Path]:
    """A temporary folder that everyone can enter, as the servers' unprivileged account must."""
    made = Path(tempfile.mkdtemp(prefix="demo-test-", dir="/tmp"))
    made.chmod(0o1777)
    yield made
    shutil.rmtree(made)


def test_the_demo_checks_what_it_claims_and_leaves_nothing_behind(folder: Path) -> None:
    """Exit status 0 comes with every scene's claims, one charge, and an empty temporary folder."""
    with started_demo(folder) as demo:
        output, errors = demo.communicate(timeout=WITHIN_S)
    assert demo.returncode == 0, output + errors
    claims = re.findall(r"^ +\[ok\] (.+)$", output, re.MULTILINE)
    assert "three steps ran at once" in claims
    assert "the payment provider got 1 call and made 1 charge" in claims
    assert "the run SUCCEEDED in delivery 2, after losing 1 worker process" in claims
    assert "delivery 1 charged and reserved; delivery 2 restored both results and shipped" in claims
    assert errors == ""
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_stops_the_demo_and_all_that_it_started(folder: Path) -> None:
    """An interrupt while the worker runs: exit status 130, no process, no open port, no file is left."""
    with started_demo(folder) as demo:
        read_until(demo, "the warehouse is closed")
        started = descendants(demo)
        assert worker_of(demo) in started
        ports = listening_ports(started)
        assert len(ports) == 2, ports

        demo.send_signal(signal.SIGINT)
        began = time.monotonic()
        output, errors = demo.communicate(timeout=WITHIN_S)
        took_s = time.monotonic() - began

        assert demo.returncode == 130, output + errors
        assert errors.strip() == "Interrupted; everything is stopped."
        assert took_s < 30
        assert [process for process in started if process.is_running()] == []
        assert [port for port in ports if accepts(port)] == []
        assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_killed_demo_takes_its_servers_and_its_worker_with_it(folder: Path) -> None:
    """Nobody can clean up after SIGKILL but those who notice it: nothing goes on without the demo."""
    with started_demo(folder) as demo:
        read_until(demo, "(a) Three services")
        started = descendants(demo)
        assert len(listening_ports(started)) == 2
        demo.kill()
        demo.wait()
        wait_until("all processes end", lambda: not any(process.is_running() for process in started))


@pytest.mark.slow
def test_a_worker_that_cannot_start_fails_the_demo(folder: Path) -> None:
    """The exit status is 1 and the reason is shown: here the worker is killed as soon as it is there."""
    with started_demo(folder) as demo:
        wait_until("the worker starts", lambda: worker_of(demo) is not None)
        worker = worker_of(demo)
        assert worker is not None
        worker.kill()
        output, errors = demo.communicate(timeout=WITHIN_S)
        assert demo.returncode == 1, output + errors
        assert "This did not hold: the worker goes on running" in errors
        assert list(folder.iterdir()) == []
