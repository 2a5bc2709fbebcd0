from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Annotated, Any

import pytest

from docket_celery import (
    AbortError,
    Graph,
    InputMutated,
    Named,
    RetryPolicy,
    StepContext,
    StepFailed,
    settings,
)
from docket_celery.testing import check_inputs
from tests.unit.graphs import pass_on
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Reservation, Shipment

ORDER = Order(order_id="7", stock={"a": 1})
AGAIN = RetryPolicy(max_attempts=3)


def spoil(order: Order) -> None:
    """Change a message somewhere inside."""
    order.stock["b"] = 2


def test_a_step_that_changes_its_input_fails() -> None:
    """Told which input of which step, and what to do; not tried again."""
    graph, calls = Graph("spoiling"), list[int]()

    @graph.step(retry=AGAIN, retriable=Exception)
    def charge(money: Money, order: Order, ctx: StepContext) -> Charge:
        calls.append(ctx.attempt)
        spoil(order)
        return Charge()

    with check_inputs(), pytest.raises(InputMutated) as caught:
        graph.execute(Charge, ORDER, Money())
    error = caught.value
    assert (error.step, error.inputs, error.attempts) == ("charge", ("docket.tests.unit.Order",), 1)
    assert "mine.CopyFrom(message)" in str(error)
    assert calls == [1]
    assert graph.execute(Charge, Order(), Money()) == Charge()


def test_the_setting_turns_it_on() -> None:
    """Off by default; a value in the environment or the app does the same."""
    graph = Graph("setting")

    @graph.step
    def charge(order: Order) -> Charge:
        order.order_id = "8"
        return Charge(charge_id=order.order_id)

    assert graph.execute(Charge, Order()).charge_id == "8"
    settings(check_mutation="on")
    try:
        with pytest.raises(InputMutated):
            graph.execute(Charge, Order())
    finally:
        settings(check_mutation=None)
    assert graph.execute(Charge, Order()).charge_id == "8"


def test_the_one_that_did_it_is_blamed_whatever_runs_beside_it() -> None:
    """Two steps hold the message at the same moment; one changes it, the other one sees nothing of that."""
    graph, changed, looked = Graph("sharing"), threading.Event(), threading.Event()
    seen: list[str] = []

    @graph.step
    def innocent(order: Order) -> Charge:
        pass_on(threading.Event(), changed)
        seen.append(order.order_id)
        looked.set()
        return Charge()

    @graph.step
    def guilty(order: Order) -> Reservation:
        order.order_id = "changed"
        pass_on(changed, looked)
        return Reservation()

    @graph.step
    def join(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    with check_inputs(), pytest.raises(InputMutated) as caught:
        graph.execute(Shipment, ORDER)
    assert (caught.value.step, caught.value.others) == ("guilty", ())
    assert seen == ["7"]


def test_both_are_blamed_where_both_did_it() -> None:
    """Each by its own name."""
    graph, barrier = Graph("both"), threading.Barrier(2, timeout=30)

    def spoiler(name: str, output: Any) -> None:
        def step(order: Order) -> Any:
            barrier.wait()
            order.order_id = name
            return output()

        step.__annotations__ = {"order": Order, "return": output}
        graph.register(step, name=name)

    spoiler("one", Charge)
    spoiler("two", Reservation)

    @graph.step
    def join(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    with check_inputs(), pytest.raises(InputMutated) as caught:
        graph.execute(Shipment, ORDER)
    text = str(caught.value)
    assert ("'one' changed its input" in text, "'two' changed its input" in text) == (True, True)


def test_inputs_are_told_apart_by_name() -> None:
    """Also where the step takes them by keyword, after its context."""
    graph = Graph("named")

    @graph.step
    def total(
        ctx: StepContext, net: Annotated[Money, Named("net")], *, tax: Annotated[Money, Named("tax")]
    ) -> Money:
        tax.cents += net.cents
        return tax

    @graph.step
    def net(order: Order) -> Annotated[Money, Named("net")]:
        return Money(cents=1)

    @graph.step
    def tax(order: Order) -> Annotated[Money, Named("tax")]:
        return Money(cents=2)

    with check_inputs(), pytest.raises(InputMutated) as caught:
        graph.execute(Money, ORDER)
    assert caught.value.inputs == ('docket.tests.unit.Money named "tax"',)


def test_an_async_step_is_checked_too() -> None:
    """On the loop thread and on the caller's loop."""
    graph = Graph("async")

    @graph.step
    async def charge(order: Order) -> Charge:
        await asyncio.sleep(0)
        spoil(order)
        return Charge()

    with check_inputs():
        with pytest.raises(InputMutated):
            graph.execute(Charge, ORDER)
        with pytest.raises(InputMutated):
            asyncio.run(graph.aexecute(Charge, ORDER))


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("k")])
def test_a_step_that_fails_after_changing_its_input_is_told_so(error: Exception) -> None:
    """Its next attempt would have got the changed message; its own error is the cause."""
    graph = Graph("failing")

    @graph.step(retry=AGAIN)
    def charge(order: Order) -> Charge:
        spoil(order)
        raise error

    with check_inputs(), pytest.raises(InputMutated) as caught:
        graph.execute(Charge, ORDER)
    assert caught.value.__cause__ is error


def test_an_abort_stands() -> None:
    """Whoever stops everything has the last word."""
    graph = Graph("aborting")

    @graph.step
    def charge(order: Order) -> Charge:
        spoil(order)
        raise AbortError("sold out")

    with check_inputs(), pytest.raises(AbortError, match="sold out"):
        graph.execute(Charge, ORDER)


def reading(order: Order) -> Label:
    """Only look."""
    return Label(text=order.order_id + str(order.stock["a"]) + order.ship_to.street)


def copying(order: Order) -> Label:
    """Change a copy, as the error says."""
    mine = type(order)()
    mine.CopyFrom(order)
    spoil(mine)
    return Label(text=mine.order_id)


def passing_on(order: Order) -> Label:
    """Raise something of its own."""
    raise ValueError(order.order_id)


@pytest.mark.parametrize("body", [reading, copying])
def test_steps_that_keep_to_the_rule_pass(body: Callable[[Order], Label]) -> None:
    """Reading fields that are not set changes nothing."""
    graph = Graph("good")
    graph.register(body)
    with check_inputs():
        assert graph.execute(Label, ORDER).text.startswith("7")


def test_a_plain_failure_is_what_it_was() -> None:
    """With its cause."""
    graph = Graph("plain")
    graph.register(passing_on)
    with check_inputs(), pytest.raises(StepFailed) as caught:
        graph.execute(Label, ORDER)
    assert (type(caught.value), caught.value.caused_by(ValueError)) == (StepFailed, True)


class Spoiler:
    """A step with state, built by a factory."""

    def compute(self, order: Order) -> Charge:
        """Change the input."""
        spoil(order)
        return Charge()


def test_a_step_that_a_factory_builds_is_checked_too() -> None:
    """Its code is another object in each process."""
    graph = Graph("built")
    graph.register(Spoiler, factory=Spoiler, name="charge")
    with check_inputs(), pytest.raises(InputMutated, match="step 'charge' changed its input"):
        graph.execute(Charge, Order(order_id="7"))
