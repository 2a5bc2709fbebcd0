"""``python -m examples.demo``: exit status 0 only if every line marked [ok] was checked and held."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from docket_celery import DocketError
from docket_celery.devserver import dev_servers
from examples.demo.claims import ClaimFailed
from examples.demo.database import Database
from examples.demo.worker import CONCURRENCY, migrate, running_worker
from examples.local import leave_on_signals, leave_others_alone


def play() -> None:
    """Start everything, play the scenes, stop everything.

    Raises:
        ClaimFailed: A claim did not hold.
        DocketError: A server did not start, or a run failed.
    """
    leave_others_alone()
    print("Starting Postgres and Redis ...", flush=True)
    with dev_servers() as servers, tempfile.TemporaryDirectory(prefix="docket-demo-") as folder:
        os.environ.update(servers.environment())
        print("celery -A workers docket migrate", flush=True)
        migrate(os.environ)
        print(f"celery -A workers worker --concurrency {CONCURRENCY}", flush=True)
        with running_worker(Path(folder), os.environ) as worker:
            # Imported only now: the app reads its addresses from the environment.
            from examples.demo import scenes

            database = Database(servers.database_url)
            scenes.wait_until_ready(worker)
            scenes.play_parallel()
            scenes.play_kill(worker, database)
            scenes.play_sql(database)
            print("\nStopping ...", flush=True)


def main() -> int:
    """Play the demo and return the exit status."""
    leave_on_signals()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a text stream outside of tests
    began = time.monotonic()
    try:
        play()
    except SystemExit as interrupted:
        print("\nInterrupted; everything is stopped.", file=sys.stderr)
        return int(interrupted.code or 0)
    except ClaimFailed as failure:
        print(f"\nThis did not hold: {failure}", file=sys.stderr)
        return 1
    except DocketError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(f"\nEvery line marked [ok] was checked. {time.monotonic() - began:.0f} s, nothing is left running.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
