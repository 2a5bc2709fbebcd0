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
from celery.exceptions import Ignore, SoftTimeLimitExceeded
from kombu.utils.json import dumps, loads

from docket_celery.batch.chunk import ChunkRun
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
from docket_celery.task.backends import counts_parts_by_id
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
    from docket_celery.task.task import AnyTask


_logger = logging.getLogger("docket_celery.batches")


class Receipt:
    """What a chunk's task returns: Celery logs that it succeeded, whatever its items did, and shows this text.

    Its facts are JSON values: ``lo``, ``state`` and ``failed``.
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


class BatchDelivery:
    """One delivery of a batch over several workers: of the run from stage to stage, or of one chunk."""

    def __init__(
        self,
        task: AnyTask,
        plan: Plan,
        submission: Submission,
        settings: Settings,
        store: BatchStore,
        batch: BatchOptions,
    ) -> None:
        task.graph.freeze()
        self._task, self._store, self._settings, self._batch = task, store, settings, batch
        self._plan = checked(plan) if settings.check_mutation else plan
        self._submission, self._request = submission, task.request
        self._given: Mapping[str, Any] = self._request.headers or {}

    def run(self, values: Sequence[Value] | None) -> RunOutcome:
        """Run it; the job is in the store where *values* is None.

        Raises:
            Ignore: A stage was opened, or the next chunk of a lane was published.
            Reject: It could not be; the broker keeps the delivery, which finds what is done.
            DocketError: As from `Graph.deliver`.
        """
        part: Mapping[str, Any] = self._given.get(PART) or {}
        if values is None and "lo" in part:
            return self._work(part)
        if values is not None and self._submission.job_digest is None:
            # Sent past `apply_async`: the parts to come must name the same job.
            digest = self._task.declaration.digest(values)
            self._submission = replace(self._submission, job_digest=digest)
        task, request, headers = self._task, self._request, self._headers()
        again: Any = task.signature_from_request(
            request, *task.declaration.blank(), headers={**headers, PART: {"stage": 0}}, expires=None
        )
        # With this message the run continues if its chord is lost, links and all.
        message = dumps(again).encode()
        outcome = run_here(
            BatchRun(self._plan, values, self._submission, self._settings, self._store, self._batch, message)
        )
        if outcome.opened is not None:
            show_progress(task, outcome.opened.progress)
            self._open(headers, outcome.opened)
        return outcome

    def _open(self, headers: Mapping[str, Any], opened: OpenStage) -> None:
        """Replace the task with the chord of a stage."""
        # The body has this task's id: it must look like a later delivery of it. A failed run it does not restart.
        body_headers = {
            **headers,
            PART: {"stage": opened.stage, "total": opened.progress.total},
            CELERY_RETRIES: self._submission.retries + 1,
            WAITS_FOR_OTHER: 1,
        }
        body = self._signature(body_headers, ignore_result=True if self._request.ignore_result else None)
        chunks = [self._chunk({**headers, PART: part}) for part in _first_parts(opened)]
        self._replace(cast("Any", chord)(chunks, body, app=self._task.app))

    def _work(self, part: Mapping[str, Any]) -> RunOutcome:
        """Work on a chunk; then continue with the next one of its lane, if it has one."""
        submission = replace(self._submission, passthrough=(SoftTimeLimitExceeded,), hands_back=())
        limit, stage, lo = part.get("limit"), int(part["stage"]), int(part["lo"])
        store, settings = self._store, self._settings
        outcome = run_here(ChunkRun(self._plan, submission, settings, store, self._batch, stage, lo, limit))
        state = (outcome.receipt or {}).get("state")
        following = _next_part(part) if state in {RunState.SUCCEEDED, ChunkStop.DONE} else None
        if following is not None:
            self._replace(self._chunk({**self._headers(), PART: following}))
        request = self._request
        if state in {ChunkStop.DONE, ChunkStop.FAILING} and request.retries and request.chord:
            body = signature(request.chord, app=self._task.app)
            # In a failing stage what is queued stays so.
            active = {RunState.RUNNING} if state == ChunkStop.FAILING else {RunState.RUNNING, RunState.QUEUED}

            def wake() -> None:
                rows = store.find_chunks(self._plan.graph, submission.execution_id)
                if not any(row.state in active and row.chunk.stage == stage for row in rows):
                    body.apply_async()

            try:
                # The child that counted the last part may have died before this. A second body finds what is done.
                run_on_pool(wake, settings.threads)
            except Exception as error:
                raise keep(request.id, error) from error
        return outcome

    def _replace(self, signature: Any) -> NoReturn:
        """Publish *signature* in place of the task."""
        try:
            self._task.replace(signature)
        except Ignore:
            raise
        except Exception as error:
            raise keep(self._request.id, error) from error
        raise AssertionError("Celery replaces a task by raising Ignore")

    def _chunk(self, headers: dict[str, Any]) -> Any:
        """Return the signature of a chunk's task; its receipt is what the chord counts."""
        # Redis counts parts without their results. Of a stored one Celery believes that it was counted, though its
        # child died before that: no retry would come, and the chord never end.
        return self._signature(headers, ignore_result=counts_parts_by_id(self._task.backend))

    def _signature(self, headers: dict[str, Any], *, ignore_result: bool | None) -> Any:
        """Return the signature of a part, which travels where and how the job did."""
        request = self._request
        info: Mapping[str, Any] = request.delivery_info or {}
        hard, soft = request.timelimit or (None, None)
        where = {"exchange": info.get("exchange"), "routing_key": info.get("routing_key")}
        if not where["exchange"]:
            where = {"queue": where["routing_key"] or None}
        how = {"time_limit": hard, "soft_time_limit": soft, "priority": info.get("priority")}
        asked: dict[str, Any] = {PREPARED: True, "ignore_result": ignore_result, **where, **how}
        options = {name: value for name, value in asked.items() if value is not None}
        # Celery checks the arguments against the declared ones, on every submission.
        blank = self._task.declaration.blank()
        return self._task.signature(*blank, immutable=True, headers=headers, **options)

    def _headers(self) -> dict[str, Any]:
        """Return the headers that all parts of a batch have."""
        headers: dict[str, Any] = {name: v for name, v in self._given.items() if name not in OF_ONE_DELIVERY}
        headers[EXECUTION_ID] = self._submission.execution_id
        headers[DIGEST] = base64.b64encode(self._submission.job_digest or b"").decode("ascii")
        lanes = {SLOTS: self._batch.slots, THREADS: self._batch.threads}
        headers[BATCH] = {**(self._given.get(BATCH) or {}), **lanes}
        return headers


def show_progress(task: AnyTask, progress: Progress) -> None:
    """Store in the result backend that a stage was opened: state ``PROGRESS``, with *progress* as its info.

    Only the delivery that opens a stage does so. It publishes the stage's chord next, whose body has the same task id
    and ends the task. What a chunk stored could come after that, and replace how the task ended.
    """
    if task.request.ignore_result:
        return
    try:
        task.update_state(state="PROGRESS", meta=asdict(progress))
    except Exception as error:  # noqa: BLE001 -- the batch continues without it
        _logger.warning("the progress of task %s could not be stored: %s", task.request.id, error)


def _first_parts(opened: OpenStage) -> list[dict[str, Any]]:
    """Return a part for each chunk, or, with a limit over all workers, for the first one of each lane.

    Which lane a chunk is in follows from where it begins, so that two chords over the same stage have the same lanes
    and never work on two chunks of one.
    """
    size, shares = opened.chunk_size, () if opened.lanes is None else opened.lanes.shares()
    parts: dict[int, dict[str, Any]] = {}
    for chunk in opened.chunks:
        part: dict[str, Any] = {"stage": opened.stage, "lo": chunk.lo, "hi": chunk.hi}
        lane = chunk.lo
        if shares:
            lane = chunk.lo // size % len(shares)
            part |= {"step": size * len(shares), "total": opened.progress.total, "limit": shares[lane]}
        parts.setdefault(lane, part)
    return list(parts.values())


def _next_part(part: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the part that follows in the same lane, or None at its end, or where there are no lanes."""
    step, lo, hi = int(part.get("step") or 0), int(part["lo"]), int(part["hi"])
    total = int(part.get("total") or 0)
    if not step or lo + step >= total:
        return None
    return {**part, "lo": lo + step, "hi": min(hi + step, total)}


def revive(app: Celery, lost: LostRun) -> None:
    """Publish a copy of the body of a batch that nobody advances; if that raises, the next look finds it again."""
    again: Any = signature(loads(lost.message.decode()), app=app)
    headers: dict[str, Any] = again.options["headers"]
    headers[PART] = {"stage": lost.stage}
    # As the body itself would: the same delivery of the task, should both come.
    headers |= {CELERY_RETRIES: lost.retries + 1, WAITS_FOR_OTHER: 1}
    again.set(headers=headers, retries=0)
    again.apply_async(add_to_parent=False, **{PREPARED: True})


def describe(part: Mapping[str, Any]) -> str:
    """Return the text that stands for the arguments of a part."""
    if "lo" in part:
        return f"(items {part['lo']} to {int(part.get('hi', part['lo'])) - 1} of stage {part['stage']})"
    return f"(after stage {part['stage']})"
