"""What people see of runs in a real Flower, through its API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, states

from examples.movies.movies_pb2 import Movie
from tests.conftest import StartFlower, StartWorker
from tests.infra.flower import FlowerProcess
from tests.infra.processes import wait_until
from tests.integration import shop
from tests.integration.apps import batches
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Payment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
APP = "tests.integration.shop"
_WITHIN_S = 30.0
_MOST_CHARS = 300


def task_in(flower: FlowerProcess, task_id: str, state: str) -> dict[str, Any]:
    """Wait until Flower shows the task in *state*; return what it says of it."""

    def found() -> bool:
        return bool(flower.get("/api/tasks").get(task_id, {}).get("state") == state)

    wait_until(found, within_s=_WITHIN_S, what=f"{state} of {task_id}: {flower.get('/api/tasks')}")
    info: dict[str, Any] = flower.get(f"/api/task/info/{task_id}")
    return info


def told(reply: Any) -> list[dict[str, Any]]:
    """Return what the one worker said, or nothing if it did not answer in time."""
    return next(iter((reply or {}).values()), [])


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Celery:
    """The app that the worker serves; a test may name another one."""
    app: Celery = getattr(request, "param", shop.app)
    return app


@pytest.fixture
def flower(
    start_worker: StartWorker,
    start_flower: StartFlower,
    connect_app: Callable[[Celery], Celery],
    served: Celery,
) -> FlowerProcess:
    """Flower beside a worker that runs one task at a time, takes no further one before, and sends events."""
    name = APP if served is shop.app else str(served.main)
    connect_app(served)
    flower = start_flower(app=name)
    start_worker(app=name, concurrency=1, args=["-E", "--prefetch-multiplier=1"])
    # Known from its events: from now on Flower hears those of its tasks too.
    wait_until(
        lambda: bool(flower.get("/workers?json=1")["data"]),
        within_s=_WITHIN_S,
        what="the worker's events in Flower",
    )
    return flower


def test_arguments_and_results_are_readable_bounded_and_without_secrets(flower: FlowerProcess) -> None:
    """100 KB in and out are cut, fields marked debug_redact are hidden, the rest can be read."""
    payment = Payment(
        card_number=shop.SECRET, receipt=b"\x00" * shop.BLOB_BYTES, note="paid " * (shop.BLOB_BYTES // 5)
    )
    result = shop.pay.delay(payment)
    by_name = shop.pay.delay(payment=Payment(card_number=shop.SECRET, note="by name"))
    assert result.get(timeout=30).amount_cents == shop.BLOB_BYTES
    info = task_in(flower, result.id, states.SUCCESS)
    assert info["name"] == "shop.pay"
    assert info["args"].startswith("(Payment(card_number=***, receipt=<100000 bytes>, note='paid paid ")
    assert info["kwargs"] == "{}"
    assert info["result"].startswith("Order(order_id='171717")
    assert f"amount_cents={shop.BLOB_BYTES}, ship_to=Address(street='paid paid " in info["result"]
    assert "phone=***" in info["result"]
    named = task_in(flower, by_name.id, states.SUCCESS)
    assert (named["args"], named["kwargs"]) == ("()", "{payment=Payment(card_number=***, note='by name')}")
    for shown in (info, named, *flower.get("/api/tasks").values()):
        assert shop.SECRET not in str(shown)
        assert shop.PHONE not in str(shown)
        for field in ("args", "kwargs", "result"):
            assert len(shown[field]) <= _MOST_CHARS


def test_waiting_and_running_tasks_are_shown_without_secrets(flower: FlowerProcess, tmp_path: Path) -> None:
    """As `celery inspect` tells it, which Flower asks for its page of a worker."""
    gate = tmp_path / "gate"
    payment = Payment(card_number=shop.SECRET, note=str(gate))
    inspect = shop.app.control.inspect()
    later = shop.hold.apply_async(kwargs={"payment": payment}, countdown=600)
    wait_until(lambda: bool(told(inspect.scheduled())), within_s=_WITHIN_S, what="the task is scheduled")
    running = shop.hold.delay(payment)
    wait_until(lambda: bool(told(inspect.active())), within_s=_WITHIN_S, what="the task is active")
    shown = "Payment(card_number=***, note='"
    (info,) = told(inspect.active())
    assert (info["id"], info["kwargs"]) == (running.id, "{}")
    assert info["args"].startswith(f"({shown}")
    (entry,) = told(inspect.scheduled())
    assert entry["request"]["id"] == later.id
    assert entry["request"]["kwargs"].startswith(f"{{payment={shown}")
    for each in (inspect.active(), inspect.query_task(running.id)):
        assert running.id in str(each)
        assert shop.SECRET not in str(each)
    shop.app.control.revoke(later.id)
    gate.touch()
    assert running.get(timeout=30).charge_id == running.id


def test_retries_and_failures_show_their_states_and_the_typed_error(
    flower: FlowerProcess, tmp_path: Path
) -> None:
    """RETRY while another task holds the worker, then SUCCESS with its retries; FAILURE with code and cause.

    Flower lists the submitted runs alone, each once and in a state of Celery's: steps are not tasks.
    """
    first_gate, second_gate = tmp_path / "first", tmp_path / "second"
    first = shop.wait.delay(Label(text=str(first_gate)))
    retried = shop.retry.delay(Money(cents=7))
    # Queued before the retry is published, so it holds the worker while the retry waits in the broker.
    holding = shop.wait.delay(Label(text=str(second_gate)))
    first_gate.touch()
    info = task_in(flower, retried.id, states.RETRY)
    assert info["name"] == "shop.retry"
    assert "[DC201] step 'call_carrier' failed after 1 attempt" in info["exception"]
    assert "ConnectionError: the carrier hung up" in info["exception"]
    second_gate.touch()
    assert retried.get(timeout=30).tracking_id == "delivery 2 of 7"
    info = task_in(flower, retried.id, states.SUCCESS)
    assert (info["retries"], info["args"]) == (1, "(Money(cents=7))")
    assert info["retried"] is not None
    assert info["result"] == "Shipment(tracking_id='delivery 2 of 7')"

    failed = shop.fail.delay(Charge(charge_id="c1"))
    info = task_in(flower, failed.id, states.FAILURE)
    assert "[DC201] step 'refuse' failed after 1 attempt" in info["exception"]
    assert "ValueError: charge c1 has no label" in info["exception"]
    assert "StepFailed" in info["traceback"]
    aborted = shop.fail.delay(Charge(amount_cents=-1))
    assert "[DC200] the customer is gone" in task_in(flower, aborted.id, states.FAILURE)["exception"]

    listed = flower.get("/api/tasks")
    assert {task_id: task["name"] for task_id, task in listed.items()} == {
        first.id: "shop.wait",
        retried.id: "shop.retry",
        holding.id: "shop.wait",
        failed.id: "shop.fail",
        aborted.id: "shop.fail",
    }
    assert {task["state"] for task in listed.values()} == {states.SUCCESS, states.FAILURE}


@pytest.mark.parametrize("served", [batches.app], indirect=True, ids=["batches"])
def test_a_batch_is_one_family_under_the_tasks_own_name(flower: FlowerProcess) -> None:
    """Its job, chunks and bodies: one name, one root; each says what it is, and the job's entry has the result."""
    sent = batches.place_all.apply_async(([Movie(title="j::", rating=n) for n in range(3)],))
    assert len(sent.get(timeout=30)) == 3
    info = task_in(flower, sent.id, states.SUCCESS)
    assert info["result"] == "<3 messages>"
    listed: dict[str, Any] = flower.get("/api/tasks")
    wait_until(
        lambda: all(task["state"] == states.SUCCESS for task in flower.get("/api/tasks").values()),
        within_s=_WITHIN_S,
        what="the end of all chunks in Flower",
    )
    assert {task["name"] for task in listed.values()} == {batches.place_all.name}
    assert {task["root_id"] for task in listed.values()} == {sent.id}
    parts = sorted(task["args"] for task_id, task in listed.items() if task_id != sent.id)
    assert parts == [
        "(items 0 to 1 of stage 1)",
        "(items 0 to 1 of stage 3)",
        "(items 2 to 2 of stage 1)",
        "(items 2 to 2 of stage 3)",
    ]
