"""However a GraphTask is declared, it behaves the same: here, through a broker, and eagerly."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from docket_celery import GraphResult, GraphTask, InvalidArguments
from tests.infra.workers import WorkerProcess
from tests.integration.apps.declared import NAMES, app, labelled, named, task_of
from tests.integration.apps.serving import Urls, drop_queue, queue_length, serving, unique
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Shipment

pytestmark = pytest.mark.integration
WAIT_S = 15
ORDER = Order(order_id="17", amount_cents=1000)
UNSERVED = "unserved"


@pytest.fixture(scope="module", autouse=True)
def worker(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """One worker for this module."""
    with serving(app, urls, tmp_path_factory.mktemp("worker")) as started:
        yield started


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Any:
    """One task for each way to declare it."""
    return task_of(request.param)


@pytest.fixture
def eager() -> Generator[None]:
    """Run tasks where they are submitted."""
    app.conf.task_always_eager = True
    yield
    app.conf.task_always_eager = False


def test_a_direct_call_returns_the_message(task: Any) -> None:
    """Calling the task runs it here and now, under a new name."""
    first, second = task(ORDER), task({"orderId": "17", "amountCents": "1000"})
    assert type(first) is Shipment
    assert first.tracking_id.startswith("17 1000 ")
    assert first != second


def test_delay_gives_the_typed_message(task: Any) -> None:
    """The run is named by the task's id unless somebody names it."""
    result = task.delay(ORDER)
    assert type(result) is GraphResult
    shipped = result.get(timeout=WAIT_S)
    assert type(shipped) is Shipment
    assert shipped.tracking_id == f"17 1000 {result.id} None"


def test_apply_async_names_the_run_and_hands_over_the_context(task: Any) -> None:
    """execution_id and context reach the steps."""
    name = unique("run")
    result = task.apply_async((ORDER,), execution_id=name, context={"tenant": "acme"})
    assert result.get(timeout=WAIT_S).tracking_id == f"17 1000 {name} acme"


def test_a_job_goes_as_json_with_either_spelling(task: Any) -> None:
    """Protocol Buffers' JSON form means the same as the message."""
    results = [
        task.delay({"orderId": "17", "amountCents": "1000"}),
        task.delay({"order_id": "17", "amount_cents": 1000}),
    ]
    for result in results:
        assert result.get(timeout=WAIT_S).tracking_id == f"17 1000 {result.id} None"


def test_a_job_goes_by_keyword(task: Any) -> None:
    """The declared names are the keywords; a class declares types alone, so it takes positions alone."""
    if task.name == "declared.by_class":
        with pytest.raises(InvalidArguments, match="input_1"):
            task.delay(order=ORDER)
        return
    results = [task.delay(order=ORDER), task.delay(order={"orderId": "17", "amountCents": "1000"})]
    for result in results:
        assert result.get(timeout=WAIT_S).tracking_id == f"17 1000 {result.id} None"
    assert task(order=ORDER).tracking_id.startswith("17 1000 ")


def test_a_plain_sender_needs_no_declaration(task: Any) -> None:
    """send_task, as beat and other services use it, takes messages and their JSON form."""
    for job in (ORDER, {"orderId": "17", "amountCents": "1000"}):
        result = app.send_task(task.name, (job,))
        value = task.AsyncResult(result.id).get(timeout=WAIT_S)
        assert value == Shipment(tracking_id=f"17 1000 {result.id} None")


@pytest.mark.parametrize(
    ("args", "kwargs", "named_there"),
    [
        ((), {}, "missing a required argument"),
        ((ORDER, ORDER), {}, "too many positional arguments"),
        ((Money(cents=1),), {}, "not a docket.tests.unit.Money"),
        (("17",), {}, "not a str"),
        ((None,), {}, "not a NoneType"),
        (({"orderIdd": "17"},), {}, "orderIdd"),
        (({"amountCents": "many"},), {}, "amountCents"),
        ((), {"ordr": ORDER}, "argument"),
        ((ORDER,), {"order": ORDER}, "argument"),
    ],
)
def test_arguments_that_do_not_fit_fail_before_publishing(
    task: Any, urls: Urls, args: tuple[Any, ...], kwargs: dict[str, Any], named_there: str
) -> None:
    """The caller gets the error, and nobody else hears of the job."""
    for submit in (task.apply_async, task.apply):
        with pytest.raises(InvalidArguments, match=named_there):
            submit(args, kwargs, queue=UNSERVED)
    with pytest.raises(InvalidArguments, match=named_there):
        task.delay(*args, **kwargs)
    with pytest.raises(InvalidArguments, match=named_there):
        task(*args, **kwargs)
    assert queue_length(urls.broker, UNSERVED) == 0
    task.apply_async((ORDER,), queue=UNSERVED)
    assert queue_length(urls.broker, UNSERVED) == 1, "the count would have shown a message"
    drop_queue(urls.broker, UNSERVED)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"execution_id": ""}, "execution_id"),
        ({"execution_id": "x" * 256}, "execution_id"),
        ({"execution_id": "line\nbreak"}, "execution_id"),
        ({"context": {"when": object()}}, "context"),
        ({"context": ["tenant"]}, "context"),
    ],
)
def test_names_and_contexts_that_cannot_travel_are_refused(
    task: Any, urls: Urls, options: dict[str, Any], fault: str
) -> None:
    """A bad execution_id or context fails at the caller too."""
    with pytest.raises(InvalidArguments, match=fault):
        task.apply_async((ORDER,), queue=UNSERVED, **options)
    assert queue_length(urls.broker, UNSERVED) == 0


@pytest.mark.usefixtures("eager")
def test_eager_mode_runs_here(task: Any) -> None:
    """task_always_eager takes the same arguments and gives the same message."""
    result = task.apply_async(({"orderId": "17"},), execution_id="eager-1", context={"tenant": "acme"})
    assert result.get() == Shipment(tracking_id="17 0 eager-1 acme")
    assert task.delay(ORDER).get().tracking_id.startswith("17 1000 ")
    with pytest.raises(InvalidArguments):
        task.delay()


def test_apply_runs_here(task: Any) -> None:
    """.apply() takes what .apply_async() takes."""
    result = task.apply((ORDER,), execution_id="here-1", context={"tenant": "acme"})
    assert result.get() == Shipment(tracking_id="17 1000 here-1 acme")
    assert result.successful()


def test_the_declaration_is_kept(task: Any) -> None:
    """Name, text and types stay what was declared."""
    assert isinstance(task, GraphTask)
    assert task.__doc__ == "Ship an order."
    assert [key.kind for key in task.declaration.given] == [Order]
    assert task.declaration.target.kind is Shipment
    assert task.plan().target.kind is Shipment
    if task.name != "declared.by_class":
        declared: Any = task.declared
        assert declared.__name__ == task.name.removeprefix("declared.")


def test_acknowledgement_is_the_tasks_own(task: Any) -> None:
    """Delivery semantics are attributes of the task and leave the app's settings alone."""
    assert (task.acks_late, task.retry_on_worker_lost, task.track_started) == (True, True, True)
    assert task.default_retry_delay == 1
    assert (app.conf.task_acks_late, app.conf.task_retry_on_worker_lost) == (False, False)


def test_a_business_key_names_the_run_where_it_is_submitted() -> None:
    """The task's execution_id function is asked at submit; an explicit name wins."""
    assert named.delay(ORDER).get(timeout=WAIT_S).tracking_id == "17 1000 order-17 None"
    explicit = named.apply_async((ORDER,), execution_id="mine")
    assert explicit.get(timeout=WAIT_S).tracking_id == "17 1000 mine None"
    assert named(ORDER).tracking_id == "17 1000 order-17 None"


def test_a_business_key_names_the_run_on_the_worker_for_plain_senders() -> None:
    """send_task knows no function; the worker asks it."""
    sent = app.send_task("declared.named", ({"orderId": "18"},))
    value = named.AsyncResult(sent.id).get(timeout=WAIT_S)
    assert value.tracking_id == "18 0 order-18 None"


def test_a_signature_carries_the_runs_name() -> None:
    """.s() takes execution_id and context as options."""
    signature: Any = named.s(ORDER)
    signed = signature.set(execution_id="signed", context={"tenant": "acme"})
    assert signed.apply_async().get(timeout=WAIT_S).tracking_id == "17 1000 signed acme"


def test_a_job_of_two_messages_takes_any_mix() -> None:
    """Positions, keywords and JSON may be mixed as in a call."""
    shipment = Shipment(tracking_id="T")
    results = [
        labelled.delay(ORDER, shipment),
        labelled.delay(ORDER, shipment=shipment),
        labelled.apply_async((), {"shipment": {"trackingId": "T"}, "order": ORDER}),
    ]
    for result in results:
        assert result.get(timeout=WAIT_S) == Label(text="17 <- T")
    wrong: Any = Charge()
    with pytest.raises(InvalidArguments, match=r"labelled\(order: Order, shipment: Shipment\)"):
        labelled.delay(ORDER, wrong)
