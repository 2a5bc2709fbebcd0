"""One execution in a process of its own: ``python -m examples.checkpointing.pipeline MODE EXECUTION_ID [STEP]``.

Prints one line of JSON for each event of the run, as it happens, for whoever watches. With a STEP the process is
killed as soon as that step's result is kept: by SIGKILL, so nothing is closed, released or flushed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

from docket_celery.observe.events import Event, EventKind
from docket_celery.store import SQLStore
from examples.checkpointing.checkpointing_pb2 import UploadedVideo, VideoJob
from examples.checkpointing.graph import video_graph

CHECKPOINTS, PLAIN = "checkpoints", "plain"


class Reporter:
    """Prints events; times are seconds since it was made.

    Args:
        kill_after: Step whose end is the end of this process; "" for none.
    """

    def __init__(self, kill_after: str) -> None:
        self._kill_after = kill_after
        self._began = time.monotonic()
        # Steps report from their own threads; a line must stay a line.
        self._lock = threading.Lock()

    def __call__(self, event: Event, /) -> None:
        """Print one event."""
        line = {"kind": event.kind.value, "step": event.step, "at_s": round(event.at - self._began, 6)}
        with self._lock:
            print(json.dumps(line), flush=True)
            if event.kind is EventKind.STEP_SUCCEEDED and event.step == self._kill_after:
                # From inside, so that the moment is the same each time; the kernel asks nobody.
                os.kill(os.getpid(), signal.SIGKILL)


def main(mode: str, execution_id: str, kill_after: str = "") -> None:
    """Run the pipeline to its end, or to its kill."""
    store = SQLStore(os.environ["DOCKET_CELERY_DATABASE_URL"])
    graph = video_graph(checkpoints=mode == CHECKPOINTS)
    graph.listeners.append(Reporter(kill_after))
    try:
        job = VideoJob(url="https://videos.example/harbour.mp4")
        graph.execute(UploadedVideo, job, execution_id=execution_id, store=store)
    finally:
        store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
