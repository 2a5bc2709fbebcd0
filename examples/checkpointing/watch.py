"""Starts executions and watches what they report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from docket_celery.observe.events import EventKind

ROOT = Path(__file__).resolve().parents[2]
_SHOWN = {
    EventKind.STEP_STARTED: "called",
    EventKind.STEP_SUCCEEDED: "finished",
    EventKind.STEP_RESTORED: "restored from its checkpoint",
}


class PipelineFailed(Exception):
    """An execution ended other than it should."""


@dataclass(slots=True, kw_only=True)
class Seen:
    """What one execution reported.

    Attributes:
        started: Steps called.
        restored: Steps whose stored result was used.
        waited_s: Seconds until the run could begin: with checkpoints, until a dead holder's lease ran out.
        worked_s: Seconds from then to the end, or to the kill.
    """

    started: list[str] = field(default_factory=list[str])
    restored: list[str] = field(default_factory=list[str])
    waited_s: float = 0.0
    worked_s: float = 0.0


def execute(mode: str, execution_id: str, environment: Mapping[str, str], *, kill_after: str = "") -> Seen:
    """Run the pipeline in a process, print its steps, and return what was seen.

    Args:
        mode: With checkpoints or without.
        execution_id: Names the run.
        environment: Of the process; tells it the database.
        kill_after: Step after whose end the process is killed by SIGKILL; "" lets it finish.

    Raises:
        PipelineFailed: It ended otherwise.
    """
    seen = Seen()
    with _process([mode, execution_id, kill_after], environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            kind, step = EventKind(event["kind"]), str(event["step"])
            _note(seen, kind, step, float(event["at_s"]))
        status = process.wait()
    if status != (-signal.SIGKILL if kill_after else 0):
        raise PipelineFailed(f"run {execution_id} ended with status {status}")
    if kill_after:
        print(f"      process {process.pid} was killed by {signal.SIGKILL.name}")
    return seen


def _note(seen: Seen, kind: EventKind, step: str, at_s: float) -> None:
    if step and not seen.started and not seen.restored:
        seen.waited_s = at_s
    seen.worked_s = at_s - seen.waited_s
    if kind is EventKind.STEP_STARTED:
        seen.started.append(step)
    elif kind is EventKind.STEP_RESTORED:
        seen.restored.append(step)
    if kind in _SHOWN:
        print(f"      {step} {_SHOWN[kind]}")


@contextmanager
def _process(arguments: Sequence[str], environment: Mapping[str, str]) -> Generator[subprocess.Popen[str]]:
    process = subprocess.Popen(  # noqa: S603 -- our own command
        [sys.executable, "-m", "examples.checkpointing.pipeline", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()
