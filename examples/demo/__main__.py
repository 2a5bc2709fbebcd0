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
from examples.local import leave_others_alone, run


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
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a text stream outside of tests
    return run(_holds)


def _holds() -> bool:
    """Play the demo, and tell whether all of it held."""
    began = time.monotonic()
    try:
        play()
    except ClaimFailed as failure:
        print(f"\nThis did not hold: {failure}", file=sys.stderr)
        return False
    except DocketError as error:
        print(f"\n{error}", file=sys.stderr)
        return False
    print(f"\nEvery line marked [ok] was checked. {time.monotonic() - began:.0f} s, nothing is left running.")
    return True


if __name__ == "__main__":
    sys.exit(main())
