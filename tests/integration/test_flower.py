"""What people see of runs in a real Flower, through its API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, states

from tests.conftest import StartFlower, StartWorker
from tests.infra.flower import FlowerProcess
from tests.infra.processes import wait_until
from tests.integration import shop
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


@pytest.fixture
def flower(
    start_worker: StartWorker, start_flower: StartFlower, connect_app: Callable[[Celery], Celery]
) -> FlowerProcess:
    """Flower beside a worker that runs one task at a time, takes no further one before, and sends events."""
    connect_app(shop.app)
    flower = start_flower(app=APP)
    start_worker(app=APP, concurrency=1, args=["-E", "--prefetch-multiplier=1"])
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
