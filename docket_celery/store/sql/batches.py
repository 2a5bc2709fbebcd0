"""What `SQLStore` offers for batches over several workers, on either database."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection

from docket_celery.errors import CodecFailed
from docket_celery.store.records import (
    Checkpoint,
    Chunk,
    ChunkEnd,
    ChunkRefusal,
    ChunkRequest,
    ChunkRow,
    Lanes,
    Lease,
    LostRun,
    Progress,
    RunRequest,
    RunRow,
    StepExecution,
)
from docket_celery.store.sealing import Seal

_logger = logging.getLogger("docket_celery.store")
T = TypeVar("T")


class BatchModule(Protocol):
    """What a module of one dialect offers: the calls of `BatchStore` on a given connection."""

    def save_many(self, connection: Connection, lease: Lease, checkpoints: Sequence[Checkpoint]) -> None: ...
    def read_items(
        self,
        connection: Connection,
        graph: str,
        execution_id: str,
        names: Sequence[str],
        lo: int,
        hi: int,
        keys: Sequence[bytes],
        job_digest: bytes | None,
    ) -> list[Checkpoint]: ...
    def measure_items(
        self, connection: Connection, graph: str, execution_id: str, name: str
    ) -> tuple[int, int]: ...
    def find_names(self, connection: Connection, graph: str, execution_id: str) -> set[str]: ...
    def open_stage(
        self,
        connection: Connection,
        lease: Lease,
        stage: int,
        chunks: Sequence[Chunk],
        allowed: int,
        executions: Sequence[StepExecution],
        progress: Progress | None,
        lanes: Lanes | None,
        message: bytes | None,
    ) -> Lanes | None: ...
    def find_chunks(self, connection: Connection, graph: str, execution_id: str) -> list[ChunkRow]: ...
    def find_failed(
        self, connection: Connection, graph: str, execution_id: str, lo: int, hi: int
    ) -> list[ChunkRow]: ...
    def lease_chunk(self, connection: Connection, request: ChunkRequest) -> Lease | ChunkRefusal: ...
    def end_chunk(self, connection: Connection, lease: Lease, ending: ChunkEnd) -> Progress | None: ...


class UploadModule(Protocol):
    """The calls about items on their way into the store, for one dialect."""

    def begin_upload(self, connection: Connection, request: RunRequest, keep_s: float) -> Lease | RunRow: ...
    def put_items(self, connection: Connection, lease: Lease, items: Sequence[Checkpoint]) -> None: ...
    def close_items(
        self, connection: Connection, lease: Lease, name: str, count: int, rows: Sequence[Checkpoint]
    ) -> None: ...
    def finish_upload(self, connection: Connection, lease: Lease, digest: bytes, keep_s: float) -> None: ...


class UpkeepModule(Protocol):
    """What others than its holder do to a run, for one dialect."""

    def cancel(
        self,
        connection: Connection,
        graph: str,
        execution_id: str,
        error: dict[str, Any],
        retention_s: float,
    ) -> RunRow | None: ...
    def find_lost(
        self,
        connection: Connection,
        task_names: Sequence[str],
        lease_s: float,
        max_deliveries: int,
        limit: int,
    ) -> list[LostRun]: ...


class BatchCalls:
    """The calls of `BatchStore`; `SQLStore` has the connections."""

    _batches: BatchModule
    _uploads: UploadModule
    _upkeep: UpkeepModule
    _seal: Seal

    def _call(self, action: str, work: Callable[[Connection], T]) -> T:
        raise NotImplementedError

    def save_many(self, lease: Lease, checkpoints: Sequence[Checkpoint]) -> None:
        """See `BatchStore.save_many`."""
        closed = [self._seal.close_checkpoint(checkpoint) for checkpoint in checkpoints]
        self._call("save the items", lambda connection: self._batches.save_many(connection, lease, closed))

    def begin_upload(self, request: RunRequest, keep_s: float) -> Lease | RunRow:
        """See `BatchStore.begin_upload`."""
        closed = self._seal.close_request(request)
        found = self._call(
            "reserve the run", lambda connection: self._uploads.begin_upload(connection, closed, keep_s)
        )
        return found if isinstance(found, Lease) else self._seal.open_run(found)

    def put_items(self, lease: Lease, items: Sequence[Checkpoint]) -> None:
        """See `BatchStore.put_items`."""
        closed = [self._seal.close_checkpoint(item) for item in items]
        self._call("store the items", lambda connection: self._uploads.put_items(connection, lease, closed))

    def close_items(self, lease: Lease, name: str, count: int, rows: Sequence[Checkpoint]) -> None:
        """See `BatchStore.close_items`."""
        closed = [self._seal.close_checkpoint(row) for row in rows]
        self._call(
            "count the items",
            lambda connection: self._uploads.close_items(connection, lease, name, count, closed),
        )

    def finish_upload(self, lease: Lease, digest: bytes, keep_s: float) -> None:
        """See `BatchStore.finish_upload`."""
        self._call(
            "queue the run",
            lambda connection: self._uploads.finish_upload(connection, lease, digest, keep_s),
        )

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
        found = self._call(
            "read the items",
            lambda connection: self._batches.read_items(
                connection, graph, execution_id, names, lo, hi, keys, job_digest
            ),
        )
        return [self._seal.open_checkpoint(checkpoint) for checkpoint in found]

    def measure_items(self, graph: str, execution_id: str, name: str) -> tuple[int, int]:
        """See `BatchStore.measure_items`."""
        return self._call(
            "measure the items",
            lambda connection: self._batches.measure_items(connection, graph, execution_id, name),
        )

    def find_names(self, graph: str, execution_id: str) -> set[str]:
        """See `BatchStore.find_names`."""
        return self._call(
            "find what is stored",
            lambda connection: self._batches.find_names(connection, graph, execution_id),
        )

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
        rows = [one for row in executions if (one := self._seal.close_execution(row)) is not None]
        sealed = (
            None if message is None else self._seal.close_message(lease.graph, lease.execution_id, message)
        )
        return self._call(
            "open the stage",
            lambda connection: self._batches.open_stage(
                connection, lease, stage, chunks, allowed, rows, progress, lanes, sealed
            ),
        )

    def find_chunks(self, graph: str, execution_id: str) -> list[ChunkRow]:
        """See `BatchStore.find_chunks`."""
        found = self._call(
            "find the chunks", lambda connection: self._batches.find_chunks(connection, graph, execution_id)
        )
        return [self._seal.open_chunk(graph, execution_id, row) for row in found]

    def find_failed(self, graph: str, execution_id: str, lo: int, hi: int) -> list[ChunkRow]:
        """See `BatchStore.find_failed`."""
        found = self._call(
            "find the failed chunks",
            lambda connection: self._batches.find_failed(connection, graph, execution_id, lo, hi),
        )
        return [self._seal.open_chunk(graph, execution_id, row) for row in found]

    def lease_chunk(self, request: ChunkRequest) -> Lease | ChunkRefusal:
        """See `BatchStore.lease_chunk`."""
        return self._call("take the chunk", lambda connection: self._batches.lease_chunk(connection, request))

    def end_chunk(self, lease: Lease, end: ChunkEnd) -> Progress | None:
        """See `BatchStore.end_chunk`."""
        closed = self._seal.close_chunk(lease, end)
        return self._call(
            "end the chunk", lambda connection: self._batches.end_chunk(connection, lease, closed)
        )

    def cancel(
        self, graph: str, execution_id: str, error: dict[str, Any], retention_s: float
    ) -> RunRow | None:
        """See `Store.cancel`."""
        closed = self._seal.close_error(graph, execution_id, error)
        found = self._call(
            "cancel the run",
            lambda connection: self._upkeep.cancel(connection, graph, execution_id, closed, retention_s),
        )
        return None if found is None else self._seal.open_run(found)

    def find_lost(
        self, task_names: Sequence[str], lease_s: float, max_deliveries: int, limit: int
    ) -> list[LostRun]:
        """See `BatchStore.find_lost`; a run whose message cannot be decoded here is left to others."""
        found = self._call(
            "look for lost runs",
            lambda connection: self._upkeep.find_lost(connection, task_names, lease_s, max_deliveries, limit),
        )
        lost: list[LostRun] = []
        for one in found:
            try:
                message = self._seal.open_message(one.graph, one.execution_id, one.message)
            except CodecFailed as error:
                _logger.warning("a lost run cannot be revived here: %s", error)
            else:
                lost.append(replace(one, message=message))
        return lost
