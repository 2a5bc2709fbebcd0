"""Postgres databases for tests: made from a template with this release's tables, and dropped."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from docket_celery.store import SQLStore


class Databases:
    """Makes databases on one server.

    Args:
        server_url: SQLAlchemy URL of a database there that may create others, such as ``postgres``.
    """

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._template = ""

    @contextmanager
    def fresh(self) -> Generator[str]:
        """Make a database with empty tables, yield its URL, and drop it, even while others are connected."""
        if not self._template:
            self._template = self._make_template()
        name = _name()
        self._do("CREATE DATABASE {} TEMPLATE {}", name, self._template)
        try:
            yield self._url(name)
        finally:
            self._do("DROP DATABASE {} WITH (FORCE)", name)

    def close(self) -> None:
        """Drop the template."""
        if self._template:
            self._do("DROP DATABASE IF EXISTS {} WITH (FORCE)", self._template)
            self._template = ""

    def _make_template(self) -> str:
        name = _name()
        self._do("CREATE DATABASE {}", name)
        store = SQLStore(self._url(name))
        try:
            store.migrate()
        finally:
            store.close()
        return name

    def _url(self, name: str) -> str:
        return make_url(self._server_url).set(database=name).render_as_string(hide_password=False)

    def _do(self, statement: Any, *names: str) -> None:
        plain = make_url(self._server_url).set(drivername="postgresql")
        conninfo = plain.render_as_string(hide_password=False)
        with psycopg.connect(conninfo, autocommit=True, application_name="docket_celery.testing") as admin:
            admin.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def _name() -> str:
    return f"docket_test_{os.getpid()}_{secrets.token_hex(4)}"
