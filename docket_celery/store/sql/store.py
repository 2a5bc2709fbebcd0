"""`SQLStore`: checkpoints and runs in Postgres or SQLite, through SQLAlchemy Core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from docket_celery.errors import DocketError, SchemaMismatch, StoreUnavailable
from docket_celery.store.codec import Codec
from docket_celery.store.records import (
    Checkpoint,
    Halt,
    Lease,
    Purged,
    RunEnd,
    RunRequest,
    RunRow,
    StepExecution,
)
from docket_celery.store.sealing import Seal
from docket_celery.store.sql import (
    faults,
    postgres,
    postgres_chunks,
    postgres_upkeep,
    postgres_uploads,
    schema,
    sqlite,
    sqlite_chunks,
    sqlite_upkeep,
    sqlite_uploads,
)
from docket_celery.store.sql.batches import BatchCalls
from docket_celery.store.sql.engines import Engines

T = TypeVar("T")


class _Calls(Protocol):
    """What a module of one dialect offers: the calls of `Store` on a given connection."""

    def enqueue(self, connection: Connection, request: RunRequest, keep_s: float) -> RunRow | None: ...
    def acquire(self, connection: Connection, request: RunRequest) -> Lease | RunRow: ...
    def restore(
        self, connection: Connection, lease: Lease, keys: Sequence[bytes], items: bool
    ) -> list[Checkpoint]: ...
    def save(
        self, connection: Connection, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None
    ) -> Checkpoint: ...
    def lookup(
        self, connection: Connection, key: bytes, owner: str, lease_s: float, within_s: float | None
    ) -> Checkpoint | bool: ...
    def publish(
        self,
        connection: Connection,
        checkpoint: Checkpoint,
        owner: str,
        execution: StepExecution | None,
        *,
        asked_s: float | None,
    ) -> Checkpoint: ...
    def forget(self, connection: Connection, key: bytes) -> bool: ...
    def disclaim(self, connection: Connection, key: bytes, owner: str) -> None: ...
    def extend(
        self, connection: Connection, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]]
    ) -> dict[tuple[str | int, ...], Halt | None]: ...
    def end(self, connection: Connection, lease: Lease, ending: RunEnd) -> None: ...
    def find_run(self, connection: Connection, graph: str, execution_id: str) -> RunRow | None: ...
    def purge(self, connection: Connection, limit: int) -> Purged: ...
    def find_job(self, connection: Connection, graph: str, execution_id: str) -> bytes | None: ...
    def migrate(self, connection: Connection) -> int: ...


class SQLStore(BatchCalls):
    """Keeps checkpoints and runs in a database; no connection is held between calls.

    Args:
        source: ``postgresql://`` (also ``postgres://``; the driver is psycopg 3), ``sqlite:///file``,
            ``sqlite://`` (memory), or your own SQLAlchemy engine for psycopg or pysqlite, used as it is. What
            the URL's query sets wins over the library's connection limits; ``?options=`` with an empty value
            sends no start-up options, for poolers that refuse them.
        codec: Encodes jobs, outputs, results and error texts; default: they are stored as they are.

    Raises:
        InvalidSettings: The URL cannot be used.
        InvalidArguments: The engine or the codec cannot be used.
    """

    def __init__(self, source: str | URL | Engine, *, codec: Codec | None = None) -> None:
        self._seal = Seal(codec)
        self._engines = Engines(source)
        is_postgres = self._engines.dialect == "postgresql"
        self._calls: _Calls = postgres if is_postgres else sqlite
        self._batches = postgres_chunks if is_postgres else sqlite_chunks
        self._uploads = postgres_uploads if is_postgres else sqlite_uploads
        self._upkeep = postgres_upkeep if is_postgres else sqlite_upkeep
        self.persistent = not self._engines.in_memory
        self._twins: list[SQLStore] = []

    def __repr__(self) -> str:
        url = self._engines.url
        where = URL.create(url.drivername, host=url.host, port=url.port, database=url.database)
        return f"SQLStore({where.render_as_string()!r})"

    @property
    def codec(self) -> Codec | None:
        """See `Store.codec`."""
        return self._seal.codec

    def keyed(self, digest: bytes) -> bytes:
        """See `Store.keyed`."""
        return self._seal.keyed(digest)

    @property
    def engine(self) -> Engine:
        """This process's engine; a forked child gets another one."""
        return self._engines.current()

    def enqueue(self, request: RunRequest, keep_s: float) -> RunRow | None:
        """See `Store.enqueue`."""
        closed = self._seal.close_request(request)
        found = self._call(
            "queue the run", lambda connection: self._calls.enqueue(connection, closed, keep_s)
        )
        return None if found is None else self._seal.open_run(found)

    def acquire(self, request: RunRequest) -> Lease | RunRow:
        """See `Store.acquire`."""
        closed = self._seal.close_request(request)
        found = self._call("acquire the run", lambda connection: self._calls.acquire(connection, closed))
        return found if isinstance(found, Lease) else self._seal.open_run(found)

    def restore(self, lease: Lease, keys: Sequence[bytes], *, items: bool = False) -> list[Checkpoint]:
        """See `Store.restore`."""
        found = self._call(
            "restore the run", lambda connection: self._calls.restore(connection, lease, keys, items)
        )
        return [self._seal.open_checkpoint(checkpoint) for checkpoint in found]

    def save(self, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None) -> Checkpoint:
        """See `Store.save`."""
        closed, row = self._seal.close_checkpoint(checkpoint), self._seal.close_execution(execution)
        found = self._call(
            "save the checkpoint", lambda connection: self._calls.save(connection, lease, closed, row)
        )
        return self._seal.open_saved(found, closed, checkpoint)

    def lookup(
        self, key: bytes, owner: str, lease_s: float, within_s: float | None = None
    ) -> Checkpoint | bool:
        """See `Store.lookup`."""
        found = self._call(
            "look the checkpoint up",
            lambda connection: self._calls.lookup(connection, key, owner, lease_s, within_s),
        )
        return found if isinstance(found, bool) else self._seal.open_checkpoint(found)

    def publish(
        self,
        checkpoint: Checkpoint,
        owner: str,
        execution: StepExecution | None,
        *,
        asked_s: float | None = None,
    ) -> Checkpoint:
        """See `Store.publish`."""
        closed, row = self._seal.close_checkpoint(checkpoint), self._seal.close_execution(execution)
        found = self._call(
            "publish the checkpoint",
            lambda connection: self._calls.publish(connection, closed, owner, row, asked_s=asked_s),
        )
        return self._seal.open_saved(found, closed, checkpoint)

    def forget(self, key: bytes) -> bool:
        """See `Store.forget`; True may come back as False where an answer was lost and the call repeated."""
        return self._call("forget the checkpoint", lambda connection: self._calls.forget(connection, key))

    def disclaim(self, key: bytes, owner: str) -> None:
        """See `Store.disclaim`."""
        self._call("drop the claim", lambda connection: self._calls.disclaim(connection, key, owner))

    def extend(
        self, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]] = ()
    ) -> dict[tuple[str | int, ...], Halt | None]:
        """See `Store.extend`."""
        return self._call(
            "extend the leases", lambda connection: self._calls.extend(connection, leases, claims)
        )

    def end(self, lease: Lease, end: RunEnd) -> None:
        """See `Store.end`."""
        closed = self._seal.close_end(lease, end)
        self._call("end the run", lambda connection: self._calls.end(connection, lease, closed))

    def find_run(self, graph: str, execution_id: str) -> RunRow | None:
        """See `Store.find_run`."""
        found = self._call(
            "find the run", lambda connection: self._calls.find_run(connection, graph, execution_id)
        )
        return None if found is None else self._seal.open_run(found)

    def find_job(self, graph: str, execution_id: str) -> bytes | None:
        """See `Store.find_job`."""
        job = self._call(
            "find the job", lambda connection: self._calls.find_job(connection, graph, execution_id)
        )
        return None if job is None else self._seal.open_job(graph, execution_id, job)

    def purge(self, limit: int) -> Purged:
        """See `Store.purge`."""
        return self._call("purge its tables", lambda connection: self._calls.purge(connection, limit))

    def migrate(self) -> int:
        """See `Store.migrate`."""
        return self._call("migrate its tables", self._calls.migrate)

    def check_schema(self) -> None:
        """See `Store.check_schema`."""
        try:
            self._call("say which tables it has", schema.check)
        except StoreUnavailable as error:
            cause = error.__cause__
            if isinstance(cause, DBAPIError):
                fault = faults.find_setting_fault(cause, self._engines.url)
                if fault is not None:
                    raise fault from cause
            raise

    def twin(self) -> SQLStore:
        """See `Store.twin`; closed with this store."""
        if self._engines.shared:
            return self
        twin = SQLStore(self._engines.url, codec=self.codec)
        self._twins.append(twin)
        return twin

    def close(self) -> None:
        """Close this process's connections. The store stays usable; a user's own engine is left alone."""
        for twin in self._twins:
            twin.close()
        self._engines.dispose()

    def _call(self, action: str, work: Callable[[Connection], T]) -> T:
        """Do *work* with a connection, once more at once if its connection was found dead.

        A server that restarted leaves dead connections in the pool; SQLAlchemy drops them all on the first
        error. Whether that error came before or after a commit is unknown, so every call must bear repeating.
        """
        try:
            try:
                return self._once(work)
            except DBAPIError as error:
                if not (error.connection_invalidated or faults.leaves_server(error)):
                    raise
                return self._once(work)
        except (DBAPIError, PoolTimeout) as error:
            raise self._find_mismatch(action, error) or faults.translate(
                action, error, self._engines.url
            ) from error

    def _once(self, work: Callable[[Connection], T]) -> T:
        engine = self._engines.current()
        with self._engines.turn(), engine.connect() as connection:
            try:
                return work(connection)
            except DBAPIError as error:
                if faults.leaves_server(error):
                    # The address may lead to another server by now; what is pooled stays with this one.
                    connection.invalidate(error)
                    engine.dispose()
                raise

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
        words = faults.describe(error, self._engines.url)
        return faults.refused(
            action, words, "restore what is missing; the version of the tables is the right one"
        )
