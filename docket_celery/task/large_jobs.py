"""Jobs that are too large for a message: they lie in the run's row, and references travel in their place."""

from __future__ import annotations

import base64
import functools
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol, cast

from celery import Celery
from google.protobuf.message import Message
from kombu.utils.json import register_type

from docket_celery.engine.job import job_parts, target_name
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.waiting import run_on_pool
from docket_celery.errors import (
    DecodeFailed,
    DocketError,
    InvalidArguments,
    PayloadUnavailable,
    RunConflict,
    to_record,
)
from docket_celery.graph import Graph
from docket_celery.plan.messages import Value, brief, check_size, frame, from_bytes, type_name, unframe
from docket_celery.plan.options import MAX_SECONDS
from docket_celery.plan.plan import Plan
from docket_celery.store.contract import Store
from docket_celery.store.identity import check_execution_id, job_digest
from docket_celery.store.records import Lease, RunEnd, RunRequest, RunState
from docket_celery.task import app_settings, envelope, result
from docket_celery.task.declaration import Declaration
from docket_celery.task.headers import DIGEST, EXECUTION_ID

_logger = logging.getLogger("docket_celery.payloads")
JOB_MARKER: Final = "docket.job"
UNDELIVERED_KEPT_S: Final = 30 * 86400.0
"""Least time that a queued run is kept from when it is due, whatever the retention: its job lies nowhere else."""
_SHOWN_CHARS: Final = 200
_MESSAGES: Final = 64
"""So many times ``docket_max_message_bytes`` may a list weigh that travels."""

Travelling = tuple[tuple[Any, ...], dict[str, Any]]


class TaskClass(Protocol):
    """What is needed of a GraphTask here."""

    name: str
    graph: Graph
    declaration: Declaration

    @property
    def app(self) -> Celery: ...

    @classmethod
    def plan(cls) -> Plan: ...


class StoredJob(envelope.Stored):
    """Stands in a task's message for an argument; the whole job lies in the row of the task's run.

    Attributes:
        shown: The message's text for logs and Flower: bounded, without secrets.
    """

    def __init__(self, shown: str) -> None:
        self.shown = shown

    def __json__(self) -> dict[str, Any]:
        return {"__type__": JOB_MARKER, "__value__": {"shown": self.shown}}

    def __repr__(self) -> str:
        return self.shown


# --- submitting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRun:
    """The run that a submission will ask for.

    Attributes:
        job_digest: `checkpoint.job_digest` of the messages.
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


def arrange(
    task: TaskClass,
    messages: Sequence[Value],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    stored_bytes: int | None = None,
    *,
    streams: bool = False,
) -> Travelling:
    """Return the job's arguments: positional and by name as they were given, dicts and results replaced by messages.

    A large result of another task stays the reference that it is.

    Args:
        task: The task.
        messages: What the arguments are or stand for.
        args: Positional arguments as they were given.
        kwargs: The same by name.
        stored_bytes: Size of the job should `send` have to store it; None: it runs here and now.
        streams: The items of its batch do not travel.

    Raises:
        PayloadTooLarge: Another message is too large to travel, and there is no store for it or it is for that too.
    """
    settings = app_settings.app_settings(task.app)
    names = list(task.declaration.signature.parameters)
    values: dict[str, Any] = dict(zip(names, messages, strict=True))
    for name, given in [*zip(names, args, strict=False), *kwargs.items()]:
        if isinstance(given, result.StoredResult) and _is_large([values[name]], settings):
            values[name] = given
    travelling = [value for value in values.values() if isinstance(value, Message)]
    if task.declaration.batch is not None:
        listed = cast("dict[str, Value]", values)
        travel = [value for value in listed.values() if not isinstance(value, result.StoredResult)]
        check_messages(task, travel, whole=not streams)
    if _is_large(travelling, settings):
        # A job that runs here and now goes to no store before its run does.
        here = stored_bytes is None and task.plan().persists
        if not here and _store_to_send(task, settings) is None:
            check_messages(task, travelling)
        _check_stored(task, stored_bytes or 0, settings)
    named = {name: values.pop(name) for name in kwargs}
    return tuple(values.values()), named


def send(task: TaskClass, args: Sequence[Any], kwargs: Mapping[str, Any], run: QueuedRun) -> Travelling:
    """Return the arguments to publish; a job that is too large for that is stored first, in its run's row.

    Args:
        task: The task.
        args: Positional arguments, as `arrange` left them.
        kwargs: The same by name.
        run: The run that the task will ask for.

    Raises:
        PayloadTooLarge: The job is too large, for the store too or there is none for it.
        RunConflict: The run exists with another job or target.
        StoreUnavailable: The database does not answer.
    """
    settings = app_settings.app_settings(task.app)
    travelling = [value for value in (*args, *kwargs.values()) if isinstance(value, Message)]
    if not _is_large(travelling, settings):
        return tuple(args), dict(kwargs)
    bound = task.declaration.bind(*result.read_results(args, kwargs, task.app))
    # A task with a list has been refused by `arrange`.
    messages = [value for value in bound if isinstance(value, Message)]
    _store_job(task, messages, run, settings)
    shown = [StoredJob(brief(message)) for message in messages]
    by_name = dict(zip(task.declaration.signature.parameters, shown, strict=True))
    named = {name: by_name.pop(name) for name in kwargs}
    return tuple(by_name.values()), named


def check_messages(task: TaskClass, values: Sequence[Value], *, whole: bool = True) -> None:
    """Refuse messages that are too large to travel.

    Args:
        task: Whose they are.
        values: Messages, and lists of them.
        whole: Look at the sizes of whole lists too.

    Raises:
        PayloadTooLarge: One is.
    """
    limit = app_settings.app_settings(task.app).max_message_bytes
    for value in values:
        messages = [value] if isinstance(value, Message) else value
        for message in messages:
            check_size(f"{type_name(message)} of task {task.name}", message.ByteSize(), limit)
        if whole and not isinstance(value, Message):
            size = sum(message.ByteSize() for message in messages)
            check_size(f"the list of task {task.name}", size, limit * _MESSAGES)


def _is_large(messages: Sequence[Message], settings: Settings) -> bool:
    return any(message.ByteSize() > settings.max_message_bytes for message in messages)


def _store_to_send(task: TaskClass, settings: Settings) -> Store | None:
    """Return the store for a job that is too large to travel, or None."""
    return _store_for(task, settings, eager=bool(task.app.conf.task_always_eager))


def _check_stored(task: TaskClass, size_bytes: int, settings: Settings) -> None:
    """Refuse a job that is too large for the store."""
    check_size(f"the job of task {task.name}", size_bytes, settings.max_stored_bytes, result.STORED_BYTES)


def _store_job(task: TaskClass, messages: Sequence[Message], run: QueuedRun, settings: Settings) -> None:
    """Write the run's row with its job, as QUEUED; repeating it changes nothing."""
    store = _store_to_send(task, settings)
    if store is None:
        check_messages(task, messages)
        return
    parts = job_parts(task.declaration.given, messages)
    job = frame(part for name, data in parts for part in (name.encode(), data))
    _check_stored(task, len(job), settings)
    plan = task.plan()
    request = RunRequest(
        graph=plan.graph,
        execution_id=run.execution_id,
        target=target_name(plan),
        job=job,
        job_digest=store.hmac_digest(run.job_digest),
        owner="",
        lease_s=0.0,
        max_deliveries=0,
        task_name=task.name,
        task_id=run.task_id,
    )
    kept_s = keep_s(run, settings)
    other = run_on_pool(lambda: store.enqueue(request, kept_s), settings.threads)
    if other is not None:
        # Another codec keeps another digest of the same job; reading it tells the two cases apart.
        run_on_pool(lambda: store.find_job(plan.graph, run.execution_id), settings.threads)
        raise RunConflict(plan.graph, run.execution_id, "target" if other.target != request.target else "job")


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


# --- running -----------------------------------------------------------------------------------------------------


def holds_job(args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> bool:
    """Tell whether a task's arguments stand for a stored job."""
    return any(isinstance(value, StoredJob) for value in (*(args or ()), *(kwargs or {}).values()))


def receive(
    task: TaskClass, args: Sequence[Any], kwargs: Mapping[str, Any], run: QueuedRun | None, *, travelled: bool
) -> tuple[Value, ...]:
    """Return the messages that a task's arguments are or stand for, in the order of its parameters.

    Args:
        task: The task.
        args: Positional arguments as they came.
        kwargs: The same by name.
        run: The run that the task asks for; None: of no use, since nobody submitted the task.
        travelled: Whether the arguments came through a broker.

    Raises:
        InvalidArguments: They do not fit.
        PayloadUnavailable: A stored job or result cannot be had here.
        RunConflict: The row of the run holds another job.
        StoreUnavailable: The database does not answer.
        UnknownMessageType, DecodeFailed, CodecFailed, PayloadTooLarge: Something cannot be read here.
    """
    if run is not None and holds_job(args, kwargs):
        return _find_job(task, run)
    try:
        read = result.read_results(args, kwargs, task.app)
    except PayloadUnavailable:
        # The run that made it may be purged; a run that was begun here has its whole job in its own row.
        kept = None if run is None else _kept_job(task, run)
        if kept is None:
            raise
        return kept
    messages = task.declaration.bind(*read)
    if travelled:
        # Checked at submit too, but beat and `celery call` send the JSON form past it.
        named = dict(zip(task.declaration.signature.parameters, messages, strict=True))
        given = {**dict(zip(named, args, strict=False)), **kwargs}
        check_messages(task, [named[n] for n, v in given.items() if not isinstance(v, result.StoredResult)])
    return messages


def give_up(task: TaskClass, run: QueuedRun, error: DocketError) -> None:
    """End a run as FAILED whose job cannot be read, if it is there: its task fails, and nobody else goes on with it.

    Args:
        task: The task.
        run: The run that the task asks for.
        error: Why; submitting the job again resumes the run.
    """
    settings, plan = app_settings.app_settings(task.app), task.plan()
    store = _store_for(task, settings)
    if store is None or not run.job_digest:
        return

    def close(store: Store) -> None:
        row = store.find_run(plan.graph, run.execution_id)
        if row is None or row.state not in {RunState.QUEUED, RunState.WAITING}:
            return
        request = RunRequest(
            graph=plan.graph,
            execution_id=run.execution_id,
            target=target_name(plan),
            job=b"",  # the row has it
            job_digest=store.hmac_digest(run.job_digest),
            owner=str(uuid.uuid4()),
            lease_s=settings.lease_seconds,
            max_deliveries=settings.max_deliveries,
            task_name=task.name,
            task_id=run.task_id,
        )
        lease = store.acquire(request)
        if isinstance(lease, Lease):
            store.end(
                lease, RunEnd(state=RunState.FAILED, error=to_record(error), retention_s=settings.retention)
            )

    try:
        run_on_pool(functools.partial(close, store), settings.threads)
    except DocketError as problem:
        _logger.warning("run %r stays as it is: %s", run.execution_id, problem)


def wrap(
    task: TaskClass, value: Message, execution_id: str, stored: bytes | None = None
) -> envelope.Result | result.StoredResult:
    """Return what a task returns for its message: itself, or where it lies.

    Args:
        task: The task.
        value: The message.
        execution_id: Of its run.
        stored: The message as the run's row has it, where it was read from there.

    Raises:
        PayloadTooLarge: It is too large, and its run is in no store.
    """
    settings = app_settings.app_settings(task.app)
    if not _is_large([value], settings):
        return envelope.Result(value)
    if _store_for(task, settings) is None:
        check_messages(task, [value])
    return result.StoredResult.of(value, task.name, task.graph.name, execution_id, stored)


def _find_job(task: TaskClass, run: QueuedRun) -> tuple[Message, ...]:
    """Return the messages of a stored job, in the order of the task's parameters."""
    settings, graph = app_settings.app_settings(task.app), task.graph.name
    what = f"the job of run {run.execution_id!r} of graph {graph!r}"
    store = task.graph.choose_store(settings)
    if store is None:
        raise PayloadUnavailable(what, result.NO_DATABASE)
    job = run_on_pool(lambda: store.find_job(graph, run.execution_id), settings.threads)
    if job is None:
        raise PayloadUnavailable(what, result.GONE)
    check_size(what, len(job), settings.max_stored_bytes, result.STORED_BYTES)
    parts = _read_parts(job)
    if job_digest(parts) != run.job_digest:
        raise RunConflict(graph, run.execution_id, "job")
    return _decode_parts(task.declaration, parts)


def _kept_job(task: TaskClass, run: QueuedRun) -> tuple[Message, ...] | None:
    """Return the job that an earlier delivery of the same run left in its row, or None."""
    settings, graph = app_settings.app_settings(task.app), task.graph.name
    store = _store_for(task, settings, eager=True)
    if store is None or task.declaration.batch is not None or not run.job_digest:
        return None
    row = run_on_pool(lambda: store.find_run(graph, run.execution_id), settings.threads)
    if row is None or row.job_digest != store.hmac_digest(run.job_digest):
        return None
    job = run_on_pool(lambda: store.find_job(graph, run.execution_id), settings.threads)
    return None if job is None else _decode_parts(task.declaration, _read_parts(job))


def _store_for(task: TaskClass, settings: Settings, *, eager: bool = False) -> Store | None:
    """Return the store that keeps the task's runs, for other processes too unless the task is eager; or None."""
    if not task.plan().persists:
        return None
    store = task.graph.choose_store(settings)
    return store if store is not None and (store.persistent or eager) else None


def _read_parts(job: bytes) -> list[tuple[str, bytes]]:
    """Return the names and the bytes of a stored job's messages, as `job_parts` made them."""
    parts = unframe(job)
    if len(parts) % 2:
        raise DecodeFailed("stored job", "it has a name without a message")
    return [(name.decode(errors="replace"), data) for name, data in zip(parts[::2], parts[1::2], strict=True)]


def _decode_parts(declaration: Declaration, parts: Sequence[tuple[str, bytes]]) -> tuple[Message, ...]:
    """Return the declared messages; only declared types are decoded, whatever the row names."""
    left, found = list(parts), list[Message]()
    for key in declaration.given:
        wanted = str(key)
        index = next((n for n, (name, _) in enumerate(left) if name == wanted), None)
        if index is None:
            names = ", ".join(name for name, _ in parts)
            raise DecodeFailed(
                wanted, f"the stored job of task {declaration.task} holds {names[:_SHOWN_CHARS]}"
            )
        found.append(from_bytes(key.kind, left.pop(index)[1]))
    if left:
        raise DecodeFailed(left[0][0][:_SHOWN_CHARS], f"task {declaration.task} does not take it any more")
    return tuple(found)


def _decode_job(value: Any) -> StoredJob:
    """Decode a reference in a message; whatever it holds, the job is looked up by the run's name alone."""
    shown = cast("dict[str, Any]", value).get("shown") if isinstance(value, dict) else None
    return StoredJob(shown[:_SHOWN_CHARS] if isinstance(shown, str) else "<StoredJob>")


def install() -> None:
    """Teach kombu's JSON to carry references to jobs."""
    register_type(StoredJob, JOB_MARKER, StoredJob.__json__, _decode_job)
