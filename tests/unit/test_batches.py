"""Batches and fan-outs in process: what each item gets, what aggregates see, and what a failed item means."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Annotated

import pytest
from celery import Celery

from docket_celery import (
    AbortError,
    BatchFailed,
    BatchResult,
    Graph,
    GraphError,
    InvalidArguments,
    MemoryStore,
    Named,
    RetryPolicy,
    RunConflict,
    Scope,
    StepContext,
    StepFailed,
    graph_task,
    settings,
)
from docket_celery.observe.events import Event, EventKind
from docket_celery.plan.batch import BatchPolicy
from docket_celery.plan.options import FixedBackoff
from tests.unit.protos.shop_pb2 import Address, Charge, Label, Money, Order, Reservation, Shipment

ORDERS = [Order(order_id=f"o{number}", amount_cents=100 * number) for number in range(1, 8)]
SUM = sum(order.amount_cents for order in ORDERS)


def share_graph() -> Graph:
    """Return a graph that charges each order with its share of the sum of all."""
    graph = Graph("shares")

    @graph.aggregate
    def total(orders: list[Order]) -> Money:
        return Money(cents=sum(order.amount_cents for order in orders))

    @graph.step
    def charge(order: Order, total: Money) -> Charge:
        return Charge(charge_id=order.order_id, amount_cents=100 * order.amount_cents // total.cents)

    return graph


def shares(orders: Iterable[Order]) -> list[Charge]:
    """Compute the same without a graph."""
    orders = list(orders)
    whole = sum(order.amount_cents for order in orders)
    return [Charge(charge_id=o.order_id, amount_cents=100 * o.amount_cents // whole) for o in orders]


@pytest.mark.parametrize("threads", [0, 1, 2, 16])
@pytest.mark.parametrize("max_concurrency", [None, 1, 3])
def test_each_item_gets_its_result_in_order(threads: int, max_concurrency: int | None) -> None:
    """Whatever number of threads works on them."""
    settings(threads=threads)
    try:
        found = share_graph().execute_batch(Charge, ORDERS, max_concurrency=max_concurrency)
    finally:
        settings(threads=None)
    assert found == shares(ORDERS)


def test_an_aggregate_alone_is_made_once() -> None:
    """A list among the inputs of `execute` is a batch."""
    assert share_graph().execute(Money, ORDERS) == Money(cents=SUM)


def test_an_empty_batch_is_legal() -> None:
    """It has no results, and an aggregate sees no items."""
    graph = share_graph()
    assert graph.execute_batch(Charge, []) == []
    assert graph.execute(Money, []) == Money(cents=0)
    assert graph.execute_batch(Charge, [], on_error="collect") == BatchResult(())


def test_equal_items_are_items_of_their_own() -> None:
    """Nothing is merged."""
    same = [ORDERS[0]] * 5
    assert share_graph().execute_batch(Charge, same) == shares(same)


def test_shared_inputs_reach_every_item() -> None:
    """What is given beside the batch is the same for all."""
    graph = Graph("shared")

    @graph.step
    def label(order: Order, prefix: Label) -> Reservation:
        return Reservation(reservation_id=prefix.text + order.order_id)

    found = graph.execute_batch(Reservation, ORDERS[:2], Label(text="r-"))
    assert found == [Reservation(reservation_id="r-o1"), Reservation(reservation_id="r-o2")]


def test_no_more_items_than_allowed_are_under_way() -> None:
    """``max_concurrency`` counts items, and as many do run at once."""
    graph = Graph("window")
    lock, now, most = threading.Lock(), Counter[str](), Counter[str]()
    together = threading.Barrier(3)

    @graph.step
    def charge(order: Order) -> Charge:
        with lock:
            now["running"] += 1
            most["running"] = max(most["running"], now["running"])
        if order.order_id in ("o1", "o2", "o3"):
            together.wait(30)
        with lock:
            now["running"] -= 1
        return Charge(charge_id=order.order_id)

    graph.execute_batch(Charge, ORDERS, max_concurrency=3)
    assert most["running"] == 3


def test_an_aggregate_may_change_its_list() -> None:
    """The list is its own: others see the items in their order."""
    graph = Graph("sorting")

    @graph.aggregate
    def largest(orders: list[Order]) -> Money:
        orders.sort(key=lambda order: -order.amount_cents)
        return Money(cents=orders.pop(0).amount_cents)

    @graph.aggregate
    def first(orders: list[Order], largest: Money) -> Label:
        return Label(text=f"{orders[0].order_id} of {largest.cents}")

    assert graph.execute(Label, ORDERS) == Label(text="o1 of 700")


def test_an_iterable_is_taken_once() -> None:
    """A parameter of ``Iterable[T]`` gets an iterator over all items."""
    graph = Graph("stream")

    @graph.aggregate
    def total(orders: Iterable[Order]) -> Money:
        return Money(cents=sum(order.amount_cents for order in orders))

    assert graph.execute(Money, ORDERS) == Money(cents=SUM)


def test_a_value_is_split_worked_on_and_merged() -> None:
    """A step that returns a list opens a fan-out in mid-graph."""
    graph = Graph("letters")

    @graph.step
    def split(order: Order) -> list[Label]:
        return [Label(text=letter) for letter in order.order_id]

    @graph.step
    def upper(label: Label) -> Reservation:
        return Reservation(reservation_id=label.text.upper())

    @graph.aggregate
    def merge(order: Order, parts: list[Reservation]) -> Shipment:
        return Shipment(tracking_id="-".join(part.reservation_id for part in parts))

    assert graph.execute(Shipment, Order(order_id="abc")) == Shipment(tracking_id="A-B-C")
    assert graph.execute(Shipment, Order(order_id="")) == Shipment(tracking_id="")
    batch = graph.execute_batch(Shipment, [Order(order_id="xy"), Order(order_id=""), Order(order_id="z")])
    assert [shipment.tracking_id for shipment in batch] == ["X-Y", "", "Z"]


def test_a_failed_item_stops_the_batch() -> None:
    """Nothing new starts, and the error names the step and the item."""
    graph, started = Graph("failing"), list[str]()

    @graph.step
    def charge(order: Order) -> Charge:
        started.append(order.order_id)
        if order.order_id == "o3":
            raise ValueError("no such card")
        return Charge(charge_id=order.order_id)

    with pytest.raises(StepFailed, match="step 'charge' of item 2 failed after 1 attempt") as caught:
        graph.execute_batch(Charge, ORDERS, max_concurrency=1)
    assert caught.value.item == "2"
    assert isinstance(caught.value.__cause__, ValueError)
    assert started == ["o1", "o2", "o3"]


def test_collected_failures_leave_the_other_items_alone() -> None:
    """Aggregates see the successes, and a failed item is not worked on further."""
    graph, later = Graph("collecting"), list[str]()

    @graph.step
    def charge(order: Order) -> Charge:
        if order.amount_cents % 300 == 0:
            raise ValueError(order.order_id)
        return Charge(charge_id=order.order_id, amount_cents=order.amount_cents)

    @graph.aggregate
    def total(charges: list[Charge]) -> Money:
        return Money(cents=sum(charge.amount_cents for charge in charges))

    @graph.step
    def ship(charge: Charge, total: Money) -> Shipment:
        later.append(charge.charge_id)
        return Shipment(tracking_id=f"{charge.charge_id} of {total.cents}")

    found = graph.execute_batch(Shipment, ORDERS, on_error="collect")
    good = [order for order in ORDERS if order.amount_cents % 300]
    whole = sum(order.amount_cents for order in good)
    assert found.results == tuple(
        Shipment(tracking_id=f"{order.order_id} of {whole}") if order in good else None for order in ORDERS
    )
    assert sorted(found.errors) == [2, 5]
    assert found.errors[2].caused_by(ValueError)
    assert found.errors[2].item == "2"
    assert sorted(later) == [order.order_id for order in good]
    assert [index for index, _ in found.succeeded()] == [0, 1, 3, 4, 6]


def test_a_failed_part_of_an_item_fails_the_item() -> None:
    """Only the batch's own items are collected: nothing is lost in silence from what a step has split."""
    graph = Graph("pages")

    @graph.aggregate
    def first(orders: list[Order]) -> Label:
        return Label(text=orders[0].order_id)

    @graph.step
    def pages(label: Label) -> list[Reservation]:
        return [Reservation(reservation_id=str(number)) for number in range(4)]

    @graph.step
    def rate(page: Reservation) -> Money:
        if page.reservation_id == "2":
            raise ValueError("unreadable")
        return Money(cents=10)

    @graph.aggregate
    def total(rates: list[Money]) -> Charge:
        return Charge(amount_cents=sum(rate.cents for rate in rates))

    @graph.step
    def price(order: Order, total: Charge) -> Shipment:
        return Shipment(tracking_id=f"{order.order_id} {total.amount_cents}")

    with pytest.raises(StepFailed, match="step 'rate' of item 2 failed"):
        graph.execute_batch(Shipment, ORDERS, on_error="collect", max_failed=1)


@pytest.mark.parametrize("max_concurrency", [1, 2])
def test_nested_parts_keep_to_the_bound(max_concurrency: int) -> None:
    """As many parts as items are allowed, not their product; a split alone keeps to it too."""
    graph = Graph("bound")
    lock, now, most = threading.Lock(), [0], [0]

    @graph.step
    def pages(order: Order) -> list[Label]:
        return [Label(text=str(number)) for number in range(5)]

    @graph.step
    def rate(page: Label) -> Money:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.002)
        with lock:
            now[0] -= 1
        return Money(cents=1)

    @graph.aggregate
    def total(order: Order, rates: list[Money]) -> Charge:
        return Charge(amount_cents=len(rates))

    found = graph.execute_batch(Charge, ORDERS, max_concurrency=max_concurrency)
    assert [charge.amount_cents for charge in found] == [5] * len(ORDERS)
    assert graph.execute(Charge, ORDERS[0], max_concurrency=max_concurrency).amount_cents == 5
    assert most[0] <= max_concurrency


def test_restored_items_need_nothing_that_only_they_used() -> None:
    """A stage whose items are all stored is not computed again, nor what came before it, and the run goes on."""
    graph, calls, broken = Graph("stages", store=MemoryStore()), Counter[str](), [True]

    @graph.step
    def prepare(order: Order) -> Money:
        calls["prepare"] += 1
        return Money(cents=order.amount_cents)

    @graph.aggregate
    def total(amounts: list[Money]) -> Label:
        calls["total"] += 1
        return Label(text=str(sum(amount.cents for amount in amounts)))

    @graph.step(persist=Scope.WORKFLOW)
    def share(order: Order, amount: Money, total: Label) -> Charge:
        calls["share"] += 1
        return Charge(amount_cents=100 * amount.cents // int(total.text))

    @graph.step
    def hint(address: Address) -> Reservation:
        calls["hint"] += 1
        return Reservation(reservation_id=address.street)

    @graph.aggregate
    def final(charges: list[Charge], hint: Reservation) -> Shipment:
        if broken[0]:
            raise ConnectionError
        return Shipment(tracking_id=f"{hint.reservation_id} {sum(charge.amount_cents for charge in charges)}")

    def ship() -> Shipment:
        return graph.execute(Shipment, ORDERS, Address(street="x"), execution_id="again", timeout=30)

    with pytest.raises(StepFailed):
        ship()
    broken[0] = False
    once = dict(calls)
    assert ship().tracking_id.startswith("x ")
    assert calls == {**once, "hint": 2}


@pytest.mark.parametrize(
    ("share", "total", "allowed"), [(0.29, 100, 29), (0.57, 100, 57), (0.3, 7, 2), (1.0, 3, 3), (0.0, 9, 0)]
)
def test_a_share_is_counted_exactly(share: float, total: int, allowed: int) -> None:
    """Binary fractions lose nobody."""
    assert BatchPolicy("collect", share).allowed(total) == allowed


@pytest.mark.parametrize(("max_failed", "passes"), [(2, True), (1, False), (0.3, True), (0.2, False)])
def test_more_failures_than_allowed_fail_the_batch(max_failed: float, passes: bool) -> None:
    """As a count, or as a share of all items."""
    graph = Graph("limits")

    @graph.step
    def charge(order: Order) -> Charge:
        if order.amount_cents % 300 == 0:
            raise ValueError(order.order_id)
        return Charge()

    if passes:
        found = graph.execute_batch(Charge, ORDERS, on_error="collect", max_failed=max_failed)
        assert len(found.errors) == 2
        return
    with pytest.raises(BatchFailed, match=r"2 of 7 items failed, max_failed allows 1") as caught:
        graph.execute_batch(Charge, ORDERS, on_error="collect", max_failed=max_failed, max_concurrency=1)
    assert [line.partition("of item ")[2][0] for line in caught.value.lines] == ["2", "5"]


def test_an_abort_stops_a_collecting_batch() -> None:
    """AbortError is never collected."""
    graph = Graph("aborting")

    @graph.step
    def charge(order: Order) -> Charge:
        raise AbortError("the provider is closed")

    with pytest.raises(AbortError, match="the provider is closed"):
        graph.execute_batch(Charge, ORDERS, on_error="collect")


def test_one_item_is_retried_alone() -> None:
    """Retry applies per item; the others are called once."""
    graph, calls = Graph("retrying"), Counter[str]()

    @graph.step(retry=RetryPolicy(max_attempts=3, backoff=FixedBackoff(0)))
    def charge(order: Order) -> Charge:
        calls[order.order_id] += 1
        if order.order_id == "o4" and calls["o4"] < 3:
            raise ConnectionError
        return Charge(charge_id=order.order_id)

    graph.execute_batch(Charge, ORDERS)
    assert calls == {order.order_id: 3 if order.order_id == "o4" else 1 for order in ORDERS}


def test_each_item_has_an_idempotency_key_of_its_own() -> None:
    """Stable for the run, step and item; the context and events say which item it is."""
    graph, events = Graph("keys"), list[Event]()
    graph.listeners.append(events.append)

    @graph.step
    def charge(order: Order, ctx: StepContext) -> Charge:
        return Charge(charge_id=f"{ctx.item} {ctx.idempotency_key}")

    first = graph.execute_batch(Charge, ORDERS, execution_id="again")
    second = graph.execute_batch(Charge, ORDERS, execution_id="again", max_concurrency=1)
    assert first == second
    assert len({charge.charge_id.split()[1] for charge in first}) == len(ORDERS)
    assert [charge.charge_id.split()[0] for charge in first] == [str(i) for i in range(len(ORDERS))]
    started = {event.item for event in events if event.kind is EventKind.STEP_STARTED}
    assert started == {str(index) for index in range(len(ORDERS))}


def test_a_failed_batch_resumes_with_what_is_missing() -> None:
    """Saved items are not called again, the aggregate is not, and the results are those of a whole run."""
    graph, calls, broken = Graph("resuming", store=MemoryStore()), Counter[str](), [True]

    @graph.aggregate(persist=Scope.WORKFLOW)
    def total(orders: list[Order]) -> Money:
        calls["total"] += 1
        return Money(cents=sum(order.amount_cents for order in orders))

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order, total: Money) -> Charge:
        calls[order.order_id] += 1
        if order.order_id == "o5" and broken[0]:
            raise ConnectionError
        return Charge(charge_id=order.order_id, amount_cents=total.cents)

    with pytest.raises(StepFailed):
        graph.execute_batch(Charge, ORDERS, execution_id="b1", max_concurrency=1)
    assert calls == {"total": 1, "o1": 1, "o2": 1, "o3": 1, "o4": 1, "o5": 1}
    broken[0] = False
    expected = [Charge(charge_id=order.order_id, amount_cents=SUM) for order in ORDERS]
    assert graph.execute_batch(Charge, ORDERS, execution_id="b1") == expected
    assert calls == {"total": 1, "o1": 1, "o2": 1, "o3": 1, "o4": 1, "o5": 2, "o6": 1, "o7": 1}
    assert graph.execute_batch(Charge, ORDERS, execution_id="b1") == expected
    assert sum(calls.values()) == 9


def test_an_ended_batch_gives_its_stored_results() -> None:
    """Collected failures included; another batch under its name is refused."""
    graph, calls = Graph("stored", store=MemoryStore()), Counter[str]()

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        calls[order.order_id] += 1
        if order.order_id == "o2":
            raise ValueError("no such card")
        return Charge(charge_id=order.order_id)

    first = graph.execute_batch(Charge, ORDERS, execution_id="b2", on_error="collect")
    second = graph.execute_batch(Charge, ORDERS, execution_id="b2", on_error="collect")
    assert second.results == first.results
    assert [str(error) for error in second.errors.values()] == [str(e) for e in first.errors.values()]
    assert set(calls.values()) == {1}
    with pytest.raises(RunConflict):
        graph.execute_batch(Charge, ORDERS[::-1], execution_id="b2", on_error="collect")


def test_a_stored_split_is_not_made_again() -> None:
    """Its parts keep their positions, so that what they became is found."""
    graph, calls, broken = Graph("splits", store=MemoryStore()), Counter[str](), [True]

    @graph.step(persist=Scope.WORKFLOW)
    def split(order: Order) -> list[Label]:
        calls["split"] += 1
        return [Label(text=letter) for letter in order.order_id]

    @graph.step(persist=Scope.WORKFLOW)
    def upper(label: Label) -> Reservation:
        calls[label.text] += 1
        if label.text == "c" and broken[0]:
            raise ConnectionError
        return Reservation(reservation_id=label.text.upper())

    @graph.aggregate
    def merge(parts: list[Reservation]) -> Shipment:
        return Shipment(tracking_id="".join(part.reservation_id for part in parts))

    with pytest.raises(StepFailed):
        graph.execute(Shipment, Order(order_id="abcd"), execution_id="s", max_concurrency=1)
    broken[0] = False
    assert graph.execute(Shipment, Order(order_id="abcd"), execution_id="s").tracking_id == "ABCD"
    assert calls == {"split": 1, "a": 1, "b": 1, "c": 2, "d": 1}


def test_a_split_that_returns_something_else_fails() -> None:
    """Each element is looked at."""
    graph = Graph("wrong")

    @graph.step
    def split(order: Order) -> list[Label]:
        return [Label(), Money()]  # type: ignore[list-item]  # on purpose

    @graph.aggregate
    def merge(parts: list[Label]) -> Shipment:
        return Shipment()

    with pytest.raises(StepFailed, match=r"returned a list that holds Money, but declares list\[.*Label\]"):
        graph.execute(Shipment, Order())


Tax = Annotated[Money, Named("tax")]


def test_named_items_fan_out_too() -> None:
    """``list[Annotated[...]]`` and ``Annotated[list[...], ...]`` say the same."""
    graph = Graph("named")

    @graph.step
    def taxes(order: Order) -> list[Tax]:
        return [Money(cents=cents) for cents in range(4)]

    @graph.aggregate
    def total(parts: Annotated[list[Money], Named("tax")]) -> Money:
        return Money(cents=sum(part.cents for part in parts))

    assert graph.execute(Money, Order()) == Money(cents=6)


def test_a_task_runs_a_graph_that_splits_a_value() -> None:
    """Within one delivery, all of it in one worker."""
    app = Celery("splitting", set_as_current=False)
    app.conf.task_always_eager = True
    graph = Graph("task")

    @graph.step
    def split(order: Order) -> list[Label]:
        return [Label(text=letter) for letter in order.order_id]

    @graph.aggregate
    def merge(parts: list[Label]) -> Shipment:
        return Shipment(tracking_id="".join(part.text.upper() for part in parts))

    @graph_task(app, graph)
    def ship(order: Order) -> Shipment:
        raise NotImplementedError

    assert ship.delay(Order(order_id="abc")).get() == Shipment(tracking_id="ABC")


class TestFaults:
    """What cannot be staged is refused before anything runs, with its place and the fix."""

    def test_a_list_needs_an_aggregate(self) -> None:
        """A plain step takes one item."""
        graph = Graph("plain")

        @graph.step
        def total(orders: list[Order]) -> Money:
            raise NotImplementedError

        with pytest.raises(GraphError, match=r"it takes a list, so it is an aggregate; use graph\.aggregate"):
            graph.validate()

    def test_an_aggregate_needs_a_list(self) -> None:
        """Else it would run for each item."""
        graph = Graph("single")

        @graph.aggregate
        def total(order: Order) -> Money:
            raise NotImplementedError

        with pytest.raises(GraphError, match="an aggregate takes all items of a fan-out"):
            graph.validate()

    def test_items_of_two_fan_outs_do_not_meet(self) -> None:
        """They have no order in common."""
        graph = Graph("two")

        @graph.step
        def pages(order: Order) -> list[Label]:
            raise NotImplementedError

        @graph.step
        def rows(order: Order) -> list[Money]:
            raise NotImplementedError

        @graph.step
        def both(label: Label, money: Money) -> Charge:
            raise NotImplementedError

        expected = (
            r"step 'both' \(.*\) takes .*Label for each item of step 'pages' and .*Money for each item of"
        )
        with pytest.raises(GraphError, match=expected) as caught:
            graph.validate()
        (fault,) = caught.value.faults
        assert fault.startswith("DC120 stages:")
        assert "take one of them whole, as list[...], in an aggregate before it" in fault

    def test_all_items_are_not_taken_for_each_item(self) -> None:
        """It would cost the square of their number; an aggregate before it looks at them once."""
        graph = Graph("square")

        @graph.aggregate
        def rank(order: Order, orders: list[Order]) -> Charge:
            raise NotImplementedError

        expected = (
            r"step 'rank' \(.*\) takes all of .*Order again for each item of the batch; make what it needs"
        )
        with pytest.raises(GraphError, match=expected):
            graph.validate(list[Order])

    def test_what_is_made_once_cannot_be_gathered(self) -> None:
        """There is one of it."""
        graph = share_graph()

        @graph.aggregate
        def count(totals: list[Money]) -> Label:
            raise NotImplementedError

        with pytest.raises(GraphError, match=r"takes list\[.*Money\], but .*Money is made once in a run"):
            graph.validate(list[Order])

    def test_the_target_says_whether_it_is_a_list(self) -> None:
        """What is made once is not asked for as a list, and the other way round."""
        graph = share_graph()
        with pytest.raises(GraphError, match="is made once in a run, not for each item"):
            graph.execute_batch(Money, ORDERS)
        with pytest.raises(GraphError, match="is made for each item of the batch, not once; ask for list"):
            graph.execute(Charge, ORDERS)

    def test_a_run_has_one_batch(self) -> None:
        """Two lists have no order in common."""
        with pytest.raises(InvalidArguments, match="a run has one batch, got 2 lists"):
            share_graph().execute(Money, ORDERS, ORDERS)
        with pytest.raises(InvalidArguments, match="the items of a batch are of one type"):
            share_graph().execute(Money, [ORDERS[0], Money()])

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"on_error": "ignore"}, 'on_error: must be "fail" or "collect"'),
            ({"max_failed": 1}, 'max_failed: needs on_error="collect"'),
            ({"on_error": "collect", "max_failed": 1.5}, "a share as a float from 0 to 1"),
            ({"on_error": "collect", "max_failed": -1}, "must be a count"),
            ({"on_error": "collect", "max_failed": True}, "must be a count"),
            ({"max_concurrency": 0}, "max_concurrency must be at least 1"),
        ],
    )
    def test_options_that_cannot_be_used_are_refused(self, options: dict[str, object], text: str) -> None:
        """Before anything runs."""
        with pytest.raises(InvalidArguments, match=text):
            share_graph().execute_batch(Charge, ORDERS, **options)  # type: ignore[call-overload]  # on purpose


def test_the_plan_shows_its_stages() -> None:
    """What runs for each item stands in a box."""
    graph = share_graph()
    plan = graph.plan(list[Charge], list[Order])
    assert list(plan) == ["total", "charge"]
    assert [(part.fan_out, list(part.plan)) for part in plan.stages] == [(None, ["total"]), ("", ["charge"])]
    assert '    subgraph p1["for each item"]\n        s1["charge"]\n    end' in plan.mermaid()
    assert graph.plan(list[Charge]).stages == plan.stages
