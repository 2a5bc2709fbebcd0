"""Copied into each worker's container as ``utils``: pytest-celery asks it for the container's processes."""

from __future__ import annotations

import json
import os
from typing import Any

import psutil


def get_running_processes_info(columns: list[str] | None = None) -> str:
    """Return facts about the container's processes as JSON.

    A container that is a local process shares the machine's process table: its own are those of its session.
    """
    wanted = columns or ["pid", "name", "username", "cmdline", "create_time"]
    session = os.environ.get("DOCKET_TEST_SESSION")
    found = [
        process.info
        for process in psutil.process_iter(wanted)
        if session is None or _session(process.pid) == int(session)
    ]
    return json.dumps(found)


def _session(pid: int) -> Any:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
