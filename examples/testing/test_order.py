"""Tests of `examples.order`'s graph as its authors would write them: no broker, no database, nobody waits."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from docket_celery import Graph, Scope, StepFailed
from docket_celery.testing import (
    CrashMatrixFailed,
    crash_matrix,
    inline,
    record_events,
    run_step,
    step_context,
)
from examples.order.graph import charge_card, checkout, payments, reserve_inventory, ship
from examples.order.order_pb2 import ChargeResult, Order, Reservation, Shipment
from examples.order.services import CarrierDown

ORDER = Order(order_id="17", amount_cents=1000, skus=["book"])
PAID = ChargeResult(charge_id="ch-1", amount_cents=1000)


def test_a_step_is_a_function() -> None:
    """Call it; the context is made for the test."""
    ctx = step_context(step="charge_card", idempotency_key="key-1")
    assert charge_card(ORDER, ctx).amount_cents == 1000
    assert payments.calls[-1] == "key-1"


def test_one_step_with_its_policy() -> None:
    """The carrier fails twice; the third attempt ships, and nobody waits for the two backoffs."""
    carrier = Mock(side_effect=[CarrierDown, CarrierDown, Shipment(tracking_number="t-1")])
    with inline() as bench, checkout.override({ship: carrier}):
        assert run_step(checkout, ship, PAID, Reservation()).tracking_number == "t-1"
    assert bench.clock.waited_s > 0
    assert carrier.call_count == 3


def test_an_error_that_waiting_cannot_cure_is_not_retried() -> None:
    """Only a carrier that is down may be asked again."""
    carrier = Mock(side_effect=ValueError("no such address"))
    with inline(), checkout.override({ship: carrier}), pytest.raises(StepFailed) as failure:
        checkout.execute(Shipment, ORDER)
    assert (failure.value.attempts, failure.value.caused_by(ValueError)) == (1, True)


def test_goods_are_reserved_once_they_are_paid() -> None:
    """The order in which the steps ran."""
    with inline(), record_events() as events:
        checkout.execute(Shipment, ORDER)
    events.assert_order("charge_card", "reserve_inventory", "ship")


def test_an_order_that_failed_is_not_charged_again() -> None:
    """The first submission fails at the carrier; the second one restores charge and reservation."""
    with inline():
        with checkout.override({ship: Mock(side_effect=CarrierDown)}), pytest.raises(StepFailed):
            checkout.execute(Shipment, ORDER, execution_id="order-17")
        with record_events() as events:
            checkout.execute(Shipment, ORDER, execution_id="order-17")
    assert events.steps() == ["ship"]


def test_a_crash_at_any_moment_charges_once() -> None:
    """Killed at every boundary, the order ships, and no effect that was kept is repeated."""
    with inline():
        report = crash_matrix(checkout, Shipment, ORDER, effects=[charge_card, reserve_inventory, ship])
    assert "after the save of 'charge_card'" in report.boundaries


def test_the_matrix_finds_an_effect_that_is_not_kept() -> None:
    """Without persist= on the reservation, a crash while shipping makes another one."""
    forgetful = Graph("forgetful")
    forgetful.register(charge_card, persist=Scope.WORKFLOW)
    forgetful.register(reserve_inventory)
    forgetful.register(ship)
    with inline(), pytest.raises(CrashMatrixFailed, match="'reserve_inventory' has effects and ran again"):
        crash_matrix(forgetful, Shipment, ORDER, effects=["reserve_inventory"])
