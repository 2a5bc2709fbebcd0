"""One Postgres and one Redis for a test run, and what each pytest process has of them for itself."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
import pytest
import redis
from psycopg import sql
from sqlalchemy import make_url

from docket_celery.devserver import DevServers, start_dev_servers
from docket_celery.store import SQLStore

HIDDEN_PREFIXES = ("DOCKET_CELERY_", "FLOWER_")
HIDDEN_VARIABLES = (
    "CELERY_BROKER_URL",
    "CELERY_RESULT_BACKEND",
    "CELERY_CONFIG_MODULE",
    # Not a server: it would have each of the many processes compile every module, two seconds of CPU at each start.
    "PYTHONDONTWRITEBYTECODE",
)
_TEMPLATE = "docket_tests_template"
_TEMPLATE_LOCK = 0x74657374  # advisory: one process makes the template
_DATABASES_A_PROCESS = 2
_LOCK_WITHIN = "10s"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerUrls:
    """Where the test run's servers are.

    Attributes:
        database_url: SQLAlchemy URL of the maintenance database; tests have databases of their own.
        broker_url: Database 0 of Redis.
    """

    database_url: str
    broker_url: str


def hide_environment() -> dict[str, str]:
    """Take out of the environment what would send tests to somebody's real servers or slow them, and return it.

    Tests flush and truncate: they may only ever see the servers that the test run started.
    """
    hidden = [name for name in os.environ if name.startswith(HIDDEN_PREFIXES) or name in HIDDEN_VARIABLES]
    return {name: os.environ.pop(name) for name in hidden}


def start_servers() -> tuple[DevServers, ServerUrls]:
    """Start temporary servers that end with this process."""
    servers = start_dev_servers()
    return servers, ServerUrls(database_url=servers.database_url, broker_url=servers.broker_url)


def only_unit_tests(config: pytest.Config) -> bool:
    """Tell whether the command line names nothing but folders or files of tests that need no server."""
    unit = [config.rootpath / "tests" / name for name in ("unit", "typing")]
    paths = [(config.invocation_params.dir / str(given).split("::")[0]).resolve() for given in config.args]
    return all(any(path.is_relative_to(folder) for folder in unit) for path in paths)


def redis_urls(broker_url: str, worker: str) -> tuple[str, str]:
    """Return the URLs of the broker and of the result backend of one pytest process.

    Args:
        broker_url: Of any database of the server.
        worker: xdist's name of the process (``gw3``), or ``master``.
    """
    number = int(worker.removeprefix("gw")) if worker.startswith("gw") else 0
    server = broker_url.rpartition("/")[0]
    first = number * _DATABASES_A_PROCESS
    return f"{server}/{first}", f"{server}/{first + 1}"


def flush(*urls: str) -> None:
    """Empty the Redis databases *urls*."""
    for url in urls:
        with redis.Redis.from_url(url) as client:
            client.flushdb()


@contextmanager
def connect(url: str) -> Generator[psycopg.Connection[tuple[object, ...]]]:
    """Open an autocommit connection to a SQLAlchemy URL of Postgres."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True, application_name="docket-tests") as connection:
        yield connection


def database_at(server_url: str, name: str) -> str:
    """Return the SQLAlchemy URL of database *name* of the server."""
    return make_url(server_url).set(database=name).render_as_string(hide_password=False)


@contextmanager
def temporary_database(server_url: str, *, migrated: bool) -> Generator[str]:
    """Create a database, yield its SQLAlchemy URL, and drop it.

    Args:
        server_url: SQLAlchemy URL of the maintenance database.
        migrated: With this release's tables; else empty.
    """
    name = f"docket_test_{os.getpid()}_{secrets.token_hex(4)}"
    with connect(server_url) as admin:
        if migrated:
            _ensure_template(server_url, admin)
        source = sql.Identifier(_TEMPLATE if migrated else "template1")
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), source))
    try:
        yield database_at(server_url, name)
    finally:
        with connect(server_url) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _ensure_template(server_url: str, admin: psycopg.Connection[tuple[object, ...]]) -> None:
    """Make the database that others are copied from; the first process that asks does."""
    admin.execute("SELECT pg_advisory_lock(%s)", [_TEMPLATE_LOCK])
    try:
        if admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", [_TEMPLATE]).fetchone() is None:
            # Under its real name only when complete.
            raw = f"{_TEMPLATE}_new"
            admin.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(raw)))
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(raw)))
            migrate(database_at(server_url, raw))
            rename = sql.SQL("ALTER DATABASE {} RENAME TO {}")
            admin.execute(rename.format(sql.Identifier(raw), sql.Identifier(_TEMPLATE)))
    finally:
        admin.execute("SELECT pg_advisory_unlock(%s)", [_TEMPLATE_LOCK])


def migrate(url: str) -> None:
    """Give the database *url* this release's tables."""
    store = SQLStore(url)
    try:
        store.migrate()
    finally:
        store.close()


def truncate(url: str) -> None:
    """Empty all tables of this library; the schema's version stays.

    Sessions that an earlier test left open are ended: that test was told, and their locks would block this.
    """
    with connect(url) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        names = [
            sql.Identifier(str(name))
            for (name,) in connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
                " AND tablename LIKE 'docket\\_%' AND tablename <> 'docket_schema'"
            )
        ]
        connection.execute(sql.SQL("SET lock_timeout = {}").format(_LOCK_WITHIN))
        if names:
            connection.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(", ").join(names)))
