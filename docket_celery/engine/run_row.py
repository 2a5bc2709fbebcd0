"""A run as its row has it: the job and its digest, what a submission asks for, what a delivery leaves in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from google.protobuf.message import Message

from docket_celery.engine.run_context import RunContext, RunOutcome, Submission
from docket_celery.engine.stored_items import StoredBatch, StoredItems
from docket_celery.errors import (
    DocketError,
    RunCancelled,
    RunNotFound,
    RunQuarantined,
    StepFailed,
    StoreUnavailable,
    from_record,
    to_record,
)
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.batch import BatchResult
from docket_celery.plan.messages import (
    Value,
    check_size,
    frame,
    from_bytes,
    many_from_bytes,
    unframe,
    value_bytes,
    value_digest,
    value_name,
)
from docket_celery.plan.plan import Plan
from docket_celery.store.contract import BatchStore, Store
from docket_celery.store.identity import job_digest
from docket_celery.store.records import RunEnd, RunRequest, RunRow, RunState

_PLACE = b"stored"
"""Leads the stored result of a batch whose results are in rows of their own; no message type is called that."""
_COLLECTED = b"collected"
"""Leads the stored result of a batch whose items may fail; no message type is called that."""
_STORED = "docket_max_stored_bytes"
_MOST_DOUBLINGS = 4


def _named(given: Iterable[ValueKey], values: Iterable[Value]) -> Iterable[tuple[str, Value]]:
    """Return each value by the name of its type, and of `Named` where types do not tell."""
    return ((key.label(value_name(value)), value) for key, value in zip(given, values, strict=False))


def job_parts(given: Iterable[ValueKey], values: Iterable[Value]) -> list[tuple[str, bytes]]:
    """Return name and bytes of each value of a job; of one that is in the store, whose *values* are none, nothing."""
    return [(name, value_bytes(value)) for name, value in _named(given, values)]


def frame_job(given: Iterable[ValueKey], values: Iterable[Value]) -> bytes:
    """Return a job as the store keeps it."""
    return frame(part for name, data in job_parts(given, values) for part in (name.encode(), data))


def job_bytes(given: Iterable[ValueKey], values: Iterable[Value]) -> int:
    """Return how many bytes a job's messages and their names have as the store keeps them; a list counts nothing."""
    sizes = (
        16 + len(name.encode()) + value.ByteSize()
        for name, value in _named(given, values)
        if isinstance(value, Message)
    )
    return sum(sizes)


def digest_job(given: Iterable[ValueKey], values: Iterable[Value]) -> bytes:
    """Return the digest of a job; that of a batch is the same however its items come."""
    return job_digest((name, value_digest(value)) for name, value in _named(given, values))


def target_name(plan: Plan) -> str:
    """Return what a run of *plan* makes, as its row has it."""
    return f"list[{plan.target}]" if plan.collects else str(plan.target)


def run_request(
    plan: Plan, inputs: Sequence[Value], context: RunContext, store: Store, *, waits_for_other: bool
) -> RunRequest:
    """Return what a delivery asks *store* for; raise `PayloadTooLarge` for a job that cannot be stored."""
    submission, settings = context.submission, context.settings
    job = frame_job(plan.given, inputs)
    check_size(f"the job of run {context.execution_id!r}", len(job), settings.max_stored_bytes, _STORED)
    return RunRequest(
        graph=plan.graph,
        execution_id=context.execution_id,
        target=target_name(plan),
        job=job,
        job_digest=store.hmac_digest(submission.job_digest or digest_job(plan.given, inputs)),
        owner=context.owner,
        lease_s=settings.lease_seconds,
        max_deliveries=settings.max_deliveries,
        task_name=submission.task_name,
        task_id=submission.task_id,
        retries=submission.retries,
        waits_for_other=waits_for_other,
        ended_cleanly=submission.ended_cleanly,
        celery_retry=submission.celery_retry,
    )


def is_busy(row: RunRow, submission: Submission) -> bool:
    """Tell whether `Store.acquire` would refuse *submission* the run because another one holds its lease."""
    same = submission.task_id is not None and row.task_id == submission.task_id
    newer = same and submission.celery_retry and submission.retries > row.retries
    return row.state is RunState.RUNNING and (row.lease_left_s or 0.0) > 0.0 and not newer


def find_holder(store: Store, graph: str, submission: Submission) -> RunRow | None:
    """Return the run's row if another one holds its lease; asked before the whole job is sent once more.

    Raises `RunNotFound` if a run that was met before has ended and is purged: its effects are not repeated.
    """
    row = store.find_run(graph, submission.execution_id)
    if row is None and submission.waits_for_other:
        raise RunNotFound(graph, submission.execution_id)
    return row if row is not None and is_busy(row, submission) else None


def find_busy_s(row: RunRow, requeues: int) -> float:
    """Return in how many seconds to ask again for a run in this state, having asked *requeues* times before."""
    if row.state is RunState.WAITING:
        # What keeps an open stage to its task tells nothing of when that ends: ask less and less often.
        return 2.0 ** min(requeues, _MOST_DOUBLINGS)
    return max(0.0, row.lease_left_s or 0.0)


def run_end(outcome: RunOutcome, context: RunContext) -> RunEnd:
    """Return how *outcome* leaves the run's row; raise `PayloadTooLarge` for a result that cannot be stored."""
    submission, settings = context.submission, context.settings
    end = RunEnd(state=RunState.SUCCEEDED, executions=tuple(context.rows), retention_s=settings.retention)
    if outcome.value is not None:
        last = context.last
        result = _result_bytes(outcome.value) if last is None else last.output_data
        what = f"the result of run {context.execution_id!r}"
        check_size(what, len(result), settings.max_stored_bytes, _STORED)
        return replace(end, result=result, checkpoint=last, items_failed=len(outcome.failed) or None)
    error = outcome.error
    record = to_record(error) if isinstance(error, DocketError) else None
    if outcome.park_s is not None:
        ordinary = not isinstance(error, StoreUnavailable)
        return replace(
            end, state=RunState.WAITING, error=record, failed_once=ordinary, wake_in_s=outcome.park_s
        )
    ends_process = error is not None and not isinstance(error, Exception)
    if ends_process or isinstance(error, (StoreUnavailable, *submission.hands_back)):
        return replace(end, state=RunState.WAITING, error=record)
    if record is None:
        # An interruption by the host, such as a soft time limit, is no error of ours; its text must do.
        record = to_record(RunCancelled(submission.execution_id, repr(error)))
    state = RunState.CANCELLED if isinstance(error, RunCancelled) else RunState.FAILED
    state = RunState.QUARANTINED if isinstance(error, RunQuarantined) else state
    return replace(end, state=state, error=record)


def read_outcome(row: RunRow, plan: Plan, store: Store) -> RunOutcome:
    """Return the stored outcome of an ended run."""
    if row.state is RunState.SUCCEEDED:
        try:
            value = read_result(row, store, plan.target.kind, collects=plan.collects)
            return RunOutcome(value=value, replayed=True, stored=row.result)
        except DocketError as error:
            return RunOutcome(error=error)
    if row.state is RunState.QUARANTINED:
        return RunOutcome(error=RunQuarantined(row.graph, row.execution_id, row.lost), replayed=True)
    if row.error is not None:
        return RunOutcome(error=from_record(row.error), replayed=True)
    return RunOutcome(error=RunCancelled(row.execution_id, "cancelled earlier"), replayed=True)


def _result_bytes(value: Any) -> bytes:
    """Return a run's result as it is stored: of collected items, what failed first, then what there is."""
    if not isinstance(value, (StoredBatch, BatchResult)):
        return value_bytes(value)
    errors = {str(index): to_record(error) for index, error in value.errors.items()}
    if isinstance(value, StoredBatch):
        place = {"names": value.items.names, "total": value.items.total, "collects": value.collects}
        return frame((_PLACE, json.dumps({**place, "errors": errors}).encode()))
    made = [each for _, each in cast("BatchResult[Message]", value).succeeded()]
    return frame((_COLLECTED, json.dumps(errors).encode(), value_bytes(made)))


def read_result(row: RunRow, store: Store, kind: type[Message], *, collects: bool) -> Any:
    """Return the result of a run that SUCCEEDED, which *collects* if it is that of a batch.

    Then it is a list, a `BatchResult` or a `StoredBatch`, and *kind* is the type of each item. Raises
    `DecodeFailed` where the bytes are no such result.
    """
    data = row.result or b""
    if not collects:
        return from_bytes(kind, data)
    parts = unframe(data)
    if parts[:1] == [_PLACE] and isinstance(store, BatchStore):
        found = json.loads(parts[1])
        stored = {int(index): from_record(record) for index, record in found["errors"].items()}
        items = StoredItems(
            store=store,
            graph=row.graph,
            execution_id=row.execution_id,
            names=tuple(found["names"]),
            kind=kind,
            total=found["total"],
            failed=stored.keys(),
            job_digest=row.job_digest,
        )
        errors_by_index = cast("dict[int, StepFailed]", stored)
        return StoredBatch(items=items, collects=found["collects"], errors=errors_by_index)
    if parts[:1] != [_COLLECTED]:
        return many_from_bytes(kind, data)
    _, errors, made = parts
    failures = {int(index): from_record(record) for index, record in json.loads(errors).items()}
    values = iter(many_from_bytes(kind, made))
    total = len(failures) + len(unframe(made)) // 2
    results = tuple(None if index in failures else next(values) for index in range(total))
    return BatchResult(results, cast("dict[int, StepFailed]", failures))
