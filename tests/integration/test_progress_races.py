"""Two write to a task's key in Redis at one moment: how the task ended is never lost to the news of a part."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
import redis
from celery import Celery, states

from docket_celery.store.records import Progress
from docket_celery.task.progress import PROGRESS, tell_progress
from tests.integration.apps.serving import unique

pytestmark = [
    pytest.mark.integration,
    # Celery's own way to store a result there.
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),
]
AT_3 = Progress(done=3, total=9)


@pytest.fixture
def connect(result_url: str) -> Generator[Callable[[], Any]]:
    """A function that makes a result backend on this test's Redis, with a connection of its own."""
    made: list[Any] = []

    def connect() -> Any:
        made.append(Celery("racing", backend=result_url, set_as_current=False).backend)
        return made[-1]

    yield connect
    for backend in made:
        backend.client.close()


def between(backend: Any, monkeypatch: pytest.MonkeyPatch, rival: Callable[[], object]) -> None:
    """Let *rival* act when *backend* has read a task's key and is about to write it: the value is encoded then."""
    encode = backend.encode

    def encode_late(value: Any) -> Any:
        rival()
        return encode(value)

    monkeypatch.setattr(backend, "encode", encode_late)


@pytest.mark.parametrize("known", [True, False], ids=["started", "unknown"])
@pytest.mark.parametrize("state", [states.SUCCESS, states.FAILURE, states.REVOKED])
def test_how_a_task_ended_stays_though_it_ended_in_that_moment(
    connect: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, state: str, *, known: bool
) -> None:
    """A part has read that the task is not ready; before it writes, somebody else has ended the task."""
    task, backend, rival = unique("race"), connect(), connect()
    if known:
        rival.store_result(task, {"pid": 1}, states.STARTED)
    ended: list[str] = []

    def end() -> None:
        rival.store_result(task, None if state == states.SUCCESS else ValueError("sold out"), state)
        ended.append(state)

    between(backend, monkeypatch, end)
    tell_progress(backend, task, AT_3)
    assert ended == [state]
    assert rival.get_task_meta(task, cache=False)["status"] == state


def test_whoever_waits_hears_nothing_after_the_end(
    connect: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, result_url: str
) -> None:
    """News that are not stored are not published either: a waiter takes the last message for the state."""
    task, backend, rival = unique("heard"), connect(), connect()
    with redis.Redis.from_url(result_url) as client, client.pubsub() as channel:
        channel.subscribe(rival.get_key_for_task(task))
        assert channel.get_message(timeout=5)["type"] == "subscribe"
        between(backend, monkeypatch, lambda: rival.store_result(task, 17, states.SUCCESS))
        tell_progress(backend, task, AT_3)
        rival.client.publish(rival.get_key_for_task(task), "the end")
        heard = [channel.get_message(timeout=5)["data"] for _ in range(2)]
    assert rival.decode_result(heard[0])["status"] == states.SUCCESS
    assert heard[1] == b"the end"


def test_undisturbed_it_is_told(connect: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody does to the key of another task is no reason to be silent."""
    task, backend, rival = unique("calm"), connect(), connect()
    between(backend, monkeypatch, lambda: rival.store_result(unique("other"), 17, states.SUCCESS))
    tell_progress(backend, task, AT_3)
    meta = rival.get_task_meta(task, cache=False)
    assert (meta["status"], meta["result"]["done"]) == (PROGRESS, 3)
