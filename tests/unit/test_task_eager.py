from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, chain, group
from celery.exceptions import Retry

from docket_celery import (
    Graph,
    InvalidArguments,
    RunTimedOut,
    Scope,
    StepContext,
    StepFailed,
    StoreUnavailable,
    graph_task,
    settings,
)
from tests.unit.protos.shop_pb2 import Charge, Order, Shipment


class BusyError(Exception):
    """A step's own failure."""


calls: list[str] = []
app = Celery("eager", broker="memory://", backend="cache+memory://", set_as_current=False)
app.conf.task_always_eager = True
shop = Graph("eager")


@shop.step
def charge(order: Order, ctx: StepContext) -> Charge:
    """Fail as often as the caller wants."""
    calls.append(f"{ctx.delivery}/{ctx.attempt}")
    if len(calls) <= ctx.values.get("failures", 0):
        raise BusyError(order.order_id)
    return Charge(charge_id=order.order_id)


@shop.step
def ship(charge: Charge, ctx: StepContext) -> Shipment:
    """Tell the run's name."""
    return Shipment(tracking_id=f"{charge.charge_id} {ctx.execution_id}")


@graph_task(app, shop, name="eager.charge", autoretry_for=(BusyError,), max_retries=2, default_retry_delay=0)
def charge_order(order: Order) -> Charge:
    """Charge."""
    raise NotImplementedError


@graph_task(app, shop, name="eager.ship")
def ship_charge(charge: Charge) -> Shipment:
    """Ship."""
    raise NotImplementedError


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def test_a_job_runs_where_it_is_submitted() -> None:
    """delay, apply_async and apply give the message."""
    order = Order(order_id="7")
    for result in (
        charge_order.delay(order),
        charge_order.apply_async((order,)),
        charge_order.apply((order,)),
    ):
        assert result.get() == Charge(charge_id="7")
        assert result.state == "SUCCESS"


def test_names_and_contexts_arrive() -> None:
    """As on a worker."""
    result = ship_charge.apply_async((Charge(charge_id="7"),), execution_id="run-1")
    assert result.get().tracking_id == "7 run-1"
    assert ship_charge.apply((Charge(charge_id="7"),), execution_id="run-2").get().tracking_id == "7 run-2"


def test_a_failure_is_in_the_result() -> None:
    """get() raises what the step led to."""
    result = charge_order.apply_async((Order(order_id="7"),), context={"failures": 99})
    assert result.state == "FAILURE"
    with pytest.raises(StepFailed, match="BusyError: 7"):
        result.get()


def test_retries_happen_here_too() -> None:
    """Two failures of three deliveries."""
    result = charge_order.apply_async((Order(order_id="7"),), context={"failures": 2})
    assert result.get() == Charge(charge_id="7")
    assert calls == ["1/1", "2/1", "3/1"]


def test_deliveries_of_an_outage_are_no_retries() -> None:
    """Two deliveries that did not get at the database leave both retries of the task to its own failures."""
    headers = {"docket_skipped": 2, "docket_context": {"failures": 2}}
    result = charge_order.apply((Order(order_id="1"),), retries=2, headers=headers)
    assert (result.get(), len(calls)) == (Charge(charge_id="1"), 3)
    calls.clear()
    headers["docket_context"] = {"failures": 3}
    result = charge_order.apply((Order(order_id="1"),), retries=2, headers=headers)
    assert (type(result.result), len(calls)) == (StepFailed, 3)


def test_an_outage_ends_an_eager_task() -> None:
    """Its retries follow each other without a wait, so they are as many as the task declares."""
    graph, apart = Graph("eager.outage"), Celery("apart", set_as_current=False)

    @graph.step(persist=Scope.WORKFLOW)
    def keep(order: Order) -> Charge:
        return Charge(charge_id=order.order_id)

    @graph_task(apart, graph, name="eager.outage")
    def keep_charge(order: Order) -> Charge:
        raise NotImplementedError

    apart.finalize()
    settings(database_url="postgresql+psycopg://nobody@127.0.0.1:1/none")
    try:
        result = keep_charge.apply((Order(order_id="1"),))
    finally:
        settings(database_url=None)
    assert isinstance(result.result, StoreUnavailable)


def test_propagation_raises_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """task_eager_propagates, as tests like it."""
    monkeypatch.setitem(app.conf, "task_eager_propagates", True)  # type: ignore[arg-type, unused-ignore]
    with pytest.raises((StepFailed, Retry)):
        charge_order.apply_async((Order(),), context={"failures": 99})


def test_arguments_that_do_not_fit_fail_at_the_caller() -> None:
    """Nothing runs."""
    wrong: Any = Charge()
    for submit in (charge_order.apply_async, charge_order.apply):
        with pytest.raises(InvalidArguments):
            submit((wrong,))
    assert calls == []


def test_a_canvas_runs_here() -> None:
    """Members hand messages on."""
    order = Order(order_id="7")
    flow: Any = chain(charge_order.s(order), ship_charge.s())
    assert flow().get().tracking_id.startswith("7 ")
    both: Any = group(charge_order.s(order), charge_order.s(order))
    assert both().get() == [Charge(charge_id="7")] * 2


def test_a_soft_limit_is_the_runs_deadline() -> None:
    """Celery enforces no limit in process, so the run does."""
    slow = Graph("eager_slow")

    @slow.step
    def wait(order: Order, ctx: StepContext) -> Charge:
        ctx.sleep(60)
        return Charge()

    @graph_task(app, slow, name="eager.slow", soft_time_limit=0.1)
    def wait_long(order: Order) -> Charge:
        raise NotImplementedError

    with pytest.raises(Exception, match="SoftTimeLimitExceeded") as caught:
        wait_long.apply((Order(),)).get()
    assert not isinstance(caught.value, RunTimedOut)
