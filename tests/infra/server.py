"""``python -m tests.infra.server KIND DIRECTORY PORT``: one database or broker as a container's program.

Runs until SIGTERM. Prints ``ready`` on a line of its own when the server accepts connections; the server's own
output is in DIRECTORY. A Postgres gets the role and the database that the official image's variables name.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from docket_celery.devserver import ServerProcess, start_postgres, start_redis

READY = "ready"
_POLL_S = 0.05


def main(kind: str, directory: Path, port: int) -> int:
    """Run the server; return the exit status."""
    signal.signal(signal.SIGTERM, _exit)
    if kind == "redis":
        server = start_redis(directory, port=port, parent_death=signal.SIGTERM)
    else:
        server = start_postgres(directory, port=port, parent_death=signal.SIGINT)
    try:
        if kind == "postgres":
            _prepare(server.url)
        sys.stdout.write(f"{READY}\n")
        sys.stdout.flush()
        return _status(server)
    finally:
        server.stop()


def log_file(directory: Path) -> Path:
    """Return where the server in *directory* prints."""
    return directory / "log"


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _status(server: ServerProcess) -> int:
    while server.status is None:
        time.sleep(_POLL_S)
    return 1


def _prepare(url: str) -> None:
    """Make what the image's variables ask for, unless an earlier start did."""
    # Imported here: a Redis is up half a second earlier without them.
    import psycopg
    from psycopg import sql
    from sqlalchemy import make_url

    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    user, password = os.environ.get("POSTGRES_USER", "postgres"), os.environ["POSTGRES_PASSWORD"]
    database = os.environ.get("POSTGRES_DB", user)
    with psycopg.connect(plain, autocommit=True) as admin:
        if admin.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [user]).fetchone() is None:
            role = sql.SQL("CREATE ROLE {} SUPERUSER LOGIN PASSWORD {}")
            admin.execute(role.format(sql.Identifier(user), sql.Literal(password)))
        if admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone() is None:
            made = sql.SQL("CREATE DATABASE {} OWNER {}")
            admin.execute(made.format(sql.Identifier(database), sql.Identifier(user)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
