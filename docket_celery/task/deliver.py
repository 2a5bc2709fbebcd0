"""One delivery of a GraphTask: reads the job, runs it, tells Celery the value, an error, or when to come again."""

from __future__ import annotations

import base64
import functools
import os
import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

from celery import _state
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from google.protobuf.message import Message

from docket_celery.engine.attempt import Pushed
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.run_context import RunOutcome, Submission
from docket_celery.errors import DocketError, RunTimedOut, StoreMissing, StoreUnavailable
from docket_celery.plan.messages import Value
from docket_celery.store.identity import check_execution_id
from docket_celery.task import app_settings, backends, chords, large_jobs
from docket_celery.task.envelope import Result, is_large
from docket_celery.task.headers import (
    BATCH,
    CELERY_RETRIES,
    CONTEXT,
    DIGEST,
    ENDED_CLEANLY,
    EXECUTION_ID,
    OUTAGES,
    PART,
    WAITS_FOR_OTHER,
    read_context,
)
from docket_celery.task.options import read_batch_options
from docket_celery.task.references import Stored
from docket_celery.task.retries import keep, longest_wait_s, most_retries, park_s, send_copy

if TYPE_CHECKING:
    from docket_celery.task.task import AnyTask

_tasks: Any = cast("Any", _state)._task_stack
"""Celery's ``current_task`` is on top of it, on each thread."""


def deliver(task: AnyTask, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run one delivery of *task* and return its value for Celery.

    Raises:
        Ignore: The task has ended before, another delivery advances its run, or a stage of its batch was opened.
        Reject: Nothing could be published; the broker keeps the message.
        Retry: The run is delivered again later.
        Exception: Whatever ended the run.
    """
    request = task.request
    settings = app_settings.app_settings(task.app)
    if backends.is_redelivered(request) and backends.is_stored(task.backend, request):
        raise Ignore("the task has ended before; its message came once more")
    # A part of the job is in the store, perhaps in the run's own row.
    refers = any(isinstance(value, Stored) for value in (*args, *kwargs.values()))
    values = _read_job(task, request, args, kwargs, settings, refers=refers)
    submission = _submission(task, request, values or (), has_row=refers)
    outcome = _run(task, request, values, submission, settings)
    if outcome.busy_s is not None:
        _send_again(task, request, outcome.busy_s)
    if outcome.error is not None:
        _retry_or_raise(task, request, outcome, outcome.error)
    return _tell(task, request, outcome, submission, settings)


def _read_job(
    task: AnyTask,
    request: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    settings: Settings,
    *,
    refers: bool,
) -> tuple[Value, ...] | None:
    """Return the messages of the job; None: its parts are in the store."""
    declared = task.declaration
    direct, headers = bool(request.called_directly), _headers(request)
    if not direct and PART in headers:
        return None
    travelled = not (direct or request.is_eager)
    try:
        if refers:
            if declared.batch is not None and large_jobs.holds_job(args, kwargs):
                return None
            run = None if direct else large_jobs.ask(task, headers, request.id, settings)
            return large_jobs.receive(task, args, kwargs, run, settings, travelled=travelled)
        values = declared.bind(args, kwargs)
        if travelled and not declared.is_ordinary(values, settings):
            # Checked at submit too, but beat and `celery call` send the JSON form past it.
            declared.check_sizes(values, settings)
    except StoreUnavailable as error:
        wait_s = park_s(task, error, None, retries=request.retries, outages=_outages(request))
        _retry_or_raise(task, request, RunOutcome(error=error, park_s=None if direct else wait_s), error)
    except DocketError as error:
        if not direct:
            run = large_jobs.ask(task, headers, request.id, settings)
            large_jobs.give_up(task, run, error, settings)
        raise
    return values


def _run(
    task: AnyTask, request: Any, values: tuple[Value, ...] | None, submission: Submission, settings: Settings
) -> RunOutcome:
    """Run the job in this process, or, where its plan fans out, as a batch over several workers."""
    graph, plan = task.graph, task.plan()
    if plan.fans_out:
        batch = read_batch_options(task, _headers(request).get(BATCH), max(1, settings.threads))
        alone = request.called_directly or request.is_eager
        store = None if alone else graph.find_batch_store(plan, settings)
        submission = replace(submission, policy=batch.policy)
        if store is not None:
            return chords.BatchDelivery(task, plan, submission, settings, store, batch).run(values)
        submission = replace(submission, max_concurrency=batch.max_concurrency)
    if values is None:
        raise StoreMissing(graph.name, next(iter(plan)))
    return graph.deliver(plan, values, submission, settings)


def _submission(task: AnyTask, request: Any, values: Sequence[Value], *, has_row: bool) -> Submission:
    """Return who asks for the run, and how: the message's headers and the task say."""
    name_run = task.execution_id
    if request.called_directly:
        named = None if name_run is None else name_run(*values)
        return Submission(
            execution_id=str(uuid.uuid4()) if named is None else check_execution_id(named),
            task_name=task.name,
            max_concurrency=task.max_concurrency,
            may_help=process.may_help(),
            listeners=task.graph.listeners,
        )
    headers, outages = _headers(request), _outages(request)
    named, digest = headers.get(EXECUTION_ID), headers.get(DIGEST)
    if named is None and name_run is not None:
        named = name_run(*values)
    requeues = int(headers.get(WAITS_FOR_OTHER) or 0)
    return Submission(
        execution_id=check_execution_id(named or request.id),
        values=read_context(headers[CONTEXT]) if CONTEXT in headers else {},
        job_digest=None if digest is None else base64.b64decode(digest),
        timeout_s=app_settings.deadline_s(task, request),
        max_concurrency=task.max_concurrency,
        number=request.retries + 1,
        task_name=task.name,
        task_id=request.id,
        retries=request.retries - outages + int(headers.get(CELERY_RETRIES) or 0),
        waits_for_other=requeues > 0,
        requeues=requeues,
        ended_cleanly=headers.get(ENDED_CLEANLY) == request.retries,
        celery_retry=request.retries > outages,
        waits=bool(request.is_eager),
        may_help=False,
        listeners=task.graph.listeners,
        passthrough=(Ignore, Reject, Retry, SoftTimeLimitExceeded),
        hands_back=(Ignore, Reject, Retry),
        scopes=(functools.partial(Pushed, (_tasks, task), (task.request_stack, request)),),
        park_s=functools.partial(park_s, task, retries=request.retries, outages=outages),
        worker=f"{request.hostname}/{os.getpid()}",
        has_row=has_row,
    )


def _tell(
    task: AnyTask, request: Any, outcome: RunOutcome, submission: Submission, settings: Settings
) -> Any:
    """Return the value of a run that has ended, as Celery stores it."""
    value = outcome.value
    if outcome.receipt is not None:
        return chords.Receipt(outcome.receipt)
    if value is None:
        raise AssertionError(f"a run ended without a value: {outcome!r}")
    if request.called_directly or request.is_eager:
        return value
    result: Any = Result(value)
    if not isinstance(value, Message) or is_large(value, settings):
        result = large_jobs.wrap(task, value, submission.execution_id, outcome.stored, settings)
    if outcome.replayed and backends.is_stored(task.backend, request, result):
        raise Ignore("a copy of a delivery that ended before")
    if outcome.held or outcome.replayed:
        backends.note_ended(request)
    return result


def _retry_or_raise(task: AnyTask, request: Any, outcome: RunOutcome, error: BaseException) -> NoReturn:
    """Fail the task, or have Celery deliver it again: raises what tells Celery so."""
    if isinstance(error, RunTimedOut):
        error = SoftTimeLimitExceeded(error.timeout_s)
    countdown = outcome.park_s
    if countdown is None:
        raise error
    outages = _outages(request)
    headers = {**_headers(request)}
    if outcome.held:
        # A delivery that advanced the run must not restart it if others end it before its retry.
        headers |= {ENDED_CLEANLY: request.retries + 1, WAITS_FOR_OTHER: 1}
    elif isinstance(error, StoreUnavailable):
        # Not a retry in the sense of leases: the holder may be well, and must not be taken for dead.
        headers[OUTAGES] = outages + 1
        if headers.get(ENDED_CLEANLY) == request.retries:
            # A delivery that did not reach the database takes nothing back of what the one before it said.
            headers[ENDED_CLEANLY] = request.retries + 1
    if isinstance(error, StoreUnavailable):
        countdown = min(countdown, longest_wait_s(task.app))
    limit = most_retries(task, error, eager=bool(request.is_eager), outages=outages)
    retry = cast("Callable[..., Exception]", task.retry)
    try:
        raise retry(exc=error, countdown=countdown, max_retries=limit, headers=headers)
    except Reject as refused:
        # Celery drops the message of a retry that it cannot publish; the run would be lost.
        rejected: Any = refused  # its reason is missing from the stubs
        raise keep(request.id, rejected.reason) from error


def _send_again(task: AnyTask, request: Any, busy_s: float) -> NoReturn:
    """Come back later, since another delivery advances this run: no state is written.

    If the copy cannot be published, the broker keeps the original.
    """
    headers = _headers(request)
    most_s = min(busy_s, longest_wait_s(task.app))
    countdown = most_s * random.uniform(0.8, 1.0) + 0.1  # noqa: S311 -- spreads load, keeps no secret
    try:
        send_copy(task, request, countdown, {WAITS_FOR_OTHER: int(headers.get(WAITS_FOR_OTHER) or 0) + 1})
    except Exception as error:
        raise keep(request.id, error) from error
    raise Ignore(f"another delivery advances this run; back in {countdown:.1f} s")


def _headers(request: Any) -> Mapping[str, Any]:
    return request.headers or {}


def _outages(request: Any) -> int:
    """Return how many deliveries of the task so far did not reach the database."""
    return int(_headers(request).get(OUTAGES) or 0)
