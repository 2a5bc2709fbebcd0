"""The process of one way: ``python -m benchmarks.host module:function '{"options"}'``.

It answers one line of JSON for each line of JSON on its standard input, until that ends. What the measured libraries
print goes to standard error.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import IO, Any

Run = Callable[[int], float | None]
"""Does that many runs. Returns seconds (or bytes) of one, where the time of the call is not what counts."""


def repeat(call: Callable[[], object]) -> Run:
    """Return a run that calls *call* in a loop."""

    def run(count: int) -> None:
        for _ in range(count):
            call()

    return run


def find(target: str) -> Callable[[Mapping[str, Any]], AbstractContextManager[Mapping[str, Run]]]:
    """Return the function named ``module:function`` below ``benchmarks.ways``."""
    module, _, function = target.partition(":")
    found: Callable[[Mapping[str, Any]], AbstractContextManager[Mapping[str, Run]]] = getattr(
        importlib.import_module(f"benchmarks.ways.{module}"), function
    )
    return found


def cpu_s() -> float:
    """Return the CPU seconds of this process and of those below it, alive or ended."""
    import psutil

    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measure(run: Run, count: int) -> dict[str, object]:
    """Do *count* runs; return the seconds and CPU seconds of one."""
    gc.collect()
    cpu, began = cpu_s(), time.perf_counter()
    told = run(count)
    took_s = time.perf_counter() - began
    seconds = took_s / count if told is None else told
    return {"seconds": seconds, "cpu": (cpu_s() - cpu) / count, "wall": took_s}


def serve(target: str, options: Mapping[str, Any], requests: IO[str], replies: IO[str]) -> None:
    """Open the way, and answer until *requests* end."""

    def reply(said: Mapping[str, object]) -> None:
        replies.write(json.dumps(said) + "\n")
        replies.flush()

    with ExitStack() as stack:
        try:
            figures = stack.enter_context(find(target)(options))
        except Exception:  # noqa: BLE001 -- told to the parent, which shows it
            reply({"error": traceback.format_exc()})
            return
        reply({"figures": sorted(figures)})
        for line in requests:
            asked = json.loads(line)
            try:
                reply(measure(figures[asked["figure"]], asked["runs"]))
            except Exception:  # noqa: BLE001 -- one figure that fails must not take the others along
                reply({"error": traceback.format_exc()})


def main() -> None:
    """Serve on the pipe that was standard output; prints of others go to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], json.loads(sys.argv[2]), sys.stdin, replies)


if __name__ == "__main__":
    main()
