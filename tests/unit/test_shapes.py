"""What is stored is read with another version of its message type: kept, or refused, never lost in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

from docket_celery import Graph, Scope
from docket_celery.errors import AbortError, DecodeFailed
from docket_celery.plan.shapes import check_shape, message_shape
from docket_celery.store import SQLStore
from tests.unit.protos.shop_pb2 import Order, Shipment

Type = type[Message]
CARD = b"\x0a\x07card-17"  # field 1 as text


def message_type(fields: str, held: str = "1 string text") -> Type:
    """Return ``shape.Card`` with *fields* ("1 string id, 2 Held held") and ``shape.Held`` with *held*."""
    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(name="card.proto", package="shape", syntax="proto3")
    for name, written in (("Held", held), ("Card", fields)):
        made = file.message_type.add(name=name)
        for line in filter(None, written.split(", ")):
            number, *labels, kind, field = line.split()
            added = made.field.add(name=field, number=int(number))
            added.label = added.LABEL_REPEATED if labels else added.LABEL_OPTIONAL
            if kind[0].isupper():
                added.type, added.type_name = added.TYPE_MESSAGE, f".shape.{kind}"
            else:
                added.type = getattr(added, f"TYPE_{kind.upper()}")
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("shape.Card"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1 string id", "1 string id, 2 int64 cents"),
        ("1 string id, 2 int64 cents", "1 string id"),
        ("1 int32 n", "1 uint64 renamed"),
        ("1 int32 n", "1 bool n"),
        ("1 string id", "1 bytes id"),
        ("1 string id", "1 repeated string id"),
        ("1 Card card, 2 Held held", "1 Card card, 2 Held held, 3 repeated Card more"),
    ],
)
def test_a_compatible_change_is_read(before: str, after: str) -> None:
    """Fields come and go, and kinds of one encoding replace each other."""
    check_shape(message_type(after), message_shape(message_type(before)))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("1 string id", "1 int64 id", "field 1 was text when it was stored, and is varint now"),
        ("1 int64 n", "1 sint64 n", "is zigzag now"),
        ("1 fixed32 n", "1 float n", "is float now"),
        ("1 repeated int64 n", "1 int64 n", "was repeated varint"),
        ("1 repeated Held h", "1 Held h", "was repeated a message"),
        ("1 Held h", "1 int32 h", "was a message"),
    ],
)
def test_a_field_of_another_kind_is_refused(before: str, after: str, told: str) -> None:
    """The number, what it was and what it is are named."""
    with pytest.raises(DecodeFailed, match=told):
        check_shape(message_type(after), message_shape(message_type(before)))


def test_a_field_of_a_message_inside_counts_too() -> None:
    """However deep; a type that holds itself ends too."""
    before = message_shape(message_type("1 Card card, 2 Held held"))
    with pytest.raises(DecodeFailed, match="field 1 was text"):
        check_shape(message_type("1 Card card, 2 Held held", held="1 double text"), before)


def test_a_shape_is_bounded_and_may_be_missing() -> None:
    """What an earlier release stored has none; a wide type has a short one."""
    check_shape(message_type("1 string id"), None)
    wide = message_type(", ".join(f"{number} string f{number}" for number in range(1, 2000)))
    assert len(message_shape(wide)) <= 4096
    with pytest.raises(DecodeFailed, match="shape cannot be read"):
        check_shape(wide, "[")


@pytest.fixture
def resume(tmp_path: Path) -> Callable[[Type, Type], Message]:
    """Run a step that returns the first type, fail after it, and resume with the second."""

    def run(before: Type, after: Type) -> Message:
        store = SQLStore(f"sqlite:///{tmp_path / 'shapes.db'}")
        store.migrate()
        seen: list[Message] = []
        for number, kind in enumerate((before, after)):
            graph = Graph("shapes", store=store)

            def card(order: Order, kind: Type = kind) -> Message:
                return kind.FromString(CARD)

            def ship(card: Message, number: int = number) -> Shipment:
                if number == 0:
                    raise AbortError("sold out")
                seen.append(card)
                return Shipment(tracking_id="1")

            def typed_card(order: Order) -> Message:
                return card(order)

            def typed_ship(card: Message) -> Shipment:
                return ship(card)

            typed_card.__annotations__ = {"order": Order, "return": kind}
            typed_ship.__annotations__ = {"card": kind, "return": Shipment}
            graph.step(persist=Scope.WORKFLOW, name="card")(typed_card)
            graph.step(name="ship")(typed_ship)
            try:
                graph.execute(Shipment, Order(order_id="17"), execution_id="resumed")
            except AbortError:
                assert number == 0
            finally:
                store.close()
        return seen[0]

    return run


def test_a_run_is_not_resumed_with_zeros(resume: Callable[[Type, Type], Message]) -> None:
    """A text became a number under one field number: `DecodeFailed`, and the step is not started."""
    with pytest.raises(DecodeFailed, match="field 1 was text"):
        resume(message_type("1 string id"), message_type("1 int64 id"))


def test_a_run_is_resumed_with_a_type_that_has_grown(resume: Callable[[Type, Type], Message]) -> None:
    """An added field is no reason to refuse."""
    found = resume(message_type("1 string id"), message_type("1 string id, 2 int64 cents"))
    assert found.SerializeToString() == CARD
