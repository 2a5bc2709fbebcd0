"""Batches that are stored before their task is sent: the items page by page; references travel."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from google.protobuf.message import Message

from docket_celery.batch.layout import Layout, paged
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run_row import frame_job, job_parts
from docket_celery.engine.waiting import run_on_pool
from docket_celery.errors import InvalidArguments, InvalidSettings, RunCancelled, RunConflict
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.messages import check_size, frame, to_bytes, type_name
from docket_celery.store.contract import BatchStore
from docket_celery.store.identity import job_digest
from docket_celery.store.records import UNFINISHED, Lease, RunRequest, RunRow, RunState
from docket_celery.task.large_jobs import refer
from docket_celery.task.references import ITEMS, Arguments, Stored, read_arguments

if TYPE_CHECKING:
    from docket_celery.task.task import AnyTask
T = TypeVar("T")
MOST_ITEMS: Final = 1_000_000
"""Most items of a batch: what looks at all rows of a run at once stays within the limit of a statement."""


def send(
    task: AnyTask,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    run: RunRequest,
    kept_s: float,
    settings: Settings,
) -> Arguments:
    """Store a job with its list, and return the arguments to publish; as `large_jobs.send`."""
    messages = task.declaration.bind(*read_arguments(args, kwargs, task.app))
    shared = [message for message in messages if isinstance(message, Message)]
    items = next(value for value in messages if not isinstance(value, Message))
    _, stored = upload(task, items, shared, run, kept_s, settings)
    return task.declaration.as_given(stored, kwargs)


def upload(
    task: AnyTask,
    items: Iterable[Any],
    others: Sequence[Message],
    run: RunRequest,
    kept_s: float,
    settings: Settings,
) -> tuple[bytes, list[Stored]]:
    """Store a batch under the name of its run, and return the job's digest and what travels for each parameter.

    The items are read once, and never all in memory. The digest of *run* is not looked at; its row is kept for
    *kept_s* seconds until a worker takes it.

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
    keys = (key for key in task.declaration.given if key != task.declaration.batch)
    shared = dict(zip(keys, others, strict=True))
    request = replace(run, job=frame_job(shared, others), job_digest=UNFINISHED)
    return _Upload(task, store, items, shared, request, kept_s, settings).store_all()


@dataclass
class _Upload:
    """One batch on its way into the store."""

    task: AnyTask
    store: BatchStore
    items: Iterable[Any]
    shared: Mapping[ValueKey, Message]
    request: RunRequest
    kept_s: float
    settings: Settings
    digest: Any = field(default_factory=hashlib.sha256)
    count: int = 0

    def store_all(self) -> tuple[bytes, list[Stored]]:
        found = self._on_pool(lambda: self.store.begin_upload(self.request, self.kept_s))
        if isinstance(found, RunRow):
            self._compare(found)
        else:
            self._put(found)
        declared, digest = self.task.declaration, self._job_digest()
        run = replace(self.request, job_digest=digest)
        assert declared.batch is not None
        kind = type_name(declared.batch.kind)
        listed = Stored(ITEMS, run.graph, run.execution_id, kind, self.count, digest)
        return digest, [
            refer(run, self.shared[key]) if key in self.shared else listed for key in declared.given
        ]

    def _put(self, lease: Lease) -> None:
        store, layout = self.store, Layout.of(self.task.plan(), self.request.execution_id)
        # A slow source must not let the lease run out, which each page extends.
        for page in paged(layout.item_rows("", self._read()), every_s=self.settings.lease_seconds / 3):
            self._on_pool(functools.partial(store.put_items, lease, page))
        closing = [layout.given_row(key, message) for key, message in self.shared.items()]
        closing.append(layout.count_row("", self.count))
        digest = store.hmac_digest(self._job_digest())
        self._on_pool(lambda: store.close_items(lease, "", self.count, closing))
        self._on_pool(lambda: store.finish_upload(lease, digest, self.kept_s))

    def _compare(self, row: RunRow) -> None:
        """Check that the run that is there is of the same job; only reading all items tells."""
        graph, execution_id = row.graph, row.execution_id
        if row.job_digest == UNFINISHED and row.state is RunState.CANCELLED:
            raise RunCancelled(execution_id, "cancelled while its items were submitted")
        if row.job_digest == UNFINISHED:
            raise RunConflict(graph, execution_id, RunConflict.UNDER_WAY)
        if row.target != self.request.target:
            raise RunConflict(graph, execution_id, "target")
        for _ in self._read():
            pass
        if self.store.hmac_digest(self._job_digest()) != row.job_digest:
            raise RunConflict(graph, execution_id, "job")
        # What is stored already must be there when a worker comes to it.
        same = replace(self.request, job_digest=row.job_digest)
        self._on_pool(lambda: self.store.enqueue(same, self.kept_s))

    def _read(self) -> Iterator[Message]:
        """Yield the messages of the items, and take their digest."""
        batch = self.task.declaration.batch
        assert batch is not None
        name, limit = type_name(batch.kind), self.settings.max_message_bytes
        for index, item in enumerate(self.items):
            if index >= MOST_ITEMS:
                problem = f"a batch of task {self.task.name} has at most {MOST_ITEMS} of them"
                raise InvalidArguments("items", problem)
            message = self.task.declaration.bind_item(index, item)
            data = to_bytes(message)
            check_size(f"{name} of task {self.task.name}", len(data), limit)
            self.digest.update(frame((name.encode(), data)))
            self.count = index + 1
            yield message

    def _job_digest(self) -> bytes:
        """Return the digest of the job as `digest_job` takes it over the whole list."""
        parts = job_parts(self.shared, self.shared.values())
        assert self.task.declaration.batch is not None
        return job_digest([*parts, (self.task.declaration.batch.label("list"), self.digest.digest())])

    def _on_pool(self, call: Callable[[], T]) -> T:
        return run_on_pool(call, self.settings.threads)
