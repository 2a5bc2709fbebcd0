"""`SQLStore`: checkpoints and runs in Postgres or SQLite, through SQLAlchemy Core."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import URL, Engine

from docket_celery.errors import CodecFailed
from docket_celery.store.codec import Codec
from docket_celery.store.records import (
    Checkpoint,
    Chunk,
    ChunkEnd,
    ChunkRefusal,
    ChunkRequest,
    ChunkRow,
    Halt,
    Lanes,
    Lease,
    LostRun,
    Progress,
    Purged,
    RunEnd,
    RunRequest,
    RunRow,
    StepExecution,
)
from docket_celery.store.sealing import ERROR, JOB, MESSAGE, Seal
from docket_celery.store.sql import checkpoints, heartbeat, purging, runs, schema, upkeep, uploads
from docket_celery.store.sql import chunks as stages
from docket_celery.store.sql.database import Database

_logger = logging.getLogger("docket_celery.store")


class SQLStore:
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
        self._database = Database(source)
        self._run = self._database.run
        self.persistent = not self._database.in_memory
        self._clones: list[SQLStore] = []

    def __repr__(self) -> str:
        url = self._database.url
        where = URL.create(url.drivername, host=url.host, port=url.port, database=url.database)
        return f"SQLStore({where.render_as_string()!r})"

    @property
    def codec(self) -> Codec | None:
        """See `Store.codec`."""
        return self._seal.codec

    def hmac_digest(self, digest: bytes) -> bytes:
        """See `Store.hmac_digest`."""
        return self._seal.hmac_digest(digest)

    @property
    def engine(self) -> Engine:
        """This process's engine; a forked child gets another one."""
        return self._database.current()

    # --- runs ------------------------------------------------------------------------------------------------------

    def enqueue(self, request: RunRequest, keep_s: float) -> RunRow | None:
        """See `Store.enqueue`."""
        found = self._run("queue the run", runs.enqueue, self._seal.seal(request), keep_s)
        return self._seal.unseal(found)

    def acquire(self, request: RunRequest) -> Lease | RunRow:
        """See `Store.acquire`."""
        found = self._run("acquire the run", runs.acquire, self._seal.seal(request))
        return found if isinstance(found, Lease) else self._seal.unseal(found)

    def acquire_and_restore(
        self, request: RunRequest, keys: Callable[[], Sequence[bytes]], *, items: bool = False
    ) -> tuple[Lease, Callable[[], list[Checkpoint]]] | RunRow:
        """See `Store.acquire_and_restore`."""
        sealed = self._seal.seal(request)
        found = self._run("acquire the run", runs.acquire_and_restore, sealed, keys, items)
        if not isinstance(found, tuple):
            return self._seal.unseal(found)
        lease, restored = found

        def read() -> list[Checkpoint]:
            if restored is None:
                return []
            read = self._run("restore the run", checkpoints.read_restored, lease, keys(), restored)
            return [self._seal.unseal(checkpoint) for checkpoint in read]

        return lease, read

    def restore(self, lease: Lease, keys: Sequence[bytes], *, items: bool = False) -> list[Checkpoint]:
        """See `Store.restore`."""
        found = self._run("restore the run", checkpoints.restore, lease, keys, items)
        return [self._seal.unseal(checkpoint) for checkpoint in found]

    def save(self, lease: Lease, checkpoint: Checkpoint, execution: StepExecution | None) -> Checkpoint:
        """See `Store.save`."""
        sealed, row = self._seal.seal(checkpoint), self._seal.seal(execution)
        found = self._run("save the checkpoint", checkpoints.save, lease, sealed, row)
        return checkpoint if found is None else self._seal.unseal(found)

    def extend(
        self, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]] = ()
    ) -> dict[tuple[str | int, ...], Halt | None]:
        """See `Store.extend`."""
        return self._run("extend the leases", heartbeat.extend, leases, claims)

    def end(self, lease: Lease, end: RunEnd) -> None:
        """See `Store.end`."""
        sealed = self._seal.seal(end, graph=lease.graph, execution_id=lease.execution_id, target=lease.target)
        self._run("end the run", runs.end, lease, sealed)

    def cancel(
        self, graph: str, execution_id: str, error: dict[str, Any], retention_s: float
    ) -> RunRow | None:
        """See `Store.cancel`."""
        sealed = self._seal.seal_value(error, ERROR, graph=graph, execution_id=execution_id)
        found = self._run("cancel the run", upkeep.cancel, graph, execution_id, sealed, retention_s)
        return self._seal.unseal(found)

    def find_run(self, graph: str, execution_id: str) -> RunRow | None:
        """See `Store.find_run`."""
        found = self._run("find the run", runs.find_run, graph, execution_id)
        return self._seal.unseal(found)

    def find_job(self, graph: str, execution_id: str) -> bytes | None:
        """See `Store.find_job`."""
        job = self._run("find the job", runs.find_job, graph, execution_id)
        return self._seal.unseal_value(job, JOB, graph=graph, execution_id=execution_id)

    # --- shared checkpoints ----------------------------------------------------------------------------------------

    def lookup(
        self, key: bytes, owner: str, lease_s: float, hit: StepExecution | None = None
    ) -> Checkpoint | bool:
        """See `Store.lookup`."""
        row = self._seal.seal(hit)
        found = self._run("look the checkpoint up", checkpoints.lookup, key, owner, lease_s, row)
        return found if isinstance(found, bool) else self._seal.unseal(found)

    def publish(
        self, checkpoint: Checkpoint, owner: str, execution: StepExecution | None, *, replace: bool = False
    ) -> Checkpoint:
        """See `Store.publish`."""
        sealed, row = self._seal.seal(checkpoint), self._seal.seal(execution)
        found = self._run("publish the checkpoint", checkpoints.publish, sealed, owner, row, replace=replace)
        return checkpoint if found is None else self._seal.unseal(found)

    def forget(self, key: bytes) -> bool:
        """See `Store.forget`; True may come back as False where an answer was lost and the call repeated."""
        return self._run("forget the checkpoint", checkpoints.forget, key)

    def release_claim(self, key: bytes, owner: str) -> None:
        """See `Store.release_claim`."""
        self._run("drop the claim", checkpoints.release_claim, key, owner)

    # --- items -----------------------------------------------------------------------------------------------------

    def save_many(self, lease: Lease, checkpoints: Sequence[Checkpoint]) -> None:
        """See `BatchStore.save_many`."""
        self._run("save the items", stages.save_many, lease, self._seal.seal_all(checkpoints))

    def begin_upload(self, request: RunRequest, keep_s: float) -> Lease | RunRow:
        """See `BatchStore.begin_upload`."""
        found = self._run("reserve the run", uploads.begin_upload, self._seal.seal(request), keep_s)
        return found if isinstance(found, Lease) else self._seal.unseal(found)

    def put_items(self, lease: Lease, items: Sequence[Checkpoint]) -> None:
        """See `BatchStore.put_items`."""
        self._run("store the items", uploads.put_items, lease, self._seal.seal_all(items))

    def close_items(self, lease: Lease, name: str, count: int, rows: Sequence[Checkpoint]) -> None:
        """See `BatchStore.close_items`."""
        self._run("count the items", uploads.close_items, lease, name, count, self._seal.seal_all(rows))

    def finish_upload(self, lease: Lease, digest: bytes, keep_s: float) -> None:
        """See `BatchStore.finish_upload`."""
        self._run("queue the run", uploads.finish_upload, lease, digest, keep_s)

    def read_items(
        self,
        graph: str,
        execution_id: str,
        names: Sequence[str],
        lo: int,
        hi: int,
        keys: Sequence[bytes] = (),
        *,
        job_digest: bytes | None = None,
    ) -> list[Checkpoint]:
        """See `BatchStore.read_items`."""
        found = self._run(
            "read the items", stages.read_items, graph, execution_id, names, lo, hi, keys, job_digest
        )
        return [self._seal.unseal(checkpoint) for checkpoint in found]

    def find_names(self, graph: str, execution_id: str) -> set[str]:
        """See `BatchStore.find_names`."""
        return self._run("find what is stored", stages.find_names, graph, execution_id)

    # --- stages and chunks -----------------------------------------------------------------------------------------

    def open_stage(
        self,
        lease: Lease,
        stage: int,
        chunks: Sequence[Chunk],
        allowed: int,
        executions: Sequence[StepExecution] = (),
        *,
        progress: Progress | None = None,
        lanes: Lanes | None = None,
        message: bytes | None = None,
    ) -> Lanes | None:
        """See `BatchStore.open_stage`."""
        return self._run(
            "open the stage",
            stages.open_stage,
            lease,
            stage,
            chunks,
            allowed,
            self._seal.seal_all(executions),
            progress,
            lanes,
            self._seal.seal_value(message, MESSAGE, lease),
        )

    def find_chunks(self, graph: str, execution_id: str) -> list[ChunkRow]:
        """See `BatchStore.find_chunks`."""
        found = self._run("find the chunks", stages.find_chunks, graph, execution_id)
        return [self._seal.unseal(row, graph=graph, execution_id=execution_id) for row in found]

    def find_failed(self, graph: str, execution_id: str, lo: int, hi: int) -> list[ChunkRow]:
        """See `BatchStore.find_failed`."""
        found = self._run("find the failed chunks", stages.find_failed, graph, execution_id, lo, hi)
        return [self._seal.unseal(row, graph=graph, execution_id=execution_id) for row in found]

    def lease_chunk(self, request: ChunkRequest) -> Lease | ChunkRefusal:
        """See `BatchStore.lease_chunk`."""
        return self._run("take the chunk", stages.lease_chunk, request)

    def end_chunk(self, lease: Lease, end: ChunkEnd) -> Progress | None:
        """See `BatchStore.end_chunk`."""
        sealed = self._seal.seal(end, graph=lease.graph, execution_id=lease.execution_id, chunk=lease.chunk)
        return self._run("end the chunk", stages.end_chunk, lease, sealed)

    # --- upkeep ----------------------------------------------------------------------------------------------------

    def find_lost(
        self, task_names: Sequence[str], lease_s: float, max_deliveries: int, limit: int
    ) -> list[LostRun]:
        """See `BatchStore.find_lost`; a run whose message cannot be decoded here is left to others."""
        lost: list[LostRun] = []
        for one in self._run(
            "look for lost runs", upkeep.find_lost, task_names, lease_s, max_deliveries, limit
        ):
            try:
                lost.append(self._seal.unseal(one))
            except CodecFailed as error:
                _logger.warning("a lost run cannot be revived here: %s", error)
        return lost

    def purge(self, limit: int) -> Purged:
        """See `Store.purge`."""
        return self._run("purge its tables", purging.purge, limit)

    def migrate(self) -> int:
        """See `Store.migrate`."""
        return self._run("migrate its tables", schema.migrate)

    def check_schema(self) -> None:
        """See `Store.check_schema`. A worker calls this before it forks: its children have what is compiled here."""
        self._database.check_schema()
        if self._database.url.get_backend_name() == "postgresql":
            for statement in (*runs.usual_statements(), *checkpoints.usual_statements()):
                statement.compile()

    def clone(self) -> SQLStore:
        """See `Store.clone`; closed with this store."""
        if self._database.shared:
            return self
        clone = SQLStore(self._database.url, codec=self.codec)
        clone._database.preparing = self._database.preparing
        self._clones.append(clone)
        return clone

    def close(self) -> None:
        """Close this process's connections. The store stays usable; a user's own engine is left alone."""
        for clone in self._clones:
            clone.close()
        self._database.dispose()
