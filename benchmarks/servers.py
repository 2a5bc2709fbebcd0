"""The servers that ways need: started once, when the first scenario asks for them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from sqlalchemy.engine import make_url

from benchmarks.process import ROOT
from docket_celery.devserver import dev_servers


class Servers:
    """Postgres with and without fsync, Redis and RabbitMQ; a context manager that stops them.

    Args:
        folder: For what they keep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._urls: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def url(self, name: str) -> str:
        """Return the address of the server *name*, which is started if it does not run."""
        if name not in self._urls:
            self._urls[name] = self._start(name)
        return self._urls[name]

    def _start(self, name: str) -> str:
        if name == "redis":
            return self._stack.enter_context(dev_servers(postgres=False, private=True)).broker_url
        if name == "rabbitmq":
            # What the tests run: no wheel holds one.
            from tests.infra.rabbitmq import RabbitMQ

            folder = self._own_folder(name)
            folder.mkdir(parents=True)
            return self._stack.enter_context(RabbitMQ(folder)).url
        if name == "postgres-nofsync":
            return self._stack.enter_context(dev_servers(redis=False, private=True)).database_url
        data = self._own_folder(name)
        servers = dev_servers(data_dir=data, durable=True, redis=False, private=True)
        return self._stack.enter_context(servers).database_url

    def _own_folder(self, name: str) -> Path:
        """Name a folder that no other measurement at this time uses; it is removed at the end."""
        folder = self._folder / f"{name}-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder


def has_rabbitmq() -> bool:
    """Tell whether this machine has a RabbitMQ to start."""
    check = ["sh", str(ROOT / "tools" / "rabbitmq.sh"), "check"]
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


@contextmanager
def databases(url: str, names: Iterable[str]) -> Generator[dict[str, str]]:
    """Make an empty database for each of *names*; yield their addresses; drop them."""
    admin = make_url(url)
    given = admin.set(drivername="postgresql").render_as_string(hide_password=False)
    made = {name: f"bench_{number}" for number, name in enumerate(names)}
    with psycopg.connect(given, autocommit=True) as connection:
        drops = [f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)' for database in made.values()]
        for drop, database in zip(drops, made.values(), strict=True):
            connection.execute(drop.encode())
            connection.execute(f'CREATE DATABASE "{database}"'.encode())
        try:
            yield {
                name: admin.set(database=database).render_as_string(hide_password=False)
                for name, database in made.items()
            }
        finally:
            for drop in drops:
                connection.execute(drop.encode())
