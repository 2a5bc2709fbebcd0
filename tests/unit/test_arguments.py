"""What a task takes as its arguments, and what it says of those that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from google.protobuf import (
    descriptor_pool,
    duration_pb2,
    field_mask_pb2,
    message_factory,
    struct_pb2,
    timestamp_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor_pb2 import FileDescriptorProto, UninterpretedOption
from google.protobuf.message import Message
from kombu.utils.json import dumps, loads

from docket_celery import Graph, InvalidArguments, graph_task
from docket_celery.task.declaration import read_generic
from docket_celery.task.envelope import Result, types, wrap
from tests.unit.protos import shop_pb2
from tests.unit.protos.shop_pb2 import Label, Nest, Order, Payment

Timestamp = timestamp_pb2.Timestamp


def bind(kind: type[Message], value: Any) -> Message:
    """Return what a task that takes a *kind* makes of *value*."""
    (found,) = read_generic("shop.take", ([kind], Label)).bind((value,), {})
    assert isinstance(found, Message)
    return found


def deep(levels: int) -> dict[str, Any]:
    """Return the JSON form of a Nest with that many levels below the first."""
    value: dict[str, Any] = {"text": "deep"}
    for _ in range(levels):
        value = {"inner": value}
    return value


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        (Timestamp, "1970-01-01T00:00:07Z", Timestamp(seconds=7)),
        (duration_pb2.Duration, "1.5s", duration_pb2.Duration(seconds=1, nanos=500_000_000)),
        (field_mask_pb2.FieldMask, "orderId,shipTo", field_mask_pb2.FieldMask(paths=["order_id", "ship_to"])),
        (wrappers_pb2.Int64Value, "12", wrappers_pb2.Int64Value(value=12)),
        (wrappers_pb2.BoolValue, True, wrappers_pb2.BoolValue(value=True)),
        (struct_pb2.Value, None, struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)),
        (struct_pb2.Value, 1.5, struct_pb2.Value(number_value=1.5)),
        (struct_pb2.ListValue, ["a"], struct_pb2.ListValue(values=[struct_pb2.Value(string_value="a")])),
        (struct_pb2.Struct, {"a": 1}, struct_pb2.Struct(fields={"a": struct_pb2.Value(number_value=1)})),
    ],
)
def test_well_known_types_are_taken_in_their_own_json_form(
    kind: type[Message], value: Any, wanted: Message
) -> None:
    """As beat and ``celery call`` send them: mostly no object."""
    assert bind(kind, value) == wanted


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Timestamp, "yesterday"),
        (Timestamp, 7),
        (duration_pb2.Duration, None),
        (wrappers_pb2.Int64Value, [1]),
        (Order, "17"),
        (Order, {"orderId": "\ud800"}),
        (Payment, {"method": float("inf")}),
        (Nest, deep(3000)),
        (Nest, deep(101)),
    ],
    ids=["text", "number", "null", "list", "no object", "surrogate", "infinity", "3000 levels", "101 levels"],
)
def test_json_that_is_no_message_is_a_typed_error(kind: type[Message], value: Any) -> None:
    """Never an error of the parser or of Python."""
    with pytest.raises(InvalidArguments):
        bind(kind, value)


def test_a_message_too_deep_to_be_read_back_is_refused() -> None:
    """A worker could never read it."""
    outer = inner = Nest()
    for _ in range(101):
        inner = inner.inner
    inner.text = "deep"
    with pytest.raises(InvalidArguments, match="nested more than 100 levels"):
        bind(Nest, outer)


def test_unset_required_fields_are_refused_at_the_call() -> None:
    """Those of proto2; the error names them."""
    option = UninterpretedOption(name=[UninterpretedOption.NamePart(name_part="a")])
    with pytest.raises(InvalidArguments, match=r"required fields are not set: name\[0\]\.is_extension"):
        bind(UninterpretedOption, option)


def test_a_message_of_another_descriptor_pool_is_called_that() -> None:
    """Both types have the same name."""
    pool, file = descriptor_pool.DescriptorPool(), FileDescriptorProto()
    for each in (shop_pb2.DESCRIPTOR.dependencies[0], shop_pb2.DESCRIPTOR):
        file.Clear()
        each.CopyToProto(file)
        pool.Add(file)
    other = message_factory.GetMessageClass(pool.FindMessageTypeByName("docket.tests.unit.Order"))
    with pytest.raises(InvalidArguments, match="of another descriptor pool"):
        bind(Order, other())


def test_declaring_a_task_registers_its_types_at_once() -> None:
    """Before Celery makes its class: a result may be read in a process that uses no task."""
    kind = _own_kind("Early")
    content = Result(kind()).__json__()
    app: Any = Celery("lazy", set_as_current=False)

    def take(order: Any) -> Any:
        raise NotImplementedError

    take.__annotations__ = {"order": kind, "return": Order}
    graph_task(app, Graph("lazy"), name="lazy.take", shared=False)(take)
    assert loads(dumps(content)) == kind()
    assert not app.finalized


def test_messages_of_types_that_no_task_declares_stay_as_kombu_has_them() -> None:
    """Without an encoder of the app's own they cannot be sent; they do not arrive as something else."""
    with pytest.raises(TypeError, match="not JSON serializable"):
        dumps([_own_kind("Stranger")()])
    types.allow(Order)
    assert loads(dumps(wrap([Order(order_id="17")]))) == [Order(order_id="17")]


def _own_kind(name: str) -> type[Message]:
    """Return a new message type that nothing else uses."""
    file = FileDescriptorProto(name=f"{name}.proto", package="docket.tests.own", syntax="proto3")
    file.message_type.add(name=name)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"docket.tests.own.{name}"))
