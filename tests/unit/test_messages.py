from __future__ import annotations

import json
import math
import re
import traceback
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.descriptor_pb2 import UninterpretedOption
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from hypothesis import example, given
from hypothesis import strategies as st

from docket_celery.errors import DecodeFailed, InvalidArguments, PayloadTooLarge
from docket_celery.plan.messages import (
    MAX_JSON_BYTES,
    brief,
    check_size,
    encoding_fault,
    from_bytes,
    from_json_object,
    is_message_type,
    to_bytes,
    to_view,
    type_name,
)
from tests.unit.protos.shop_pb2 import METHOD_CARD, Address, Nest, Order, Payment

SECRET = "4111-1111"


def payment() -> Payment:
    """Return a payment with a secret at every place where a message can hold one."""
    secret = Address(street="Main", phone=SECRET)
    paid = Payment(
        card_number=SECRET, method=METHOD_CARD, billing=secret, earlier=[secret], known={"home": secret}
    )
    paid.extra.Pack(Payment(billing=secret, note="inner"))
    return paid


@given(entries=st.dictionaries(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1), max_size=8))
def test_bytes_do_not_depend_on_the_order_of_a_map(entries: dict[str, int]) -> None:
    """Equal messages give equal bytes."""
    forward = Order(stock=entries)
    backward = Order(stock=dict(reversed(entries.items())))
    assert to_bytes(forward) == to_bytes(backward)
    assert from_bytes(Order, to_bytes(forward)) == forward


@given(data=st.binary(max_size=40))
def test_any_bytes_decode_or_fail_typed(data: bytes) -> None:
    """Whatever comes in, nothing but a message or `DecodeFailed` comes out."""
    try:
        found = from_bytes(Order, data)
    except DecodeFailed:
        return
    assert from_bytes(Order, to_bytes(found)) == found


def test_views_leave_out_what_is_marked_as_secret() -> None:
    """At the top, in messages, lists, maps and packed messages; the message itself is untouched."""
    paid = payment()
    view = to_view(paid)
    assert view is not None
    assert SECRET not in view
    shown = json.loads(view)
    assert shown["known"] == {"home": {"street": "Main"}}
    assert shown["extra"]["billing"] == {"street": "Main"}
    assert paid == payment()


def test_texts_mask_what_is_marked_as_secret() -> None:
    """Names stay, values do not; enums by name, lists and bytes by size."""
    text = brief(payment())
    assert SECRET not in text
    assert text.startswith(
        "Payment(card_number=***, method=METHOD_CARD, billing=Address(street='Main', phone=***)"
    )
    assert "earlier=[1], known=[1]" in text
    assert brief(Payment(receipt=b"abc", note="x" * 100)) == f"Payment(receipt=<3 bytes>, note='{'x' * 59}…')"


@given(text=st.text(), limit=st.integers(1, 300))
def test_texts_are_one_bounded_line(text: str, limit: int) -> None:
    """Whatever a field holds, Flower gets one line of at most the limit."""
    shown = brief(Order(order_id=text), limit)
    assert len(shown) <= limit
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    "message",
    [
        Order(order_id="x" * MAX_JSON_BYTES),
        Order(order_id="nul \0"),
        Payment(extra=Packed(type_url="type.googleapis.com/no.such.Type", value=b"x")),
        Payment(extra=Packed(type_url="type.googleapis.com/docket.tests.unit.Order", value=b"\xff")),
    ],
    ids=["too large", "U+0000", "unknown packed type", "broken packed bytes"],
)
def test_what_cannot_be_shown_has_no_view(message: Any) -> None:
    """A view is a convenience: None, never an error."""
    assert to_view(message) is None


PLAIN = st.none() | st.booleans() | st.floats() | st.text()


@given(
    value=st.dictionaries(
        st.text(max_size=5), PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=5), PLAIN)
    )
)
@example(value={"a": "nul \0"})
@example(value={"nul \0": 1.0})
@example(value={"a": math.nan})
@example(value={"a": [math.inf]})
@example(value={"a": 1.7976931348623157e308})
def test_a_view_is_json_that_a_database_takes(value: dict[str, Any]) -> None:
    """Without NaN, U+0000 and lone surrogates: one that jsonb refuses would fail the save of the data itself."""
    message = Struct()
    message.update(value)
    view = to_view(message)
    if view is not None:
        assert json.dumps(json.loads(view), ensure_ascii=False, allow_nan=False).encode()
        assert "\\u0000" not in view


def test_a_deep_message_cannot_break_its_save() -> None:
    """Rendering recurses; the view is then missing and the bytes are not."""
    top = inner = Nest()
    for _ in range(1500):
        inner = inner.inner
    inner.text = "deep"
    assert to_view(top) is None
    assert to_bytes(top)


@pytest.mark.parametrize(
    "value",
    [{"order_id": {}}, {"missing": 1}, {"amount_cents": "many"}, {"ship_to": 5}, {"stock": [1]}, {5: 6}],
    ids=str,
)
def test_json_that_does_not_fit_is_refused_typed(value: Any) -> None:
    """The type is named, and what is wrong."""
    with pytest.raises(InvalidArguments, match=r"JSON form of docket\.tests\.unit\.Order"):
        from_json_object(Order, value)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"card_number": {"digits": SECRET}}, "field card_number does not fit its type; it is marked debug_redact"),
        ({"cardNumber": [SECRET]}, "field cardNumber does not fit"),
        ({"note": "n", "billing": {"street": "s", "phone": {"x": SECRET}}}, "in field billing: field phone does not"),
        ({"billing": {"street": {"s": 1}}}, "street"),
        ({"billing": SECRET}, "in field billing: it is no docket.tests.unit.Address"),
        ({"earlier": [{"phone": [SECRET]}]}, "field earlier does not fit its type; it may hold"),
        ({"earlier": SECRET}, "field earlier does not fit its type; it may hold"),
        ({"known": {"a": {"phone": {"x": SECRET}}}}, "field known does not fit"),
        ({"extra": {"@type": "x/docket.tests.unit.Payment", "cardNumber": [SECRET]}}, "field extra does not fit"),
        ({"method": "CASH", "card_number": SECRET}, "CASH"),
        ({"carNumber": SECRET}, "there is no field 'carNumber' in docket.tests.unit.Payment; known: billing, card"),
        ({5: SECRET}, "there is no field '5'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_json_fault_does_not_quote_what_is_redacted(value: Any, told: str) -> None:
    """The field is named; neither the error nor its causes show the value, as tracebacks travel too."""
    with pytest.raises(InvalidArguments, match=re.escape(told)) as refused:
        from_json_object(Payment, value)
    assert SECRET not in "".join(traceback.format_exception(refused.value))


def test_the_json_form_of_protocol_buffers_is_read() -> None:
    """Both spellings of names, 64-bit numbers as text."""
    value = {"orderId": "7", "amount_cents": "1000", "shipTo": {"street": "Main"}}
    assert from_json_object(Order, value) == Order(
        order_id="7", amount_cents=1000, ship_to=Address(street="Main")
    )


def test_message_types_are_told_from_other_things() -> None:
    """Generated classes only: no instance, no base class, no annotation."""
    assert is_message_type(Order)
    assert type_name(Order) == type_name(Order()) == "docket.tests.unit.Order"
    assert not any(map(is_message_type, [Order(), Order.__mro__[1], str, "Order", None, list[Order]]))


def test_a_message_over_the_limit_is_refused() -> None:
    """The limit itself is allowed."""
    check_size("docket.Order", 10, 10)
    with pytest.raises(PayloadTooLarge, match="has 11 bytes, over the limit of 10"):
        check_size("docket.Order", 11, 10)


def nest(levels: int) -> Nest:
    """Return a message with that many levels below the first."""
    outer = inner = Nest()
    for _ in range(levels):
        inner = inner.inner
    inner.text = "deep"
    return outer


def struct(levels: int) -> Struct:
    """Return a Struct with that many levels below the first."""
    outer = inner = Struct()
    for _ in range(levels):
        inner = inner.fields["a"].struct_value
    inner.fields["a"].number_value = 1
    return outer


@pytest.mark.parametrize("message", [nest(100), struct(32), Order(order_id="o-1")], ids=type_name)
def test_what_can_be_read_back_has_no_fault(message: Message) -> None:
    """The deepest that Protocol Buffers reads passes."""
    assert encoding_fault(message) is None
    assert from_bytes(type(message), to_bytes(message)) == message


@pytest.mark.parametrize("message", [nest(101), struct(33)], ids=type_name)
def test_what_is_too_deep_to_be_read_back_is_found_before_it_is_written(message: Message) -> None:
    """It can be written, so nothing else would tell until it is needed."""
    assert "nested more than 100 levels" in (encoding_fault(message) or "")
    with pytest.raises(DecodeFailed):
        from_bytes(type(message), to_bytes(message))


def test_unset_required_fields_are_named() -> None:
    """Those of proto2, at any depth."""
    option = UninterpretedOption(name=[UninterpretedOption.NamePart(name_part="a")])
    assert encoding_fault(option) == "required fields are not set: name[0].is_extension"
