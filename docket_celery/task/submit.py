"""The submitting side of a GraphTask: a job is bound, checked, named and published."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, cast

from celery.result import EagerResult
from google.protobuf.message import Message

from docket_celery.engine.handles import RunHandle
from docket_celery.engine.job import digest_job, job_bytes
from docket_celery.errors import InvalidArguments
from docket_celery.graph import Graph
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.messages import brief
from docket_celery.plan.plan import Plan
from docket_celery.store.identity import check_execution_id
from docket_celery.task import app_settings, chords, envelope, large_jobs, result, upload
from docket_celery.task.context import read_context, write_context
from docket_celery.task.declaration import Declaration, add_routing
from docket_celery.task.delays import whole_seconds
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
from docket_celery.task.on_commit import OnCommitTask
from docket_celery.task.result import GraphResult, R, StoredResult

P = ParamSpec("P")


class SubmittedTask(OnCommitTask[P, R]):
    """What callers use of a GraphTask; its attributes are explained there."""

    abstract = True
    graph: Graph
    execution_id: Callable[..., str] | None = None
    on_error: str | None = None
    max_failed: float | None = None
    chunk_size: int | None = None
    max_concurrency: int | None = None
    declaration: Declaration
    routing: Mapping[str, Any] = {}

    if TYPE_CHECKING:

        def delay(self, *args: P.args, **kwargs: P.kwargs) -> GraphResult[R]: ...

    def AsyncResult(self, task_id: str, **kwargs: Any) -> GraphResult[R]:  # noqa: N802 -- Celery's name
        """Return the promise of the task called *task_id*."""
        promise = GraphResult[R](task_id, backend=self.backend, task_name=self.name, app=self.app, **kwargs)
        promise.task = self
        return promise

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        *more: Any,
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> GraphResult[R]:
        """Submit a job.

        Args:
            args: The messages, positionally; their JSON form (a dict) is accepted too.
            kwargs: The messages by name.
            task_id: As in Celery; the run is named by *execution_id*.
            *more: Celery's further positional options.
            execution_id: Names the run; default: the task's ``execution_id`` function, else the task id.
            context: JSON values for ``ctx.values``: at most 16 KiB as JSON, 32 levels, without NaN and Infinity.
            **options: Celery's own; of a batch also ``on_error``, ``max_failed``, ``chunk_size`` and
                ``max_concurrency``, in place of the task's.

        Raises:
            GraphError: The graph has faults.
            InvalidArguments: An argument is missing or of another type, or the name cannot be used.
            PayloadTooLarge: The job is too large for a message, and for the store or there is none.
            RunConflict, StoreUnavailable: Of a job that is too large for a message and goes to the store.
        """
        headers = dict(options.pop("headers", None) or {})
        # The job's own delivery comes again: it was checked, and its headers are ours.
        again = options.pop(PREPARED, False) or options.get("retries")
        if not again:
            args, kwargs = self._prepare(args, kwargs, headers, execution_id, context)
            self._note_order(headers, options)
        args, kwargs = args or (), kwargs or {}
        options.setdefault("argsrepr", chords.describe(headers) or f"({', '.join(map(_brief, args))})")
        options.setdefault("kwargsrepr", f"{{{', '.join(f'{k}={_brief(v)}' for k, v in kwargs.items())}}}")
        # A copy that waits for its turn carries what its original did: nobody else may have stored that.
        if not options.get("retries") and PART not in headers and WAITS_FOR_OTHER not in headers:
            task_id = task_id or str(uuid.uuid4())
            run = queued_run(headers, task_id, options)
            args, kwargs = upload.send(self, args, kwargs, run) or large_jobs.send(self, args, kwargs, run)
        return self._publish(args, kwargs, task_id, *more, headers=headers, **options)

    def submit_batch(
        self,
        items: Iterable[Any],
        *others: Message,
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        task_id: str | None = None,
        **options: Any,
    ) -> GraphResult[R]:
        """Submit a batch whose items are read one after the other and stored, never all of them in memory.

        Args:
            items: Messages, or their JSON form; any iterable, read once, here and now.
            *others: The messages that all items share, in the order of the task's other parameters.
            execution_id: As for `apply_async`; the task's own function is not asked, since it takes the whole list.
            context: JSON values for ``ctx.values``: at most 16 KiB as JSON, 32 levels, without NaN and Infinity.
            task_id: As in Celery.
            **options: As for `apply_async`.

        Raises:
            InvalidArguments: An argument is of another type, the task takes no list, or the run must be named.
            InvalidSettings: This process has no ``docket_database_url``.
            PayloadTooLarge: An item is too large.
            RunConflict: The run exists with another job, or is being submitted by another process.
            StoreUnavailable: The database does not answer; submitting it again is safe, once the lease of what had
                begun is over (``docket_lease_seconds``).
        """
        self.plan()
        shared = self.declaration.bind_others(others)
        if self.app.conf.task_always_eager:
            eager = cast("Callable[..., GraphResult[R]]", self.apply_async)
            job = self.declaration.join(list(items), shared)
            return eager(job, None, task_id, execution_id=execution_id, context=context, **options)
        headers = dict(options.pop("headers", None) or {})
        if execution_id is None and EXECUTION_ID not in headers and self.execution_id is not None:
            raise InvalidArguments(
                "execution_id", f"task {self.name} names its runs by their items; name this one"
            )
        self._name_run(headers, execution_id, context)
        self._note_order(headers, options)
        task_id = task_id or str(uuid.uuid4())
        digest, stored = upload.upload(self, items, shared, queued_run(headers, task_id, options))
        headers[DIGEST] = base64.b64encode(digest).decode("ascii")
        args = tuple(stored.values())
        options |= {"argsrepr": f"({', '.join(map(repr, args))})", "kwargsrepr": "{}"}
        return self._publish(args, {}, task_id, headers=headers, **options)

    def handle(self, execution_id: str) -> RunHandle:
        """Return the run of that name, to cancel it.

        Raises:
            InvalidArguments: It cannot name a run.
            StoreMissing, InvalidSettings: This process has no database.
        """
        settings, plan = app_settings.app_settings(self.app), self.plan()
        shared = self.graph.find_batch_store(plan, settings)
        store = self.graph.find_store(plan, settings) if shared is None else shared
        name = check_execution_id(execution_id)
        return RunHandle(
            store, self.graph.name, name, retention_s=settings.retention, threads=settings.threads
        )

    def _note_order(self, headers: dict[str, Any], options: dict[str, Any]) -> None:
        chords.write_batch_options(self, headers, chords.take_batch_options(options))

    def _publish(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], *more: Any, **options: Any
    ) -> GraphResult[R]:
        submit = cast("Callable[..., GraphResult[R]]", super().apply_async)
        wrapped = tuple(map(envelope.wrap, args)), {name: envelope.wrap(v) for name, v in kwargs.items()}
        promise = submit(*wrapped, *more, **whole_seconds(self.app, add_routing(self.routing, options)))
        promise.execution_id = options["headers"].get(EXECUTION_ID)
        return promise

    def apply(
        self,
        args: Any = None,
        kwargs: Any = None,
        *more: Any,
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> EagerResult[R]:
        """Run a job here and now, as a worker would; arguments as in `apply_async`."""
        headers = dict(options.pop("headers", None) or {})
        if not options.get("retries") and not large_jobs.holds_job(args, kwargs):
            args, kwargs = self._prepare(args, kwargs, headers, execution_id, context, travels=False)
            self._note_order(headers, options)
        run = cast("Callable[..., EagerResult[R]]", super().apply)
        if more:
            return run(args, kwargs, *more, headers=headers, **options)
        # Raised here: told to throw, Celery throws the Retry of a job that is to be tried again.
        throw = options.pop("throw", None)
        result = run(args, kwargs, headers=headers, throw=False, **options)
        if self.app.conf.task_eager_propagates if throw is None else throw:
            result.get(disable_sync_subtasks=False)
        return result

    def _prepare(
        self,
        args: Any,
        kwargs: Any,
        headers: dict[str, Any],
        execution_id: str | None,
        context: Mapping[str, Any] | None,
        *,
        travels: bool = True,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = self.declaration.given
        self.plan()  # a wiring fault is the caller's to see, not first the worker's
        messages = self.declaration.bind(*result.read_results(args or (), kwargs or {}, self.app))
        headers[DIGEST] = base64.b64encode(digest_job(given, messages)).decode("ascii")
        named_run = headers.get(EXECUTION_ID) if execution_id is None else execution_id
        if named_run is None and self.execution_id is not None:
            named_run = self.execution_id(*messages)
        self._name_run(headers, named_run, context)
        size = job_bytes(given, messages) if travels else None
        streams = travels and upload.wants_upload(self, messages)
        return large_jobs.arrange(self, messages, args or (), kwargs or {}, size, streams=streams)

    def _name_run(
        self, headers: dict[str, Any], execution_id: str | None, context: Mapping[str, Any] | None
    ) -> None:
        for name in (*OF_ONE_DELIVERY, BATCH):
            # They speak of one delivery; whoever passes on the headers of a running task passes on these too.
            headers.pop(name, None)
        named_run = headers.get(EXECUTION_ID) if execution_id is None else execution_id
        if named_run is not None:
            headers[EXECUTION_ID] = check_execution_id(named_run)
        if context is not None or CONTEXT in headers:
            # In the headers of a running task it is a text already; older versions and callers may have a mapping.
            values = read_context(headers.get(CONTEXT)) if context is None else context
            headers[CONTEXT] = write_context(values)

    @classmethod
    def plan(cls) -> Plan:
        """Return the plan of this task.

        Raises:
            GraphError: The graph has faults.
        """
        return cls.declaration.compile(cls.graph)


def queued_run(
    headers: Mapping[str, Any], task_id: str | None, options: Mapping[str, Any]
) -> large_jobs.QueuedRun:
    """Return the run that a task with these headers asks for, where its job has been bound before."""
    return large_jobs.QueuedRun(
        execution_id=check_execution_id(headers.get(EXECUTION_ID) or task_id),
        job_digest=base64.b64decode(headers.get(DIGEST) or ""),
        task_id=task_id or "",
        wait_s=large_jobs.wait_s(options),
    )


def _brief(value: Any) -> str:
    value = value.message if isinstance(value, envelope.Result) else value
    if isinstance(value, large_jobs.StoredJob | StoredResult):
        return repr(value)
    if isinstance(value, (list, tuple, BatchResult)):
        return f"<{len(cast('Sequence[Any]', value))} messages>"
    return brief(value) if isinstance(value, Message) else f"<{type(value).__name__}>"
