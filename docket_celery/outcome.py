"""Who asks for a run, how its delivery ended, and what that means for its row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from google.protobuf.message import Message

from docket_celery.annotation import ValueKey
from docket_celery.batch_result import ONE_FAILS, BatchPolicy, BatchResult
from docket_celery.checkpoint import (
    Chunk,
    Lease,
    RunEnd,
    RunRequest,
    RunRow,
    RunState,
    StepExecution,
    Store,
    job_digest,
)
from docket_celery.chunks import BatchStore, Lanes, Progress
from docket_celery.configuration import Settings
from docket_celery.error_records import from_record, to_record
from docket_celery.errors import (
    DocketError,
    RunCancelled,
    RunQuarantined,
    StepFailed,
    StoreUnavailable,
)
from docket_celery.events import Listener
from docket_celery.messages import (
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
from docket_celery.plan import Plan
from docket_celery.stored_items import ItemPlace, StoredBatch, StoredItems
from docket_celery.surroundings import MakeScope

_PLACE = b"stored"
"""Leads the stored result of a batch whose results lie in rows of their own; no message type is called that."""
_COLLECTED = b"collected"
"""Leads the stored result of a batch whose items may fail; no message type is called that."""

_STORED = "docket_max_stored_bytes"
_MOST_DOUBLINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Who asks for a run, and how.

    Attributes:
        job_digest: Taken where the job was submitted; None: taken here over the inputs.
        number: Delivery number when there is no lease to count them.
        attached: This submission waits for the outcome of a run that somebody else advances.
        waited: How often it was sent again for that.
        released: The task's delivery before this one ended in order.
        retried: Celery tries the task again, as `RunRequest.retried`.
        max_concurrency: Most steps at once, or, of a plan that fans out, most items.
        policy: How a fan-out treats its items.
        waits: Wait here while another holder advances the run; False: end with `Busy`.
        may_help: The calling thread may run steps itself.
        park_s: Asked with an error and the lease: seconds until the run is delivered again, or None to end it.
        hands_back: After these another delivery shall go on: the run is left WAITING, as it is after whatever ends
            a process or a greenlet (SystemExit, KeyboardInterrupt, GreenletExit, a cancelled asyncio task).
        worker: Who runs it, for the record.
        refreshes: Compute GLOBAL outputs anew and replace those that are stored.
    """

    execution_id: str
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    job_digest: bytes | None = None
    timeout_s: float | None = None
    max_concurrency: int | None = None
    policy: BatchPolicy = ONE_FAILS
    number: int = 1
    task_name: str | None = None
    task_id: str | None = None
    retries: int = 0
    attached: bool = False
    waited: int = 0
    released: bool = False
    retried: bool = True
    waits: bool = True
    may_help: bool = True
    listeners: Sequence[Listener] = ()
    passthrough: tuple[type[BaseException], ...] = ()
    hands_back: tuple[type[BaseException], ...] = ()
    scopes: Sequence[MakeScope] = ()
    park_s: Callable[[BaseException, Lease | None], float | None] | None = None
    worker: str = ""
    refreshes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStage:
    """A stage of a batch that other tasks are to work on.

    Attributes:
        stage: Counted from 1.
        chunks: Those that are not done.
        total: Items of the whole stage.
        chunk_size: Items of each chunk of the stage but the last.
        lanes: How it is to be worked on, if there is a limit over all workers.
    """

    stage: int
    chunks: tuple[Chunk, ...]
    total: int
    chunk_size: int
    lanes: Lanes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How a delivery ended.

    Attributes:
        value: The target: a message, of a batch a list or a `BatchResult`; None where there is none.
        error: What ended it, or None.
        busy_s: Another holder advances the run; its lease expires in so many seconds.
        park_s: The run is parked; deliver it again in so many seconds.
        replayed: The run had ended before; nothing ran here.
        stored: The result as the run's row has it, if replayed. A newer worker may have written fields that this one
            does not know, and would encode in another order.
        held: This delivery had the run's lease.
        opened: The run waits for this stage.
        receipt: What a chunk's task tells of it, as JSON.
        progress: How far the stage is, once a chunk has ended or the stage was opened.
    """

    value: Any = None
    error: BaseException | None = None
    busy_s: float | None = None
    park_s: float | None = None
    replayed: bool = False
    stored: bytes | None = None
    held: bool = False
    opened: OpenStage | None = None
    receipt: Mapping[str, Any] | None = None
    progress: Progress | None = None


def job_parts(given: Iterable[ValueKey], values: Iterable[Value]) -> list[tuple[str, bytes]]:
    """Return the name and the bytes of each value of a job: of its type, and of `Named` where types do not tell.

    Nothing of a job that lies in the store, whose *values* are none.
    """
    return [
        (key.label(value_name(value)), value_bytes(value)) for key, value in zip(given, values, strict=False)
    ]


def job_bytes(given: Iterable[ValueKey], values: Iterable[Value]) -> int:
    """Return how many bytes a job's messages and their names have as the store keeps them; a list counts nothing."""
    sizes = (
        16 + len(key.label(value_name(value)).encode()) + value.ByteSize()
        for key, value in zip(given, values, strict=False)
        if isinstance(value, Message)
    )
    return sum(sizes)


def digest_job(given: Iterable[ValueKey], values: Iterable[Value]) -> bytes:
    """Return the digest of a job; that of a batch is the same however its items come."""
    return job_digest(
        (key.label(value_name(value)), value_digest(value)) for key, value in zip(given, values, strict=False)
    )


def target_name(plan: Plan) -> str:
    """Return what a run of *plan* makes, as its row has it."""
    return f"list[{plan.target}]" if plan.collects else str(plan.target)


def run_request(
    plan: Plan,
    inputs: Sequence[Value],
    submission: Submission,
    settings: Settings,
    store: Store,
    *,
    owner: str,
    attached: bool,
) -> RunRequest:
    """Return what *submission* asks *store* for.

    Args:
        plan: What to do.
        inputs: The job.
        submission: Who asks for it.
        settings: Those in force.
        store: Keeps the job's digest in its own form.
        owner: Who will hold the lease.
        attached: The submission has met another holder of the run before.

    Raises:
        PayloadTooLarge: The job is too large to be stored.
    """
    job = job_parts(plan.given, inputs)
    framed = frame(part for name, data in job for part in (name.encode(), data))
    check_size(f"the job of run {submission.execution_id!r}", len(framed), settings.max_stored_bytes, _STORED)
    return RunRequest(
        graph=plan.graph,
        execution_id=submission.execution_id,
        target=target_name(plan),
        job=framed,
        job_digest=store.keyed(submission.job_digest or digest_job(plan.given, inputs)),
        owner=owner,
        lease_s=settings.lease_seconds,
        max_deliveries=settings.max_deliveries,
        task_name=submission.task_name,
        task_id=submission.task_id,
        retries=submission.retries,
        attached=attached,
        released=submission.released,
        retried=submission.retried,
    )


def is_busy(row: RunRow, submission: Submission) -> bool:
    """Tell whether `Store.acquire` would refuse *submission* the run because another one holds its lease."""
    newer = (
        submission.task_id is not None
        and row.task_id == submission.task_id
        and submission.retries > row.retries
        and submission.retried
    )
    return row.state is RunState.RUNNING and (row.lease_left_s or 0.0) > 0.0 and not newer


def find_busy_s(row: RunRow, waited: int) -> float:
    """Return in how many seconds to ask again for a run that stands so, having asked *waited* times before."""
    if row.state is RunState.WAITING:
        # What keeps an open stage to its task tells nothing of when that ends: ask less and less often.
        return 2.0 ** min(waited, _MOST_DOUBLINGS)
    return max(0.0, row.lease_left_s or 0.0)


def run_end(
    outcome: RunOutcome, submission: Submission, rows: Sequence[StepExecution], settings: Settings
) -> RunEnd:
    """Return how *outcome* leaves the run's row.

    Args:
        outcome: How the delivery ended.
        submission: Whose delivery it was.
        rows: Step executions that no save has carried.
        settings: For how long an ended run is kept, and how large a result may be.

    Raises:
        PayloadTooLarge: The result is too large to be stored.
    """
    end = RunEnd(state=RunState.SUCCEEDED, executions=tuple(rows), retention_s=settings.retention)
    if outcome.value is not None:
        result = _result_bytes(outcome.value)
        what = f"the result of run {submission.execution_id!r}"
        check_size(what, len(result), settings.max_stored_bytes, _STORED)
        return replace(end, result=result)
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
            return RunOutcome(value=_read_result(plan, row, store), replayed=True, stored=row.result)
        except DocketError as error:
            return RunOutcome(error=error)
    if row.state is RunState.QUARANTINED:
        return RunOutcome(error=RunQuarantined(row.graph, row.execution_id, row.lost), replayed=True)
    if row.error is not None:
        return RunOutcome(error=from_record(row.error), replayed=True)
    return RunOutcome(error=RunCancelled(row.execution_id, "cancelled earlier"), replayed=True)


def _result_bytes(value: Any) -> bytes:
    """Return a run's result as it is stored: of collected items, what failed first, then what there is."""
    if isinstance(value, StoredBatch):
        return frame((_PLACE, json.dumps(_describe(value)).encode()))
    if not isinstance(value, BatchResult):
        return value_bytes(value)
    collected = cast("BatchResult[Message]", value)
    errors = {str(index): to_record(error) for index, error in collected.errors.items()}
    made = [each for _, each in collected.succeeded()]
    return frame((_COLLECTED, json.dumps(errors).encode(), value_bytes(made)))


def _describe(batch: StoredBatch) -> dict[str, Any]:
    place = batch.items.place
    errors = {str(index): to_record(error) for index, error in batch.errors.items()}
    return {"names": place.names, "total": place.total, "collects": batch.collects, "errors": errors}


def _read_result(plan: Plan, row: RunRow, store: Store) -> Any:
    data = row.result or b""
    if not plan.collects:
        return from_bytes(plan.target.kind, data)
    parts = unframe(data)
    if parts[:1] == [_PLACE] and isinstance(store, BatchStore):
        found = json.loads(parts[1])
        stored = {int(index): from_record(record) for index, record in found["errors"].items()}
        place = ItemPlace(
            graph=row.graph,
            execution_id=row.execution_id,
            names=tuple(found["names"]),
            kind=plan.target.kind,
            total=found["total"],
            failed=stored.keys(),
            job_digest=row.job_digest,
        )
        return StoredBatch(
            items=StoredItems(store, place),
            collects=found["collects"],
            errors=cast("dict[int, StepFailed]", stored),
        )
    if parts[:1] != [_COLLECTED]:
        return many_from_bytes(plan.target.kind, data)
    _, errors, made = parts
    failures = {int(index): from_record(record) for index, record in json.loads(errors).items()}
    values = iter(many_from_bytes(plan.target.kind, made))
    total = len(failures) + len(unframe(made)) // 2
    results = tuple(None if index in failures else next(values) for index in range(total))
    return BatchResult(results, cast("dict[int, StepFailed]", failures))
