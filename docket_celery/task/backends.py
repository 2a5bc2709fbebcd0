"""How a GraphTask's result backend is used in a worker: it waits for a server that is away, and tells no wrong end.

Celery stores a result once, after the run has ended. When that fails, or when a linked task cannot be published,
it stores FAILURE instead, and the caller of a run that SUCCEEDED hears of an error. A GraphTask's run is in the
store: its task is sent again instead, finds the run ended, and tells its outcome.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from celery import states
from celery.exceptions import OperationalError
from kombu.exceptions import EncodeError

from docket_celery.task.envelope import to_stored
from docket_celery.task.headers import UNTOLD, WAITS_FOR_OTHER
from docket_celery.task.retries import LONGEST_WAIT_S, send_copy

_logger = logging.getLogger("docket_celery.task")
_TWIN: Final = "docket_patient"
_ENDED: Final = "docket_run_ended"
_WRITTEN: Final = "docket_written"
_MOST_TRIES: Final = 20
"""Most deliveries that only have to tell an outcome, and most tries to publish one: five minutes of waits each."""
_LONGEST_SLEEP_MS: Final = 1000
_STORING: Final = (
    "store_result",
    "_store_result",
    "_set_with_state",
    "set",
    "_set",
    "ensure",
    "get",
    "_get_task_meta_for",
)
"""The methods with which a backend keeps and finds states: what a user has overridden is called."""
_REPLACE: Final = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
if ARGV[3] == '0' then redis.call('SET', KEYS[1], ARGV[2]) else redis.call('SETEX', KEYS[1], ARGV[3], ARGV[2]) end
redis.call('PUBLISH', KEYS[1], ARGV[2])
return 1
"""
"""Puts a state in the place of the one before it, as Celery does in a pipeline, unless there is another one."""


def patient(backend: Any) -> Any:
    """Return *backend* with the same connections, as a worker uses it for GraphTasks.

    The backend itself serves the app's other tasks and stays as it is.
    """
    found = backend.__dict__.get(_TWIN)
    if found is None:
        kind: Any = backend.__class__
        added = _PatientRedis if _is_redis(backend) and _keeps_as_celery(kind) else _Patient
        found = cast("Any", object).__new__(type(f"Patient{kind.__name__}", (added, kind), {}))
        # A client that is made on first use is made for both.
        getattr(backend, "client", None)
        found.__dict__.update(backend.__dict__)
        found.always_retry = True
        found.max_sleep_between_retries_ms = _LONGEST_SLEEP_MS
        backend.__dict__[_TWIN] = found
    return found


def note_ended(request: Any) -> None:
    """Note in a delivery's request that the store has its run's outcome: it must not be told as another one."""
    setattr(request, _ENDED, True)


def is_redelivered(request: Any) -> bool:
    """Tell whether the broker delivers a message once more; its task may have ended, and its run be purged."""
    info: Mapping[str, Any] = request.delivery_info or {}
    return bool(info.get("redelivered"))


def is_stored(backend: Any, request: Any, result: object = None) -> bool:
    """Tell whether Celery has stored this task's success before, its links and chain sent by then.

    The part of a chord is counted after that, so a worker that died in between has not counted it: it is counted
    again where the backend knows parts by their id (Redis), since a chord that misses one never ends.

    The *result* is what the copy would return; None: what is stored.
    """
    if request.ignore_result:
        return False
    try:
        stored = backend.get_state(request.id)
    except Exception as error:  # noqa: BLE001 -- without an answer the copy runs, as Celery's own would
        _logger.warning("cannot tell whether task %s is stored: %s", request.id, error)
        return False
    if stored != states.SUCCESS:
        return False
    if request.chord and counts_parts_by_id(backend):
        made = backend.get_result(request.id) if result is None else result
        backend.on_chord_part_return(request, states.SUCCESS, made)
    return True


def counts_parts_by_id(backend: Any) -> bool:
    """Tell whether a backend counts a chord's parts by their ids, once each and without their results."""
    return _is_redis(backend)


def _is_redis(backend: Any) -> bool:
    # Importing it would import the client of Redis, which an app may not use.
    redis: Any = sys.modules.get("celery.backends.redis")
    return redis is not None and isinstance(backend, redis.RedisBackend)


def _keeps_as_celery(kind: Any) -> bool:
    """Tell whether a class of Redis backends stores results as Celery's own does, not in a way of its user's."""
    owner: Any = sys.modules["celery.backends.redis"].RedisBackend
    return all(getattr(kind, name) is getattr(owner, name) for name in _STORING)


class _Patient:
    """Added to the class of a result backend."""

    app: Any

    def _get_result_meta(self, result: Any, state: str, *more: Any, **options: Any) -> Any:
        """Return what is kept of a task; its result in a form that a process without this library can read."""
        owner: Any = super()
        kept = to_stored(result) if hasattr(result, "__json__") else result
        return owner._get_result_meta(kept, state, *more, **options)

    def mark_as_failure(
        self, task_id: str, exc: BaseException, traceback: Any = None, request: Any = None, **options: Any
    ) -> None:
        """Tell a failure, unless the run's outcome is another one."""
        # The caller of an eager task waits here: it is told what happened, and nothing is sent.
        told_later = request is not None and not request.is_eager
        if told_later and (_told_success(self, request) or _sent_again(self.app, request, exc)):
            return
        owner: Any = super()
        owner.mark_as_failure(task_id, exc, traceback=traceback, request=request, **options)


class _PatientRedis(_Patient):
    """Writes the usual states of a delivery in one round trip each: STARTED over nothing, SUCCESS over that.

    Celery first reads what is kept, to leave a SUCCESS as it is. Here the server compares it with what this delivery
    knows. Where it is anything else, Celery reads and writes as ever.
    """

    client: Any
    expires: int | None
    _MAX_STR_VALUE_SIZE: int
    encode: Callable[[Any], Any]
    get_key_for_task: Callable[[str], Any]

    @functools.cached_property
    def _replace(self) -> Callable[..., int]:
        script: Callable[..., int] = self.client.register_script(_REPLACE)
        return script

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **more: Any
    ) -> Any:
        before = None if request is None else _find_written(request, state)
        if before is None or not self._written(before, task_id, result, state, request):
            owner: Any = super()
            owner._store_result(task_id, result, state, traceback, request=request, **more)
        return result

    def _written(self, before: Any, task_id: str, result: Any, state: str, request: Any) -> bool:
        """Write a state over the one *before*; False: there is another one, it is too large, or no script runs."""
        from redis.exceptions import ResponseError

        text = self.encode({**self._get_result_meta(result, state, None, request), "task_id": task_id})
        if len(text) > self._MAX_STR_VALUE_SIZE:
            return False  # Celery refuses it with its own words
        try:
            found = self._replace([self.get_key_for_task(task_id)], [before, text, self.expires or 0])
        except ResponseError as problem:
            _logger.debug("Celery stores state %s of task %s: %s", state, task_id, problem)
            return False
        if found:
            # Over a SUCCESS nothing is written, not even by the delivery that wrote it.
            setattr(request, _WRITTEN, text if state == states.STARTED else None)
        return bool(found)


def _find_written(request: Any, state: str) -> Any:
    """Return what is kept of a delivery's task before it writes *state*, '' for nothing; None: it does not know."""
    if state == states.SUCCESS:
        return getattr(request, _WRITTEN, None)
    # Before a later delivery there is what the one before it has written.
    return "" if state == states.STARTED and not request.retries and not is_redelivered(request) else None


def _told_success(backend: Any, request: Any) -> bool:
    """Tell whether *request* is a copy of a delivery whose success is stored: its own error is nobody's."""
    headers: Mapping[str, Any] = request.headers or {}
    if WAITS_FOR_OTHER not in headers and not is_redelivered(request):
        return False
    return not request.ignore_result and bool(backend.get_state(request.id) == states.SUCCESS)


def _sent_again(app: Any, request: Any, error: BaseException) -> bool:
    """Send the task of an ended run again whose outcome could not be told because of *error*; tell if that worked."""
    headers: Mapping[str, Any] = request.headers or {}
    tries = int(headers.get(UNTOLD) or 0) + 1
    if not getattr(request, _ENDED, False) or isinstance(error, EncodeError) or tries > _MOST_TRIES:
        return False
    for attempt in range(1, _MOST_TRIES + 1):
        try:
            send_copy(app.tasks[request.task], request, _wait_s(tries), {UNTOLD: tries})
        except OperationalError as problem:
            _logger.warning("task %s cannot be sent again to tell its outcome: %s", request.id, problem)
            time.sleep(_wait_s(attempt))
        else:
            _logger.warning("task %s is sent again to tell the outcome of its run: %s", request.id, error)
            return True
    return False


def _wait_s(tries: int) -> float:
    return min(LONGEST_WAIT_S, 2.0 ** (tries - 1))
