"""What ``context=`` may hold, and the text in which it travels."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from docket_celery import DecodeFailed, InvalidArguments
from docket_celery.task.headers import MAX_CONTEXT_BYTES, MAX_DEPTH, read_context, write_context

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10
)


def nested(levels: int) -> Any:
    """Return a mapping with that many levels, itself included."""
    value: Any = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


@given(values=st.dictionaries(st.text(), VALUES, max_size=5))
def test_any_json_values_come_back_as_they_were(values: dict[str, Any]) -> None:
    """With the types that they had."""
    assert read_context(write_context(values)) == values


@pytest.mark.parametrize(
    ("context", "problem"),
    [
        (["a"], "must be a mapping"),
        ({"a": float("nan")}, "is nan"),
        ({"a": [1.0, float("-inf")]}, "context['a'][1]: is -inf"),
        ({"a": 2**5000}, "integer of 5001 bits"),
        ({1: "a"}, "keys must be text"),
        ({"a": {(1, 2): "a"}}, "keys must be text"),
        ({"a": "\ud800"}, "lone surrogate"),
        ({"\ud800": "a"}, "lone surrogate"),
        ({"a": b"bytes"}, "must hold JSON values only, not bytes"),
        ({"a": {1, 2}}, "must hold JSON values only, not set"),
        (nested(MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} levels"),
        (nested(5000), f"nested more than {MAX_DEPTH} levels"),
        ({"a": "é" * (MAX_CONTEXT_BYTES // 2)}, "over the limit of 16384"),
    ],
)
def test_what_cannot_travel_is_refused(context: Any, problem: str) -> None:
    """The error says what, and where in the context."""
    with pytest.raises(InvalidArguments) as caught:
        write_context(context)
    assert problem in str(caught.value)


def test_a_context_that_holds_itself_is_refused() -> None:
    """It has no end."""
    endless: dict[str, Any] = {}
    endless["a"] = endless
    with pytest.raises(InvalidArguments, match="nested more than"):
        write_context(endless)


@pytest.mark.parametrize(
    "context",
    [
        nested(MAX_DEPTH),
        {"__type__": "datetime", "__value__": "yesterday"},
        {"n": 2**63, "m": -(2**64)},
        {"k" * 300: 1},
        {"a": (1, 2)},
    ],
)
def test_what_brokers_would_not_carry_travels_as_text(context: Any) -> None:
    """Values that RabbitMQ's headers or kombu's JSON would refuse or change."""
    assert read_context(write_context(context)) == json.loads(json.dumps(context))


@pytest.mark.parametrize(("header", "values"), [(None, {}), ({}, {}), ("{}", {}), ({"a": 1}, {"a": 1})])
def test_what_older_versions_sent_is_read(header: object, values: dict[str, Any]) -> None:
    """They put the mapping itself into the header."""
    assert read_context(header) == values


@pytest.mark.parametrize("header", ["[1]", "{", "[" * 9000, "1" * 9000, 7, ["a"], '"a"', " " * 10**6])
def test_a_header_that_holds_something_else_is_a_typed_error(header: object) -> None:
    """It came from elsewhere."""
    with pytest.raises(DecodeFailed, match="context"):
        read_context(header)
