"""What `SQLStore` offers for batches over several workers, on either database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from sqlalchemy import Connection

from docket_celery.checkpoint import Checkpoint, Chunk, Lease, StepExecution
from docket_celery.chunks import ChunkEnd, ChunkRefusal, ChunkRequest, ChunkRow
from docket_celery.store.sealing import Seal

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
    ) -> list[Checkpoint]: ...
    def measure_items(
        self, connection: Connection, graph: str, execution_id: str, name: str
    ) -> tuple[int, int]: ...
    def open_stage(
        self,
        connection: Connection,
        lease: Lease,
        stage: int,
        chunks: Sequence[Chunk],
        allowed: int,
        executions: Sequence[StepExecution],
    ) -> None: ...
    def find_chunks(self, connection: Connection, graph: str, execution_id: str) -> list[ChunkRow]: ...
    def lease_chunk(self, connection: Connection, request: ChunkRequest) -> Lease | ChunkRefusal: ...
    def end_chunk(self, connection: Connection, lease: Lease, ending: ChunkEnd) -> None: ...


class BatchCalls:
    """The calls of `BatchStore`; `SQLStore` has the connections."""

    _batches: BatchModule
    _seal: Seal

    def _call(self, action: str, work: Callable[[Connection], T]) -> T:
        raise NotImplementedError

    def save_many(self, lease: Lease, checkpoints: Sequence[Checkpoint]) -> None:
        """See `BatchStore.save_many`."""
        closed = [self._seal.close_checkpoint(checkpoint) for checkpoint in checkpoints]
        self._call("save the items", lambda connection: self._batches.save_many(connection, lease, closed))

    def read_items(
        self,
        graph: str,
        execution_id: str,
        names: Sequence[str],
        lo: int,
        hi: int,
        keys: Sequence[bytes] = (),
    ) -> list[Checkpoint]:
        """See `BatchStore.read_items`."""
        found = self._call(
            "read the items",
            lambda connection: self._batches.read_items(connection, graph, execution_id, names, lo, hi, keys),
        )
        return [self._seal.open_checkpoint(checkpoint) for checkpoint in found]

    def measure_items(self, graph: str, execution_id: str, name: str) -> tuple[int, int]:
        """See `BatchStore.measure_items`."""
        return self._call(
            "measure the items",
            lambda connection: self._batches.measure_items(connection, graph, execution_id, name),
        )

    def open_stage(
        self,
        lease: Lease,
        stage: int,
        chunks: Sequence[Chunk],
        allowed: int,
        executions: Sequence[StepExecution] = (),
    ) -> None:
        """See `BatchStore.open_stage`."""
        rows = [one for row in executions if (one := self._seal.close_execution(row)) is not None]
        self._call(
            "open the stage",
            lambda connection: self._batches.open_stage(connection, lease, stage, chunks, allowed, rows),
        )

    def find_chunks(self, graph: str, execution_id: str) -> list[ChunkRow]:
        """See `BatchStore.find_chunks`."""
        found = self._call(
            "find the chunks", lambda connection: self._batches.find_chunks(connection, graph, execution_id)
        )
        return [self._seal.open_chunk(graph, execution_id, row) for row in found]

    def lease_chunk(self, request: ChunkRequest) -> Lease | ChunkRefusal:
        """See `BatchStore.lease_chunk`."""
        return self._call("take the chunk", lambda connection: self._batches.lease_chunk(connection, request))

    def end_chunk(self, lease: Lease, end: ChunkEnd) -> None:
        """See `BatchStore.end_chunk`."""
        closed = self._seal.close_chunk(lease, end)
        self._call("end the chunk", lambda connection: self._batches.end_chunk(connection, lease, closed))
