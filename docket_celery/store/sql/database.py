"""`Database`: runs a call on a connection, repeats it once on a dead one, and turns driver errors into ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from docket_celery.errors import DocketError, SchemaMismatch, StoreUnavailable
from docket_celery.store.sql import faults, schema
from docket_celery.store.sql.clock import roll_back
from docket_celery.store.sql.engines import Engines

_logger = logging.getLogger("docket_celery.store")
_UNPREPARED = (
    "a statement that was prepared is not there: %s; a pooler seems to share connections in between, so this process "
    "prepares no more statements, and each takes the database longer; set ?prepare_threshold=none in "
    "docket_database_url if that is so, or have the pooler keep prepared statements (PgBouncer: "
    "max_prepared_statements)"
)
P = ParamSpec("P")
T = TypeVar("T")


class Database(Engines):
    """The engines of a store and how its calls run on them; no connection is held between calls."""

    def run(
        self, action: str, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call *work* with a connection and the arguments, once more at once if its connection was dead.

        A server that restarted leaves dead connections in the pool; SQLAlchemy drops them all on the first
        error. Whether that error came before or after a commit is unknown, so every call must bear repeating.
        So is one whose prepared statement a pooler has mislaid; this process prepares none from then on.
        Errors name the *action* that the database is asked for: "save the checkpoint".
        """
        try:
            try:
                return self._once(work, *args, **kwargs)
            except DBAPIError as error:
                if faults.misses_prepared(error):
                    self._prepare_no_more(error)
                elif not faults.leaves_server(error):
                    raise
                return self._once(work, *args, **kwargs)
        except (DBAPIError, PoolTimeout) as error:
            raise self._find_mismatch(action, error) or faults.translate(action, error, self.url) from error

    def check_schema(self) -> None:
        """See `Store.check_schema`."""
        try:
            self.run("say which tables it has", schema.check)
        except StoreUnavailable as error:
            cause = error.__cause__
            if isinstance(cause, DBAPIError):
                fault = faults.find_setting_fault(cause, self.url)
                if fault is not None:
                    raise fault from cause
            raise

    def _once(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        engine = self.current()
        with self.lock, engine.connect() as connection:
            try:
                return work(connection, *args, **kwargs)
            except BaseException as error:
                roll_back(connection)
                if isinstance(error, DBAPIError) and faults.leaves_server(error):
                    # The address may lead to another server by now; what is pooled stays with this one.
                    connection.invalidate(error)
                    engine.dispose()
                raise

    def _prepare_no_more(self, error: DBAPIError) -> None:
        if self.preparing.asked is not False:
            self.preparing.asked = False
            _logger.warning(_UNPREPARED, faults.describe(error, self.url))

    def _find_mismatch(self, action: str, error: DBAPIError | PoolTimeout) -> DocketError | None:
        """Return the error for a table or a column that is missing; None: nothing is."""
        if not (isinstance(error, DBAPIError) and schema.misses_something(error)):
            return None
        try:
            found = self._once(schema.find_version)
        except (DBAPIError, PoolTimeout):
            return StoreUnavailable(action, "something is missing, and it did not say which tables it has")
        if found != schema.VERSION:
            return SchemaMismatch(found, schema.VERSION)
        words = faults.describe(error, self.url)
        return faults.refused(
            action, words, "restore what is missing; the version of the tables is the right one"
        )
