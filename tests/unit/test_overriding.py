from __future__ import annotations

import asyncio
import functools
import threading
from typing import Annotated, Any
from unittest.mock import AsyncMock, Mock, create_autospec

import pytest
from celery import Celery

from docket_celery import (
    FixedBackoff,
    Graph,
    GraphError,
    MemoryStore,
    Named,
    RetryPolicy,
    Scope,
    StepContext,
    StepFailed,
    graph_task,
)
from docket_celery.engine.process.state import process
from tests.unit.graphs import start
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Reservation, Shipment

ORDER = Order(order_id="7", amount_cents=100)
calls: list[str] = []


def make_shop() -> Graph:
    """Return a graph of four steps that write down their calls."""
    graph = Graph("overridden")

    @graph.step(
        persist=Scope.WORKFLOW, retry=RetryPolicy(max_attempts=3, backoff=FixedBackoff(0)), name="charge"
    )
    def charge(order: Order, ctx: StepContext) -> Charge:
        calls.append("charge")
        return Charge(charge_id=f"real-{order.order_id}")

    @graph.step
    def reserve(order: Order, charge: Charge) -> Reservation:
        calls.append("reserve")
        return Reservation(reservation_id=f"{charge.charge_id}/r")

    @graph.step
    def tax(order: Order) -> Annotated[Money, Named("tax")]:
        calls.append("tax")
        return Money(cents=19)

    @graph.step
    def ship(charge: Charge, reservation: Reservation, tax: Annotated[Money, Named("tax")]) -> Shipment:
        calls.append("ship")
        return Shipment(tracking_id=f"{charge.charge_id} {reservation.reservation_id} {tax.cents}")

    graph.ship = ship  # type: ignore[attr-defined] # for the tests that name it by the function
    return graph


@pytest.fixture
def shop() -> Graph:
    """The graph, and nobody called so far."""
    calls.clear()
    return make_shop()


@pytest.fixture(autouse=True)
def _store(shop: Graph) -> None:
    shop.store = MemoryStore()


def tracking(graph: Graph) -> str:
    """Execute and return what came out."""
    return graph.execute(Shipment, ORDER).tracking_id


def test_a_message_stands_for_a_step_and_for_what_only_that_step_needs(shop: Graph) -> None:
    """The reservation is given, so neither it nor anything above it runs."""
    with shop.override({"reserve": Reservation(reservation_id="fixed")}):
        assert tracking(shop) == "real-7 fixed 19"
        assert calls.count("reserve") == 0
        calls.clear()
        assert shop.execute(Reservation, ORDER).reservation_id == "fixed"
        assert calls == []
    assert tracking(shop) == "real-7 real-7/r 19"


def test_a_steps_output_type_or_function_names_it_too(shop: Graph) -> None:
    """Three ways to say which step."""
    ship: Any = shop.ship  # type: ignore[attr-defined]
    keys: list[Any] = ["ship", Shipment, ship]
    for key in keys:
        with shop.override({key: Shipment(tracking_id="fake")}):
            assert tracking(shop) == "fake"
    with shop.override({Annotated[Money, Named("tax")]: Money(cents=7)}):
        assert tracking(shop).endswith(" 7")


def test_a_method_and_an_object_name_their_steps() -> None:
    """What was registered is what names it."""

    class Scorer:
        def compute(self, order: Order) -> Money:
            return Money(cents=order.amount_cents)

        def label(self, money: Money) -> Label:
            return Label(text=str(money.cents))

    scorer, graph = Scorer(), Graph("registered")
    graph.register(scorer)
    graph.register(scorer.label)
    with graph.override({scorer: Money(cents=2)}):
        assert graph.execute(Label, ORDER).text == "2"
    with graph.override({scorer.label: Label(text="fake")}):
        assert graph.execute(Label, ORDER).text == "fake"


def test_a_function_is_wired_by_its_own_signature(shop: Graph) -> None:
    """It may take other inputs than the step it replaces, and the context."""

    def reserve(tax: Annotated[Money, Named("tax")], ctx: StepContext) -> Reservation:
        return Reservation(reservation_id=f"{ctx.step}:{tax.cents}")

    with shop.override({"reserve": reserve}):
        assert tracking(shop) == "real-7 reserve:19 19"


def test_a_function_keeps_the_steps_options(shop: Graph) -> None:
    """It is tried as often, and kept as long."""
    tries: list[int] = []

    def charge(order: Order, ctx: StepContext) -> Charge:
        tries.append(ctx.attempt)
        if ctx.attempt < 3:
            raise ConnectionError("again")
        return Charge(charge_id="third")

    with shop.override({"charge": charge}):
        assert shop.execute(Charge, ORDER, execution_id="kept").charge_id == "third"
        assert shop.execute(Charge, ORDER, execution_id="kept").charge_id == "third"
    assert tries == [1, 2, 3]
    store: Any = shop.store
    assert [row.step_name for row in store.executions] == ["charge"]


def test_a_message_has_no_options(shop: Graph) -> None:
    """Nothing is kept of a step that did not run, and no store is needed."""
    shop.store = None
    with shop.override({"charge": Charge(charge_id="fixed")}):
        assert tracking(shop).startswith("fixed ")


def test_a_message_is_copied_for_each_run(shop: Graph) -> None:
    """A step that changes its input does not change the test's own."""
    fixed = Money(cents=5)

    def spoil(tax: Annotated[Money, Named("tax")]) -> Shipment:
        tax.cents += 1
        return Shipment(tracking_id=str(tax.cents))

    with shop.override({"tax": fixed, "ship": spoil}):
        assert [tracking(shop), tracking(shop)] == ["6", "6"]
    assert fixed == Money(cents=5)


def test_what_has_no_annotations_is_called_like_the_step(shop: Graph) -> None:
    """Lambdas and mocks take the step's own arguments."""
    mock = Mock(return_value=Charge(charge_id="mock"))
    with shop.override({"charge": mock, "tax": lambda order: Money(cents=order.amount_cents)}):
        assert tracking(shop) == "mock mock/r 100"
    (order, context), named = mock.call_args
    assert (order, context.step, named) == (ORDER, "charge", {})


def test_async_functions_and_mocks_stand_in(shop: Graph) -> None:
    """Whatever the step was itself."""

    async def tax(order: Order) -> Money:
        await asyncio.sleep(0)
        return Money(cents=1)

    mock = AsyncMock(return_value=Reservation(reservation_id="async"))
    with shop.override({"tax": tax, "reserve": mock}):
        assert tracking(shop) == "real-7 async 1"
    assert mock.await_count == 1


def test_partials_objects_and_autospecs_stand_in(shop: Graph) -> None:
    """Whatever can be called, or has compute."""

    class Fake:
        def compute(self, order: Order) -> Charge:
            return Charge(charge_id=f"object-{order.order_id}")

    def tax(cents: int, order: Order) -> Money:
        return Money(cents=cents)

    ship: Any = shop.ship  # type: ignore[attr-defined]
    double = create_autospec(ship, return_value=Shipment(tracking_id="spec"))
    with shop.override({"charge": Fake(), "tax": functools.partial(tax, 3)}):
        assert tracking(shop) == "object-7 object-7/r 3"
        with shop.override({ship: double}):
            assert tracking(shop) == "spec"
    double.assert_called_once()


def test_blocks_add_up(shop: Graph) -> None:
    """The inner one wins where both name a step; after it the outer one holds again."""
    with shop.override({"tax": Money(cents=1), "reserve": Reservation(reservation_id="outer")}):
        with shop.override({"tax": Money(cents=2)}):
            assert tracking(shop) == "real-7 outer 2"
        assert tracking(shop) == "real-7 outer 1"
    assert tracking(shop) == "real-7 real-7/r 19"


def test_it_decorates_a_test(shop: Graph) -> None:
    """Like other context managers of the standard library, as often as it is called."""

    @shop.override({"tax": Money(cents=3)})
    def test() -> str:
        return tracking(shop)

    assert [test(), test()] == ["real-7 real-7/r 3"] * 2


def test_other_threads_do_not_see_it(shop: Graph) -> None:
    """Tests that run side by side do not touch each other."""
    inside, checked = threading.Event(), threading.Event()

    def other() -> str:
        inside.wait(30)
        try:
            return tracking(shop)
        finally:
            checked.set()

    running = start(other)
    with shop.override({"tax": Money(cents=1)}):
        inside.set()
        assert checked.wait(30)
    assert running.result(30) == "real-7 real-7/r 19"


def test_other_tasks_of_the_loop_do_not_see_it(shop: Graph) -> None:
    """Nor do asyncio tests that run side by side; aexecute inside sees it."""

    async def one(cents: int) -> str:
        with shop.override({"tax": Money(cents=cents)}):
            await asyncio.sleep(0)
            return (await shop.aexecute(Shipment, ORDER)).tracking_id

    async def both() -> list[str]:
        return list(await asyncio.gather(one(1), one(2)))

    assert asyncio.run(both()) == ["real-7 real-7/r 1", "real-7 real-7/r 2"]


def test_what_a_step_executes_sees_it(shop: Graph) -> None:
    """However deep; and what is started in the block goes on with it after the block."""
    outer = Graph("outer")

    @outer.step
    def run_shop(order: Order) -> Label:
        return Label(text=tracking(shop))

    with shop.override({"tax": Money(cents=4)}):
        assert outer.execute(Label, ORDER).text == "real-7 real-7/r 4"
        running = shop.start(Shipment, ORDER)
    assert running.result(30).tracking_id == "real-7 real-7/r 4"


def test_an_eager_task_sees_it(shop: Graph) -> None:
    """Delay runs in the block."""
    app = Celery("overridden", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.task_always_eager = True

    @graph_task(app, shop, name="overridden.ship")
    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    with shop.override({"ship": Shipment(tracking_id="fake")}):
        assert ship_order.delay(ORDER).get().tracking_id == "fake"
    assert ship_order.delay(ORDER).get().tracking_id == "real-7 real-7/r 19"


def test_the_graph_is_neither_frozen_nor_changed(shop: Graph) -> None:
    """Its own plan stays; a step that comes later counts within the block too."""
    before = list(shop.plan(Shipment, Order))
    with shop.override({"reserve": Reservation()}):
        assert list(shop.plan(Shipment, Order)) == ["charge", "reserve", "tax", "ship"]

        @shop.step
        def label(shipment: Shipment) -> Label:
            return Label(text=shipment.tracking_id)

        assert shop.execute(Label, ORDER).text == "real-7  19"
    assert list(shop.plan(Shipment, Order)) == before


def test_all_faults_stand_in_one_report(shop: Graph) -> None:
    """Found at the with statement, before anything runs; each says which and what to do."""

    def wrong(order: Order) -> Label:
        return Label()

    def untyped(order: Order, colour: str) -> Charge:
        return Charge()

    given: dict[Any, Any] = {
        "shipp": Shipment(),
        Label: Label(),
        "tax": Charge(),
        "charge": untyped,
        Shipment: wrong,
        "reserve": lambda charge: Reservation(reservation_id=charge.charge_id),
        7: Money(),
    }
    with pytest.raises(GraphError) as caught, shop.override(given):
        raise AssertionError("the block must not begin")
    faults = caught.value.faults
    assert len(faults) == len(given)
    assert all(fault.startswith("DC118 override: ") for fault in faults)
    parts = [
        "the graph has no such step; it has charge, reserve, tax, ship",
        "no step returns docket.tests.unit.Label",
        'it is a docket.tests.unit.Charge, but the step returns docket.tests.unit.Money named "tax"',
        "parameter 'colour' is str, not a Protocol Buffers message",
        "it returns docket.tests.unit.Label, but the step returns docket.tests.unit.Shipment",
        "it is called like the step itself, (docket.tests.unit.Order, docket.tests.unit.Charge)",
        "no such step; name it by its name",
    ]
    for part, fault in zip(parts, faults, strict=True):
        assert part in fault


def test_a_step_is_replaced_once(shop: Graph) -> None:
    """By name and by type at once is a mistake."""
    with (
        pytest.raises(GraphError, match="it is named twice"),
        shop.override({"ship": Shipment(), Shipment: Shipment()}),
    ):
        pass


def test_a_class_and_a_value_that_is_nothing_to_call_are_refused(shop: Graph) -> None:
    """Each with its own words."""
    for wrong, words in ((Shipment, "is a class"), (7, "neither a function nor an object")):
        given: Any = {"ship": wrong}
        with pytest.raises(GraphError, match=words), shop.override(given):
            pass


def test_a_graph_with_faults_reports_those(shop: Graph) -> None:
    """They come first: without them the override might be right."""
    broken = Graph("broken")

    @broken.step
    def untyped(order) -> Label:  # type: ignore[no-untyped-def]
        return Label()

    with pytest.raises(GraphError, match="DC111"), broken.override({"untyped": Label()}):
        pass


def test_a_mock_of_the_wrong_type_fails_its_step(shop: Graph) -> None:
    """What comes back is checked like any step's."""
    with (
        shop.override({"ship": Mock(return_value=None)}),
        pytest.raises(StepFailed, match="returned None"),
    ):
        tracking(shop)


def test_a_key_function_holds_for_the_inputs_it_was_written_for() -> None:
    """A substitute with other inputs is cached by those."""
    graph, store = Graph("keyed"), MemoryStore()

    def by_order(order: Order, money: Money) -> Order:
        return order

    @graph.step(persist=Scope.GLOBAL, key=by_order)
    def label(order: Order, money: Money) -> Label:
        return Label(text="real")

    def fake(order: Order) -> Label:
        return Label(text=order.order_id)

    with graph.override({"label": fake}):
        for name in ("1", "2", "2"):
            assert graph.execute(Label, Order(order_id=name), store=store).text == name
    assert [row.cached for row in store.executions] == [False, False, True]


def test_the_bound_of_a_step_holds_for_what_stands_in() -> None:
    """max_concurrent is an option like the others; a message runs nothing that could be bounded."""
    graph = Graph("bounded")

    @graph.step(max_concurrent=1)
    def label(order: Order) -> Label:
        return Label()

    def fake(order: Order) -> Label:
        return Label(text="fake")

    bound = process.slots_of(graph.find_step("label"))
    assert bound is not None
    with graph.override({"label": fake}):
        assert process.slots_of(graph.find_step("label")) is bound
    with graph.override({"label": Label()}):
        assert process.slots_of(graph.find_step("label")) is None


def test_what_stands_in_for_a_built_step_has_nothing_built() -> None:
    """The class names the step; its factory, which would connect to something, is not called."""

    class Scorer:
        async def compute(self, order: Order) -> Label:
            raise AssertionError(order)

    def make() -> Scorer:
        raise AssertionError("nothing is to be built")

    graph = Graph("built")
    graph.register(Scorer, factory=make)
    fakes: list[Any] = [
        Label(),
        AsyncMock(return_value=Label()),
        lambda order: Label(text=order.order_id[:0]),
    ]
    for fake in fakes:
        with graph.override({Scorer: fake}):
            assert graph.execute(Label, ORDER) == Label()
