"""Fixtures: one real Postgres for a test run, a database in it, and a store over its empty tables."""

from __future__ import annotations

import secrets
from collections.abc import Generator

import pytest
from sqlalchemy import create_engine, make_url, text

from docket_celery.devserver import dev_servers
from docket_celery.store import SQLStore
from docket_celery.store.schema import metadata


@pytest.fixture(scope="session")
def postgres_server_url() -> Generator[str]:
    """The URL of a running Postgres, ours or the one that the environment names."""
    with dev_servers(redis=False) as servers:
        yield servers.database_url


@pytest.fixture(scope="session")
def database_url(postgres_server_url: str) -> Generator[str]:
    """The URL of a fresh database with this release's tables."""
    name = f"docket_test_{secrets.token_hex(6)}"
    admin = create_engine(postgres_server_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = make_url(postgres_server_url).set(database=name).render_as_string(hide_password=False)
    store = SQLStore(url)
    store.migrate()
    store.close()
    yield url
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def postgres_store(database_url: str) -> Generator[SQLStore]:
    """A store over that database, its tables empty."""
    store = SQLStore(database_url)
    names = ", ".join(name for name in metadata.tables if name != "docket_schema")
    with store.engine.connect() as connection:
        connection.execute(text(f"TRUNCATE {names}"))
    yield store
    store.close()
