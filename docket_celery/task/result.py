"""The promise of a GraphTask's message."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast, overload

from celery.result import AsyncResult
from google.protobuf.message import Message

from docket_celery.batch.layout import failures_of
from docket_celery.engine.stored_items import PAGE, StoredBatch
from docket_celery.engine.waiting import run_on_pool
from docket_celery.errors import InvalidArguments, InvalidSettings, RunNotFound, StepFailed
from docket_celery.graph import Graph
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.messages import check_size, type_name
from docket_celery.store.contract import BatchStore
from docket_celery.store.records import Progress
from docket_celery.task import app_settings, references

R = TypeVar("R", bound=Message | Sequence[Message] | BatchResult[Any])
M = TypeVar("M", bound=Message)
T = TypeVar("T")
_MOST_ITEMS: Final = 2**62
OnMessage = Callable[[dict[str, Any]], None]


if TYPE_CHECKING:

    class _TypedResult(AsyncResult[R]): ...

else:
    # Celery's class is generic in its stubs only.
    class _TypedResult(AsyncResult, Generic[R]): ...


class GraphResult(_TypedResult[R]):
    """The promise of a GraphTask's message.

    Attributes:
        execution_id: The run's name, where this process submitted the job.
    """

    task: Any = None
    execution_id: str | None = None

    def get(self, *args: Any, **kwargs: Any) -> R:
        """Wait for the message, like `AsyncResult.get`; of a batch for all of them.

        Raises:
            UnknownMessageType, DecodeFailed, PayloadTooLarge, CodecFailed: The stored result cannot be read.
            PayloadUnavailable: It was too large for the result backend, and cannot be had from the store here.
            Exception: Whatever the task failed with.
        """
        settings = app_settings.app_settings(self.app)  # tells the decoder the size limit
        found: Any = super().get(*args, **kwargs)
        message = references.read_value(found, self.app)
        if isinstance(message, Message) and not isinstance(found, references.Stored):
            check_size(f"result {type_name(message)}", message.ByteSize(), settings.max_message_bytes)
        return cast("R", message)

    @overload
    def stream(
        self: GraphResult[list[M]], timeout: float | None = None, on_message: OnMessage | None = None
    ) -> Iterator[M]: ...
    @overload
    def stream(
        self: GraphResult[BatchResult[M]], timeout: float | None = None, on_message: OnMessage | None = None
    ) -> Iterator[M | None]: ...
    def stream(self, timeout: float | None = None, on_message: OnMessage | None = None) -> Iterator[Any]:
        """Wait for a batch, then yield its results one after the other; of a `BatchResult` None for what failed.

        A result that is in the database is read from there page by page, so it may be of any size.

        Args:
            timeout: Most seconds to wait for the end of the batch.
            on_message: Called while it waits with each change of the task's state, as by `get`; where the result
                backend tells of them (Redis).

        Raises:
            InvalidArguments: The task returns one message.
            Exception: As from `get`.
        """
        settings = app_settings.app_settings(self.app)
        told: dict[str, Any] = {} if on_message is None else {"on_message": on_message}
        found: Any = super().get(timeout=timeout, **told)
        if isinstance(found, references.Stored):
            found = run_on_pool(functools.partial(found.find, self.app, settings), settings.threads)
            if isinstance(found, StoredBatch):
                pages = range(0, found.items.total, PAGE)
                read = functools.partial(run_on_pool, threads=settings.threads)
                return (each for lo in pages for each in read(functools.partial(found.page, lo)))
        value = references.read_value(found, self.app)
        results: Any = cast("Any", value).results if isinstance(value, BatchResult) else value
        if not isinstance(results, (list, tuple)):
            problem = "the task returns one message, not the results of a batch; use get"
            raise InvalidArguments("stream", problem)
        return iter(cast("Sequence[Any]", results))

    def failed_items(self, execution_id: str | None = None) -> dict[int, StepFailed]:
        """Return why items of the batch failed, by index, as the database has it: so far, while it runs.

        A result that an aggregate made under ``on_error="collect"`` says nothing of the items it is made without.

        Args:
            execution_id: The name of the run, where this promise was made by ``AsyncResult(task_id)`` and the run is
                not named by its task's id.

        Raises:
            RunNotFound: There is no run of that name (yet), or it was purged.
            InvalidArguments: The promise was pickled.
            InvalidSettings: This process has no ``docket_database_url``.
            StoreUnavailable: The database does not answer; trying again is safe.
        """

        def read(store: BatchStore, graph: str, name: str) -> dict[int, StepFailed]:
            if store.find_run(graph, name) is None:
                raise RunNotFound(graph, name)
            return failures_of(store.find_failed(graph, name, 0, _MOST_ITEMS))

        return self._read_run(read, execution_id)

    def progress(self, execution_id: str | None = None) -> Progress | None:
        """Return how far the open stage of the batch is, as the database has it; of an ended batch its last stage.

        Args:
            execution_id: As for `failed_items`.

        Returns:
            None before a worker has opened the first stage, and once the run was purged.

        Raises:
            InvalidArguments, InvalidSettings, StoreUnavailable: As from `failed_items`.
        """
        row = self._read_run(lambda store, graph, name: store.find_run(graph, name), execution_id)
        return None if row is None else row.progress

    def _read_run(self, read: Callable[[BatchStore, str, str], T], execution_id: str | None) -> T:
        if self.task is None:
            raise InvalidArguments(
                "GraphResult", "a promise that was pickled does not know its task; use task.AsyncResult"
            )
        graph: Graph = self.task.graph
        settings = app_settings.app_settings(self.app)
        store = graph.find_batch_store(self.task.plan(), settings)
        if store is None:
            raise InvalidSettings(
                "docket_database_url", "how a batch stands is read from the database; there is none here"
            )
        name = execution_id or self.execution_id or self.id
        return run_on_pool(lambda: read(store, graph.name, name), settings.threads)
