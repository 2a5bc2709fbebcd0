"""``python -m docket_celery.testing.worker_main ORDER``: a Celery worker of a test, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(order: dict[str, Any]) -> int:
    """Run the worker; return its exit status.

    Args:
        order: As `workers.Worker` writes it.
    """
    sys.path[:] = order["path"]
    from celery import maybe_patch_concurrency

    # Before anything else is imported: gevent replaces what others would have taken by then.
    maybe_patch_concurrency(["celery", *order["argv"]])

    from celery import signals
    from celery.app.utils import find_app

    from docket_celery.lifecycle import settings

    app: Any = find_app(order["app"])
    settings(database_url=order["database_url"])

    def tell_ready(**_: Any) -> None:
        Path(order["ready"]).touch()

    signals.worker_ready.connect(tell_ready, weak=False)
    app.worker_main(order["argv"])
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
