"""Batches that go to the store before their task is sent: the items one page after the other, a reference travels."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar, cast

from celery import Celery
from google.protobuf.message import Message

from docket_celery.batch.layout import Layout, paged
from docket_celery.engine.job import job_parts, target_name
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.stored_items import ENVELOPE_BYTES
from docket_celery.engine.waiting import run_on_pool
from docket_celery.errors import InvalidArguments, InvalidSettings, RunCancelled, RunConflict
from docket_celery.graph import Graph
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.messages import ListDigest, brief, check_size, frame, to_bytes, type_name
from docket_celery.plan.plan import Plan
from docket_celery.store.contract import BatchStore
from docket_celery.store.identity import job_digest
from docket_celery.store.records import UNFINISHED, Lease, RunRequest, RunRow, RunState
from docket_celery.task import app_settings
from docket_celery.task.declaration import Declaration
from docket_celery.task.large_jobs import QueuedRun, StoredJob, keep_s
from docket_celery.task.result import read_results

TRAVELS_BYTES: Final = 64 * 1024
"""A list up to this weight travels in the task's message; a bigger one goes to the store, if there is one."""
MOST_ITEMS: Final = 1_000_000
"""Most items of a batch: what looks at all rows of a run at once stays within the limit of a statement."""
T = TypeVar("T")


class BatchTask(Protocol):
    """What is needed of a GraphTask here."""

    name: str
    graph: Graph
    declaration: Declaration

    @property
    def app(self) -> Celery: ...
    @classmethod
    def plan(cls) -> Plan: ...


def wants_upload(task: BatchTask, values: Iterable[Any]) -> bool:
    """Tell whether a job's list is better stored than sent.

    Args:
        task: The task.
        values: Its arguments, in whatever order.
    """
    lists = (cast("Sequence[Message]", value) for value in values if isinstance(value, (list, tuple)))
    items = next(lists, None)
    if task.declaration.batch is None or items is None or task.app.conf.task_always_eager:
        return False
    weight = 0
    for item in items:
        weight += ENVELOPE_BYTES + item.ByteSize()
        if weight > TRAVELS_BYTES:
            return _find_store(task) is not None
    return False


def send(
    task: BatchTask, args: Sequence[Any], kwargs: Mapping[str, Any], run: QueuedRun
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Store a job whose list is better stored than sent, and return the arguments to publish; None: it is not.

    Args:
        task: The task.
        args: Positional arguments, bound and checked.
        kwargs: The same by name.
        run: The run that the task will ask for.

    Raises:
        DocketError: As from `upload`.
    """
    if not wants_upload(task, (*args, *kwargs.values())):
        return None
    values = dict(zip(task.declaration.signature.parameters, args, strict=False)) | dict(kwargs)
    messages = task.declaration.bind(*read_results((), values, task.app))
    shared = [message for message in messages if isinstance(message, Message)]
    items = next(value for value in messages if not isinstance(value, Message))
    _, stored = upload(task, items, shared, run)
    named = {name: stored.pop(name) for name in kwargs}
    return tuple(stored.values()), named


def upload(
    task: BatchTask, items: Iterable[Any], others: Sequence[Message], run: QueuedRun
) -> tuple[bytes, dict[str, StoredJob]]:
    """Store a batch under the name of its run, without ever having all of it in memory.

    Args:
        task: The task.
        items: The batch's, as messages or their JSON form; read once.
        others: The messages that all items share, in the order of the task's other parameters.
        run: The run that the task will ask for; its digest is not looked at.

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
    store = _find_store(task)
    if store is None:
        problem = f"batches of task {task.name} are streamed into the database; set it in this process too"
        raise InvalidSettings("docket_database_url", problem)
    return _Upload(task, store, others, run).take(items)


class _Upload:
    """One batch on its way into the store."""

    def __init__(self, task: BatchTask, store: BatchStore, others: Sequence[Message], run: QueuedRun) -> None:
        declared = task.declaration
        assert declared.batch is not None
        self._task, self._store, self._run, self._batch = task, store, run, declared.batch
        self._settings: Settings = app_settings.app_settings(task.app)
        self._layout = Layout.of(task.plan(), run.execution_id)
        kept = [key for key in declared.given if key != declared.batch]
        self._shared: dict[ValueKey, Message] = dict(zip(kept, others, strict=True))
        self._digest, self._count = ListDigest(), 0
        self._keep_s = keep_s(run, self._settings)
        self._request = self._make_request()

    def take(self, items: Iterable[Any]) -> tuple[bytes, dict[str, StoredJob]]:
        """Store the batch; see `upload`."""
        found = self._aside(lambda: self._store.begin_upload(self._request, self._keep_s))
        if isinstance(found, RunRow):
            self._compare(items, found)
        else:
            self._put(items, found)
        declared = self._task.declaration
        texts = {key: brief(message) for key, message in self._shared.items()}
        names = zip(declared.signature.parameters, declared.given, strict=True)
        stored = {name: StoredJob(texts.get(key, f"<{self._count} messages>")) for name, key in names}
        return self._job_digest(), stored

    def _put(self, items: Iterable[Any], lease: Lease) -> None:
        store, rows = self._store, self._layout.item_rows("", self._checked(items))
        # A slow source must not let the lease run out, which each page extends.
        for page in paged(rows, every_s=self._settings.lease_seconds / 3):
            self._aside(functools.partial(store.put_items, lease, page))
        closing = [self._layout.given_row(key, message) for key, message in self._shared.items()]
        closing.append(self._layout.count_row("", self._count))
        self._aside(lambda: store.close_items(lease, "", self._count, closing))
        digest = store.hmac_digest(self._job_digest())
        self._aside(lambda: store.finish_upload(lease, digest, self._keep_s))

    def _compare(self, items: Iterable[Any], row: RunRow) -> None:
        """See whether the run that is there is of the same job; only reading all items tells."""
        graph, execution_id = row.graph, row.execution_id
        if row.job_digest == UNFINISHED and row.state is RunState.CANCELLED:
            raise RunCancelled(execution_id, "cancelled while its items were submitted")
        if row.job_digest == UNFINISHED:
            raise RunConflict(graph, execution_id, RunConflict.UNDER_WAY)
        if row.target != self._request.target:
            raise RunConflict(graph, execution_id, "target")
        for _ in self._checked(items):
            pass
        if self._store.hmac_digest(self._job_digest()) != row.job_digest:
            raise RunConflict(graph, execution_id, "job")
        # What is stored already must be there when a worker comes to it.
        known = replace(self._request, job_digest=row.job_digest)
        self._aside(lambda: self._store.enqueue(known, self._keep_s))

    def _checked(self, items: Iterable[Any]) -> Iterator[Message]:
        """Yield the messages of *items*, and take their digest."""
        limit, what = (
            self._settings.max_message_bytes,
            f"{type_name(self._batch.kind)} of task {self._task.name}",
        )
        name = type_name(self._batch.kind)
        for index, item in enumerate(items):
            if index >= MOST_ITEMS:
                raise InvalidArguments(
                    "items", f"a batch of task {self._task.name} has at most {MOST_ITEMS} of them"
                )
            message = self._task.declaration.bind_item(index, item)
            data = to_bytes(message)
            check_size(what, len(data), limit)
            self._digest.add(data, name)
            self._count = index + 1
            yield message

    def _job_digest(self) -> bytes:
        """Return the digest of the job as `outcome.digest_job` takes it over the whole list."""
        shared = [(key.label(type_name(message)), to_bytes(message)) for key, message in self._shared.items()]
        return job_digest([*shared, (self._batch.label("list"), self._digest.digest())])

    def _make_request(self) -> RunRequest:
        plan, settings = self._task.plan(), self._settings
        parts = job_parts(self._shared, self._shared.values())
        return RunRequest(
            graph=plan.graph,
            execution_id=self._run.execution_id,
            target=target_name(plan),
            job=frame(part for name, data in parts for part in (name.encode(), data)),
            job_digest=UNFINISHED,
            owner=str(uuid.uuid4()),
            lease_s=settings.lease_seconds,
            max_deliveries=settings.max_deliveries,
            task_name=self._task.name,
            task_id=self._run.task_id,
        )

    def _aside(self, work: Callable[[], T]) -> T:
        return run_on_pool(work, self._settings.threads)


def _find_store(task: BatchTask) -> BatchStore | None:
    return task.graph.find_batch_store(task.plan(), app_settings.app_settings(task.app))
