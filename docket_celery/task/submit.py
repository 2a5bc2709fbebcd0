"""The submitting side of a GraphTask: a job is bound, checked, named and published."""

from __future__ import annotations

import base64
import copy
import functools
import importlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from celery.result import EagerResult
from google.protobuf.message import Message

from docket_celery.engine.handles import RunHandle
from docket_celery.engine.process.settings import Settings
from docket_celery.errors import InvalidArguments
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.messages import brief
from docket_celery.store.identity import check_execution_id
from docket_celery.task import app_settings, chords, delays, large_jobs, upload
from docket_celery.task.context import read_context, write_context
from docket_celery.task.envelope import Result, wrap
from docket_celery.task.headers import (
    BATCH,
    CONTEXT,
    DIGEST,
    EXECUTION_ID,
    OF_ONE_DELIVERY,
    PART,
    PREPARED,
    WAITS_FOR_OTHER,
)
from docket_celery.task.options import add_routing, read_batch_options, take_batch_options
from docket_celery.task.references import Stored, holds_stored, read_arguments
from docket_celery.task.result import GraphResult

if TYPE_CHECKING:
    from docket_celery.task.task import GraphTask

Publish = Callable[..., GraphResult[Any]]
"""Celery's own `apply_async`, as the next class of the task has it."""
RunEagerly = Callable[..., EagerResult[Any]]
"""Celery's own `apply`, likewise."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def submit(
    task: GraphTask[Any, Any],
    publish: Publish,
    args: Any,
    kwargs: Any,
    task_id: str | None,
    more: Sequence[Any],
    execution_id: str | None,
    context: Mapping[str, Any] | None,
    options: dict[str, Any],
) -> GraphResult[Any]:
    """Submit a job, or a later delivery of one; see `GraphTask.apply_async`."""
    headers = dict(options.pop("headers", None) or {})
    settings = app_settings.app_settings(task.app)
    # A later delivery of a job was checked before, and its headers are ours.
    if not (options.pop(PREPARED, False) or options.get("retries")):
        args, kwargs = _prepare(task, args, kwargs, headers, execution_id, context, options, settings)
    args, kwargs = tuple(args or ()), kwargs or {}
    shown = chords.describe(headers) if PART in headers else f"({', '.join(map(_brief, args))})"
    options.setdefault("argsrepr", shown)
    options.setdefault("kwargsrepr", f"{{{', '.join(f'{k}={_brief(v)}' for k, v in kwargs.items())}}}")
    # A copy that waits for its turn carries what its original did: only that may have been stored.
    first = not options.get("retries") and PART not in headers and WAITS_FOR_OTHER not in headers
    if first and not _travels(task, (*args, *kwargs.values()), settings):
        task_id = task_id or str(uuid.uuid4())
        run = large_jobs.queued_run(headers, task_id, options)
        send = upload.send if large_jobs.wants_upload(task, args, kwargs, settings) else large_jobs.send
        args, kwargs = send(task, args, kwargs, run, settings)
    return _publish(task, publish, args, kwargs, task_id, more, headers, options)


def submit_on_commit(
    task: GraphTask[Any, Any],
    args: Any,
    kwargs: Any,
    more: Sequence[Any],
    execution_id: str | None,
    context: Mapping[str, Any] | None,
    options: dict[str, Any],
) -> None:
    """Submit a job as it is now when Django's transaction commits; see `GraphTask.apply_async_on_commit`."""
    headers = dict(options.pop("headers", None) or {})
    settings = app_settings.app_settings(task.app)
    job = copy.deepcopy(_prepare(task, args, kwargs, headers, execution_id, context, options, settings))
    options |= {"headers": headers, PREPARED: True}
    transaction: Any = importlib.import_module("django.db.transaction")
    transaction.on_commit(functools.partial(task.apply_async, *job, *more, **options))


def submit_batch(
    task: GraphTask[Any, Any],
    publish: Publish,
    items: Iterable[Any],
    others: Sequence[Message],
    task_id: str | None,
    execution_id: str | None,
    context: Mapping[str, Any] | None,
    options: dict[str, Any],
) -> GraphResult[Any]:
    """Store a batch page by page, then submit it; see `GraphTask.submit_batch`."""
    task.plan()
    shared = task.declaration.bind_others(others)
    if task.app.conf.task_always_eager:
        eager = cast("Publish", task.apply_async)
        job = task.declaration.join(list(items), shared)
        return eager(job, None, task_id, execution_id=execution_id, context=context, **options)
    headers = dict(options.pop("headers", None) or {})
    if execution_id is None and EXECUTION_ID not in headers and task.execution_id is not None:
        raise InvalidArguments(
            "execution_id", f"task {task.name} names its runs by their items; name this one"
        )
    _name_run(headers, execution_id, context)
    _note_batch_options(task, headers, options)
    task_id = task_id or str(uuid.uuid4())
    run = large_jobs.queued_run(headers, task_id, options)
    digest, stored = upload.upload(task, items, shared, run, app_settings.app_settings(task.app))
    headers[DIGEST] = base64.b64encode(digest).decode("ascii")
    args = tuple(stored.values())
    options |= {"argsrepr": f"({', '.join(map(repr, args))})", "kwargsrepr": "{}"}
    return _publish(task, publish, args, {}, task_id, (), headers, options)


def run_eagerly(
    task: GraphTask[Any, Any],
    run: RunEagerly,
    args: Any,
    kwargs: Any,
    more: Sequence[Any],
    execution_id: str | None,
    context: Mapping[str, Any] | None,
    options: dict[str, Any],
) -> EagerResult[Any]:
    """Run a job here and now; see `GraphTask.apply`."""
    headers = dict(options.pop("headers", None) or {})
    if not options.get("retries") and not large_jobs.holds_job(args, kwargs):
        settings = app_settings.app_settings(task.app)
        args, kwargs = _prepare(
            task, args, kwargs, headers, execution_id, context, options, settings, travels=False
        )
    if more:
        return run(args, kwargs, *more, headers=headers, **options)
    # Raised here: told to throw, Celery throws the Retry of a job that is to be tried again.
    throw = options.pop("throw", None)
    result = run(args, kwargs, headers=headers, throw=False, **options)
    if task.app.conf.task_eager_propagates if throw is None else throw:
        result.get(disable_sync_subtasks=False)
    return result


def find_handle(task: GraphTask[Any, Any], execution_id: str) -> RunHandle:
    """Return the run of that name; see `GraphTask.handle`."""
    settings, plan = app_settings.app_settings(task.app), task.plan()
    shared = task.graph.find_batch_store(plan, settings)
    store = task.graph.find_store(plan, settings) if shared is None else shared
    name = check_execution_id(execution_id)
    return RunHandle(store, task.graph.name, name, retention_s=settings.retention, threads=settings.threads)


def _prepare(
    task: GraphTask[Any, Any],
    args: Any,
    kwargs: Any,
    headers: dict[str, Any],
    execution_id: str | None,
    context: Mapping[str, Any] | None,
    options: dict[str, Any],
    settings: Settings,
    *,
    travels: bool = True,
) -> Arguments:
    """Check a job, write what names it into *headers*, and return its arguments; not *travels*: it runs here."""
    declared, args, kwargs = task.declaration, tuple(args or ()), dict[str, Any](kwargs or {})
    task.plan()  # a wiring fault is the caller's to see, not first the worker's
    refers = holds_stored(args, kwargs)
    messages = declared.bind(*(read_arguments(args, kwargs, task.app) if refers else (args, kwargs)))
    headers[DIGEST] = base64.b64encode(declared.digest(messages)).decode("ascii")
    if execution_id is None and headers.get(EXECUTION_ID) is None and task.execution_id is not None:
        execution_id = task.execution_id(*messages)
    _name_run(headers, execution_id, context)
    _note_batch_options(task, headers, options)
    if refers or not _travels(task, messages, settings):
        return large_jobs.arrange(task, messages, args, kwargs, settings, travels=travels)
    values = dict(zip(declared.signature.parameters, messages, strict=True))
    named = {name: values.pop(name) for name in kwargs}
    return tuple(values.values()), named


def _travels(task: GraphTask[Any, Any], values: Iterable[Any], settings: Settings) -> bool:
    """Tell whether a job goes by the ordinary door: single messages, none of them too large."""
    limit = settings.max_message_bytes
    return task.declaration.batch is None and not any(
        isinstance(value, Message) and value.ByteSize() > limit for value in values
    )


def _name_run(headers: dict[str, Any], execution_id: str | None, context: Mapping[str, Any] | None) -> None:
    """Write into *headers* what a submission says of its run."""
    for name in (*OF_ONE_DELIVERY, BATCH):
        # They speak of one delivery; whoever passes on the headers of a running task passes on these too.
        headers.pop(name, None)
    named = headers.get(EXECUTION_ID) if execution_id is None else execution_id
    if named is not None:
        headers[EXECUTION_ID] = check_execution_id(named)
    if context is not None or CONTEXT in headers:
        # In the headers of a running task it is a text already; older versions and callers may have a mapping.
        values = read_context(headers.get(CONTEXT)) if context is None else context
        headers[CONTEXT] = write_context(values)


def _note_batch_options(task: GraphTask[Any, Any], headers: dict[str, Any], options: dict[str, Any]) -> None:
    """Move what *options* ask of a batch into *headers*."""
    asked = take_batch_options(options) if options else {}
    if asked:
        read_batch_options(task, asked)
        if not task.plan().fans_out:
            raise InvalidArguments(next(iter(asked)), f"is about batches, and task {task.name} has none")
        headers[BATCH] = asked


def _publish(
    task: GraphTask[Any, Any],
    publish: Publish,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    task_id: str | None,
    more: Sequence[Any],
    headers: Mapping[str, Any],
    options: Mapping[str, Any],
) -> GraphResult[Any]:
    if task.routing:
        options = add_routing(task.routing, options)
    if options.get("countdown") is not None or options.get("eta") is not None:
        options = delays.whole_seconds(task.app, options)
    wrapped = tuple(map(wrap, args)), {name: wrap(value) for name, value in kwargs.items()}
    result = publish(*wrapped, task_id, *more, headers=headers, **options)
    result.execution_id = headers.get(EXECUTION_ID) or result.id
    return result


def _brief(value: Any) -> str:
    value = value.message if isinstance(value, Result) else value
    if isinstance(value, Stored):
        return repr(value)
    if isinstance(value, (list, tuple, BatchResult)):
        return f"<{len(cast('Sequence[Any]', value))} messages>"
    return brief(value) if isinstance(value, Message) else f"<{type(value).__name__}>"
