"""How far a batch is, as its task's result backend tells: ``AsyncResult.info`` while the task is not ready."""

from __future__ import annotations

import importlib
import logging
from dataclasses import asdict
from typing import Any, Final, cast

from celery import states
from celery.backends.redis import RedisBackend

from docket_celery.store.records import Progress

PROGRESS: Final = "PROGRESS"
"""The state of a batch's task between its parts; its ``info`` has done, total, stage and stages."""
_logger = logging.getLogger("docket_celery.progress")


def tell_progress(backend: Any, task_id: str | None, progress: Progress | None) -> None:
    """Store the progress of a task that is not ready.

    Whoever ends the task may do so at the same moment: this never replaces how it ended, nor what another part told
    later. On Redis it watches the key, in a database it locks the row; other backends do not hear of it.

    Args:
        backend: The task's.
        task_id: The batch's task; None: nobody can ask.
        progress: How far the batch is; None: it does not say.
    """
    if task_id is None or progress is None:
        return
    try:
        if isinstance(backend, RedisBackend):
            _tell_redis(backend, task_id, progress)
        elif hasattr(backend, "ResultSession"):
            _tell_database(backend, task_id, progress)
    except Exception as error:  # noqa: BLE001 -- the batch goes on whether or not anybody looks at it
        _logger.warning("the progress of task %s could not be stored: %s", task_id, error)


def _tell_redis(backend: Any, task_id: str, progress: Progress) -> None:
    watch_error: type[Exception] = importlib.import_module("redis").WatchError
    key = backend.get_key_for_task(task_id)
    with backend.client.pipeline() as pipe:
        pipe.watch(key)
        found = pipe.get(key)
        if found is not None and not _is_newer(progress, backend.decode_result(found)):
            return
        meta = cast("dict[str, Any]", backend._get_result_meta(asdict(progress), PROGRESS, None, None))
        value = backend.encode({**meta, "task_id": task_id})
        pipe.multi()
        pipe.set(key, value, ex=backend.expires or None)
        # Whoever waits for the task hears of it, as of any other state.
        pipe.publish(key, value)
        try:
            pipe.execute()
        except watch_error:
            _logger.debug("another part of task %s told its progress at the same moment", task_id)


def _tell_database(backend: Any, task_id: str, progress: Progress) -> None:
    cleanup: Any = importlib.import_module("celery.backends.database").session_cleanup
    session = backend.ResultSession()
    with cleanup(session):
        row = backend._query_task(session, task_id, for_update=True)
        found = {} if not row else {"status": row.status, "result": backend.decode(row.result or "{}")}
        if row and _is_newer(progress, found):
            row.status, row.result = PROGRESS, backend.encode(asdict(progress)).encode()
            session.commit()


def _is_newer(progress: Progress, meta: dict[str, Any]) -> bool:
    """Tell whether *progress* may replace what a task's result is now."""
    if meta.get("status") in states.READY_STATES:
        return False
    known: Any = meta.get("result")
    if meta.get("status") != PROGRESS or not isinstance(known, dict):
        return True
    told = cast("dict[str, Any]", known)
    return (progress.stage, progress.done) > (told.get("stage", 0), told.get("done", 0))
