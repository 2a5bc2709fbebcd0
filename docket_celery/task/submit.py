"""The submitting side of a GraphTask: a job is bound, checked, named and published."""

from __future__ import annotations

import base64
import copy
import functools
import importlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from celery.result import EagerResult
from google.protobuf.message import Message

from docket_celery.engine.handles import RunHandle
from docket_celery.errors import InvalidArguments
from docket_celery.plan.batch import BatchResult
from docket_celery.store.identity import check_execution_id
from docket_celery.store.records import RunRequest
from docket_celery.task import app_settings, chords, large_jobs, upload
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
    read_context,
    write_context,
)
from docket_celery.task.options import add_routing, read_batch_options, take_batch_options
from docket_celery.task.references import Arguments, Stored, read_arguments
from docket_celery.task.result import GraphResult
from docket_celery.task.retries import whole_seconds

if TYPE_CHECKING:
    from docket_celery.task.task import AnyTask

Publish = Callable[..., GraphResult[Any]]
_NOT_PASSED_ON: Final = {*OF_ONE_DELIVERY, BATCH}


def submit(
    task: AnyTask, publish: Publish, args: Any, kwargs: Any, options: dict[str, Any]
) -> GraphResult[Any]:
    """Submit a job, or a later delivery of one, by Celery's own `apply_async`; see `GraphTask.apply_async`."""
    call, args, kwargs = _Call(task, options), tuple(args or ()), dict[str, Any](kwargs or {})
    # A later delivery of a job was checked before, and its headers are ours.
    if not (options.pop(PREPARED, False) or options.get("retries")):
        args, kwargs = call.prepare(args, kwargs)
    headers = call.headers
    shown = chords.describe(headers[PART]) if PART in headers else f"({', '.join(map(_brief, args))})"
    options.setdefault("argsrepr", shown)
    options.setdefault("kwargsrepr", f"{{{', '.join(f'{k}={_brief(v)}' for k, v in kwargs.items())}}}")
    # A copy that waits for its turn carries what its original did: only that may have been stored.
    first = not options.get("retries") and PART not in headers and WAITS_FOR_OTHER not in headers
    if first and not (
        call.ordinary or task.declaration.is_ordinary((*args, *kwargs.values()), call.settings)
    ):
        send = upload.send if large_jobs.wants_upload(task, args, kwargs, call.settings) else large_jobs.send
        args, kwargs = send(task, args, kwargs, *call.ask(), call.settings)
    return call.publish(publish, args, kwargs)


def submit_on_commit(task: AnyTask, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
    """Submit a job as it is now when Django's transaction commits; see `GraphTask.apply_async_on_commit`."""
    call = _Call(task, options)
    job = copy.deepcopy(call.prepare(tuple(args or ()), dict(kwargs or {})))
    options |= {"task_id": call.task_id, "headers": call.headers, PREPARED: True}
    transaction: Any = importlib.import_module("django.db.transaction")
    transaction.on_commit(functools.partial(task.apply_async, *job, **options))


def submit_batch(
    task: AnyTask,
    publish: Publish,
    items: Iterable[Any],
    others: Sequence[Message],
    options: dict[str, Any],
) -> GraphResult[Any]:
    """Store a batch page by page, then submit it; see `GraphTask.submit_batch`."""
    task.plan()
    shared = task.declaration.bind_others(others)
    if task.app.conf.task_always_eager:
        eager: Publish = task.apply_async
        return eager(task.declaration.join(list(items), shared), **options)
    call = _Call(task, options)
    if call.execution_id is None and EXECUTION_ID not in call.headers and task.execution_id is not None:
        raise InvalidArguments(
            "execution_id", f"task {task.name} names its runs by their items; name this one"
        )
    call.write_headers()
    digest, stored = upload.upload(task, items, shared, *call.ask(), call.settings)
    call.headers[DIGEST] = base64.b64encode(digest).decode("ascii")
    options |= {"argsrepr": f"({', '.join(map(repr, stored))})", "kwargsrepr": "{}"}
    return call.publish(publish, stored, {})


def run_eagerly(
    task: AnyTask, run: Callable[..., EagerResult[Any]], args: Any, kwargs: Any, options: dict[str, Any]
) -> EagerResult[Any]:
    """Run a job here and now by Celery's own `apply`; see `GraphTask.apply`."""
    call = _Call(task, options)
    if not options.get("retries") and not large_jobs.holds_job(args, kwargs):
        args, kwargs = call.prepare(tuple(args or ()), dict(kwargs or {}), leaves=False)
    # Raised here: told to throw, Celery throws the Retry of a job that is to be tried again.
    throw = options.pop("throw", None)
    result = run(args, kwargs, task_id=call.task_id, headers=call.headers, throw=False, **options)
    if task.app.conf.task_eager_propagates if throw is None else throw:
        result.get(disable_sync_subtasks=False)
    return result


def find_handle(task: AnyTask, execution_id: str) -> RunHandle:
    """Return the run of that name; see `GraphTask.handle`."""
    settings = app_settings.app_settings(task.app)
    store = task.graph.find_store(task.plan(), settings)
    name = check_execution_id(execution_id)
    return RunHandle(store, task.graph.name, name, retention_s=settings.retention, threads=settings.threads)


class _Call:
    """What a caller says of a job besides its messages; Celery's own options are left in *options*.

    It is `ordinary` once `prepare` has found that no part of the job can have to go to the store.
    """

    ordinary = False

    def __init__(self, task: AnyTask, options: dict[str, Any]) -> None:
        self.headers: dict[str, Any] = dict(options.pop("headers", None) or {})
        self.execution_id: str | None = options.pop("execution_id", None)
        self._context: Mapping[str, Any] | None = options.pop("context", None)
        self.task_id: str | None = options.pop("task_id", None)
        self._task, self._options = task, options
        self.settings = app_settings.app_settings(task.app)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, leaves: bool = True) -> Arguments:
        """Check a job, write what names it into the headers, and return its arguments; not *leaves*: it runs here."""
        task, declared = self._task, self._task.declaration
        steps, checked = len(task.graph.registrations), task.checked_plan
        if checked is None or checked[0] != steps:
            # A wiring fault is the caller's to see, not first the worker's.
            checked = type(task).checked_plan = steps, task.plan()
        plan = checked[1]
        refers = any(isinstance(value, Stored) for value in (*args, *kwargs.values()))
        messages = declared.bind(*(read_arguments(args, kwargs, task.app) if refers else (args, kwargs)))
        self.ordinary = not refers and declared.is_ordinary(messages, self.settings)
        self.headers.pop(DIGEST, None)
        if plan.persists or plan.fans_out or not self.ordinary:
            # Else no row has it; a worker whose graph keeps something takes it from the messages.
            self.headers[DIGEST] = base64.b64encode(declared.digest(messages)).decode("ascii")
        if self.execution_id is None and self.headers.get(EXECUTION_ID) is None:
            self.execution_id = None if task.execution_id is None else task.execution_id(*messages)
        self.write_headers()
        if self.ordinary:
            return declared.as_given(messages, kwargs) if kwargs else (messages, {})
        return large_jobs.arrange(task, messages, args, kwargs, self.settings, leaves=leaves)

    def write_headers(self) -> None:
        """Write what names the run, its context, and what is asked of its batch; raises InvalidArguments."""
        headers, task = self.headers, self._task
        for name in headers.keys() & _NOT_PASSED_ON:
            # They speak of one delivery; a caller that passes on a running task's headers passes on these too.
            del headers[name]
        named = headers.get(EXECUTION_ID) if self.execution_id is None else self.execution_id
        if named is not None:
            headers[EXECUTION_ID] = check_execution_id(named)
        if self._context is not None or CONTEXT in headers:
            # In the headers of a running task it is a text already; older versions and callers may have a mapping.
            given = read_context(headers.get(CONTEXT)) if self._context is None else self._context
            headers[CONTEXT] = write_context(given)
        if not self._options:
            return
        asked = take_batch_options(self._options)
        if asked:
            read_batch_options(task, asked)
            if not task.plan().fans_out:
                raise InvalidArguments(next(iter(asked)), f"is about batches, and task {task.name} has none")
            headers[BATCH] = asked

    def ask(self) -> tuple[RunRequest, float]:
        """Return what the task will ask of its run's row, and for how long to keep that; its task is named now."""
        self.task_id = self.task_id or str(uuid.uuid4())
        run = large_jobs.ask(self._task, self.headers, self.task_id, self.settings)
        return run, large_jobs.keep_s(self._options, self.settings)

    def publish(self, publish: Publish, args: Sequence[Any], kwargs: Mapping[str, Any]) -> GraphResult[Any]:
        """Send the task through Celery."""
        options: Mapping[str, Any] = self._options
        if self._task.routing:
            options = add_routing(self._task.routing, options)
        if options.get("countdown") is not None or options.get("eta") is not None:
            options = whole_seconds(self._task.app, options)
        wrapped = tuple(map(wrap, args)), {name: wrap(value) for name, value in kwargs.items()}
        promise = publish(*wrapped, self.task_id, headers=self.headers, **options)
        promise.execution_id = self.headers.get(EXECUTION_ID) or promise.id
        return promise


def _brief(value: Any) -> str:
    if isinstance(value, (Message, list, tuple, BatchResult)):
        value = Result(value)  # pyright: ignore[reportUnknownArgumentType]  # whatever it is of
    return repr(value) if isinstance(value, Result | Stored) else f"<{type(value).__name__}>"
