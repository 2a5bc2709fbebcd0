"""`GraphTask`: one Celery task that resolves a graph inside the worker."""

from __future__ import annotations

import base64
import contextlib
import functools
import logging
import os
import random
import uuid
from collections.abc import Callable, Generator, Mapping
from typing import Any, NoReturn, ParamSpec, cast

from celery import Celery, _state
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from google.protobuf.message import Message

from docket_celery.engine.outcome import RunOutcome, Submission
from docket_celery.engine.process.state import process_defaults
from docket_celery.errors import DocketError, InvalidDeclaration, RunTimedOut, StoreUnavailable
from docket_celery.graph import Graph
from docket_celery.plan.messages import Value
from docket_celery.plan.step import locate
from docket_celery.store.identity import check_execution_id
from docket_celery.task import app_settings, backends, chords, envelope, large_jobs, result, sweeper, worker
from docket_celery.task.context import read_context
from docket_celery.task.declaration import (
    Declaration,
    check_name_function,
    check_options,
    check_step_options,
    note_graph,
    read_function,
    read_generic,
    take_routing,
)
from docket_celery.task.headers import (
    CELERY_RETRIES,
    CONTEXT,
    DIGEST,
    ENDED_CLEANLY,
    EXECUTION_ID,
    OUTAGES,
    PREPARED,
    WAITS_FOR_OTHER,
)
from docket_celery.task.result import R
from docket_celery.task.retries import Kinds, keep, most_retries, park_s, visibility_s, with_causes
from docket_celery.task.submit import SubmittedTask, queued_run

_logger = logging.getLogger("docket_celery.task")
P = ParamSpec("P")
_BUSY_MOST_S = 15.0


class GraphTask(SubmittedTask[P, R]):
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
    declared: Callable[..., Any] | None = None
    declared_max_retries: int | None = 3
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _is_function(cls.__dict__.get("execution_id")):
            # A function in a class body is a method; this one takes the messages alone.
            cls.execution_id = staticmethod(cls.__dict__["execution_id"])
        name = str(cls.__dict__.get("name") or cls.__name__)
        if "graph" not in cls.__dict__:
            if cls.__dict__.get("_decorated"):
                raise InvalidDeclaration(name, "it names no graph, so its body would run; pass graph=")
            return
        if not isinstance(cls.graph, Graph):
            raise InvalidDeclaration(name, f"graph= must be a docket_celery.Graph, not {cls.graph!r}")
        cls.abstract = False
        check_step_options(name, cls.__dict__)
        if cls.__dict__.get("_decorated"):
            check_options(name, cls.__dict__, dir(GraphTask))
        cls.declaration = _declare(cls, name)
        check_name_function(name, cls.execution_id, cls.declaration.given)
        cls.declared_max_retries = cls.max_retries
        cls.routing = take_routing(cls)
        cls.throws = with_causes(cls.throws)
        chords.read_batch_options(cls)
        for key in (*cls.declaration.given, cls.declaration.target):
            envelope.types.allow(key.kind)

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Look at the wiring once all modules are imported; a fault is logged here and stops a worker's start."""
        if "graph" in cls.__dict__:
            where = (
                locate(cls.declared)
                if cls.declared is not None
                else f"class {cls.__module__}.{cls.__qualname__}"
            )
            note_graph(app, cls.name, cls.graph, where)
            worker.watch_task(app)
            sweeper.watch(app)

    @property
    def backend(self) -> Any:
        """The result backend; in a process that runs tasks it waits for a server that is away."""
        found = super().backend
        return backends.patient(found) if app_settings.runs_tasks() else found

    @backend.setter
    def backend(self, value: Any) -> None:
        self._backend = value

    # --- running -----------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Resolve the graph for one delivery; Celery calls this."""
        request = self.request
        direct = bool(request.called_directly)
        settings = app_settings.app_settings(self.app)
        if backends.is_redelivered(request) and backends.is_stored(self.backend, request):
            raise Ignore("the task has ended before; its message came once more")
        queued = None if direct else queued_run(request.headers or {}, request.id, {})
        try:
            travelled = not (direct or request.is_eager)
            read = functools.partial(large_jobs.receive, self, args, kwargs, queued, travelled=travelled)
            stored = self.declaration.batch is not None and large_jobs.holds_job(args, kwargs)
            messages = None if stored or chords.is_part(request) else read()
        except StoreUnavailable as error:
            wait_s = park_s(self, error, None, retries=request.retries, outages=_outages(request))
            self._raise(RunOutcome(error=error, park_s=None if direct else wait_s), error)
        except DocketError as error:
            if queued is not None:
                large_jobs.give_up(self, queued, error)
            raise
        submission = (self._direct if direct else self._delivered)(messages or ())
        outcome = chords.deliver(self, messages, submission, settings)
        if outcome.busy_s is not None:
            self._send_again(outcome.busy_s)
        if outcome.error is not None:
            self._raise(outcome, outcome.error)
        value: Any = outcome.value if outcome.receipt is None else chords.Receipt(outcome.receipt)
        if value is None:
            raise AssertionError(f"a run ended without a value: {outcome!r}")
        if direct or request.is_eager or outcome.receipt is not None:
            return value
        result: Any = envelope.Results(value)
        if isinstance(value, Message):
            result = large_jobs.wrap(self, value, submission.execution_id, outcome.stored)
        if outcome.replayed and backends.is_stored(self.backend, request, result):
            raise Ignore("a copy of a delivery that ended before")
        if outcome.held or outcome.replayed:
            backends.note_ended(request)
        return result

    def _direct(self, messages: tuple[Value, ...]) -> Submission:
        named = None if self.execution_id is None else self.execution_id(*messages)
        execution_id = str(uuid.uuid4()) if named is None else check_execution_id(named)
        return Submission(
            execution_id=execution_id,
            task_name=self.name,
            may_help=process_defaults.may_help(),
            listeners=self.graph.listeners,
        )

    def _delivered(self, messages: tuple[Value, ...]) -> Submission:
        request = self.request
        headers: Mapping[str, Any] = request.headers or {}
        execution_id = headers.get(EXECUTION_ID)
        if execution_id is None and self.execution_id is not None:
            execution_id = self.execution_id(*messages)
        digest = headers.get(DIGEST)
        outages = _outages(request)
        return Submission(
            execution_id=check_execution_id(execution_id or request.id),
            values=read_context(headers.get(CONTEXT)),
            job_digest=None if digest is None else base64.b64decode(digest),
            timeout_s=app_settings.deadline_s(self, request),
            number=request.retries + 1,
            task_name=self.name,
            task_id=request.id,
            retries=request.retries - outages + int(headers.get(CELERY_RETRIES) or 0),
            waits_for_other=bool(headers.get(WAITS_FOR_OTHER)),
            requeues=int(headers.get(WAITS_FOR_OTHER) or 0),
            ended_cleanly=headers.get(ENDED_CLEANLY) == request.retries,
            celery_retry=request.retries > outages,
            waits=bool(request.is_eager),
            may_help=False,
            listeners=self.graph.listeners,
            passthrough=(Ignore, Reject, Retry, SoftTimeLimitExceeded),
            hands_back=(Ignore, Reject, Retry),
            scopes=(_scope(self, request),),
            park_s=functools.partial(park_s, self, retries=request.retries, outages=outages),
            worker=f"{request.hostname}/{os.getpid()}",
        )

    # --- ending a delivery -------------------------------------------------------------------------------------

    def _raise(self, outcome: RunOutcome, error: BaseException) -> NoReturn:
        """Fail the task, or have Celery deliver it again.

        Raises:
            BaseException: Always.
        """
        if isinstance(error, RunTimedOut):
            error = SoftTimeLimitExceeded(error.timeout_s)
        if outcome.park_s is None:
            raise error
        request = self.request
        headers: dict[str, Any] = dict(request.headers or {})
        if outcome.held:
            # A delivery that advanced the run may not start it anew should others end it before its retry.
            headers |= {ENDED_CLEANLY: request.retries + 1, WAITS_FOR_OTHER: True}
        elif isinstance(error, StoreUnavailable):
            # Not a retry in the sense of leases: the holder may be well, and must not be taken for dead.
            headers[OUTAGES] = _outages(request) + 1
        countdown = outcome.park_s
        if isinstance(error, StoreUnavailable):
            countdown = min(countdown, visibility_s(self.app) / 3)
        limit = most_retries(self, error, eager=bool(request.is_eager), outages=_outages(request))
        retry = cast("Callable[..., Exception]", self.retry)
        try:
            raise retry(exc=error, countdown=countdown, max_retries=limit, headers=headers)
        except Reject as refused:
            # Celery drops the message of a retry that it cannot publish; the run would be lost.
            rejected: Any = refused  # its reason is missing from the stubs
            raise keep(request.id, rejected.reason) from error

    def _send_again(self, busy_s: float) -> None:
        """Another delivery advances this run: come back later, without using up a retry or writing a state.

        Raises:
            Ignore: The copy is published.
            Reject: It could not be; the broker keeps the original.
        """
        request = self.request
        most_s = min(busy_s, _BUSY_MOST_S, visibility_s(self.app) / 3)
        countdown = most_s * random.uniform(0.8, 1.0) + 0.1  # noqa: S311 -- spreads load, keeps no secret
        known: Mapping[str, Any] = request.headers or {}
        headers = {**known, WAITS_FOR_OTHER: int(known.get(WAITS_FOR_OTHER) or 0) + 1}
        # A worker took the job up in time: while it waits for its turn it does not expire.
        again: Any = self.signature_from_request(
            request, countdown=countdown, retries=request.retries, headers=headers, expires=None
        )
        try:
            again.apply_async(add_to_parent=False, **{PREPARED: True})
        except Exception as error:
            raise keep(request.id, error) from error
        raise Ignore(f"another delivery advances this run; back in {countdown:.1f} s")


def _scope(task: GraphTask[Any, Any], request: Any) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a scope in which ``current_task`` and its request are what they are in the task's own thread."""
    stack: Any = cast("Any", _state)._task_stack

    @contextlib.contextmanager
    def scope() -> Generator[None]:
        stack.push(task)
        task.request_stack.push(request)
        try:
            yield
        finally:
            task.request_stack.pop()
            stack.pop()

    return scope


def _outages(request: Any) -> int:
    """Return how many deliveries of the task so far did not even get at the database."""
    headers: Mapping[str, Any] = request.headers or {}
    return int(headers.get(OUTAGES) or 0)


def _is_function(value: object) -> bool:
    """Tell whether *value* is a plain function, which would become a method on a class."""
    return callable(value) and hasattr(value, "__get__") and not isinstance(value, type)


def _declare(cls: type[GraphTask[Any, Any]], name: str) -> Declaration:
    """Read the declared function or the generic arguments, and put the graph's `run` in their place."""
    declared = cls.__dict__.get("run")
    if declared is None:
        for base in cls.__dict__.get("__orig_bases__", ()):
            arguments = getattr(base, "__args__", ())
            if getattr(base, "__origin__", None) is GraphTask and arguments:
                return read_generic(name, arguments)
        raise InvalidDeclaration(name, "write class X(GraphTask[[InputType], OutputType]) or declare run()")
    if not isinstance(declared, staticmethod):
        if cls.__dict__.get("_decorated"):
            raise InvalidDeclaration(name, "bind=True hands the task to a body that never runs; drop it")
        raise InvalidDeclaration(name, "declare the types as GraphTask[[...], ...] and drop its run method")
    function = declared.__func__
    del cls.run
    cls.declared = staticmethod(function)
    return read_function(name, function)


envelope.install()
result.install()
large_jobs.install()
worker.install()
sweeper.install()
