"""What a test may not leave behind, each as a question that answers with the leftovers.

All wait a moment, since threads, processes and server sessions need one to end; what is left is described in
words for the failed test's report.
"""

from __future__ import annotations

import multiprocessing.resource_tracker
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import psutil

from tests.infra.servers import connect

PREFIX = "docket-"
_POLL_S = 0.02


def library_threads() -> set[threading.Thread]:
    """Return this library's living threads."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(PREFIX)}


def threads_left(before: Collection[threading.Thread], within_s: float) -> list[str]:
    """Return the names of this library's threads that were not there *before* and are after *within_s* seconds."""
    return _left(lambda: sorted(thread.name for thread in library_threads().difference(before)), within_s)


def child_pids() -> set[int]:
    """Return the ids of this process's children, unreaped ones too."""
    if sys.platform != "linux":
        return {child.pid for child in psutil.Process().children()}
    found: set[int] = set()
    # Some 50 times quicker than to look at every process of the machine, and this runs around each test.
    for thread in os.listdir("/proc/self/task"):
        try:
            found.update(map(int, Path(f"/proc/self/task/{thread}/children").read_text().split()))
        except FileNotFoundError:  # the thread has just ended
            continue
    return found


def children_left(before: Collection[int], within_s: float) -> list[str]:
    """Return the children that were not there *before* and are still there after *within_s* seconds."""
    # Python starts one by itself for multiprocessing, for the length of the process.
    tracker = multiprocessing.resource_tracker._resource_tracker._pid  # type: ignore[attr-defined] # no public way
    return _left(lambda: [_describe(pid) for pid in sorted(child_pids() - {*before, tracker})], within_s)


def connections_left(url: str, within_s: float) -> list[str]:
    """Return the sessions that are still open in the database *url* after *within_s* seconds."""
    with connect(url) as connection:

        def open_sessions() -> Sequence[str]:
            return [
                f"{application or 'unnamed'} ({state}): {query}"
                for application, state, query in connection.execute(
                    "SELECT application_name, state, query FROM pg_stat_activity"
                    " WHERE datname = current_database() AND backend_type = 'client backend'"
                    " AND pid <> pg_backend_pid() ORDER BY backend_start"
                )
            ]

        return _left(open_sessions, within_s)


def live_leases(url: str, within_s: float) -> list[str]:
    """Return the runs in the database *url* that hold a live lease after *within_s* seconds."""
    with connect(url) as connection:
        if connection.execute("SELECT to_regclass('docket_runs')").fetchone() == (None,):
            return []

        def leased() -> Sequence[str]:
            return [
                f"{graph} {execution_id}, by {owner}"
                for graph, execution_id, owner in connection.execute(
                    "SELECT graph, execution_id, owner FROM docket_runs"
                    " WHERE state = 'RUNNING' AND lease_until > clock_timestamp()"
                    " ORDER BY graph, execution_id"
                )
            ]

        return _left(leased, within_s)


def _describe(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return f"{pid} (ended, but nobody waited for it)"
        return f"{pid} {' '.join(process.cmdline())}"
    except psutil.NoSuchProcess:
        return f"{pid} (just ended)"


def _left(look: Callable[[], Sequence[str]], within_s: float) -> list[str]:
    deadline = time.monotonic() + within_s
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return list(found)
