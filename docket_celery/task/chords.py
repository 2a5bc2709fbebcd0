"""A batch task on Celery: each stage is a chord whose header works on chunks and whose body carries on.

Every task of it is the same GraphTask; a header of its message says which part it is. Messages carry keys and ranges
only, since each header message holds a copy of the body.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

from celery import Celery, chord, signature
from celery.backends.redis import RedisBackend
from celery.exceptions import Ignore, SoftTimeLimitExceeded
from kombu.utils.json import dumps, loads

from docket_celery.batch.chunk import ChunkRun
from docket_celery.batch.layout import stage_rows
from docket_celery.batch.options import BatchOptions
from docket_celery.batch.run import BatchRun
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run_context import OpenStage, RunOutcome, Submission
from docket_celery.engine.waiting import run_here, run_on_pool
from docket_celery.plan.messages import Value
from docket_celery.plan.mutation import checked
from docket_celery.plan.plan import Plan
from docket_celery.store.contract import BatchStore
from docket_celery.store.records import ChunkStop, LostRun, Progress, RunState
from docket_celery.task.headers import (
    BATCH,
    CELERY_RETRIES,
    DIGEST,
    EXECUTION_ID,
    OF_ONE_DELIVERY,
    PART,
    PREPARED,
    WAITS_FOR_OTHER,
)
from docket_celery.task.options import SLOTS, THREADS
from docket_celery.task.retries import keep

if TYPE_CHECKING:
    from docket_celery.task.task import GraphTask

_logger = logging.getLogger("docket_celery.batches")


class Receipt:
    """What a chunk's task returns: Celery logs that it succeeded, whatever its items did, and shows this text.

    Attributes:
        facts: JSON values: ``lo``, ``state`` and ``failed``.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = dict(facts)

    def __json__(self) -> dict[str, Any]:
        return self.facts

    def __repr__(self) -> str:
        state, failed = str(self.facts.get("state")), self.facts.get("failed", 0)
        if state in {RunState.SUCCEEDED, ChunkStop.DONE}:
            how = f"{failed} items failed" if failed else "done"
        elif state == RunState.FAILED:
            how = f"{failed} items failed, the batch ends"
        else:
            how = f"not worked on ({state.lower()})"
        return f"<chunk from item {self.facts['lo']}: {how}>"


def deliver(
    task: GraphTask[Any, Any],
    plan: Plan,
    values: Sequence[Value] | None,
    submission: Submission,
    settings: Settings,
    store: BatchStore,
    batch: BatchOptions,
) -> RunOutcome:
    """Run one delivery of a batch over several workers, whichever part it is.

    Args:
        task: Whose it is.
        plan: What it does.
        values: The job; None: it is in the store.
        submission: Who asks for it, and how.
        settings: Those in force.
        store: What the workers share.
        batch: How it is worked on.

    Raises:
        Ignore: A stage was opened, or the next chunk of a lane was published.
        Reject: It could not be; the broker keeps the delivery.
        DocketError: As from `Graph.deliver`.
    """
    request = task.request
    task.graph.freeze()
    plan = checked(plan) if settings.check_mutation else plan
    part: Mapping[str, Any] = (request.headers or {}).get(PART) or {}
    if values is None and "lo" in part:
        return _work(task, plan, submission, settings, store, batch, part)
    if values is not None and submission.job_digest is None:
        # Sent past `apply_async`: the parts to come must name the same job.
        submission = replace(submission, job_digest=task.declaration.digest(values))
    message = _pack(task, submission, batch)
    outcome = run_here(BatchRun(plan, values, submission, settings, store, batch, message))
    if outcome.opened is not None:
        show_progress(task, outcome.opened.progress)
        _open(task, _headers(request, submission, batch), outcome.opened, submission.retries)
    return outcome


def _open(task: GraphTask[Any, Any], headers: Mapping[str, Any], opened: OpenStage, retries: int) -> None:
    """Replace *task* with the chord of a stage.

    Raises:
        Ignore: It was published.
        Reject: It could not be; the broker keeps the delivery, which finds the open stage.
    """
    request = task.request
    options = _options(request)
    body_part = {"stage": opened.stage, "total": opened.total}
    # The body has this task's id: it must look like a later delivery of it. It starts no run anew that has failed.
    body_headers: dict[str, Any] = {
        **headers,
        PART: body_part,
        CELERY_RETRIES: retries + 1,
        WAITS_FOR_OTHER: True,
    }
    # Celery checks the arguments against the declared ones, on every submission.
    blank = task.declaration.blank()
    body: Any = task.signature(*blank, immutable=True, headers=body_headers, **options)
    parts = _parts(opened) if opened.lanes is None else _first_parts(opened, opened.lanes.shares())
    chunks = [_chunk(task, {**headers, PART: part}, options) for part in parts]
    if request.ignore_result:
        body.set(ignore_result=True)
    _replace(task, cast("Any", chord)(chunks, body, app=task.app))


def _work(
    task: GraphTask[Any, Any],
    plan: Plan,
    submission: Submission,
    settings: Settings,
    store: BatchStore,
    batch: BatchOptions,
    part: Mapping[str, Any],
) -> RunOutcome:
    """Work on a chunk; then go on with the next one of its lane, if it has one.

    Raises:
        Reject: Nothing could be published; the broker keeps the delivery.
    """
    request = task.request
    submission = replace(submission, passthrough=(SoftTimeLimitExceeded,), hands_back=())
    limit, stage, lo = part.get("limit"), int(part["stage"]), int(part["lo"])
    outcome = run_here(ChunkRun(plan, submission, settings, store, batch, stage, lo, limit))
    state = (outcome.receipt or {}).get("state")
    following = _next_part(part) if state in {RunState.SUCCEEDED, ChunkStop.DONE} else None
    if following is not None:
        headers = {**_headers(request, submission, batch), PART: following}
        _replace(task, _chunk(task, headers, _options(request)))
    if state in {ChunkStop.DONE, ChunkStop.FAILING} and request.retries and request.chord:
        body = signature(request.chord, app=task.app)
        # In a failing stage what is queued stays so.
        going_on = {RunState.RUNNING} if state == ChunkStop.FAILING else {RunState.RUNNING, RunState.QUEUED}

        def wake() -> None:
            rows = store.find_chunks(plan.graph, submission.execution_id)
            if not any(row.state in going_on for row in stage_rows(rows, stage)):
                body.apply_async()

        try:
            # The child that counted the last part may have died before this. A second body finds what is done.
            run_on_pool(wake, settings.threads)
        except Exception as error:
            raise keep(request.id, error) from error
    return outcome


def _replace(task: GraphTask[Any, Any], signature: Any) -> NoReturn:
    """Let *signature* go on in place of *task*.

    Raises:
        Ignore: It was published.
        Reject: It could not be; the broker keeps the delivery, which finds what is done.
    """
    try:
        task.replace(signature)
    except Ignore:
        raise
    except Exception as error:
        raise keep(task.request.id, error) from error
    raise AssertionError("Celery replaces a task by raising Ignore")


def show_progress(task: GraphTask[Any, Any], progress: Progress) -> None:
    """Store in the result backend that a stage was opened: state ``PROGRESS``, with *progress* as its info.

    Only the delivery that opens a stage does so. It publishes the stage's chord next, whose body has the same task id
    and ends the task. What a chunk stored could come after that, and replace how the task ended.
    """
    if task.request.ignore_result:
        return
    try:
        task.update_state(state="PROGRESS", meta=asdict(progress))
    except Exception as error:  # noqa: BLE001 -- the batch goes on whether or not anybody looks at it
        _logger.warning("the progress of task %s could not be stored: %s", task.request.id, error)


def _parts(opened: OpenStage) -> list[dict[str, Any]]:
    """Return a part for each chunk: all of them may be under way at once."""
    return [{"stage": opened.stage, "lo": chunk.lo, "hi": chunk.hi} for chunk in opened.chunks]


def _first_parts(opened: OpenStage, lanes: Sequence[int]) -> list[dict[str, Any]]:
    """Return a part for the first chunk of each lane that has one; the others follow it.

    Which lane a chunk is in follows from where it begins, so that two chords over the same stage have the same lanes
    and never work on two chunks of one.
    """
    size, total = opened.chunk_size, opened.total
    parts: dict[int, dict[str, Any]] = {}
    for chunk in opened.chunks:
        lane = chunk.lo // size % len(lanes)
        place = {"stage": opened.stage, "lo": chunk.lo, "hi": chunk.hi}
        way = {"step": size * len(lanes), "total": total, "limit": lanes[lane]}
        parts.setdefault(lane, {**place, **way})
    return list(parts.values())


def _next_part(part: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the part that follows in the same lane, or None at its end, or where there are no lanes."""
    step = int(part.get("step") or 0)
    lo = int(part["lo"]) + step
    if not step or lo >= int(part["total"]):
        return None
    size = int(part["hi"]) - int(part["lo"])
    return {**part, "lo": lo, "hi": min(lo + size, int(part["total"]))}


def _chunk(task: GraphTask[Any, Any], headers: dict[str, Any], options: Mapping[str, Any]) -> Any:
    """Return the signature of a chunk's task; its receipt is what the chord counts."""
    blank = task.declaration.blank()
    # Redis counts parts without their results. Of a stored one Celery believes that it was counted, though its child
    # died before that: no retry would come, and the chord never end.
    counts = isinstance(task.backend, RedisBackend)
    return task.signature(*blank, immutable=True, headers=headers, ignore_result=counts, **options)


def _headers(request: Any, submission: Submission, batch: BatchOptions) -> dict[str, Any]:
    """Return the headers that all parts of a batch have."""
    given: Mapping[str, Any] = request.headers or {}
    headers: dict[str, Any] = {name: v for name, v in given.items() if name not in OF_ONE_DELIVERY}
    headers[EXECUTION_ID] = submission.execution_id
    headers[DIGEST] = base64.b64encode(submission.job_digest or b"").decode("ascii")
    headers[BATCH] = {**(given.get(BATCH) or {}), SLOTS: batch.slots, THREADS: batch.threads}
    return headers


def _pack(task: GraphTask[Any, Any], submission: Submission, batch: BatchOptions) -> bytes:
    """Return the message with which this task goes on should its chord be lost, links and all."""
    request = task.request
    args, kwargs = task.declaration.blank()
    headers = {**_headers(request, submission, batch), PART: {"stage": 0}}
    again: Any = task.signature_from_request(request, args, kwargs, headers=headers, expires=None)
    return dumps(again).encode()


def revive(app: Celery, lost: LostRun) -> None:
    """Have somebody go on with a batch that nobody advances: a copy of the body, whatever has become of that.

    Raises:
        Exception: It could not be published; the next look finds the run again.
    """
    again: Any = signature(loads(lost.message.decode()), app=app)
    headers: dict[str, Any] = again.options["headers"]
    headers[PART] = {"stage": lost.stage}
    # As the body itself would: the same delivery of the task, should both come.
    headers |= {CELERY_RETRIES: lost.retries + 1, WAITS_FOR_OTHER: True}
    again.set(headers=headers, retries=0)
    again.apply_async(add_to_parent=False, **{PREPARED: True})


def describe(headers: Mapping[str, Any]) -> str | None:
    """Return the text that stands for the arguments of a part, or None for a job itself."""
    part: Mapping[str, Any] | None = headers.get(PART)
    if not part:
        return None
    if "lo" in part:
        return f"(items {part['lo']} to {int(part.get('hi', part['lo'])) - 1} of stage {part['stage']})"
    return f"(after stage {part['stage']})"


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
