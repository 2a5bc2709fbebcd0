"""What ``context=`` holds arrives whole or is refused at the call, and harms neither the caller nor a worker."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import pytest

from docket_celery import DecodeFailed, InvalidArguments
from tests.infra.rabbitmq import RabbitMQ
from tests.infra.workers import WorkerProcess
from tests.integration.apps.contexts import app, tell_context
from tests.integration.apps.serving import Urls, serving
from tests.unit.protos.shop_pb2 import Label, Order

pytestmark = pytest.mark.integration
WAIT_S = 20
ORDER = Order(order_id="17")


def nested(levels: int) -> Any:
    """Return a mapping with that many levels."""
    value: Any = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


@pytest.fixture(scope="module", params=["redis", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def worker(
    request: pytest.FixtureRequest, urls: Urls, tmp_path_factory: pytest.TempPathFactory
) -> Generator[WorkerProcess]:
    """One worker for each broker."""
    broker = urls.broker
    if request.param == "rabbitmq":
        server: RabbitMQ = request.getfixturevalue("rabbitmq")
        server.drop_queue("celery")
        broker = server.url
    own = Urls(broker=broker, results=urls.results, database=urls.database)
    with serving(app, own, tmp_path_factory.mktemp("worker")) as started:
        yield started


def ask(context: Any) -> dict[str, Any]:
    """Return the context that a job with *context* had in the worker."""
    found: dict[str, Any] = json.loads(
        tell_context.apply_async((ORDER,), context=context).get(timeout=WAIT_S).text
    )
    return found


@pytest.fixture(autouse=True)
def _goes_on(worker: WorkerProcess) -> Generator[None]:
    """After each test the same processes serve the next job, which says nothing of a context."""
    before = {worker.pid, *(child.pid for child in worker.children())}
    yield
    assert tell_context.delay(ORDER).get(timeout=WAIT_S) == Label(text="{}")
    assert {worker.pid, *(child.pid for child in worker.children())} == before


@pytest.mark.parametrize(
    "context",
    [
        {"n": 2**63, "m": -(2**63) - 1, "huge": 10**300},
        {"k" * 300: "long", "": "empty"},
        {"__type__": "datetime", "__value__": "yesterday"},
        {"a": {"__type__": "docket.nothing", "__value__": [1]}},
        {"text": "é\u0000\U0001f600" * 1000},
        nested(30),
    ],
    ids=["integers", "keys", "marker", "inner marker", "text", "levels"],
)
def test_json_values_arrive_whole(context: Any) -> None:
    """Whatever the broker's own headers or kombu's JSON would make of them."""
    assert ask(context) == context


@pytest.mark.parametrize(
    "context",
    [{"n": float("nan")}, {"n": float("inf")}, {"blob": "x" * 140_000}, nested(600), {1: 2}],
    ids=["nan", "infinity", "140 KB", "600 levels", "key"],
)
def test_what_cannot_travel_is_refused_at_the_call(context: Any) -> None:
    """Nothing was sent, so nothing is lost."""
    with pytest.raises(InvalidArguments, match="context"):
        tell_context.apply_async((ORDER,), context=context)


def test_the_mapping_of_an_older_version_is_read() -> None:
    """Its messages may be in the queue when the workers are replaced."""
    sent = app.send_task("contexts.tell", ({"orderId": "17"},), headers={"docket_context": {"user": "ann"}})
    assert json.loads(tell_context.AsyncResult(sent.id).get(timeout=WAIT_S).text) == {"user": "ann"}


def test_a_strange_header_fails_its_task() -> None:
    """Of a sender that is not this library."""
    sent = app.send_task("contexts.tell", ({"orderId": "17"},), headers={"docket_context": "{"})
    with pytest.raises(DecodeFailed, match="context"):
        tell_context.AsyncResult(sent.id).get(timeout=WAIT_S)


def test_a_context_is_kept_by_headers_that_are_passed_on() -> None:
    """As a text of this version, and as the mapping of an older one."""
    for header in ('{"user":"ann"}', {"user": "ann"}):
        sent = tell_context.apply_async((ORDER,), headers={"docket_context": header})
        assert json.loads(sent.get(timeout=WAIT_S).text) == {"user": "ann"}
