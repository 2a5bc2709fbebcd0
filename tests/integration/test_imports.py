"""When a worker imports what its graphs need: before it forks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from celery import Celery

from tests.conftest import StartWorker
from tests.integration.apps.importing import app, tell_imports
from tests.unit.protos.shop_pb2 import Order

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


def test_a_forked_child_has_the_imports_of_its_store_from_its_parent(
    start_worker: StartWorker, connect_app: Callable[[Celery], Celery]
) -> None:
    """The check at the worker's start opens the store once, so that no child's first job imports SQLAlchemy."""
    start_worker(concurrency=1, app="tests.integration.apps.importing")
    connect_app(app)
    told = [tell_imports.delay(Order(order_id=str(number))).get(timeout=30).text for number in (1, 2)]
    imported = {name for text in told for name in text.partition(": ")[2].split()}
    # Protobuf's own, when the options of a field are read for the first time: one millisecond.
    assert imported <= {"google.protobuf.descriptor_pb2"}
