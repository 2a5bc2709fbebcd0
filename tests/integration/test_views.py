"""The view of an output for people who read the database: helpful where it can be had, never in the way of a save."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Any

import pytest
from google.protobuf import any_pb2, duration_pb2, struct_pb2, timestamp_pb2
from google.protobuf.message import Message

from docket_celery.graph import Graph
from docket_celery.plan.messages import MAX_JSON_BYTES
from docket_celery.plan.options import Scope
from docket_celery.store import SQLStore
from tests.conformance.samples import SQLBench
from tests.unit.graphs import within
from tests.unit.protos.shop_pb2 import Address, Label, Money, Nest, Order, Payment, Reservation

pytestmark = pytest.mark.integration

SECRET = "4111-1111"
JOB = Reservation(reservation_id="7")


@pytest.fixture
def bench(database_url: str) -> Generator[SQLBench]:
    """A store on real Postgres, empty."""
    store = SQLStore(database_url)
    yield SQLBench(store)
    store.close()


@pytest.fixture(params=[Scope.WORKFLOW, Scope.GLOBAL])
def keep(request: pytest.FixtureRequest, bench: SQLBench) -> Callable[[Message], Any]:
    """A function that has a step return a message, checks that it is stored whole, and returns its view."""

    def run(message: Message) -> Any:
        kind: Any = type(message)
        graph = Graph("views", store=bench.store)

        def step(job: Reservation) -> Message:
            return message

        step.__annotations__["return"] = kind
        graph.register(step, persist=request.param)
        assert within(lambda: graph.execute(kind, JOB, execution_id="o-1")) == message
        ((data, view),) = bench.sql("SELECT output_data, output_json FROM docket_cache")
        assert kind.FromString(data) == message
        return view

    return run


def packed(message: Message) -> any_pb2.Any:
    """Return *message* as an Any."""
    found = any_pb2.Any()
    found.Pack(message)
    return found


def test_an_output_is_shown_by_its_fields(keep: Callable[[Message], Any]) -> None:
    """As JSON that SQL can look into, under the names of the proto file."""
    assert keep(Order(order_id="7", amount_cents=5)) == {"order_id": "7", "amount_cents": "5"}


@pytest.mark.parametrize(
    "message",
    [
        Label(text="x" * MAX_JSON_BYTES),
        Label(text="x" * 1_000_000),
        # Fewer bytes than its JSON has, where each quote becomes two characters.
        Label(text='"' * (MAX_JSON_BYTES - 100)),
        Payment(extra=any_pb2.Any(type_url="type.googleapis.com/no.such.Type", value=b"\x08\x01")),
        Payment(extra=any_pb2.Any(type_url="type.googleapis.com/docket.tests.unit.Money", value=b"\xff\xff")),
        Label(text="a\0b"),
        Order(stock={"a\0b": 1}),
        Payment(extra=packed(Label(text="a\0b"))),
        struct_pb2.Value(number_value=float("nan")),
        timestamp_pb2.Timestamp(seconds=10**15),
        duration_pb2.Duration(seconds=10**15),
    ],
    ids=[
        "large", "1 MB", "large as JSON", "unknown Any", "damaged Any", "NUL", "NUL in a key", "NUL in an Any", "NaN",
        "no date", "no duration",
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_stored_without_a_view(
    keep: Callable[[Message], Any], message: Message
) -> None:
    """The data is whole and the run succeeds; only the view is missing."""
    assert keep(message) is None


def test_the_largest_view_is_stored(keep: Callable[[Message], Any]) -> None:
    """Sixteen kibibytes of JSON fit."""
    text = "x" * (MAX_JSON_BYTES - len(json.dumps({"text": ""})))
    assert keep(Label(text=text)) == {"text": text}


def test_a_message_as_deep_as_can_be_is_stored(keep: Callable[[Message], Any]) -> None:
    """Rendering recurses; whether there is a view does not matter to the save."""
    nest = Nest(text="inside")
    for _ in range(90):
        nest = Nest(inner=nest)
    view = keep(nest)
    assert view is None or "inner" in view


@pytest.mark.parametrize(
    "message",
    [
        Payment(card_number=SECRET, note="shown"),
        Payment(billing=Address(phone=SECRET, street="shown")),
        Payment(earlier=[Address(phone=SECRET, street="shown")]),
        Payment(known={"home": Address(phone=SECRET, street="shown")}),
        Payment(extra=packed(Payment(card_number=SECRET, note="shown"))),
        Payment(extra=packed(Payment(extra=packed(Address(phone=SECRET, street="shown"))))),
    ],
    ids=["a field", "a message", "a list", "a map", "an Any", "an Any in an Any"],
)
def test_secrets_are_left_out_wherever_they_are(
    keep: Callable[[Message], Any], bench: SQLBench, message: Message
) -> None:
    """Fields marked ``debug_redact``; what stands beside them is shown."""
    assert "shown" in json.dumps(keep(message))
    assert (
        bench.sql("SELECT 1 FROM docket_cache WHERE output_json::text LIKE :secret", secret=f"%{SECRET}%")
        == []
    )


def test_every_float_and_integer_of_protobuf_is_shown(keep: Callable[[Message], Any]) -> None:
    """64-bit integers are text in JSON, so that nobody rounds them."""
    assert keep(Money(cents=-(2**63))) == {"cents": str(-(2**63))}
