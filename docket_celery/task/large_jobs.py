"""Jobs that are too large for a Celery message: they are stored in the run's row, and references travel."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, cast

from google.protobuf.message import Message

from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run_row import frame_job, job_bytes, target_name
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
from docket_celery.plan.messages import (
    STORED_BYTES,
    Value,
    check_size,
    from_bytes,
    to_bytes,
    type_name,
    unframe,
)
from docket_celery.plan.options import MAX_SECONDS
from docket_celery.store.contract import Store
from docket_celery.store.identity import check_execution_id, job_digest
from docket_celery.store.records import Lease, RunEnd, RunRequest, RunState
from docket_celery.task import references
from docket_celery.task.envelope import Result, is_large
from docket_celery.task.headers import DIGEST, EXECUTION_ID
from docket_celery.task.references import JOB, RESULT, RESULTS, Arguments, Stored

if TYPE_CHECKING:
    from docket_celery.task.task import AnyTask

_logger = logging.getLogger("docket_celery.large_jobs")
UNDELIVERED_KEPT_S: Final = 30 * 86400.0
"""Least time that a queued run is kept from when it is due, whatever the retention: its job is nowhere else."""
_SHOWN_CHARS: Final = 200


def ask(task: AnyTask, headers: Mapping[str, Any], task_id: str | None, settings: Settings) -> RunRequest:
    """Return what a task with these headers asks of its run's row: without the job, with the job's own digest."""
    plan = task.plan()
    return RunRequest(
        graph=plan.graph,
        execution_id=check_execution_id(headers.get(EXECUTION_ID) or task_id),
        target=target_name(plan),
        job=b"",
        job_digest=base64.b64decode(headers.get(DIGEST) or ""),
        owner=str(uuid.uuid4()),
        lease_s=settings.lease_seconds,
        max_deliveries=settings.max_deliveries,
        task_name=task.name,
        task_id=task_id or "",
    )


# --- submitting --------------------------------------------------------------------------------------------------


def arrange(
    task: AnyTask,
    messages: Sequence[Value],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    settings: Settings,
    *,
    leaves: bool,
) -> Arguments:
    """Return the job's arguments as they were given, dicts and results replaced by *messages*, for `send`.

    The reference to a large result of another task stays: it is not stored a second time. A job that does not leave
    runs here and now, and goes to no store before its run does.

    Another message raises PayloadTooLarge if it is too large to travel, and has no store or is too large for that.
    """
    declared = task.declaration
    values: dict[str, Any] = dict(zip(declared.signature.parameters, messages, strict=True))
    for name, given in [*zip(values, args, strict=False), *kwargs.items()]:
        if isinstance(given, Stored) and is_large(values[name], settings):
            values[name] = given
    own = [value for value in values.values() if not isinstance(value, Stored)]
    if declared.batch is not None:
        lists = not (leaves and wants_upload(task, messages, {}, settings))
        declared.check_sizes(own, settings, lists=lists)
    elif any(is_large(value, settings) for value in own):
        if (leaves or not task.plan().persists) and _store_for(task, settings) is None:
            declared.check_sizes(own, settings)
        if leaves:
            size = job_bytes(declared.given, messages)
            check_size(f"the job of task {task.name}", size, settings.max_stored_bytes, STORED_BYTES)
    return declared.as_given(values.values(), kwargs)


def wants_upload(task: AnyTask, args: Sequence[Any], kwargs: Mapping[str, Any], settings: Settings) -> bool:
    """Tell whether the list of a job is to be stored: it is too large for a message, and there is a store."""
    if task.declaration.batch is None or task.app.conf.task_always_eager:
        return False
    values = (*args, *kwargs.values())
    items = next((cast("Sequence[Message]", each) for each in values if isinstance(each, (list, tuple))), ())
    if sum(ENVELOPE_BYTES + item.ByteSize() for item in items) <= settings.max_list_bytes:
        return False
    return task.graph.find_batch_store(task.plan(), settings) is not None


def send(
    task: AnyTask,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    run: RunRequest,
    kept_s: float,
    settings: Settings,
) -> Arguments:
    """Return the arguments to publish; a job that is too large for that is stored first, in its run's row.

    The row is kept for *kept_s* seconds until a worker takes the run.

    Raises:
        PayloadTooLarge: There is no store for it any more.
        RunConflict: The run exists with another job or target.
        StoreUnavailable: The database does not answer.
    """
    if not any(is_large(value, settings) for value in (*args, *kwargs.values())):
        return tuple(args), dict(kwargs)
    declared, store = task.declaration, _store_for(task, settings)
    bound = declared.bind(*references.read_arguments(args, kwargs, task.app))
    if store is None:
        declared.check_sizes(bound, settings)
        return tuple(args), dict(kwargs)
    # A task with a list has been refused by `arrange`.
    messages = [value for value in bound if isinstance(value, Message)]
    job, digest = frame_job(declared.given, messages), store.hmac_digest(run.job_digest)
    request = replace(run, job=job, job_digest=digest)
    other = run_on_pool(lambda: store.enqueue(request, kept_s), settings.threads)
    if other is not None:
        # Another codec keeps another digest of the same job; reading it tells the two cases apart.
        run_on_pool(lambda: store.find_job(run.graph, run.execution_id), settings.threads)
        raise RunConflict(run.graph, run.execution_id, "target" if other.target != run.target else "job")
    return declared.as_given((refer(run, message) for message in messages), kwargs)


def keep_s(options: Mapping[str, Any], settings: Settings) -> float:
    """Return for how many seconds a run is kept that no worker takes; *options* as for `wait_s`."""
    return min(wait_s(options) + max(settings.retention, UNDELIVERED_KEPT_S), MAX_SECONDS)


def refer(run: RunRequest, message: Message) -> Stored:
    """Return the reference to a message of the job of *run*."""
    size = message.ByteSize()
    return Stored(JOB, run.graph, run.execution_id, type_name(message), size, run.job_digest, message)


def wait_s(options: Mapping[str, Any]) -> float:
    """Return in how many seconds a task submitted with these options of Celery's may begin.

    A countdown over a century raises InvalidArguments.
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


def _store_for(task: AnyTask, settings: Settings) -> Store | None:
    """Return the store that keeps the task's runs, for other processes too unless tasks are eager; or None."""
    if not task.plan().persists:
        return None
    store = task.graph.choose_store(settings)
    return store if store is not None and (store.persistent or task.app.conf.task_always_eager) else None


# --- running -----------------------------------------------------------------------------------------------------


def holds_job(args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> bool:
    """Tell whether a task's arguments refer to its own stored job."""
    values = (*(args or ()), *(kwargs or {}).values())
    return any(isinstance(value, Stored) and value.kind in references.OWN for value in values)


def receive(
    task: AnyTask,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    run: RunRequest | None,
    settings: Settings,
    *,
    travelled: bool,
) -> tuple[Value, ...]:
    """Return the messages that a task's arguments are or stand for, in the order of its parameters.

    Of a task that was called directly, or whose arguments hold no reference, *run* is None. What has *travelled* came
    through a broker.

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


def give_up(task: AnyTask, run: RunRequest, error: DocketError, settings: Settings) -> None:
    """End a run as FAILED whose job cannot be read because of *error*, if it is there and no delivery has taken it.

    Submitting the job again resumes the run.
    """
    store = _store_for(task, settings)
    if store is None or not run.job_digest:
        return
    request = replace(run, job_digest=store.hmac_digest(run.job_digest))

    def close() -> None:
        row = store.find_run(run.graph, run.execution_id)
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
    task: AnyTask, value: Any, execution_id: str, stored: bytes | None, settings: Settings
) -> Result | Stored:
    """Return what a task returns for the outcome of its run: the value itself, or a reference to it.

    Of a message that was read from the run's row, *stored* is what the row has. One that is too large raises
    PayloadTooLarge if its run is in no store.
    """
    if isinstance(value, StoredBatch):
        items = value.items
        name, digest = type_name(items.kind), items.job_digest or b""
        return Stored(RESULTS, items.graph, items.execution_id, name, items.total, digest)
    if not is_large(value, settings):
        return Result(value)
    if _store_for(task, settings) is None:
        task.declaration.check_sizes([value], settings)
    data = to_bytes(value) if stored is None else stored
    digest = hashlib.sha256(data).digest()
    return Stored(RESULT, task.graph.name, execution_id, type_name(value), len(data), digest, value)


def _find_job(task: AnyTask, run: RunRequest, settings: Settings) -> tuple[Message, ...]:
    """Return the messages of a stored job, in the order of the task's parameters.

    The run is that of the headers, which the job's digest proves; a reference is not believed.
    """
    what = f"the job of run {run.execution_id!r} of graph {run.graph!r}"
    store = task.graph.choose_store(settings)
    if store is None:
        raise PayloadUnavailable(what, references.NO_DATABASE)
    job = run_on_pool(lambda: store.find_job(run.graph, run.execution_id), settings.threads)
    if job is None:
        raise PayloadUnavailable(what, GONE)
    check_size(what, len(job), settings.max_stored_bytes, STORED_BYTES)
    framed = unframe(job)
    parts = [
        (name.decode(errors="replace"), data) for name, data in zip(framed[::2], framed[1::2], strict=False)
    ]
    if job_digest(parts) != run.job_digest:
        raise RunConflict(run.graph, run.execution_id, "job")
    # Only declared types are decoded, whatever the row names.
    stored, wanted = dict(parts), {str(key): key.kind for key in task.declaration.given}
    if stored.keys() != wanted.keys():
        held, taken = ", ".join(stored)[:_SHOWN_CHARS], ", ".join(wanted)
        raise DecodeFailed("stored job", f"it holds {held}; task {task.name} takes {taken}")
    return tuple(from_bytes(kind, stored[name]) for name, kind in wanted.items())
