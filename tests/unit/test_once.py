"""What a job costs around its run is done once: at its submission, and in its delivery."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import pytest
from celery import Celery, _state
from celery.contrib.testing.worker import start_worker
from celery.result import AsyncResult

from docket_celery import Graph, GraphTask, graph_task
from docket_celery.engine.process.pool import Pool
from docket_celery.task import app_settings, backends, envelope
from tests.unit.protos.shop_pb2 import Label, Order

WAIT_S = 30.0
graph = Graph("tests.once")


@graph.step
def print_label(order: Order) -> Label:
    """Tell that a step has run."""
    return Label(text=order.order_id)


@pytest.fixture(scope="module")
def task() -> Generator[GraphTask[[Order], Label]]:
    """A task of an app of its own, with a worker in this process."""
    state: Any = _state
    before, known = getattr(state._tls, "current_app", None), vars(app_settings.this_worker).copy()
    app = Celery("once", broker="memory://", backend="cache+memory://")
    # The broker in memory is one for all tests of the process.
    app.conf.task_default_queue = f"once-{uuid.uuid4()}"

    @graph_task(app, graph, name="once.print", shared=False)
    def print_one(order: Order) -> Label:
        raise NotImplementedError

    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=WAIT_S):
        yield print_one
    vars(app_settings.this_worker).update(known)
    state._tls.current_app = before


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], Counter[str]]:
    """Return what counts the calls of a function, by the thread that makes them."""

    def counted(owner: Any, name: str) -> Counter[str]:
        calls, real = Counter[str](), getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            here = threading.current_thread() is threading.main_thread()
            calls["submitting" if here else "running"] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)
        return calls

    return counted


def run(task: GraphTask[[Order], Label]) -> Any:
    """Have a job worked off, and return what a process without the library reads as its result."""
    return AsyncResult(task.delay(Order(order_id="17")).id, app=task.app).get(timeout=WAIT_S)


def test_settings_are_looked_at_once_on_each_side(
    task: GraphTask[[Order], Label], count: Callable[[Any, str], Counter[str]]
) -> None:
    """By the submission, and by the delivery; all else is handed what they found."""
    calls = count(app_settings, "app_settings")
    assert run(task) == Label(text="17")
    assert calls == {"submitting": 1, "running": 1}


def test_a_delivery_hands_one_piece_of_work_to_the_pool(
    task: GraphTask[[Order], Label], count: Callable[[Any, str], Counter[str]]
) -> None:
    """Celery's thread runs no step: that is the one hop there is."""
    calls = count(Pool, "submit")
    assert run(task) == Label(text="17")
    assert calls == {"running": 1}


def test_a_first_delivery_asks_the_result_backend_nothing(
    task: GraphTask[[Order], Label], count: Callable[[Any, str], Counter[str]]
) -> None:
    """Whether its task has ended before is a question for a message that came once more."""
    calls = count(backends, "is_stored")
    assert run(task) == Label(text="17")
    assert calls == {}


def test_a_result_is_encoded_once(
    task: GraphTask[[Order], Label], count: Callable[[Any, str], Counter[str]]
) -> None:
    """For the backend; the job was, when it was published."""
    calls = count(envelope, "encode")
    assert run(task) == Label(text="17")
    assert calls == {"submitting": 1, "running": 1}
