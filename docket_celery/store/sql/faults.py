"""What an error of the driver means: an outage to wait for, a refusal that stays, or a setting that cannot work."""

from __future__ import annotations

import re

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from docket_celery.errors import (
    CorruptCheckpoint,
    DocketError,
    InvalidSettings,
    StoreRefused,
    StoreUnavailable,
)
from docket_celery.store.sql.engines import SETTING

_PASSING_CLASSES = ("08", "53", "57")
_PASSING_STATES = frozenset({"0A000", "25006", "25P03", "40001", "40P01", "55P03"})
# 0A000: a migration has changed the type of what a prepared statement returns.
_LEFT_STATES = frozenset({"0A000", "25006", "57P01", "57P02", "57P03"})
_PREPARED_STATES = frozenset({"26000", "42P05"})
_ADVICE = {
    "42501": "grant the right to the role in docket_database_url",
    "22021": "use a database whose encoding is UTF8",
    "22P05": "use a database whose encoding is UTF8",
    "23505": "a run that was deleted has left a checkpoint in docket_cache; delete that, too",
}
_OPTIONS_ADVICE = (
    "the pooler refuses start-up options; add '?options=' (an empty value) to docket_database_url, and set "
    "statement_timeout, idle_in_transaction_session_timeout and default_transaction_isolation=read committed "
    "for the role"
)
_CONNECTING = (
    (re.compile(r"unsupported startup parameter"), _OPTIONS_ADVICE),
    (
        re.compile(r"password authentication failed|no password supplied|SASL auth"),
        "correct user and password",
    ),
    (re.compile(r"database .* does not exist|no such database"), "create the database or correct its name"),
    (re.compile(r"role .* does not exist|no such user"), "create the role or correct its name"),
    (re.compile(r"no pg_hba\.conf entry|permission denied for database"), "allow the role to connect"),
    (re.compile(r"invalid (connection option|port number|integer value|.*sslmode)"), "correct the URL"),
)
"""A refused connection has no SQLSTATE in psycopg; the server's words are matched instead."""
_SHORTEST_TOKEN = 6
"""From this length on a password is hidden wherever it stands as a word."""
_MOST_CHARS = 300


def sqlstate(error: DBAPIError) -> str | None:
    """Return the server's five-character code, or None: SQLite, or a connection that was never made."""
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state


def leaves_server(error: DBAPIError) -> bool:
    """Tell whether all connections are to be closed: dead, of a server that is read-only now or ends, or outdated."""
    return error.connection_invalidated or sqlstate(error) in _LEFT_STATES


def misses_prepared(error: DBAPIError) -> bool:
    """Tell whether the server lacks a statement that was prepared, or has another one of its name."""
    return sqlstate(error) in _PREPARED_STATES


def find_setting_fault(error: DBAPIError, url: URL) -> InvalidSettings | None:
    """Return the fault in ``docket_database_url`` for which a connection was refused, or None."""
    if sqlstate(error) is not None or url.get_backend_name() == "sqlite":
        return None
    words = describe(error, url)
    for pattern, advice in _CONNECTING:
        if pattern.search(words):
            return InvalidSettings(SETTING, f"the connection is refused ({words}); {advice}")
    return None


def translate(action: str, error: DBAPIError | PoolTimeout, url: URL) -> DocketError:
    """Return the error of this library for *error*, raised by the driver during *action*.

    A connection that is refused for its settings is `StoreUnavailable` here: a password may be changed while workers
    run, and no job may be lost over it. `find_setting_fault` is what stops a worker at its start.
    """
    if not isinstance(error, DBAPIError):
        return StoreUnavailable(action, "all connections of this process stayed in use")
    state, words = sqlstate(error), describe(error, url)
    if "decode to UTF-8" in str(error.orig):  # SQLite reads text as it is; Postgres checks when it writes
        return CorruptCheckpoint("a docket table", f"read to {action}", "a text is not UTF-8")
    if state is not None:
        if state.startswith(_PASSING_CLASSES) or state in _PASSING_STATES:
            return StoreUnavailable(action, words)
        return refused(action, words, _ADVICE.get(state, "see the server's log"))
    if (fault := find_setting_fault(error, url)) is not None:
        return StoreUnavailable(action, fault.problem)
    if isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated:
        return StoreUnavailable(action, words)
    return refused(action, words, "see the driver's error, chained to this one")


def refused(action: str, words: str, advice: str) -> StoreRefused:
    """Return the error for a refusal that stays."""
    return StoreRefused(f"the database did not {action}", f"{words}; {advice}")


def describe(error: DBAPIError, url: URL) -> str:
    """Return the server's own first words: details could quote the row, libpq could quote the URL."""
    diagnosis = getattr(error.orig, "diag", None)
    words = getattr(diagnosis, "message_primary", None) or str(error.orig)
    text = " ".join(words.split())
    for secret in (url.password, url.query.get("password")):
        if secret:
            text = _mask(text, str(secret))
    shown = text if len(text) <= _MOST_CHARS else text[: _MOST_CHARS - 1] + "…"
    state = sqlstate(error)
    return shown if state is None else f"{shown} (SQLSTATE {state})"


def _mask(text: str, secret: str) -> str:
    """Hide a password in *text*; a short one, which may be a word of it, only where a password is written."""
    before = r"(?<!\w)" if len(secret) >= _SHORTEST_TOKEN else "(?<=[:=\"'])"
    return re.sub(rf"{before}{re.escape(secret)}(?!\w)", "***", text)
