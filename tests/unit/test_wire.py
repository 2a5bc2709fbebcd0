from __future__ import annotations

import base64
import json
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils.json import dumps, loads

from docket_celery import BatchResult, DecodeFailed, PayloadTooLarge, StepFailed, UnknownMessageType
from docket_celery.task import envelope
from docket_celery.task.envelope import MARKER, Result, Types, Undecodable
from tests.unit.protos.shop_pb2 import Address, Nest, Order, Payment

ORDER = Order(order_id="17", amount_cents=1000, stock={"a": 1, "b": 2})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(autouse=True, scope="module")
def types() -> Generator[Types]:
    """The process's types with two of ours among them."""
    before, limits = dict(envelope.types._kinds), set(envelope.types.limits)
    for kind in (Order, Payment):
        envelope.types.allow(kind)
    envelope.types._kinds.pop(Nest.DESCRIPTOR.full_name, None)
    yield envelope.types
    envelope.types._kinds = before
    envelope.types.limits = limits


def test_a_message_travels_through_celerys_json() -> None:
    """Anywhere in a body, as type name and base64."""
    body = [[ORDER], {"by_name": {"deep": [ORDER, 1, "x"]}}, {"chord": None}]
    text = dumps(body)
    assert loads(text) == body
    assert json.loads(text)[0][0] == {
        "__type__": MARKER,
        "__value__": {
            "t": "docket.tests.unit.Order",
            "b": base64.b64encode(ORDER.SerializeToString(deterministic=True)).decode(),
        },
    }


def test_other_values_travel_as_they_did() -> None:
    """The library adds one type and changes none."""
    value = [1, 2.5, None, "text", {"__type__": 1}, {"t": "x", "b": "y"}]
    assert loads(dumps(value)) == value


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"t": "docket.tests.unit.Order", "b": "/////w=="}, DecodeFailed),
        ({"t": "docket.tests.unit.Order", "b": "@"}, DecodeFailed),
        ({"t": "docket.tests.unit.Order", "b": "ä"}, DecodeFailed),
        ({"t": "docket.tests.unit.Nest", "b": ""}, UnknownMessageType),
        ({"t": "os.system", "b": ""}, UnknownMessageType),
        ({"t": 1, "b": ""}, DecodeFailed),
        ([], DecodeFailed),
        (None, DecodeFailed),
    ],
)
def test_what_cannot_be_read_becomes_a_placeholder(content: Any, error: type[Exception]) -> None:
    """With its typed error, and passed on as it came."""
    text = json.dumps({"__type__": MARKER, "__value__": content})
    found = loads(text)
    assert isinstance(found, Undecodable)
    assert type(found.error) is error
    assert json.loads(dumps(found)) == json.loads(text)
    assert str(found.error) in repr(found)


@given(content=JSON | st.fixed_dictionaries({"t": JSON, "b": JSON}))
def test_the_decoder_never_raises(content: Any) -> None:
    """Whatever stands in the envelope."""
    found = envelope.decode(content)
    assert isinstance(found, (Undecodable, Order, Payment))


@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_placeholder(data: bytes) -> None:
    """Damaged bytes never raise in the decoder."""
    found = envelope.decode({"t": "docket.tests.unit.Order", "b": base64.b64encode(data).decode()})
    assert isinstance(found, (Undecodable, Order))


def test_the_size_is_looked_at_before_decoding(types: Types) -> None:
    """At the limit a message passes; over it, even one of an unknown type or of bad base64 is too large."""
    exact = Order(order_id="x" * 997)
    assert exact.ByteSize() == 1000
    types.limits = {1000}
    assert envelope.decode(envelope.encode(exact)) == exact
    for content in ({"t": "no.such", "b": "A" * 1340}, {"t": "docket.tests.unit.Order", "b": "@" * 1340}):
        found = envelope.decode(content)
        assert isinstance(found, Undecodable)
        assert isinstance(found.error, PayloadTooLarge)
        assert (found.error.size_bytes, found.error.limit_bytes) == (1005, 1000)
    types.limits = {1024 * 1024}


def test_a_long_type_name_does_not_flood_the_error() -> None:
    """Texts from outside are bounded."""
    found = envelope.decode({"t": "x" * 100_000, "b": ""})
    assert isinstance(found, Undecodable)
    assert len(str(found.error)) < 1000


def test_a_result_reads_like_its_message_and_hides_secrets() -> None:
    """Celery logs a result's text; ours is short and without the fields marked debug_redact."""
    payment = Payment(card_number="4111", billing=Address(street="s", phone="555"), note="n" * 5000)
    result = Result(payment)
    assert result.note == payment.note
    assert result == payment
    assert result == Result(payment)
    assert "4111" not in repr(result)
    assert "555" not in repr(result)
    assert len(repr(result)) <= 200
    assert loads(dumps(result)) == payment
    with pytest.raises(AttributeError):
        _ = result.no_such_field


def test_a_message_in_an_unset_result_does_not_recurse() -> None:
    """Copying and unpickling look attributes up before there is a message."""
    with pytest.raises(AttributeError):
        _ = Result.__new__(Result).value


def test_the_results_of_a_batch_travel_with_their_errors() -> None:
    """By value, where they are small: each message in an envelope of its own, None where there is none."""
    sent = BatchResult((ORDER, None), {1: StepFailed("rate", 1, False, ["ValueError"], "too old")})
    assert repr(Result(sent)) == "<2 results, 1 failed>"
    found = loads(dumps(Result(sent)))
    assert isinstance(found, BatchResult)
    assert found.results == sent.results
    assert str(found.errors[1]) == str(sent.errors[1])


ERRORS: list[Any] = [None, 7, ["x"], {"x": {}}, {"1": None}]


@pytest.mark.parametrize(
    "content",
    [
        *({"results": results, "errors": {}} for results in (None, 7)),
        *({"results": (), "errors": errors} for errors in ERRORS),
    ],
)
def test_damaged_results_of_a_batch_are_a_placeholder(content: dict[str, Any]) -> None:
    """Whoever gets it next reads the same, and is told the same."""
    text = json.dumps({"__type__": envelope.MARKER, "__value__": content})
    found = loads(text)
    assert isinstance(found, Undecodable)
    assert type(found.error) is DecodeFailed
    assert json.loads(dumps(found)) == json.loads(text)
