"""Included in a test's worker: writes down which modules of this library each task enters, in that order.

Only calls of functions count, on all threads that begin after this is imported and on the one that runs tasks:
what modules do while they are imported is not part of a job.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from celery.signals import task_postrun, worker_ready

VARIABLE = "DOCKET_TEST_MODULES_FILE"
ROOMS = (
    {"errors", "frames"},
    {"store", "plan"},
    {"observe"},
    {"engine"},
    {"runner"},
    {"batch", "graph"},
    {"task"},
    {"cli", "testing"},
)
"""From the bottom upward, as the contract in pyproject.toml has them."""
_PACKAGE = "docket_celery."


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one job entered.

    Attributes:
        modules: Paths below the package, such as ``task/submit``, each once, in the order of first entry.
        upward: Calls from a room into one above it, as "caller -> callee", also by way of code of others.
    """

    modules: list[str]
    upward: list[str]


class Recorder:
    """Records what is entered from `start` to `stop`."""

    def __init__(self) -> None:
        self._modules: dict[str, None] = {}
        self._upward: dict[str, None] = {}

    def start(self) -> None:
        """Record this thread and all threads that begin from now on."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def stop(self) -> None:
        """Record nothing more."""
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type, unused-ignore]  # the stubs forget None

    def take(self) -> Record:
        """Return what was recorded, and forget it."""
        taken = Record(modules=list(self._modules), upward=list(self._upward))
        self._modules, self._upward = {}, {}
        return taken

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        module = _module(frame)
        is_function = bool(frame.f_code.co_flags & inspect.CO_NEWLOCALS)
        if event != "call" or module is None or not is_function or _is_import(frame):
            return
        self._modules.setdefault(module)
        if frame.f_code.co_name == "<genexpr>":
            return  # what is handed down is read, as a list would be
        caller = frame.f_back
        while caller is not None and _module(caller) is None:
            caller = caller.f_back
        above = None if caller is None else _module(caller)
        if caller is not None and above is not None and _height(above) < _height(module):
            self._upward.setdefault(f"{above}.{caller.f_code.co_name} -> {module}.{frame.f_code.co_name}")


def _module(frame: FrameType) -> str | None:
    name = str(frame.f_globals.get("__name__", ""))
    return name.removeprefix(_PACKAGE).replace(".", "/") if name.startswith(_PACKAGE) else None


def _height(module: str) -> int:
    room = module.partition("/")[0]
    return next(height for height, rooms in enumerate(ROOMS) if room in rooms)


def _is_import(frame: FrameType) -> bool:
    """Tell whether a module of this library is being executed below *frame*."""
    caller: FrameType | None = frame
    while caller is not None:
        if caller.f_code.co_name == "<module>" and str(caller.f_globals.get("__name__")).startswith(_PACKAGE):
            return True
        caller = caller.f_back
    return False


if VARIABLE in os.environ:
    _recorder = Recorder()
    _records: list[dict[str, Any]] = []

    @worker_ready.connect  # type: ignore[misc, unused-ignore]  # signals are untyped
    def _start(**_: object) -> None:
        _recorder.start()

    @task_postrun.connect  # type: ignore[misc, unused-ignore]  # signals are untyped
    def _write(**_: object) -> None:
        _records.append(asdict(_recorder.take()))
        file = Path(os.environ[VARIABLE])
        part = file.with_suffix(".part")
        part.write_text(json.dumps(_records))
        part.rename(file)
