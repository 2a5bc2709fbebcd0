"""Included in a test's worker: writes down which modules of this library a task enters, in that order.

Only calls of functions count, on all threads that begin after this is imported and on the one that runs tasks:
what modules do while they are imported is not part of a job.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from celery.signals import task_postrun, worker_ready

VARIABLE = "DOCKET_TEST_MODULES_FILE"
_PACKAGE = "docket_celery."


class Recorder:
    """The modules entered so far.

    Attributes:
        modules: Their paths below the package, such as ``task/submit``, each once, in the order of first entry.
    """

    def __init__(self) -> None:
        self.modules: dict[str, None] = {}

    def start(self) -> None:
        """Record this thread and all threads that begin from now on."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def stop(self) -> None:
        """Record nothing more."""
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type, unused-ignore]  # the stubs forget None

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        name = str(frame.f_globals.get("__name__", ""))
        is_function = bool(frame.f_code.co_flags & inspect.CO_NEWLOCALS)
        if event == "call" and is_function and name.startswith(_PACKAGE) and not _is_import(frame):
            self.modules.setdefault(name.removeprefix(_PACKAGE).replace(".", "/"))


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

    @worker_ready.connect  # type: ignore[misc, unused-ignore]  # signals are untyped
    def _start(**_: object) -> None:
        _recorder.start()

    @task_postrun.connect  # type: ignore[misc, unused-ignore]  # signals are untyped
    def _write(**_: object) -> None:
        _recorder.stop()
        file = Path(os.environ[VARIABLE])
        part = file.with_suffix(".part")
        part.write_text(json.dumps(list(_recorder.modules)))
        part.rename(file)
