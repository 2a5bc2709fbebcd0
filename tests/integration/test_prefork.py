"""What a worker does before it forks, so that the first job of a child finds it done."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from celery import Celery

from tests.conftest import StartWorker
from tests.integration.apps.prepared import app, tell_all
from tests.unit.protos.shop_pb2 import Order

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


def test_a_forked_child_finds_its_store_imported_and_its_statements_compiled(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery]
) -> None:
    """The check at the worker's start opens the store and compiles what usual runs send: to save, publish and end."""
    start_worker(concurrency=1, app="tests.integration.apps.prepared")
    connect_app(app)
    # The second job tells how the first one ended.
    texts = [tell_all.delay(Order(order_id=str(number))).get(timeout=30).text for number in (1, 2)]
    told = json.loads(texts[-1])
    # Protobuf's own, when the options of a field are read for the first time: one millisecond.
    assert set(told["imported"]) <= {"google.protobuf.descriptor_pb2"}
    assert told["compiled"] == []
