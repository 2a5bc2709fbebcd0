"""Whatever arrives instead of a message, the task fails with a typed error and the worker goes on."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery.result import AsyncResult

from docket_celery import DecodeFailed, DocketError, InvalidArguments, PayloadTooLarge, UnknownMessageType
from docket_celery.task.envelope import Undecodable
from tests.infra.processes import ROOT
from tests.infra.workers import WorkerProcess
from tests.integration.apps.serving import Urls, queue_length, serving
from tests.integration.apps.wired import LIMIT_BYTES, app, make_label, measure_label, ship_order
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Nest, Order, Shipment

pytestmark = pytest.mark.integration
WAIT_S = 15
MIB = 1024 * 1024
ORDER = "docket.tests.unit.Order"


@pytest.fixture(scope="module", params=["prefork", "threads"])
def worker(
    request: pytest.FixtureRequest, urls: Urls, tmp_path_factory: pytest.TempPathFactory
) -> Generator[WorkerProcess]:
    """One worker for this module: in prefork the main process decodes too."""
    with serving(app, urls, tmp_path_factory.mktemp("worker"), pool=request.param, concurrency=1) as started:
        yield started


@pytest.fixture(autouse=True)
def lives(worker: WorkerProcess) -> Generator[None]:
    """After each test the same processes serve the next job."""
    before = children(worker)
    yield
    assert ship_order.delay(Order(order_id="next")).get(timeout=WAIT_S) == Shipment(tracking_id="T-next")
    assert children(worker) == before


def children(worker: WorkerProcess) -> set[int]:
    """Return the worker's processes."""
    return {worker.pid, *(child.pid for child in worker.children() if isinstance(child, psutil.Process))}


def send(content: Any) -> Any:
    """Publish *content* in an envelope of ours past the caller's checks; return the promise."""
    raw: Any = Undecodable(content, DocketError())
    return ship_order.AsyncResult(app.send_task("wired.ship", (raw,)).id)


def envelope(name: str, data: bytes) -> dict[str, str]:
    """Return an envelope's content."""
    return {"t": name, "b": base64.b64encode(data).decode()}


def test_corrupt_bytes_fail_the_task() -> None:
    """Bytes that are no Order."""
    with pytest.raises(DecodeFailed) as caught:
        send(envelope(ORDER, b"\xff\xff\xff")).get(timeout=WAIT_S)
    assert caught.value.type_name == ORDER
    assert caught.value.problem


def test_damaged_base64_fails_the_task() -> None:
    """Text that is no base64."""
    with pytest.raises(DecodeFailed, match="base64 is damaged") as caught:
        send({"t": ORDER, "b": "@@@"}).get(timeout=WAIT_S)
    assert caught.value.type_name == ORDER


@pytest.mark.parametrize("name", ["no.such.Type", Nest.DESCRIPTOR.full_name, "google.protobuf.Any", ""])
def test_a_type_that_no_task_declares_fails_the_task(name: str) -> None:
    """A name nobody knows, and one that the pool knows but no task uses, are alike unknown."""
    with pytest.raises(UnknownMessageType, match="belongs to no declared GraphTask") as caught:
        send(envelope(name, b"")).get(timeout=WAIT_S)
    assert caught.value.type_name == name


def test_another_tasks_type_fails_the_task() -> None:
    """A valid message of the wrong type."""
    sent = app.send_task("wired.ship", (Charge(charge_id="c"),))
    with pytest.raises(InvalidArguments, match=r"must be a docket\.tests\.unit\.Order") as caught:
        ship_order.AsyncResult(sent.id).get(timeout=WAIT_S)
    assert caught.value.what == "wired.ship(order: Order)"


@pytest.mark.parametrize(
    "content",
    [None, [], {}, "text", 7, {"t": ORDER}, {"t": ORDER, "b": 7}, {"t": [ORDER], "b": ""},
     {"t": ORDER, "b": "", "x": 1}, {"t": {"__type__": "docket.pb", "__value__": 1}, "b": ""}],
)  # fmt: skip
def test_an_envelope_of_another_shape_fails_the_task(content: Any) -> None:
    """Our mark around anything else."""
    with pytest.raises(DecodeFailed, match="the envelope is not"):
        send(content).get(timeout=WAIT_S)


@pytest.mark.parametrize(
    "args", [(), (1,), ("x",), ([],), (None,), ({"nope": 1},), ({"orderId": 7},), (Order(), Order())]
)
def test_arguments_that_do_not_fit_fail_the_task(args: tuple[Any, ...]) -> None:
    """A plain sender's mistakes reach its own promise."""
    sent = app.send_task("wired.ship", args)
    with pytest.raises(InvalidArguments):
        ship_order.AsyncResult(sent.id).get(timeout=WAIT_S)


def test_a_message_over_the_default_limit_passes_under_a_higher_one() -> None:
    """docket_max_message_bytes holds for the worker's and the caller's decoder too."""
    size = MIB + MIB // 2
    assert measure_label.delay(Label(text="x" * size)).get(timeout=WAIT_S) == Money(cents=size)
    assert len(make_label.delay(Charge(amount_cents=size)).get(timeout=WAIT_S).text) == size


def test_an_oversized_job_is_refused_at_the_caller(urls: Urls) -> None:
    """Before publishing, with the sizes."""
    label = Label(text="x" * LIMIT_BYTES)
    with pytest.raises(PayloadTooLarge) as caught:
        measure_label.apply_async((label,), queue="unserved")
    assert caught.value.size_bytes == label.ByteSize()
    assert caught.value.limit_bytes == LIMIT_BYTES
    assert queue_length(urls.broker, "unserved") == 0


def test_an_oversized_job_past_the_caller_fails_the_task() -> None:
    """Refused by its size, before it is decoded."""
    sent = app.send_task("wired.measure", (Label(text="x" * (LIMIT_BYTES + 10)),))
    with pytest.raises(PayloadTooLarge) as caught:
        measure_label.AsyncResult(sent.id).get(timeout=WAIT_S)
    assert caught.value.limit_bytes == LIMIT_BYTES
    assert caught.value.size_bytes > LIMIT_BYTES


def test_an_oversized_result_raises_at_get() -> None:
    """The caller does not decode it either."""
    result = make_label.delay(Charge(amount_cents=LIMIT_BYTES + 10))
    with pytest.raises(PayloadTooLarge) as caught:
        result.get(timeout=WAIT_S)
    assert caught.value.limit_bytes == LIMIT_BYTES


def test_a_result_of_a_strange_type_harms_its_own_promise_alone(urls: Urls) -> None:
    """A caller that lacks one type still gets the others."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.apps.stranger"],
        capture_output=True, text=True, cwd=ROOT, env=urls.environment, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["known"] == ["T-0", "T-1", "T-2"]
    assert told["after"] == ["T-9"]
    name, text = told["strange"]
    assert name == "docket.tests.unit.Reservation"
    assert "import the module that declares the task" in text
    assert told["plain"] == ["SUCCESS", True, name, name, name]


READER = """
import json, sys
from celery import Celery
app = Celery("reader", backend=sys.argv[1])
found = app.AsyncResult(sys.argv[2])
print(json.dumps([found.state, found.get(timeout=15), "docket_celery" in sys.modules]))
"""


def test_a_process_without_the_library_reads_state_and_plain_json(urls: Urls) -> None:
    """Its type and bytes are in a text; a plain promise of this process has the message."""
    promise = ship_order.delay(Order(order_id="plain"))
    shipment = promise.get(timeout=WAIT_S)
    done = subprocess.run(
        [sys.executable, "-c", READER, urls.results, promise.id],
        capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    state, value, imported = json.loads(done.stdout)
    assert (state, list(value), imported) == ("SUCCESS", ["docket_celery.result"], False)
    content = json.loads(value["docket_celery.result"])["__value__"]
    assert content["t"] == "docket.tests.unit.Shipment"
    assert Shipment.FromString(base64.b64decode(content["b"])) == shipment
    assert AsyncResult(promise.id, app=app).get(timeout=WAIT_S) == shipment


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (["--args", '[{"orderIdd": "7"}]'], "there is no field 'orderIdd' in docket.tests.unit.Order"),
        (["--kwargs", '{"ordr": {"orderId": "7"}}'], "'ordr' is none of them"),
    ],
)
def test_a_typo_in_celery_call_is_told_by_the_task_with_what_was_meant(
    urls: Urls, argument: list[str], said: str
) -> None:
    """The command itself checks nothing: it needs no more than the task's name."""
    command = [sys.executable, "-m", "celery", "-A", app.main or "", "call", "wired.ship", *argument]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=urls.environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    task_id = done.stdout.split()[-1]
    with pytest.raises(InvalidArguments) as caught:
        ship_order.AsyncResult(task_id).get(timeout=WAIT_S)
    assert said in str(caught.value)
    assert str(caught.value).endswith("; did you mean " + ("orderId?" if "field" in said else "order?"))


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.fspath(self.folder),)


def test_pickle_is_never_read(worker: WorkerProcess, tmp_path: Path) -> None:
    """A pickled job is refused unread."""
    bomb: Any = Bomb(tmp_path / "exploded")
    app.send_task("wired.ship", (bomb,), serializer="pickle")
    worker.wait_for_log("Refusing to deserialize")
    assert not bomb.folder.exists()
