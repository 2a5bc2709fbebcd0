"""The states of a GraphTask in Redis: written in one round trip each, and only over what the delivery knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, states, uuid
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError
from redis import Redis

from docket_celery.task.backends import patient

pytestmark = [
    pytest.mark.integration,
    # Celery's backend calls what redis-py means to drop one day.
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),
]
STARTED: Any = {"pid": 1, "hostname": "here"}


@pytest.fixture
def app(broker_url: str, result_url: str) -> Celery:
    """An app on the real result backend."""
    return Celery("states", broker=broker_url, backend=result_url)


@pytest.fixture
def client(result_url: str) -> Iterator[Redis]:
    """A connection of the test's own."""
    with Redis.from_url(result_url, decode_responses=True) as found:
        yield found


def delivery(task_id: str, **facts: Any) -> Any:
    """Return the request of a task's first delivery, as Celery has it."""
    return Context(**({"id": task_id, "delivery_info": {"redelivered": False}} | facts))


def counts(client: Any) -> dict[str, int]:
    """Return how often the server was asked by commands that read and write results."""
    stats = client.info("commandstats")
    return {
        name: stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "script|load", "multi")
    }


def kept(client: Any, backend: Any, task_id: str) -> Any:
    """Return what is kept of a task."""
    return json.loads(client.get(backend.get_key_for_task(task_id)))


def test_a_first_delivery_takes_one_round_trip_for_each_state(app: Celery, client: Any) -> None:
    """Celery takes two: it reads the state, then writes it in a transaction."""
    backend = patient(app.backend)
    backend.store_result(uuid(), STARTED, states.STARTED, request=delivery("warm"))
    task_id = uuid()
    request, before = delivery(task_id), counts(client)
    backend.store_result(task_id, STARTED, states.STARTED, request=request)
    assert kept(client, backend, task_id)["status"] == "STARTED"
    backend.store_result(task_id, 17, states.SUCCESS, request=request)
    assert counts(client) == before | {"evalsha": before["evalsha"] + 2}
    assert app.AsyncResult(task_id).get(timeout=5) == 17


def test_what_is_kept_and_told_is_what_celery_keeps_and_tells(app: Celery, client: Any) -> None:
    """The key, its text but for the time, how long it is kept, and what is published."""
    found: list[Any] = []
    backends: list[Any] = [app.backend, patient(app.backend)]
    for backend in backends:
        task_id = uuid()
        request, key = delivery(task_id, group="g", parent_id="p"), backend.get_key_for_task(task_id)
        with client.pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe(key)
            for state, result in ((states.STARTED, STARTED), (states.SUCCESS, 17)):
                backend.store_result(task_id, result, state, request=request)
                text = client.get(key)
                # Before the first there is None, for the subscription.
                told = channel.get_message(timeout=5) or channel.get_message(timeout=5)
                assert told["data"] == text
                assert json.loads(text).pop("task_id") == task_id
                alike = {k: v for k, v in json.loads(text).items() if k not in {"task_id", "date_done"}}
                found.append((alike, client.ttl(key)))
    assert found[:2] == found[2:]
    assert found[0][1] == 86400


def test_results_without_an_end_are_kept_for_good(broker_url: str, result_url: str, client: Any) -> None:
    """``result_expires = 0``, as with Celery's own."""
    app = Celery("states", broker=broker_url, backend=result_url)
    app.conf.update(result_expires=0)
    backend, task_id = patient(app.backend), uuid()
    backend.store_result(task_id, STARTED, states.STARTED, request=delivery(task_id))
    assert client.ttl(backend.get_key_for_task(task_id)) == -1


def test_a_success_stays(app: Celery, client: Any) -> None:
    """A task that is delivered twice, of which the broker says nothing, has the result of its first delivery."""
    backend, task_id = patient(app.backend), uuid()
    first, second = delivery(task_id), delivery(task_id)
    backend.store_result(task_id, STARTED, states.STARTED, request=first)
    backend.store_result(task_id, STARTED, states.STARTED, request=second)
    backend.store_result(task_id, 17, states.SUCCESS, request=first)
    backend.store_result(task_id, 18, states.SUCCESS, request=second)
    assert kept(client, backend, task_id)["result"] == 17
    third = delivery(task_id)
    backend.store_result(task_id, STARTED, states.STARTED, request=third)
    backend.store_result(task_id, 19, states.SUCCESS, request=third)
    assert kept(client, backend, task_id)["result"] == 17


def test_a_success_of_the_steps_own_stays_too(app: Celery, client: Any) -> None:
    """As with Celery, also where the same delivery wrote it: subscribers have been told."""
    backend, task_id = patient(app.backend), uuid()
    request = delivery(task_id)
    backend.store_result(task_id, STARTED, states.STARTED, request=request)
    backend.store_result(task_id, "early", states.SUCCESS, request=request)
    backend.store_result(task_id, "late", states.SUCCESS, request=request)
    assert kept(client, backend, task_id)["result"] == "early"


@pytest.mark.parametrize("name", ["set", "_store_result"])
def test_a_backend_of_the_users_own_is_called_as_ever(
    name: str, broker_url: str, result_url: str, client: Any
) -> None:
    """It may encrypt what is kept, or count it."""
    calls: list[str] = []

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return getattr(RedisBackend, name)(self, *args, **kwargs)

    own = type("Own", (RedisBackend,), {name: called})
    backend = patient(own(app=Celery("states", broker=broker_url), url=result_url))
    task_id = uuid()
    request, before = delivery(task_id), counts(client)
    for state in (states.STARTED, states.SUCCESS):
        backend.store_result(task_id, None, state, request=request)
    assert calls == [name] * 2
    assert counts(client) == before | {"multi": before["multi"] + 2}


def test_what_is_too_large_for_redis_is_refused_by_celery(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server would close the connection, and the worker try for ever."""
    backend, task_id = patient(app.backend), uuid()
    monkeypatch.setattr(RedisBackend, "_MAX_STR_VALUE_SIZE", 300)
    request = delivery(task_id)
    backend.store_result(task_id, STARTED, states.STARTED, request=request)
    with pytest.raises(BackendStoreError, match="too large"):
        backend.store_result(task_id, "x" * 300, states.SUCCESS, request=request)


@pytest.mark.parametrize("between", ["PROGRESS", "REVOKED", None])
def test_a_success_follows_any_other_state(app: Celery, client: Any, between: str | None) -> None:
    """A state of the step's own, of another process, or none any more: Celery writes over it."""
    backend, task_id = patient(app.backend), uuid()
    request = delivery(task_id)
    backend.store_result(task_id, STARTED, states.STARTED, request=request)
    if between is None:
        client.delete(backend.get_key_for_task(task_id))
    else:
        app.backend.store_result(task_id, None, between)
    backend.store_result(task_id, 17, states.SUCCESS, request=request)
    assert kept(client, backend, task_id)["status"] == "SUCCESS"


@pytest.mark.parametrize("facts", [{"retries": 1}, {"delivery_info": {"redelivered": True}}])
def test_a_later_delivery_writes_as_celery_does(app: Celery, client: Any, facts: Any) -> None:
    """The delivery before it has written something, so no script is tried in vain."""
    backend, task_id = patient(app.backend), uuid()
    app.backend.store_result(task_id, None, states.RETRY)
    request, before = delivery(task_id, **facts), counts(client)
    backend.store_result(task_id, STARTED, states.STARTED, request=request)
    backend.store_result(task_id, 17, states.SUCCESS, request=request)
    assert counts(client) == before | {"multi": before["multi"] + 2}
    assert kept(client, backend, task_id)["result"] == 17


def test_a_server_that_refuses_scripts_gets_celerys_own_commands(
    broker_url: str, result_url: str, client: Any
) -> None:
    """As an account without the right to run scripts."""
    client.acl_setuser(
        "noscript", enabled=True, nopass=True, keys=["*"], channels=["*"], categories=["+@all", "-@scripting"]
    )
    try:
        url = result_url.replace("redis://", "redis://noscript:any@")
        app = Celery("states", broker=broker_url, backend=url)
        backend, task_id = patient(app.backend), uuid()
        request = delivery(task_id)
        backend.store_result(task_id, STARTED, states.STARTED, request=request)
        assert kept(client, backend, task_id)["status"] == "STARTED"
        backend.store_result(task_id, 17, states.SUCCESS, request=request)
        assert app.AsyncResult(task_id).get(timeout=5) == 17
    finally:
        client.acl_deluser("noscript")
