"""Included in a test's worker (``celery worker --include``): says when it consumes, in a file.

Celery's own event, so that it holds for every pool, log level and app.
"""

from __future__ import annotations

import os
from pathlib import Path

from celery.signals import worker_ready

VARIABLE = "DOCKET_TEST_READY_FILE"


@worker_ready.connect  # type: ignore[misc, unused-ignore] # signals are untyped
def _say_ready(**_: object) -> None:
    file = Path(os.environ[VARIABLE])
    part = file.with_suffix(".part")
    part.write_text(str(os.getpid()))
    part.rename(file)
