"""GraphTasks are ordinary members of Celery's canvas."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError

from docket_celery import InvalidArguments, StepFailed
from tests.infra.workers import WorkerProcess
from tests.integration.apps.canvas import (
    CardRefusedError,
    app,
    charge_order,
    describe,
    on_error,
    read_order,
    remember,
    ship_charge,
    total,
)
from tests.integration.apps.journal import Journals
from tests.integration.apps.serving import Urls, serving, unique
from tests.unit.protos.shop_pb2 import Charge, Order, Shipment

pytestmark = pytest.mark.integration
WAIT_S = 15
ORDER = Order(order_id="17", amount_cents=1000)
FREE = Order(order_id="18")


@pytest.fixture(scope="module", autouse=True)
def worker(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Generator[WorkerProcess]:
    """One worker for this module."""
    with serving(app, urls, tmp_path_factory.mktemp("worker")) as started:
        yield started


@pytest.fixture
def journals(urls: Urls) -> Journals:
    """What the worker noted."""
    return Journals(urls.results)


def test_a_chain_hands_a_message_from_graph_to_graph() -> None:
    """The result of one is the argument of the next, whose promise is typed."""
    value = chain(charge_order.s(ORDER), ship_charge.s())().get(timeout=WAIT_S)
    assert value == Shipment(tracking_id="C-17 1000 None")
    assert type(value) is Shipment


def test_a_chain_carries_each_members_name_and_context() -> None:
    """Options of a signature reach the member that they were set on."""
    second: Any = ship_charge.s()
    second.set(execution_id=unique("run"), context={"tenant": "acme"})
    value = chain(charge_order.s(ORDER), second)().get(timeout=WAIT_S)
    assert value.tracking_id == "C-17 1000 acme"


def test_a_plain_task_feeds_a_graph_with_a_dict() -> None:
    """A plain task needs to know nothing of protobuf."""
    value = chain(read_order.s(3), charge_order.s(), ship_charge.s())().get(timeout=WAIT_S)
    assert value == Shipment(tracking_id="C-3 300 None")


def test_a_graph_feeds_a_plain_task_with_a_message() -> None:
    """A plain task gets the message itself."""
    value = chain(charge_order.s(ORDER), ship_charge.s(), describe.s())().get(timeout=WAIT_S)
    assert value == "Shipment C-17 1000 None"


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ((charge_order.s(ORDER), charge_order.s()), r"must be a docket\.tests\.unit\.Order"),
        ((read_order.s(3, "cost"), charge_order.s()), "cost"),
        ((describe.s(Shipment()), charge_order.s()), "not a str"),
        ((charge_order.s(ORDER), describe.s(), charge_order.s()), "tracking_id|canvas"),
    ],
)
def test_a_link_that_does_not_fit_fails_the_chain_at_once(members: tuple[Any, ...], fault: str) -> None:
    """Nobody waits for a member that cannot be given what the one before made."""
    with pytest.raises((InvalidArguments, AttributeError), match=fault):
        chain(*members)().get(timeout=WAIT_S)


def test_a_failed_member_ends_the_chain_with_its_error() -> None:
    """The promise of the last member raises what the failed one raised."""
    with pytest.raises(StepFailed) as caught:
        chain(charge_order.s(FREE), ship_charge.s(), describe.s())().get(timeout=WAIT_S)
    assert caught.value.step == "charge"
    assert caught.value.caused_by(CardRefusedError)


def test_a_group_gives_all_messages_in_order() -> None:
    """As with any tasks."""
    orders = [Order(order_id=str(n), amount_cents=n) for n in range(1, 6)]
    values = group(charge_order.s(order) for order in orders)().get(timeout=WAIT_S)
    assert values == [Charge(charge_id=f"C-{n}", amount_cents=n) for n in range(1, 6)]


def test_a_groups_failed_member_raises_its_error() -> None:
    """And the others' messages stay to be had."""
    result = group(charge_order.s(ORDER), charge_order.s(FREE))()
    with pytest.raises(StepFailed, match="costs nothing"):
        result.get(timeout=WAIT_S)
    first: Any = result.children[0]
    assert first.get(timeout=WAIT_S) == Charge(charge_id="C-17", amount_cents=1000)


def test_a_chords_body_gets_the_headers_messages() -> None:
    """A plain body reads them."""
    header = [charge_order.s(Order(order_id=str(n), amount_cents=n)) for n in range(1, 5)]
    assert chord(header)(total.s()).get(timeout=WAIT_S) == 10


def test_a_graph_is_a_chords_body() -> None:
    """After a header of plain tasks and of graphs."""
    header = [charge_order.s(ORDER), read_order.s(1)]
    value = chord(header)(ship_charge.si(Charge(charge_id="body", amount_cents=1))).get(timeout=WAIT_S)
    assert value == Shipment(tracking_id="body 1 None")


def test_a_chords_body_that_cannot_take_the_list_fails_at_once() -> None:
    """A graph of one message is no body for a list of results; its promise says so."""
    with pytest.raises((ChordError, InvalidArguments), match="not a list"):
        chord([charge_order.s(ORDER)] * 2)(ship_charge.s()).get(timeout=WAIT_S)


def test_a_failed_header_fails_the_body() -> None:
    """With the header's own error."""
    with pytest.raises((ChordError, StepFailed), match="costs nothing"):
        chord([charge_order.s(ORDER), charge_order.s(FREE)])(total.s()).get(timeout=WAIT_S)


def test_a_group_in_a_chain_becomes_a_chord() -> None:
    """Celery upgrades it, and messages pass through."""
    flow = chain(read_order.s(2), group(charge_order.s(), charge_order.s()), total.s())
    assert flow().get(timeout=WAIT_S) == 400


def test_a_link_gets_the_message(journals: Journals) -> None:
    """link= is called with the result."""
    journal = unique("link")
    ship_charge.apply_async((Charge(charge_id="L"),), link=remember.s(journal)).get(timeout=WAIT_S)
    assert journals.wait(journal, 1) == ["L 0 None"]


def test_a_graph_is_a_link() -> None:
    """A GraphTask may follow another as its link."""
    result = charge_order.apply_async((ORDER,), link=ship_charge.s())
    assert result.get(timeout=WAIT_S) == Charge(charge_id="C-17", amount_cents=1000)
    children: Any = result.children
    (child,) = children
    assert child.get(timeout=WAIT_S) == Shipment(tracking_id="C-17 1000 None")


def test_an_errback_gets_the_typed_error(journals: Journals) -> None:
    """link_error= is called once with the step's failure and its fields."""
    journal = unique("errback")
    result = charge_order.apply_async((FREE,), link_error=on_error.s(journal))
    with pytest.raises(StepFailed):
        result.get(timeout=WAIT_S)
    (line,) = journals.wait(journal, 1)
    assert line.startswith("StepFailed ('charge', 1, ")
    assert "order 18 costs nothing" in line
