"""A batch task on Celery: each stage is a chord whose header works on chunks and whose body carries on.

Every task of it is the same GraphTask; a header of its message says which part it is. Messages carry keys and ranges
only, since each header message holds a copy of the body.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, cast

from celery import Celery, chord
from celery.exceptions import Ignore, SoftTimeLimitExceeded

from docket_celery.batch_plan import BatchOrder
from docket_celery.batch_result import BatchPolicy
from docket_celery.batch_run import BatchRun
from docket_celery.checkpoint import job_digest
from docket_celery.chunk_run import ChunkRun
from docket_celery.configuration import Settings
from docket_celery.declaration import Declaration
from docket_celery.errors import StoreMissing
from docket_celery.graph import Graph
from docket_celery.messages import Value
from docket_celery.mutation import checked
from docket_celery.on_commit import PREPARED
from docket_celery.outcome import OpenStage, RunOutcome, Submission, job_parts
from docket_celery.plan import Plan
from docket_celery.retrying import keep
from docket_celery.waiting import run_here

EXECUTION_ID, CONTEXT, DIGEST, ATTACHED, RELEASED, SKIPPED, BATCH, PART, RETRIES = (
    "docket_execution_id",
    "docket_context",
    "docket_job_digest",
    "docket_attached",
    "docket_released",
    "docket_skipped",
    "docket_batch",
    "docket_part",
    "docket_retries",
)
OF_ONE_DELIVERY: Final = (ATTACHED, RELEASED, SKIPPED, PART, RETRIES)
"""Headers that speak of one delivery."""


class BatchTask(Protocol):
    """What is needed of a GraphTask here."""

    name: str
    graph: Graph
    declaration: Declaration

    @property
    def app(self) -> Celery: ...
    @property
    def request(self) -> Any: ...
    @classmethod
    def plan(cls) -> Plan: ...
    def signature(self, *args: Any, **kwargs: Any) -> Any: ...
    def replace(self, sig: Any) -> Any: ...


def read_order(task: Any, given: Mapping[str, Any] | None = None) -> BatchOrder:
    """Return how a batch is to be worked on: as the submission says, else the GraphTask or its class.

    Raises:
        InvalidArguments: A value cannot be used.
    """
    said = {name: value for name, value in (given or {}).items() if value is not None}
    usual = "collect" if task.declaration.form == "BatchResult" else "fail"
    on_error = said.get("on_error", task.on_error or usual)
    # A limit of the task's own means nothing to a submission under which no item may fail.
    max_failed = said.get("max_failed", task.max_failed if on_error == "collect" else None)
    return BatchOrder(
        policy=BatchPolicy(on_error, max_failed), chunk_size=said.get("chunk_size", task.chunk_size)
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Look at a task's options for batches where it is declared; Celery makes its class later.

    Raises:
        InvalidArguments: A value cannot be used.
    """
    max_failed = options.get("max_failed")
    on_error: Any = options.get("on_error") or ("fail" if max_failed is None else "collect")
    BatchOrder(policy=BatchPolicy(on_error, max_failed), chunk_size=options.get("chunk_size"))


def is_part(request: Any) -> bool:
    """Tell whether a delivery is of a part of a batch, whose job lies in the store."""
    return not request.called_directly and PART in (request.headers or {})


def write_order(task: Any, headers: dict[str, Any], asked: tuple[Any, Any, Any]) -> None:
    """Note in *headers* what a submission asks of its batch: ``on_error``, ``max_failed`` and ``chunk_size``.

    Raises:
        InvalidArguments: A value cannot be used.
    """
    names = ("on_error", "max_failed", "chunk_size")
    said = {name: value for name, value in zip(names, asked, strict=True) if value is not None}
    if said:
        read_order(task, said)
        headers[BATCH] = said


def deliver(
    task: BatchTask, values: Sequence[Value] | None, submission: Submission, settings: Settings
) -> RunOutcome:
    """Run one delivery of *task*, whichever part it is.

    Args:
        task: Whose it is.
        values: The job; None: a later part, whose job lies in the store.
        submission: Who asks for it, and how.
        settings: Those in force.

    Raises:
        StoreMissing: It is a part of a batch, and this worker has no database.
        DocketError: As from `Graph.deliver`.
    """
    request, declared, graph = task.request, task.declaration, task.graph
    headers: Mapping[str, Any] = request.headers or {}
    order, plan = read_order(task, headers.get(BATCH)), task.plan()
    alone = bool(request.called_directly or request.is_eager)
    store = None if alone else graph.find_batch_store(plan, settings)
    submission = replace(submission, policy=order.policy)
    if store is None:
        if values is None:
            raise StoreMissing(graph.name, next(iter(plan)))
        return graph.deliver(
            declared.target,
            values,
            submission,
            given=declared.given,
            batch=declared.batch,
            collects=declared.collects,
            settings=settings,
        )
    graph.freeze()
    plan = checked(plan) if settings.check_mutation else plan
    part: Mapping[str, Any] = headers.get(PART) or {}
    if values is None and "lo" in part:
        submission = replace(submission, passthrough=(SoftTimeLimitExceeded,), hands_back=())
        chunk = ChunkRun(plan, submission, settings, store, order, int(part["stage"]), int(part["lo"]))
        return run_here(chunk)
    if values is not None and submission.job_digest is None:
        # Sent past `apply_async`: the parts to come must name the same job.
        digest = job_digest(job_parts(declared.given, values))
        submission = replace(submission, job_digest=digest)
    outcome = run_here(BatchRun(plan, values, submission, settings, store, order))
    if outcome.opened is not None:
        _open(task, submission, outcome.opened)
    return outcome


def _open(task: BatchTask, submission: Submission, opened: OpenStage) -> None:
    """Replace *task* with the chord of a stage.

    Raises:
        Ignore: It was published.
        Reject: It could not be; the broker keeps the delivery, which finds the open stage.
    """
    request = task.request
    given: Mapping[str, Any] = request.headers or {}
    headers: dict[str, Any] = {name: v for name, v in given.items() if name not in OF_ONE_DELIVERY}
    headers[EXECUTION_ID] = submission.execution_id
    headers[DIGEST] = base64.b64encode(submission.job_digest or b"").decode("ascii")
    options = _options(request)
    body_part = {"stage": opened.stage, "total": opened.total}
    # The body has this task's id: it must look like a later delivery of it.
    body_headers: dict[str, Any] = {**headers, PART: body_part, RETRIES: submission.retries + 1}
    # Celery checks the arguments against the declared ones, on every submission.
    none = task.declaration.blank()
    body = task.signature(*none, immutable=True, headers=body_headers, **options)
    chunks = [
        task.signature(
            *none,
            immutable=True,
            headers={**headers, PART: {"stage": opened.stage, "lo": chunk.lo, "hi": chunk.hi}},
            ignore_result=False,
            **options,
        )
        for chunk in opened.chunks
    ]
    if request.ignore_result:
        body.set(ignore_result=True)
    try:
        task.replace(cast("Any", chord)(chunks, body, app=task.app))
    except Ignore:
        raise
    except Exception as error:
        raise keep(request.id, error) from error


def describe(headers: Mapping[str, Any]) -> str | None:
    """Return the text that stands for the arguments of a part, or None for a job itself."""
    part: Mapping[str, Any] | None = headers.get(PART)
    if not part:
        return None
    if "lo" in part:
        return f"(items {part['lo']} to {int(part.get('hi', part['lo'])) - 1} of stage {part['stage']})"
    return f"(after stage {part['stage']} of {part.get('total')} items)"


def _options(request: Any) -> dict[str, Any]:
    """Return where and how the parts of a batch travel: as their job did."""
    info: Mapping[str, Any] = request.delivery_info or {}
    hard, soft = request.timelimit or (None, None)
    options: dict[str, Any] = {PREPARED: True}
    options |= {name: v for name, v in (("time_limit", hard), ("soft_time_limit", soft)) if v is not None}
    if info.get("priority") is not None:
        options["priority"] = info["priority"]
    exchange, key = info.get("exchange"), info.get("routing_key")
    if not exchange and key:
        options["queue"] = key
    elif exchange:
        options |= {"exchange": exchange, "routing_key": key}
    return options
