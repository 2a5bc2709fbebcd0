"""``python -m docket_celery.devserver``: the servers as a command."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from docket_celery.devserver.command import run_command
from docket_celery.devserver.env_file import kept_exports
from docket_celery.devserver.owner import DEFAULT_DATA_DIR, dev_servers, resolve
from docket_celery.devserver.supervisor import supervise
from docket_celery.errors import DocketError

_DESCRIPTION = """\
Run a private Postgres and a private Redis-compatible server on free loopback ports.

Without CMD: print the variables that name them as shell exports, keep the same lines in .docket/env (in the
data directory, if there is one) for other terminals, and run until Ctrl-C or the end of standard input.
With CMD: run it with those variables set, stop the servers after it, and return its exit status.
A server is not started where DOCKET_CELERY_DATABASE_URL or CELERY_BROKER_URL is set."""


def main(argv: Sequence[str]) -> int:
    """Run the command line *argv*; return the exit status."""
    parser = _parser()
    own, command = _split(argv)
    options = parser.parse_args(own)
    if command == [] or (command is not None and options.json):
        parser.error("-- needs a command after it, and no --json before it")
    wanted: dict[str, Any] = {
        "data_dir": options.data_dir,
        "durable": options.durable or options.data_dir is not None,
        "postgres": not options.no_postgres,
        "redis": not options.no_redis,
    }
    try:
        if options.json:
            order, database_url, broker_url = resolve(**wanted, owner_pid=None)
            return supervise(order, database_url=database_url, broker_url=broker_url)
        return _run_command(command, wanted) if command is not None else _run_alone(wanted)
    except DocketError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _run_command(command: Sequence[str], wanted: Mapping[str, Any]) -> int:
    _end_in_order()
    with dev_servers(**wanted) as servers:
        return run_command(command, servers.environment())


def _run_alone(wanted: Mapping[str, Any]) -> int:
    _end_in_order()
    with dev_servers(**wanted) as servers, contextlib.ExitStack() as stack:
        exports = "".join(
            f"export {name}={shlex.quote(value)}\n" for name, value in servers.environment().items()
        )
        note = stack.enter_context(kept_exports(wanted["data_dir"] or DEFAULT_DATA_DIR, exports))
        # Ctrl-C is how this command is meant to end, from the moment its last line can be read.
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdout.write(f"{exports}# {note}\n")
            sys.stdout.flush()
            while os.read(sys.stdin.fileno(), 4096):
                pass
    return 0


def _end_in_order() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str] | None]:
    """Divide *argv* at the first ``--``."""
    if "--" not in argv:
        return argv, None
    at = list(argv).index("--")
    return argv[:at], argv[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m docket_celery.devserver",
        usage="%(prog)s [options] [-- CMD ARGS...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--durable", action="store_true", help="keep the data, and survive a power cut")
    parser.add_argument(
        "--data-dir", type=Path, help="where to keep it (default: ./.docket); implies --durable"
    )
    parser.add_argument("--no-postgres", action="store_true", help="no database")
    parser.add_argument("--no-redis", action="store_true", help="no broker")
    parser.add_argument("--json", action="store_true", help="print one JSON line, for programs")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
