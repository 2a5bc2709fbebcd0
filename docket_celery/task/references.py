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
from docket_celery.plan.messages import STORED_BYTES, brief, check_size
from docket_celery.store.contract import Store
from docket_celery.store.records import RunState
from docket_celery.task import app_settings, checks, envelope

MARKER: Final = "docket.stored"
JOB, ITEMS, RESULT, RESULTS = _KINDS = "job", "items", "result", "results"
OWN: Final = frozenset({JOB, ITEMS})
"""Kinds of what belongs to the job of the task that gets the reference."""
NO_DATABASE: Final = (
    "this process has no database; set docket_database_url here (and docket_codec, if the workers have one)"
)
_OTHER_RESULT: Final = (
    "its row holds another result than the one referred to; submit the job again and wait for it"
)
_NAMES: Final = ("kind", "graph", "execution_id", "type_name", "size", "digest")
_TEXTS: Final = ("kind", "graph", "execution_id", "type_name", "digest")
_OLD_MARKERS: Final = ("docket.job", "docket.result", "docket.batch")
_MAX_CHARS: Final = 500
"""The most characters of each text in a reference: all of them go into logs and errors."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(unsafe_hash=True)
class Stored:
    """Stands for a job or a result in a Celery message; the data is in the row of the run.

    GraphTasks and `GraphResult.get` read it by themselves. An ordinary task that gets one calls `read`.

    Attributes:
        kind: ``job``: a message of the run's own job. ``items``: the list of its job. ``result``: the message that
            the run made. ``results``: those of a batch.
        graph, execution_id: The name of the run.
        type_name: Full Protocol Buffers name of the message, or of each message of a list.
        size: Bytes of the message; of a list, how many it had to hold.
        digest: What the row must still have: of a result its SHA-256, else the digest of the run's job.
        message: The message, where this process has it already; it does not travel.
    """

    kind: str
    graph: str
    execution_id: str
    type_name: str
    size: int
    digest: bytes
    message: Message | None = field(default=None, compare=False)

    def __json__(self) -> dict[str, Any]:
        content = {name: getattr(self, name) for name in _NAMES}
        content["digest"] = base64.b64encode(self.digest).decode("ascii")
        return {"__type__": MARKER, "__value__": content}

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the message, in whatever form it travels.
        return Stored, tuple(getattr(self, name) for name in _NAMES)

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
        if self.message is not None:
            return self.message
        app = app or current_app
        settings = app_settings.app_settings(app)

        def load() -> Any:
            found = self.find(app, settings)
            return found.load() if isinstance(found, StoredBatch) else found

        value = run_on_pool(load, settings.threads)
        self.message = value if isinstance(value, Message) else None
        return value

    def find(self, app: Celery, settings: Settings) -> Any:
        """Like `read`, but on the calling thread, and of a large batch without the results themselves."""
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
        if self.kind == RESULTS and row.job_digest != self.digest:
            raise PayloadUnavailable(what, OTHER_JOB)
        data = row.result or b""
        check_size(what, len(data), settings.max_stored_bytes, STORED_BYTES)
        if row.result is None or row.state is not RunState.SUCCEEDED:
            raise PayloadUnavailable(
                what, f"the run is {row.state} now; submit the job again and wait for it"
            )
        if self.kind != RESULTS and hashlib.sha256(data).digest() != self.digest:
            raise PayloadUnavailable(what, _OTHER_RESULT)
        return read_result(row, store, kind, collects=self.kind == RESULTS)

    def _find_store(self, app: Celery, settings: Settings) -> Store | None:
        graphs = (task.graph for task in checks.graph_tasks(app) if task.graph.name == self.graph)
        if (graph := next(graphs, None)) is not None:
            return graph.choose_store(settings)
        return process.store(settings.database_url, settings.codec)


StoredResult = Stored
"""The public name: what a task gets as an argument is always a result."""


def read_arguments(args: Sequence[Any], kwargs: Mapping[str, Any], app: Celery) -> Arguments:
    """Return the arguments with references to results of other tasks read; errors as from `Stored.read`."""

    def read(value: Any) -> Any:
        return value.read(app) if isinstance(value, Stored) and value.kind not in OWN else value

    return tuple(map(read, args)), {name: read(value) for name, value in kwargs.items()}


def read_value(value: Any, app: Celery) -> Any:
    """Return what a task's result stands for; errors as from `Stored.read`."""
    if (fault := envelope.find_fault(value)) is not None:
        raise fault
    return value.read(app) if isinstance(value, Stored) else value


def decode(value: object) -> Stored | envelope.Undecodable:
    """Return the reference in an envelope's content, or an `Undecodable`; never raises."""
    try:
        content = cast("dict[str, Any]", value)
        texts, size = {name: content[name] for name in _TEXTS}, content["size"]
        if not all(isinstance(text, str) and len(text) <= _MAX_CHARS for text in texts.values()):
            raise ValueError("a text")
        if type(size) is not int or not 0 <= size < 2**63 or texts["kind"] not in _KINDS:
            raise ValueError("size or kind")
        digest = base64.b64decode(texts.pop("digest"), validate=True)
        return Stored(**texts, size=size, digest=digest)
    except Exception as error:  # noqa: BLE001 -- a decoder that raises loses the message and hangs its caller
        problem = DecodeFailed("reference", f"it is damaged: {type(error).__name__}")
        return envelope.Undecodable(value, problem, MARKER)


def _refuse(marker: str, value: object) -> envelope.Undecodable:
    """Decode a reference of version 0.1.0; kombu itself would raise."""
    problem = DecodeFailed(
        marker, "docket_celery 0.1.0 wrote it, and this version cannot read it; submit the job again"
    )
    return envelope.Undecodable(value, problem, marker)


register_type(Stored, MARKER, Stored.__json__, cast("Any", decode))
for _marker in _OLD_MARKERS:
    # They encode themselves: the type is named for the decoder's sake.
    register_type(
        envelope.Undecodable, _marker, envelope.Undecodable.__json__, functools.partial(_refuse, _marker)
    )
