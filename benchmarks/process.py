"""The parent's side of a way's process."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.scenario import Way
from docket_celery.devserver.processes import log_tail, signal_on_parent_death

ROOT = Path(__file__).resolve().parents[1]
PEERS_PYTHON = ROOT / ".venv" / "bench" / "bin" / "python"
ANSWERS_WITHIN_S = 300.0
ENDS_WITHIN_S = 20.0


class WayFailed(Exception):
    """A way's process raised, ended or hung; the text says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One round of a way: seconds (or bytes) and CPU seconds of one run, and how long the round lasted."""

    seconds: float
    cpu: float
    wall: float


class Process:
    """A running way.

    Attributes:
        figures: The names of the figures that it has.

    Args:
        way: What to run.
        options: Addresses of servers, added to the way's own options.
        log: Where its output goes.
        package: Folder that holds the docket_celery to measure; None: this checkout.

    Raises:
        WayFailed: It did not become ready.
    """

    def __init__(
        self, way: Way, options: Mapping[str, object], log: Path, package: Path | None = None
    ) -> None:
        self._name, self._log = way.name, log
        python = PEERS_PYTHON if way.peer else sys.executable
        paths = [str(path) for path in (package, ROOT) if path is not None]
        with log.open("wb") as output:
            # -P: else the working directory comes before PYTHONPATH.
            self._process = subprocess.Popen(
                [
                    python,
                    "-P",
                    "-m",
                    "benchmarks.host",
                    way.target,
                    json.dumps({**way.options, **options}),
                ],
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(paths),
                    "OTEL_SDK_DISABLED": "true",
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                preexec_fn=signal_on_parent_death(signal.SIGTERM),  # noqa: PLW1509 -- no thread runs yet
            )
        try:
            self.figures: list[str] = self._answer()["figures"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def measure(self, figure: str, runs: int) -> Measured:
        """Do that many runs; raise `WayFailed` if it cannot."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"figure": figure, "runs": runs}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WayFailed(f"{self._name} has ended:\n{log_tail(self._log)}") from None
        return Measured(**self._answer())

    def close(self) -> None:
        """End it in order, else by force, with all that it started."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDS_WITHIN_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            if not ready.select(ANSWERS_WITHIN_S):
                raise WayFailed(f"{self._name} gave no answer in {ANSWERS_WITHIN_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise WayFailed(f"{self._name} ended:\n{log_tail(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WayFailed(f"{self._name}: {answer['error']}")
        return answer
