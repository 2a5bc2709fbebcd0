"""Jobs that are too large for a Celery message: they are stored in the run's row, and references travel."""

from __future__ import annotations

import base64
import contextlib
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, cast

from google.protobuf.message import Message

from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run_row import job_bytes, job_parts, target_name
from docket_celery.engine.stored_items import ENVELOPE_BYTES, GONE, StoredBatch
from docket_celery.engine.waiting import run_on_pool
from docket_celery.errors import (
    DecodeFailed,
    DocketError,
    InvalidArguments,
    PayloadUnavailable,
    RunConflict,
    to_record,
)
from docket_celery.plan.messages import STORED_BYTES, Value, check_size, frame, from_bytes, unframe
from docket_celery.plan.options import MAX_SECONDS
from docket_celery.store.contract import Store
from docket_celery.store.identity import check_execution_id, job_digest
from docket_celery.store.records import Lease, RunEnd, RunRequest, RunState
from docket_celery.task import references
from docket_celery.task.declaration import Declaration
from docket_celery.task.envelope import Result, Results
from docket_celery.task.headers import DIGEST, EXECUTION_ID
from docket_celery.task.references import Stored

if TYPE_CHECKING:
    from docket_celery.task.task import GraphTask

    Task = GraphTask[Any, Any]

_logger = logging.getLogger("docket_celery.large_jobs")
UNDELIVERED_KEPT_S: Final = 30 * 86400.0
"""Least time that a queued run is kept from when it is due, whatever the retention: its job is nowhere else."""
_SHOWN_CHARS: Final = 200

Travelling = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRun:
    """The run that a submission will ask for.

    Attributes:
        job_digest: `store.identity.job_digest` of the messages.
        task_id: Of the task that will be published.
        wait_s: Seconds until it may begin, from now.
    """

    execution_id: str
    job_digest: bytes
    task_id: str
    wait_s: float


def queued_run(headers: Mapping[str, Any], task_id: str | None, options: Mapping[str, Any]) -> QueuedRun:
    """Return the run that a task with these headers asks for, where its job has been bound before."""
    return QueuedRun(
        execution_id=check_execution_id(headers.get(EXECUTION_ID) or task_id),
        job_digest=base64.b64decode(headers.get(DIGEST) or ""),
        task_id=task_id or "",
        wait_s=wait_s(options),
    )


# --- submitting --------------------------------------------------------------------------------------------------


def arrange(
    task: Task,
    messages: Sequence[Value],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    settings: Settings,
    *,
    travels: bool,
) -> Travelling:
    """Return the job's arguments as they were given, dicts and results replaced by messages, for `send`.

    The reference to a large result of another task stays: it is not stored a second time.

    Args:
        task: The task.
        messages: What the arguments are or stand for.
        args: Positional arguments as they were given.
        kwargs: The same by name.
        settings: Those in force.
        travels: The job will be sent; False: it runs here and now, and goes to no store before its run does.

    Raises:
        PayloadTooLarge: Another message is too large to travel, and there is no store for it or it is for that too.
    """
    declared = task.declaration
    values: dict[str, Any] = dict(zip(declared.signature.parameters, messages, strict=True))
    for name, given in [*zip(values, args, strict=False), *kwargs.items()]:
        if isinstance(given, Stored) and _is_large(values[name], settings):
            values[name] = given
    own = [value for value in values.values() if not isinstance(value, Stored)]
    if declared.batch is not None:
        declared.check_sizes(
            own, settings, lists=not (travels and wants_upload(task, messages, {}, settings))
        )
    elif any(_is_large(value, settings) for value in own):
        if (travels or not task.plan().persists) and _store_to_send(task, settings) is None:
            declared.check_sizes(own, settings)
        if travels:
            size = job_bytes(declared.given, messages)
            check_size(f"the job of task {task.name}", size, settings.max_stored_bytes, STORED_BYTES)
    named = {name: values.pop(name) for name in kwargs}
    return tuple(values.values()), named


def wants_upload(task: Task, args: Sequence[Any], kwargs: Mapping[str, Any], settings: Settings) -> bool:
    """Tell whether the list of a job is to be stored: it is too large for a message, and there is a store."""
    if task.declaration.batch is None or task.app.conf.task_always_eager:
        return False
    values = (*args, *kwargs.values())
    items = next((cast("Sequence[Message]", each) for each in values if isinstance(each, (list, tuple))), ())
    weight = 0
    for item in items:
        weight += ENVELOPE_BYTES + item.ByteSize()
        if weight > settings.max_list_bytes:
            return task.graph.find_batch_store(task.plan(), settings) is not None
    return False


def send(
    task: Task, args: Sequence[Any], kwargs: Mapping[str, Any], run: QueuedRun, settings: Settings
) -> Travelling:
    """Return the arguments to publish; a job that is too large for that is stored first, in its run's row.

    Args:
        task: The task.
        args: Positional arguments, as `arrange` left them.
        kwargs: The same by name.
        run: The run that the task will ask for.
        settings: Those in force.

    Raises:
        PayloadTooLarge: There is no store for it any more.
        RunConflict: The run exists with another job or target.
        StoreUnavailable: The database does not answer.
    """
    if not any(_is_large(value, settings) for value in (*args, *kwargs.values())):
        return tuple(args), dict(kwargs)
    declared, store = task.declaration, _store_to_send(task, settings)
    bound = declared.bind(*references.read_arguments(args, kwargs, task.app))
    if store is None:
        declared.check_sizes(bound, settings)
        return tuple(args), dict(kwargs)
    # A task with a list has been refused by `arrange`.
    messages = [value for value in bound if isinstance(value, Message)]
    parts = job_parts(declared.given, messages)
    job = frame(part for name, data in parts for part in (name.encode(), data))
    request = ask(task, run, job, store.hmac_digest(run.job_digest), settings)
    other = run_on_pool(lambda: store.enqueue(request, keep_s(run, settings)), settings.threads)
    if other is not None:
        # Another codec keeps another digest of the same job; reading it tells the two cases apart.
        run_on_pool(lambda: store.find_job(request.graph, request.execution_id), settings.threads)
        differs = "target" if other.target != request.target else "job"
        raise RunConflict(request.graph, request.execution_id, differs)
    row = (request.graph, request.execution_id, run.job_digest)
    by_name = {
        name: references.job_reference(message, *row)
        for name, message in zip(declared.signature.parameters, messages, strict=True)
    }
    named = {name: by_name.pop(name) for name in kwargs}
    return tuple(by_name.values()), named


def ask(task: Task, run: QueuedRun, job: bytes, digest: bytes, settings: Settings) -> RunRequest:
    """Return what a submission of *task* asks of its run's row.

    Args:
        task: The task.
        run: The run.
        job: What the row has of the job.
        digest: The job's, in the store's own form.
        settings: Those in force.
    """
    plan = task.plan()
    return RunRequest(
        graph=plan.graph,
        execution_id=run.execution_id,
        target=target_name(plan),
        job=job,
        job_digest=digest,
        owner=str(uuid.uuid4()),
        lease_s=settings.lease_seconds,
        max_deliveries=settings.max_deliveries,
        task_name=task.name,
        task_id=run.task_id,
    )


def keep_s(run: QueuedRun, settings: Settings) -> float:
    """Return for how many seconds from now a run is kept that no worker takes."""
    return min(run.wait_s + max(settings.retention, UNDELIVERED_KEPT_S), MAX_SECONDS)


def wait_s(options: Mapping[str, Any]) -> float:
    """Return in how many seconds a task submitted with these options of Celery's may begin.

    Raises:
        InvalidArguments: The countdown is over a century.
    """
    countdown, eta = options.get("countdown"), options.get("eta")
    if countdown is not None:
        if not float(countdown) <= MAX_SECONDS:
            problem = f"must be at most {MAX_SECONDS:.0f} seconds (a century), got {countdown!r}"
            raise InvalidArguments("countdown=", problem)
        return max(0.0, float(countdown))
    if isinstance(eta, datetime):
        aware = eta if eta.tzinfo is not None else eta.replace(tzinfo=UTC)
        return max(0.0, (aware - datetime.now(UTC)).total_seconds())
    return 0.0


def _is_large(value: object, settings: Settings) -> bool:
    return isinstance(value, Message) and value.ByteSize() > settings.max_message_bytes


def _store_to_send(task: Task, settings: Settings) -> Store | None:
    """Return the store for a job that is too large to travel, or None."""
    return _store_for(task, settings, eager=bool(task.app.conf.task_always_eager))


def _store_for(task: Task, settings: Settings, *, eager: bool = False) -> Store | None:
    """Return the store that keeps the task's runs, for other processes too unless the task is eager; or None."""
    if not task.plan().persists:
        return None
    store = task.graph.choose_store(settings)
    return store if store is not None and (store.persistent or eager) else None


# --- running -----------------------------------------------------------------------------------------------------


def holds_job(args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> bool:
    """Tell whether a task's arguments refer to its own stored job."""
    values = (*(args or ()), *(kwargs or {}).values())
    return any(isinstance(value, Stored) and value.kind in references.OWN for value in values)


def receive(
    task: Task,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    run: QueuedRun | None,
    settings: Settings,
    *,
    travelled: bool,
) -> tuple[Value, ...]:
    """Return the messages that a task's arguments are or stand for, in the order of its parameters.

    Args:
        task: The task.
        args: Positional arguments as they came.
        kwargs: The same by name.
        run: The run that the task asks for; None: the task was called directly, and has none yet.
        settings: Those in force.
        travelled: Whether the arguments came through a broker.

    Raises:
        InvalidArguments: They do not fit.
        PayloadUnavailable: A stored job or result cannot be had here.
        RunConflict: The row of the run holds another job.
        StoreUnavailable: The database does not answer.
        UnknownMessageType, DecodeFailed, CodecFailed, PayloadTooLarge: Something cannot be read here.
    """
    if run is not None and holds_job(args, kwargs):
        return _find_job(task, run, settings)
    try:
        read = references.read_arguments(args, kwargs, task.app)
    except PayloadUnavailable:
        if run is None:
            raise
        # The run that made it may be purged; a run that was begun here has its whole job in its own row.
        with contextlib.suppress(PayloadUnavailable, RunConflict):
            return _find_job(task, run, settings)
        raise
    messages = task.declaration.bind(*read)
    if travelled:
        # Checked at submit too, but beat and `celery call` send the JSON form past it.
        named = dict(zip(task.declaration.signature.parameters, messages, strict=True))
        given = {**dict(zip(named, args, strict=False)), **kwargs}
        own = [named[name] for name, value in given.items() if not isinstance(value, Stored)]
        task.declaration.check_sizes(own, settings)
    return messages


def give_up(task: Task, run: QueuedRun, error: DocketError, settings: Settings) -> None:
    """End a run as FAILED whose job cannot be read, if it is there and no delivery has taken it.

    Args:
        task: The task, which fails.
        run: The run that the task asks for.
        error: Why; submitting the job again resumes the run.
        settings: Those in force.
    """
    store = _store_for(task, settings)
    if store is None or not run.job_digest:
        return
    # The row has the job.
    request = ask(task, run, b"", store.hmac_digest(run.job_digest), settings)

    def close() -> None:
        row = store.find_run(request.graph, request.execution_id)
        if row is None or row.state not in {RunState.QUEUED, RunState.WAITING}:
            return
        lease = store.acquire(request)
        if isinstance(lease, Lease):
            failed = RunEnd(state=RunState.FAILED, error=to_record(error), retention_s=settings.retention)
            store.end(lease, failed)

    try:
        run_on_pool(close, settings.threads)
    except DocketError as problem:
        _logger.warning("run %r stays as it is: %s", run.execution_id, problem)


def wrap(
    task: Task, value: Any, execution_id: str, stored: bytes | None, settings: Settings
) -> Result | Results | Stored:
    """Return what a task returns for the outcome of its run: the value itself, or a reference to it.

    Args:
        task: The task.
        value: A message, or the results of a batch.
        execution_id: Of its run.
        stored: The message as the run's row has it, where it was read from there.
        settings: Those in force.

    Raises:
        PayloadTooLarge: It is too large, and its run is in no store.
    """
    if isinstance(value, StoredBatch):
        return references.results_reference(value)
    if not isinstance(value, Message):
        return Results(value)
    if not _is_large(value, settings):
        return Result(value)
    if _store_for(task, settings) is None:
        task.declaration.check_sizes([value], settings)
    return references.result_reference(value, task.graph.name, execution_id, stored)


def _find_job(task: Task, run: QueuedRun, settings: Settings) -> tuple[Message, ...]:
    """Return the messages of a stored job, in the order of the task's parameters.

    The run is that of the headers, which the job's digest proves; a reference is not believed.
    """
    graph = task.graph.name
    what = f"the job of run {run.execution_id!r} of graph {graph!r}"
    store = task.graph.choose_store(settings)
    if store is None:
        raise PayloadUnavailable(what, references.NO_DATABASE)
    job = run_on_pool(lambda: store.find_job(graph, run.execution_id), settings.threads)
    if job is None:
        raise PayloadUnavailable(what, GONE)
    check_size(what, len(job), settings.max_stored_bytes, STORED_BYTES)
    parts = _read_parts(job)
    if job_digest(parts) != run.job_digest:
        raise RunConflict(graph, run.execution_id, "job")
    return _decode_parts(task.declaration, parts)


def _read_parts(job: bytes) -> list[tuple[str, bytes]]:
    """Return the names and the bytes of a stored job's messages, as `job_parts` made them."""
    parts = unframe(job)
    if len(parts) % 2:
        raise DecodeFailed("stored job", "it has a name without a message")
    return [(name.decode(errors="replace"), data) for name, data in zip(parts[::2], parts[1::2], strict=True)]


def _decode_parts(declaration: Declaration, parts: Sequence[tuple[str, bytes]]) -> tuple[Message, ...]:
    """Return the declared messages; only declared types are decoded, whatever the row names."""
    stored, wanted = dict(parts), {str(key): key.kind for key in declaration.given}
    if stored.keys() != wanted.keys():
        held, taken = ", ".join(stored)[:_SHOWN_CHARS], ", ".join(wanted)
        raise DecodeFailed("stored job", f"it holds {held}; task {declaration.task} takes {taken}")
    return tuple(from_bytes(kind, stored[name]) for name, kind in wanted.items())
