"""``Graph(defaults=...)``: the options of steps that do not set their own, and keys of GLOBAL entries."""

from __future__ import annotations

from typing import Any

import pytest

from docket_celery import Graph, InvalidArguments, MemoryStore, RetryPolicy, Scope, StepOptions
from tests.unit.protos.shop_pb2 import Charge, Order, Reservation

RETRY = RetryPolicy(max_attempts=3)


def options_of(graph: Graph, name: str) -> StepOptions:
    """Return the options in force for a step."""
    return graph.find_step(name).options


def test_a_step_has_the_defaults_of_its_graph() -> None:
    """Decorated or registered."""
    graph = Graph("shop", defaults=StepOptions(persist=Scope.WORKFLOW, retry=RETRY))

    @graph.step
    def charge(order: Order) -> Charge:
        return Charge()

    def reserve(order: Order) -> Reservation:
        return Reservation()

    graph.register(reserve)
    for name in ("charge", "reserve"):
        assert (options_of(graph, name).persist, options_of(graph, name).retry) == (Scope.WORKFLOW, RETRY)


def test_a_preset_and_the_step_itself_win_over_defaults() -> None:
    """The step over the preset, the preset over the defaults; None at the step takes a default back."""
    graph = Graph("shop", defaults=StepOptions(persist=Scope.WORKFLOW, retry=RETRY, timeout=60))

    @graph.step(StepOptions(timeout=5, version="2"), version="3")
    def charge(order: Order) -> Charge:
        return Charge()

    @graph.step(persist=None)
    def reserve(order: Order) -> Reservation:
        return Reservation()

    found = options_of(graph, "charge")
    assert (found.persist, found.retry, found.timeout, found.version) == (Scope.WORKFLOW, RETRY, 5, "3")
    assert options_of(graph, "reserve").persist is None
    assert options_of(graph, "reserve").timeout == 60


@pytest.mark.parametrize(
    ("defaults", "text"),
    [
        (StepOptions(name="charge"), "defaults= cannot have name"),
        (StepOptions(renamed_from=("charge",)), "defaults= cannot have renamed_from"),
        ({"persist": Scope.WORKFLOW}, "defaults= is a StepOptions"),
    ],
)
def test_defaults_that_cannot_be_meant_are_refused(defaults: Any, text: str) -> None:
    """A name is one step's own."""
    with pytest.raises(InvalidArguments, match=text):
        Graph("shop", defaults=defaults)


@pytest.mark.parametrize(
    "make",
    [lambda text: text, lambda text: text.encode(), lambda text: Order(order_id=text)],
    ids=["str", "bytes", "message"],
)
def test_a_key_is_a_message_text_or_bytes(make: Any) -> None:
    """Equal keys share an entry, other keys do not."""
    graph, calls, store = Graph("shop"), list[int](), MemoryStore()

    @graph.step(persist=Scope.GLOBAL, key=lambda order: make(order.order_id))
    def charge(order: Order) -> Charge:
        calls.append(order.amount_cents)
        return Charge(amount_cents=order.amount_cents)

    def charged(order_id: str, cents: int) -> int:
        return graph.execute(Charge, Order(order_id=order_id, amount_cents=cents), store=store).amount_cents

    assert [charged("1", 10), charged("1", 20), charged("2", 30)] == [10, 10, 30]
    assert calls == [10, 30]


def test_keys_of_different_kinds_are_different_keys() -> None:
    """The text, its bytes and a message that holds it never name one entry."""
    store, kinds = MemoryStore(), list[Any](["1", b"1", Order(order_id="1")])
    for number, kind in enumerate(kinds):
        graph = Graph("shop")

        @graph.step(persist=Scope.GLOBAL, key=lambda _, kind=kind: kind, cache="shared")
        def charge(order: Order, number: int = number) -> Charge:
            return Charge(charge_id=str(number))

        assert graph.execute(Charge, Order(), store=store).charge_id == str(number)


def test_a_key_of_another_kind_is_refused() -> None:
    """With what it may be."""
    graph = Graph("shop")

    @graph.step(persist=Scope.GLOBAL, key=lambda _: 17)  # type: ignore[arg-type, return-value, unused-ignore]
    def charge(order: Order) -> Charge:
        return Charge()

    with pytest.raises(InvalidArguments, match="returned int; it must return the message, str or bytes"):
        graph.execute(Charge, Order(), store=MemoryStore())
