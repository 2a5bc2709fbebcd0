"""Batches that are stored before their task is sent: the items page by page; references travel."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from google.protobuf.message import Message

from docket_celery.batch.layout import Layout, paged
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run_row import job_parts
from docket_celery.engine.waiting import run_on_pool
from docket_celery.errors import InvalidArguments, InvalidSettings, RunCancelled, RunConflict
from docket_celery.plan.messages import check_size, frame, to_bytes, type_name
from docket_celery.store.contract import BatchStore
from docket_celery.store.identity import job_digest
from docket_celery.store.records import UNFINISHED, Lease, RunRow, RunState
from docket_celery.task.large_jobs import QueuedRun, Travelling, ask, keep_s
from docket_celery.task.references import Stored, items_reference, job_reference, read_arguments

if TYPE_CHECKING:
    from docket_celery.task.task import GraphTask

    Task = GraphTask[Any, Any]
P = ParamSpec("P")
T = TypeVar("T")
MOST_ITEMS: Final = 1_000_000
"""Most items of a batch: what looks at all rows of a run at once stays within the limit of a statement."""


def send(
    task: Task, args: Sequence[Any], kwargs: Mapping[str, Any], run: QueuedRun, settings: Settings
) -> Travelling:
    """Store a job with its list, and return the arguments to publish.

    Args:
        task: The task.
        args: Positional arguments, bound and checked.
        kwargs: The same by name.
        run: The run that the task will ask for.
        settings: Those in force.

    Raises:
        DocketError: As from `upload`.
    """
    values = dict(zip(task.declaration.signature.parameters, args, strict=False)) | dict(kwargs)
    messages = task.declaration.bind(*read_arguments((), values, task.app))
    shared = [message for message in messages if isinstance(message, Message)]
    items = next(value for value in messages if not isinstance(value, Message))
    _, stored = upload(task, items, shared, run, settings)
    named = {name: stored.pop(name) for name in kwargs}
    return tuple(stored.values()), named


def upload(
    task: Task, items: Iterable[Any], others: Sequence[Message], run: QueuedRun, settings: Settings
) -> tuple[bytes, dict[str, Stored]]:
    """Store a batch under the name of its run, without ever having all of it in memory.

    Args:
        task: The task.
        items: The batch's, as messages or their JSON form; read once.
        others: The messages that all items share, in the order of the task's other parameters.
        run: The run that the task will ask for; its digest is not looked at.
        settings: Those in force.

    Returns:
        The job's digest, and what travels for each parameter.

    Raises:
        InvalidArguments: An item is of another type, or there are too many.
        PayloadTooLarge: An item is too large.
        InvalidSettings: This process has no database.
        RunConflict: The run exists with another job, or is being submitted by another process.
        RunCancelled: It was cancelled while its items were submitted.
        LeaseLost: It was so slow that another process began to submit it.
        StoreUnavailable: The database does not answer.
    """
    store = task.graph.find_batch_store(task.plan(), settings)
    if store is None:
        problem = f"batches of task {task.name} are streamed into the database; set it in this process too"
        raise InvalidSettings("docket_database_url", problem)
    return _Upload(task, store, items, others, run, settings).store()


class _Upload:
    """One batch on its way into the store."""

    def __init__(
        self,
        task: Task,
        store: BatchStore,
        items: Iterable[Any],
        others: Sequence[Message],
        run: QueuedRun,
        settings: Settings,
    ) -> None:
        declared, self._settings = task.declaration, settings
        assert declared.batch is not None
        self._task, self._store, self._items, self._run, self._batch = task, store, items, run, declared.batch
        kept = (key for key in declared.given if key != declared.batch)
        self._shared = dict(zip(kept, others, strict=True))
        self._parts = job_parts(self._shared, others)
        job = frame(part for name, data in self._parts for part in (name.encode(), data))
        self._request = ask(task, run, job, UNFINISHED, settings)
        self._keep_s = keep_s(run, settings)
        self._digest, self._count = hashlib.sha256(), 0

    def store(self) -> tuple[bytes, dict[str, Stored]]:
        """Store the batch; see `upload`."""
        found = self._on_pool(self._store.begin_upload, self._request, self._keep_s)
        if isinstance(found, RunRow):
            self._compare(found)
        else:
            self._put(found)
        declared, digest = self._task.declaration, self._job_digest()
        run = (self._request.graph, self._request.execution_id, digest)
        stored = {
            name: items_reference(key.kind, self._count, *run)
            if key == self._batch
            else job_reference(self._shared[key], *run)
            for name, key in zip(declared.signature.parameters, declared.given, strict=True)
        }
        return digest, stored

    def _put(self, lease: Lease) -> None:
        store, layout = self._store, Layout.of(self._task.plan(), self._run.execution_id)
        # A slow source must not let the lease run out, which each page extends.
        for page in paged(layout.item_rows("", self._read()), every_s=self._settings.lease_seconds / 3):
            self._on_pool(store.put_items, lease, page)
        closing = [layout.given_row(key, message) for key, message in self._shared.items()]
        closing.append(layout.count_row("", self._count))
        self._on_pool(store.close_items, lease, "", self._count, closing)
        self._on_pool(store.finish_upload, lease, store.hmac_digest(self._job_digest()), self._keep_s)

    def _compare(self, row: RunRow) -> None:
        """Check that the run that is there is of the same job; only reading all items tells."""
        graph, execution_id = row.graph, row.execution_id
        if row.job_digest == UNFINISHED and row.state is RunState.CANCELLED:
            raise RunCancelled(execution_id, "cancelled while its items were submitted")
        if row.job_digest == UNFINISHED:
            raise RunConflict(graph, execution_id, RunConflict.UNDER_WAY)
        if row.target != self._request.target:
            raise RunConflict(graph, execution_id, "target")
        for _ in self._read():
            pass
        if self._store.hmac_digest(self._job_digest()) != row.job_digest:
            raise RunConflict(graph, execution_id, "job")
        # What is stored already must be there when a worker comes to it.
        self._on_pool(self._store.enqueue, replace(self._request, job_digest=row.job_digest), self._keep_s)

    def _read(self) -> Iterator[Message]:
        """Yield the messages of the items, and take their digest."""
        name, limit = type_name(self._batch.kind), self._settings.max_message_bytes
        for index, item in enumerate(self._items):
            if index >= MOST_ITEMS:
                problem = f"a batch of task {self._task.name} has at most {MOST_ITEMS} of them"
                raise InvalidArguments("items", problem)
            message = self._task.declaration.bind_item(index, item)
            data = to_bytes(message)
            check_size(f"{name} of task {self._task.name}", len(data), limit)
            self._digest.update(frame((name.encode(), data)))
            self._count = index + 1
            yield message

    def _job_digest(self) -> bytes:
        """Return the digest of the job as `digest_job` takes it over the whole list."""
        return job_digest([*self._parts, (self._batch.label("list"), self._digest.digest())])

    def _on_pool(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return run_on_pool(functools.partial(call, *args, **kwargs), self._settings.threads)
