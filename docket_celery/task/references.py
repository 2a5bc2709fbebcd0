"""References: what travels through Celery in place of a job or a result that is too large for a message."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

from celery import Celery, current_app
from google.protobuf.message import Message
from kombu.utils.json import register_type

from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.run_row import read_result
from docket_celery.engine.stored_items import GONE, OTHER_JOB, StoredBatch
from docket_celery.engine.waiting import run_on_pool
from docket_celery.errors import DecodeFailed, PayloadUnavailable
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.messages import STORED_BYTES, brief, check_size, to_bytes, type_name
from docket_celery.store.contract import Store
from docket_celery.store.records import RunState
from docket_celery.task import app_settings, checks, envelope

MARKER: Final = "docket.stored"
JOB, ITEMS, RESULT, RESULTS = "job", "items", "result", "results"
OWN: Final = frozenset({JOB, ITEMS})
"""Kinds of what belongs to the job of the task that gets the reference."""
NO_DATABASE: Final = (
    "this process has no database; set docket_database_url here (and docket_codec, if the workers have one)"
)
_OTHER_RESULT: Final = (
    "its row holds another result than the one referred to; submit the job again and wait for it"
)
_FIELDS: Final = {
    "kind": str,
    "graph": str,
    "execution_id": str,
    "type_name": str,
    "size": int,
    "digest": str,
}
"""What travels of a reference."""
_OLD_MARKERS: Final = ("docket.job", "docket.result", "docket.batch")
_MAX_CHARS: Final = 500
"""The most characters of each text in a reference: all of them go into logs and errors."""

Arguments = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass
class Stored:
    """Stands for a job or a result in a Celery message; the data is in the row of the run.

    GraphTasks and `GraphResult.get` read it by themselves. An ordinary task that gets one calls `read`.

    Attributes:
        kind: ``job``: a message of the run's own job. ``items``: the list of its job. ``result``: the message that
            the run made. ``results``: those of a batch.
        graph, execution_id: The name of the run.
        type_name: Full Protocol Buffers name of the message, or of each message of a list.
        size: Bytes of the message; of a list, how many it had to hold.
        digest: What the row must still have, in base64: of a result its SHA-256, else the digest of the run's job.
        message: The message, where this process has it already; it does not travel.
    """

    kind: str
    graph: str
    execution_id: str
    type_name: str
    size: int
    digest: str
    message: Message | None = field(default=None, compare=False)

    def __json__(self) -> dict[str, Any]:
        return {"__type__": MARKER, "__value__": self._fields()}

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the message, in whatever form it travels.
        return Stored, tuple(self._fields().values())

    def __repr__(self) -> str:
        if self.message is not None:
            return brief(self.message)
        size = f"{self.size} {'bytes' if self.kind in {JOB, RESULT} else 'items'}"
        return f"<Stored {self.kind} {self.type_name} of run {self.execution_id!r}, {size}>"

    def read(self, app: Celery | None = None) -> Any:
        """Return the message; of a batch its list of messages or its `BatchResult`.

        Args:
            app: Whose settings and tasks say which store has it; default: Celery's current app.

        Raises:
            PayloadUnavailable: This process has no database, or the row is gone or holds something else now.
            StoreUnavailable: The database does not answer; trying again is safe.
            UnknownMessageType, DecodeFailed, CodecFailed, PayloadTooLarge: The stored bytes cannot be read here.
        """
        found = self.find(app) if self.message is None else self.message
        if isinstance(found, Message):
            self.message = found
        return run_on_pool(found.load, _settings(app).threads) if isinstance(found, StoredBatch) else found

    def find(self, app: Celery | None = None) -> Any:
        """Return what the run's row has: like `read`, but of a large batch without the results themselves.

        Raises:
            DocketError: As from `read`.
        """
        settings = _settings(app)
        return run_on_pool(functools.partial(self._find, app or current_app, settings), settings.threads)

    def _find(self, app: Celery, settings: Settings) -> Any:
        kind = envelope.types.find(self.type_name)
        what = f"the result of run {self.execution_id!r} of graph {self.graph!r}"
        if self.kind == RESULT:
            check_size(what, self.size, settings.max_stored_bytes, STORED_BYTES)
        store = self._find_store(app, settings)
        if store is None:
            raise PayloadUnavailable(what, NO_DATABASE)
        row = store.find_run(self.graph, self.execution_id)
        if row is None:
            raise PayloadUnavailable(what, GONE)
        if self.kind == RESULTS and _text(row.job_digest) != self.digest:
            raise PayloadUnavailable(what, OTHER_JOB)
        data = row.result or b""
        check_size(what, len(data), settings.max_stored_bytes, STORED_BYTES)
        if row.result is None or row.state is not RunState.SUCCEEDED:
            raise PayloadUnavailable(
                what, f"the run is {row.state} now; submit the job again and wait for it"
            )
        if self.kind != RESULTS and _sha256(data) != self.digest:
            raise PayloadUnavailable(what, _OTHER_RESULT)
        return read_result(row, store, kind, collects=self.kind == RESULTS)

    def _find_store(self, app: Celery, settings: Settings) -> Store | None:
        graphs = (task.graph for task in checks.graph_tasks(app) if task.graph.name == self.graph)
        if (graph := next(graphs, None)) is not None:
            return graph.choose_store(settings)
        return process.store(settings.database_url, settings.codec)

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS}


StoredResult = Stored
"""The public name: what a task gets as an argument is always a result."""


def holds_stored(args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> bool:
    """Tell whether a task's arguments hold a reference."""
    return any(isinstance(value, Stored) for value in (*(args or ()), *(kwargs or {}).values()))


def job_reference(message: Message, graph: str, execution_id: str, job_digest: bytes) -> Stored:
    """Return the reference to an argument of a run's job."""
    digest = _text(job_digest)
    return Stored(JOB, graph, execution_id, type_name(message), message.ByteSize(), digest, message)


def items_reference(kind: type[Message], count: int, graph: str, execution_id: str, digest: bytes) -> Stored:
    """Return the reference to the list of a run's job: *count* messages of *kind*."""
    return Stored(ITEMS, graph, execution_id, type_name(kind), count, _text(digest))


def result_reference(message: Message, graph: str, execution_id: str, data: bytes | None = None) -> Stored:
    """Return the reference to the result of a run, whose row has it as *data*; default: as it is encoded here."""
    data = to_bytes(message) if data is None else data
    return Stored(RESULT, graph, execution_id, type_name(message), len(data), _sha256(data), message)


def results_reference(batch: StoredBatch) -> Stored:
    """Return the reference to the results of a batch."""
    place = batch.items.place
    digest = _text(place.job_digest or b"")
    return Stored(RESULTS, place.graph, place.execution_id, type_name(place.kind), place.total, digest)


def holds_job(args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> bool:
    """Tell whether a task's arguments refer to its own stored job."""
    values = (*(args or ()), *(kwargs or {}).values())
    return any(isinstance(value, Stored) and value.kind == JOB for value in values)


def read_arguments(args: Sequence[Any], kwargs: Mapping[str, Any], app: Celery) -> Arguments:
    """Return the arguments with references to results of other tasks read.

    Raises:
        DocketError: As from `Stored.read`.
    """

    def read(value: Any) -> Any:
        return value.read(app) if isinstance(value, Stored) and value.kind not in OWN else value

    return [read(value) for value in args], {name: read(value) for name, value in kwargs.items()}


def read_value(value: Any, app: Celery) -> Any:
    """Return what a task's result stands for.

    Raises:
        DocketError: It cannot be read; as from `Stored.read`.
    """
    if isinstance(value, envelope.Undecodable):
        raise value.error
    if isinstance(value, Stored):
        return value.read(app)
    if isinstance(value, envelope.Result):
        return value.message
    if isinstance(value, envelope.Results):
        return value.value
    for each in listed(value) or ():
        if isinstance(each, envelope.Undecodable):
            raise each.error
    return value


def listed(value: object) -> Sequence[Any] | None:
    """Return the results of a batch one by one; None if *value* is something else."""
    if isinstance(value, BatchResult):
        return cast("BatchResult[Message]", value).results
    return cast("Sequence[Any]", value) if isinstance(value, (list, tuple)) else None


def decode(value: object) -> Stored | envelope.Undecodable:
    """Return the reference in an envelope's content, or an `Undecodable`; never raises."""
    try:
        return _decode(cast("dict[str, Any]", value))
    except Exception as error:  # noqa: BLE001 -- a decoder that raises loses the message and hangs its caller
        problem = DecodeFailed("reference", f"it is damaged: {type(error).__name__}")
        return envelope.Undecodable(value, problem, MARKER)


def _decode(content: Mapping[str, Any]) -> Stored:
    fields = {name: content[name] for name in _FIELDS}
    for name, kind in _FIELDS.items():
        if type(fields[name]) is not kind:
            raise TypeError(name)
        if isinstance(fields[name], str) and len(fields[name]) > _MAX_CHARS:
            raise ValueError(name)
    if not 0 <= fields["size"] < 2**63:
        raise ValueError("size")
    if fields["kind"] not in {JOB, ITEMS, RESULT, RESULTS}:
        raise ValueError("kind")
    return Stored(**fields)


def _refuse(marker: str, value: object) -> envelope.Undecodable:
    """Decode a reference of version 0.1.0; kombu itself would raise."""
    problem = DecodeFailed(
        marker, "docket_celery 0.1.0 wrote it, and this version cannot read it; submit the job again"
    )
    return envelope.Undecodable(value, problem, marker)


def _settings(app: Celery | None) -> Settings:
    return app_settings.app_settings(app or current_app)


def _sha256(data: bytes) -> str:
    return _text(hashlib.sha256(data).digest())


def _text(digest: bytes) -> str:
    return base64.b64encode(digest).decode("ascii")


register_type(Stored, MARKER, Stored.__json__, cast("Any", decode))
for _marker in _OLD_MARKERS:
    # They encode themselves: the type is named for the decoder's sake.
    register_type(
        envelope.Undecodable, _marker, envelope.Undecodable.__json__, functools.partial(_refuse, _marker)
    )
