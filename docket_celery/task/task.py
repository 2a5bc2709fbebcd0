"""`GraphTask`: one Celery task that resolves a graph inside the worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, cast

from celery import Celery, Task
from celery.result import EagerResult
from google.protobuf.message import Message

from docket_celery.engine.handles import RunHandle
from docket_celery.graph import Graph
from docket_celery.plan.plan import Plan
from docket_celery.plan.step import locate
from docket_celery.task import backends, deliver, submit, worker
from docket_celery.task.app_settings import this_worker
from docket_celery.task.declaration import Declaration, declare, note_graph
from docket_celery.task.result import GraphResult, R
from docket_celery.task.retries import Kinds

P = ParamSpec("P")
AnyTask: TypeAlias = "GraphTask[Any, Any]"


class GraphTask(Task[P, R]):
    """A Celery task whose body is a graph. Declare it with `graph_task`, as a class, or with ``base=GraphTask``.

    Class attributes besides Celery's own:
        graph: The graph to run.
        execution_id: Optional function of the messages giving the name of the run.
        on_error: Of a batch: ``fail`` with the first failed item, or ``collect``; default: as its result says.
        max_failed: ``collect`` only: how many items may fail, as a count or as a share (a float from 0 to 1).
        chunk_size: Items that one task works on; default: chosen from how many there are.
        max_concurrency: Most items under way at once over all workers; default: as many as they have threads.
    """

    abstract = True
    graph: Graph
    execution_id: Callable[..., str] | None = None
    on_error: str | None = None
    max_failed: float | None = None
    chunk_size: int | None = None
    max_concurrency: int | None = None
    declaration: Declaration
    checked_plan: tuple[int, Plan] | None = None
    declared: Callable[..., Any] | None = None
    declared_max_retries: int | None = 3
    routing: Mapping[str, Any] = {}
    acks_late = True
    retry_on_worker_lost = True
    track_started = True
    default_retry_delay = 1
    autoretry_for: Kinds = ()
    dont_autoretry_for: Kinds = ()
    retry_backoff: bool | float = False
    retry_backoff_max: int = 600
    retry_jitter: bool = True
    retry_kwargs: Mapping[str, Any] = {}
    # Celery wraps `run` for autoretry unless this exists; failures are matched with their causes here instead.
    _orig_run = None
    Request = "docket_celery.task.request:GraphRequest"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.checked_plan = None  # not that of the task whose class this one is made from
        declare(cls, GraphTask)

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Look at the wiring once all modules are imported; a fault is logged here and stops a worker's start."""
        if "graph" in cls.__dict__:
            if cls.serializer != "auth":
                cls.serializer = "json"  # whatever the app's other tasks have
            declared = cls.declared
            where = f"class {cls.__module__}.{cls.__qualname__}" if declared is None else locate(declared)
            note_graph(app, cls.name, cls.graph, where)
            worker.connect(app)

    @property
    def backend(self) -> Any:
        """The result backend; in a process that runs tasks it waits for a server that is away."""
        found = super().backend
        return backends.patient(found) if this_worker.runs_tasks else found

    @backend.setter
    def backend(self, value: Any) -> None:
        self._backend = value

    @classmethod
    def plan(cls) -> Plan:
        """Return the plan of this task.

        Raises:
            GraphError: The graph has faults.
        """
        return cls.declaration.compile(cls.graph)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Resolve the graph for one delivery; Celery calls this."""
        return deliver.deliver(self, args, kwargs)

    # --- submitting --------------------------------------------------------------------------------------------

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
        options |= {"task_id": task_id, "execution_id": execution_id, "context": context}
        options |= zip(("producer", "link", "link_error", "shadow"), more, strict=False)
        return submit.submit(self, cast("Any", super().apply_async), args, kwargs, options)

    def delay_on_commit(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Submit a job when Django's transaction commits; at once outside of one, never if it is rolled back.

        Raises:
            InvalidArguments, PayloadTooLarge: As `delay`, here and now; what a server says, at the commit.
            ImportError: Django is not installed.
        """
        self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(
        self,
        args: Any = None,
        kwargs: Any = None,
        *more: Any,
        execution_id: str | None = None,
        context: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Submit a job like `apply_async` when Django's transaction commits: the job as it is now.

        Arguments as for `apply_async`.

        Raises:
            InvalidArguments, PayloadTooLarge: As `apply_async`, here and now; what a server says, at the commit.
            ImportError: Django is not installed.
        """
        options |= {"execution_id": execution_id, "context": context}
        options |= zip(("task_id", "producer", "link", "link_error", "shadow"), more, strict=False)
        submit.submit_on_commit(self, args, kwargs, options)

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
        options |= {"task_id": task_id, "execution_id": execution_id, "context": context}
        return submit.submit_batch(self, cast("Any", super().apply_async), items, others, options)

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
        options |= {"execution_id": execution_id, "context": context}
        options |= zip(("link", "link_error", "task_id", "retries", "throw"), more, strict=False)
        return submit.run_eagerly(self, cast("Any", super().apply), args, kwargs, options)

    def handle(self, execution_id: str) -> RunHandle:
        """Return the run of that name, to cancel it.

        Raises:
            InvalidArguments: It cannot name a run.
            StoreMissing, InvalidSettings: This process has no database.
        """
        return submit.find_handle(self, execution_id)
