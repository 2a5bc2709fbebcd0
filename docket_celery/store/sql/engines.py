"""SQLAlchemy engines: made lazily for each process, with limits on every wait, never shared over a fork."""

from __future__ import annotations

import os
import re
import secrets
import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import StaticPool

from docket_celery.errors import InvalidArguments, InvalidSettings
from docket_celery.store.sql.statement import PREPARING, Preparing

SETTING = "docket_database_url"
_DRIVERS = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg", "sqlite": "sqlite+pysqlite"}
# What is opened is kept: overflow connections would be closed on return, and opening one costs as much as a run.
# Threads that wait for one cost as well: 8 busy ones with 4 or 5, a tenth to a quarter of their runs a second.
# What an error leaves open is rolled back where it is caught, so nothing is left to reset on return.
_POOL: Mapping[str, Any] = {
    "pool_size": 8,
    "max_overflow": 0,
    "pool_timeout": 15.0,
    "pool_use_lifo": True,
    "pool_reset_on_return": None,
}
_ONLY_WHEN_ASKED = (
    1_000_000_000  # executions after which the driver would prepare a statement that does not ask
)
_POSTGRES_ARGS: Mapping[str, Any] = {
    "application_name": "docket_celery",
    "client_encoding": "utf8",
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "prepare_threshold": _ONLY_WHEN_ASKED,
}
# READ COMMITTED is not left to the server's default: the fence re-reads rows that it waited for.
# A worker that is stopped within a transaction would keep its locks; the server ends its session.
_POSTGRES_OPTIONS = (
    "-c statement_timeout=15000 -c idle_in_transaction_session_timeout=15000 "
    r"-c default_transaction_isolation=read\ committed"
)
# A prepared statement is planned once for a connection. The tables may have been empty then, where reading all of a
# table costs least; each statement that is prepared finds its rows by key. Where another one has no index, servers
# before 18 price reading the table so high that they would compile it first.
_PREPARED_OPTIONS = "-c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c jit=off"
_EMPTY_OPTIONS = re.compile(r"[?&]options=(&|$)")
_USER = re.compile(r"^[\w+]+://(?:[^:/]*(?::[^@]*)?@)?")
_SQLITE_BUSY_S = 5.0


def parse_url(value: str | URL) -> URL:
    """Return *value* with the driver that this library uses, or raise `InvalidSettings`."""
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        # The text may hold a password, so neither it nor the error that quotes it is repeated.
        raise InvalidSettings(SETTING, "is not a URL such as postgresql+psycopg://user@host/name") from None
    name = _DRIVERS.get(url.drivername, url.drivername)
    if name not in _DRIVERS.values():
        known = ", ".join(sorted(set(_DRIVERS.values())))
        raise InvalidSettings(SETTING, f"names {url.drivername!r}; supported: {known}")
    if _has_split_password(url, value if isinstance(value, str) else ""):
        problem = (
            "holds an unquoted '@' in the password; write it as %40, and other special characters likewise"
        )
        raise InvalidSettings(SETTING, problem)
    if isinstance(value, str) and _EMPTY_OPTIONS.search(value):
        url = url.update_query_dict({"options": ""})  # parsing drops empty values; this one means something
    return url.set(drivername=name)


def _has_split_password(url: URL, text: str) -> bool:
    """Tell whether a part of the password was read as host, database name or option."""
    if url.get_backend_name() != "postgresql":
        return False
    options = [part.partition("=")[0] for part in _USER.sub("", text).partition("?")[2].split("&")]
    return any("@" in part for part in (url.host or "", url.database or "", *url.query, *options))


def is_memory(url: URL) -> bool:
    """Tell whether *url* names a SQLite database in memory, which no other connection can see."""
    if url.get_backend_name() != "sqlite":
        return False
    name = url.database or ""
    return name in {"", ":memory:"} or "mode=memory" in name or url.query.get("mode") == "memory"


class Engines:
    """One engine for each process that uses it; a forked child never touches its parent's connections.

    A user's own engine is used as it is. Raises `InvalidSettings` or `InvalidArguments` for a URL or an engine that
    cannot be used.
    """

    def __init__(self, source: str | URL | Engine) -> None:
        self._given = source if isinstance(source, Engine) else None
        self.url = source.url if isinstance(source, Engine) else parse_url(source)
        if self._given is not None:
            _check_given(self._given)
        self.in_memory = is_memory(self.url)
        # SQLite in memory is one connection; statements of two threads must not mix in one transaction.
        self.lock: AbstractContextManager[Any] = threading.Lock() if self.in_memory else nullcontext()
        self.preparing = Preparing(_asks_to_prepare(self.url) if self._given is None else None)
        self._made_by = os.getpid()
        self._engines: dict[int, Engine] = {}

    @property
    def shared(self) -> bool:
        """Whether there is but one engine to use: the user's own, or SQLite in memory."""
        return self.in_memory or self._given is not None

    def current(self) -> Engine:
        """Return this process's engine: mostly a look-up, and never a lock that a fork could leave held."""
        pid = os.getpid()
        engine = self._engines.get(pid)
        return engine if engine is not None else self._make(pid)

    def dispose(self) -> None:
        """Close this process's idle connections, unless the engine is the user's own."""
        engine = self._engines.get(os.getpid())
        if engine is not None and self._given is None and not self.in_memory:
            engine.dispose()

    def _make(self, pid: int) -> Engine:
        forked = pid != self._made_by
        if forked and self.in_memory:
            self.lock = threading.Lock()  # a thread of the parent may have held it at the fork
        # Two threads may both make one: setdefault keeps one, the other never connected and is dropped.
        # The parent's stays where it is, unused: closing its connections would end the parent's sessions.
        if self._given is None:
            engine = self._engines.setdefault(pid, _create(self.url, self.in_memory, self.preparing))
            # A store without references gives its connections back.
            weakref.finalize(self, _release, engine, pid).atexit = False
            return engine
        if forked:
            self._given.dispose(close=False)
        options: dict[str, Any] = {"isolation_level": "AUTOCOMMIT", PREPARING: self.preparing}
        return self._engines.setdefault(pid, self._given.execution_options(**options))


_of_parents: list[Engine] = []
"""Engines of a parent process, kept: freeing their connections here would end the parent's sessions."""


def _release(engine: Engine, pid: int) -> None:
    if pid == os.getpid():
        engine.dispose()
    else:
        _of_parents.append(engine)


def _check_given(engine: Engine) -> None:
    if engine.url.drivername not in _DRIVERS.values() and engine.driver not in {"psycopg", "pysqlite"}:
        raise InvalidArguments(
            "SQLStore", f"the engine uses {engine.url.drivername!r}; use psycopg or pysqlite"
        )
    if is_memory(engine.url) and not isinstance(engine.pool, StaticPool):
        problem = "an engine over SQLite in memory must use StaticPool; or pass the URL 'sqlite://' instead"
        raise InvalidArguments("SQLStore", problem)


def _asks_to_prepare(url: URL) -> bool | None:
    """Tell whether statements ask to be prepared; None: the URL says how often they run before that, or never."""
    return None if "prepare_threshold" in url.query or url.query.get("options") == "" else True


def _create(url: URL, in_memory: bool, preparing: Preparing) -> Engine:
    options: dict[str, Any] = {
        "isolation_level": "AUTOCOMMIT",
        "execution_options": {PREPARING: preparing},
        "hide_parameters": True,  # error texts and logs never show what was stored
    }
    if url.get_backend_name() == "sqlite":
        limits = {"timeout": _SQLITE_BUSY_S, "check_same_thread": False}
        given = {name: value for name, value in limits.items() if name not in url.query}
        pool = {"poolclass": StaticPool} if in_memory else dict(_POOL)
        return create_engine(url, connect_args=given, **options, **pool)
    arguments = dict(_POSTGRES_ARGS)
    query = dict(url.query)
    # Theirs come last and win; an explicit empty value sends none, for poolers that refuse start-up options.
    theirs = query.pop("options", None)
    ours = f"{_POSTGRES_OPTIONS} {_PREPARED_OPTIONS}" if preparing.asked else _POSTGRES_OPTIONS
    arguments["options"] = "" if theirs == "" else f"{ours} {theirs or ''}".rstrip()
    if not preparing.asked:
        text = str(query.pop("prepare_threshold", ""))
        arguments["prepare_threshold"] = int(text) if text.isdigit() else None
    given = {name: value for name, value in arguments.items() if name not in query}
    url = url.set(query=query)
    engine = create_engine(url, connect_args=given, use_native_hstore=False, **options, **_POOL)
    event.listen(engine, "connect", _name_apart)
    return engine


def _name_apart(connection: Any, _record: object) -> None:
    """Make the names of what *connection* prepares its own.

    Psycopg counts them from 0 on each connection. A pooler may give a connection the server of another one, where the
    same name stands for another statement; a name that is unknown there is an error, and the statement is repeated.
    """
    names: Any = getattr(connection, "_prepared", None)
    if hasattr(names, "_prepared_idx"):
        names._prepared_idx = secrets.randbits(60)
    else:
        connection.prepare_threshold = None
