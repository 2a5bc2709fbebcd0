"""The promise of a GraphTask's message, and the reference that stands for one too large for the result backend."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast, overload

from celery import Celery, _state
from celery.result import AsyncResult
from google.protobuf.message import Message
from kombu.utils.json import register_type

from docket_celery.batch.layout import failures_of
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.waiting import run_on_pool
from docket_celery.errors import (
    DecodeFailed,
    InvalidArguments,
    InvalidSettings,
    PayloadUnavailable,
    RunNotFound,
    StepFailed,
)
from docket_celery.graph import Graph
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.messages import brief, check_size, from_bytes, to_bytes, type_name
from docket_celery.store.records import RunState
from docket_celery.task import app_settings, envelope
from docket_celery.task.batch_values import read_batch, stream_batch

R = TypeVar("R", bound=Message | Sequence[Message] | BatchResult[Any])
M = TypeVar("M", bound=Message)
RESULT_MARKER: Final = "docket.result"
_MOST_CHARS: Final = 500
_MOST_ITEMS: Final = 2**62
STORED_BYTES: Final = "docket_max_stored_bytes"
GONE: Final = "its row is gone: purged after docket_retention, or deleted; submit the job again"
OTHER: Final = "its row holds another result than the one referred to; submit the job again and wait for it"
NO_DATABASE: Final = (
    "this process has no database; set docket_database_url here (and docket_codec, if the workers have one)"
)
OnMessage = Callable[[dict[str, Any]], None]
Arguments = tuple[Sequence[Any], Mapping[str, Any]]


class StoredResult(envelope.Stored):
    """A GraphTask's result that is too large for the result backend; it lies in the row of the run.

    `GraphResult.get` and GraphTasks that get one as an argument read the message by themselves. An ordinary task in a
    chain or a chord's body calls `read`.

    Attributes:
        task: Name of the task that made it.
        graph, execution_id: Name of the run.
        type_name: Full Protocol Buffers name of the message.
        size_bytes: Its size.
    """

    def __init__(self, fields: Mapping[str, Any], message: Message | None = None) -> None:
        self.task, self.graph = str(fields["task"]), str(fields["graph"])
        self.execution_id, self.type_name = str(fields["execution_id"]), str(fields["type"])
        self.size_bytes, self._sha256 = int(fields["bytes"]), str(fields["sha256"])
        self._message = message

    @classmethod
    def of(
        cls, message: Message, task: str, graph: str, execution_id: str, data: bytes | None = None
    ) -> StoredResult:
        """Return the reference to the result *message* of a run, whose row has it as *data*, or as encoded here."""
        data = to_bytes(message) if data is None else data
        fields = {"task": task, "graph": graph, "execution_id": execution_id, "type": type_name(message)}
        return cls({**fields, "bytes": len(data), "sha256": _sha256(data)}, message)

    def __json__(self) -> dict[str, Any]:
        return {"__type__": RESULT_MARKER, "__value__": self._fields()}

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the message, in whatever form it travels.
        return StoredResult, (self._fields(),)

    def __repr__(self) -> str:
        if self._message is not None:
            return brief(self._message)
        return f"<StoredResult {self.type_name} of run {self.execution_id!r}, {self.size_bytes} bytes>"

    def read(self, app: Celery | None = None) -> Message:
        """Return the message.

        Args:
            app: Whose settings and tasks say where it lies; default: Celery's current app.

        Raises:
            PayloadUnavailable: This process has no database, or the row is gone or holds something else now.
            StoreUnavailable: The database does not answer; trying again is safe.
            UnknownMessageType, DecodeFailed, CodecFailed, PayloadTooLarge: The stored bytes cannot be read here.
        """
        if self._message is None:
            # Not the proxy that stands for it: limits are kept by app.
            app = _state.get_current_app() if app is None else app
            settings = app_settings.app_settings(app)
            self._message = run_on_pool(lambda: self._read(app, settings), settings.threads)
        return self._message

    def _read(self, app: Celery, settings: Settings) -> Message:
        what = f"the result of run {self.execution_id!r} of graph {self.graph!r}"
        kind = envelope.types.find(self.type_name)
        check_size(what, self.size_bytes, settings.max_stored_bytes, STORED_BYTES)
        graph: object = getattr(app.tasks.get(self.task), "graph", None)
        if isinstance(graph, Graph) and graph.name == self.graph:
            store = graph.choose_store(settings)
        else:
            store = process.store(settings.database_url, settings.codec)
        if store is None:
            raise PayloadUnavailable(what, NO_DATABASE)
        row = store.find_run(self.graph, self.execution_id)
        if row is None:
            raise PayloadUnavailable(what, GONE)
        check_size(what, len(row.result or b""), settings.max_stored_bytes, STORED_BYTES)
        if row.result is None or row.state is not RunState.SUCCEEDED:
            raise PayloadUnavailable(
                what, f"the run is {row.state} now; submit the job again and wait for it"
            )
        if _sha256(row.result) != self._sha256:
            raise PayloadUnavailable(what, OTHER)
        return from_bytes(kind, row.result)

    def _fields(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "graph": self.graph,
            "execution_id": self.execution_id,
            "type": self.type_name,
            "bytes": self.size_bytes,
            "sha256": self._sha256,
        }


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
        value = self._wait_for(*args, **kwargs)
        if isinstance(value, StoredResult):
            return cast("R", value.read(self.app))
        value = read_batch(self.app, value)
        message = value.message if isinstance(value, envelope.Result) else value
        if isinstance(message, Message):
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

        A result that lies in the database is read from there page by page, so it may be of any size.

        Args:
            timeout: Most seconds to wait for the end of the batch.
            on_message: Called while it waits with each change of the task's state, as by `get`; where the result
                backend tells of them (Redis).

        Raises:
            InvalidArguments: The task returns one message.
            Exception: As from `get`.
        """
        app_settings.app_settings(self.app)
        told = {} if on_message is None else {"on_message": on_message}
        return stream_batch(self.app, self._wait_for(timeout=timeout, **told))

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
        if self.task is None:
            raise InvalidArguments(
                "failed_items", "a promise that was pickled does not know its task; use task.AsyncResult"
            )
        graph: Graph = self.task.graph
        settings = app_settings.app_settings(self.app)
        store = graph.find_batch_store(self.task.plan(), settings)
        name = execution_id or self.execution_id or self.id
        if store is None:
            raise InvalidSettings(
                "docket_database_url", "failed items are read from the database; there is none here"
            )

        def read() -> dict[int, StepFailed]:
            if store.find_run(graph.name, name) is None:
                raise RunNotFound(graph.name, name)
            return failures_of(store.find_failed(graph.name, name, 0, _MOST_ITEMS))

        return run_on_pool(read, settings.threads)

    def _wait_for(self, *args: Any, **kwargs: Any) -> Any:
        value = cast("Any", super().get(*args, **kwargs))
        if isinstance(value, envelope.Undecodable):
            raise value.error
        return value


def holds_result(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether one of a task's arguments stands for another task's stored result."""
    return any(isinstance(value, StoredResult | envelope.Reference) for value in (*args, *kwargs.values()))


def read_results(args: Sequence[Any], kwargs: Mapping[str, Any], app: Celery) -> Arguments:
    """Return the arguments with stored results of other tasks read.

    Raises:
        DocketError: As from `StoredResult.read`.
    """
    if not holds_result(args, kwargs):
        return args, kwargs

    def read(value: Any) -> Any:
        return value.read(app) if isinstance(value, StoredResult) else read_batch(app, value)

    return [read(value) for value in args], {name: read(value) for name, value in kwargs.items()}


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode("ascii")


def _decode_result(value: Any) -> StoredResult | envelope.Undecodable:
    """Decode a reference in a message; never raises, as `wire.decode`."""
    try:
        return StoredResult(_check_fields(value))
    except Exception as error:  # noqa: BLE001 -- a decoder that raises loses the message and hangs its caller
        problem = DecodeFailed("unknown", f"a reference to a result is damaged: {type(error).__name__}")
        return envelope.Undecodable(value, problem, RESULT_MARKER)


def _check_fields(value: Any) -> Mapping[str, Any]:
    """Return a reference's fields, whose texts go into logs and errors.

    Raises:
        KeyError, TypeError, ValueError: One is missing, of another type, or too long.
    """
    for name in ("task", "graph", "execution_id", "type", "sha256"):
        text = value[name]
        if not isinstance(text, str):
            raise TypeError(name)
        if len(text) > _MOST_CHARS:
            raise ValueError(name)
    size_bytes = value["bytes"]
    if type(size_bytes) is not int:
        raise TypeError("bytes")
    if not 0 <= size_bytes < 2**63:
        raise ValueError("bytes")
    return cast("Mapping[str, Any]", value)


def install() -> None:
    """Teach kombu's JSON to carry references to results."""
    register_type(StoredResult, RESULT_MARKER, StoredResult.__json__, cast("Any", _decode_result))
