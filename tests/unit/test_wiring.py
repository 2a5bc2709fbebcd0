from __future__ import annotations

import itertools
import sys
from types import FrameType
from typing import Any

import pytest

from docket_celery.errors import GraphError, InvalidArguments
from docket_celery.graph import Graph
from docket_celery.plan.options import Scope
from docket_celery.plan.plan import Plan
from tests.unit.graphs import add_step, build, deliver, key, total
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Payment, Reservation, Shipment


def charge(order: Order) -> Charge:
    """Charge."""
    return Charge(charge_id=order.order_id)


def reserve(order: Order, charge: Charge) -> Reservation:
    """Reserve."""
    return Reservation(reservation_id=charge.charge_id)


def ship(charge: Charge, reservation: Reservation) -> Shipment:
    """Ship."""
    return Shipment(tracking_id=reservation.reservation_id)


def label(order: Order) -> Label:
    """Print a label that no shipment needs."""
    return Label(text=order.order_id)


def shop() -> Graph:
    """Return the order graph, with one step too many."""
    graph = Graph("shop")
    for step in (label, ship, reserve, charge):
        graph.register(step)
    return graph


def faults(graph: Graph, *given: type) -> list[str]:
    """Return the faults that validating reports."""
    with pytest.raises(GraphError) as caught:
        graph.validate(*given)
    assert caught.value.graph == graph.name
    return list(caught.value.faults)


def test_a_right_graph_is_valid_with_and_without_given_types() -> None:
    """Without given types, whatever no step returns counts as handed in."""
    shop().validate()
    shop().validate(Order)


def test_a_cycle_is_shown_as_a_path() -> None:
    """Three steps that wait for each other are named in a row, with a place and the fix."""
    (fault,) = faults(build({"a": ["c"], "b": ["a"], "c": ["b"], "free": []}, total))
    path = fault.split(" (")[0].removeprefix("DC115 cycle: ").replace("'", "").split(" needs ")
    assert path[0] == path[-1]
    assert sorted(path[1:]) == ["a", "b", "c"]
    needs = {"a": "c", "b": "a", "c": "b"}
    assert all(needs[one] == other for one, other in itertools.pairwise(path))
    assert "break it by" in fault


def test_a_step_that_takes_what_it_returns_can_never_run() -> None:
    """Given the value it is not called, without it it waits for itself; both are refused, by its own code."""

    def normalize(order: Order) -> Order:
        return order

    for given in ((), (Order,)):
        graph = Graph("shop")
        graph.register(normalize)
        graph.register(charge)
        (fault,) = faults(graph, *given)
        assert fault.startswith("DC123 never runs: step 'normalize' (")
        assert 'Annotated[Order, Named("...")]' in fault
        with pytest.raises(GraphError, match="DC123"):
            graph.execute(Charge, Order())


def test_a_step_whose_result_cannot_be_read_is_the_only_fault() -> None:
    """It may return what others need and callers ask for, so neither is reported as missing."""
    graph = Graph("shop")

    def broken(order: Order):  # type: ignore[no-untyped-def]
        return Charge()

    graph.register(broken)
    graph.register(reserve)
    (fault,) = faults(graph, Order)
    assert fault.startswith("DC111 signature: step 'broken'")
    with pytest.raises(GraphError) as caught:
        graph.plan(Shipment, Order)
    assert [text[:5] for text in caught.value.faults] == ["DC111"]


@pytest.mark.parametrize(
    ("edges", "path"),
    [
        ({"b": ["a"], "a": [], "c": ["d"], "d": ["c"]}, "'c' needs 'd' needs 'c'"),
        ({"x": ["c", "l"], "l": [], "c": ["x"]}, "'x' needs 'c' needs 'x'"),
        ({"x": ["c", "l", "y"], "l": [], "y": ["l"], "c": ["x"]}, "'x' needs 'c' needs 'x'"),
    ],
    ids=["after steps that are fine", "beside a step that is fine", "beside a step that two need"],
)
def test_a_cycle_is_found_wherever_it_stands(edges: dict[str, list[str]], path: str) -> None:
    """What was looked at before it does not end the search, and is no part of the path."""
    (fault,) = faults(build(edges, total))
    assert fault.startswith(f"DC115 cycle: {path} (")


def test_a_part_that_a_run_does_not_need_may_lack_its_inputs() -> None:
    """A caller hands in what its target needs, not what every step of the graph would."""
    graph = Graph("shop")
    graph.register(charge)
    graph.register(label)

    @graph.step
    def pay(label: Label, money: Money) -> Payment:
        return Payment()

    assert graph.execute(Charge, Order()) == charge(Order())


def test_a_cycle_is_broken_by_handing_one_value_in() -> None:
    """The fix that the fault names works: a given value is not made."""
    graph = build({"a": ["c"], "b": ["a"], "c": ["b"]}, total)
    outcome = deliver(graph, "b", {"c": 10})
    assert outcome.value == Money(cents=12)


def test_a_type_without_a_producer_is_named_with_who_needs_it() -> None:
    """With given types each other input must be made by a step."""
    graph = Graph("shop")
    graph.register(reserve)
    (fault,) = faults(graph, Order)
    assert fault.startswith("DC114 no producer: step 'reserve'")
    assert "needs docket.tests.unit.Charge" in fault
    assert "(given: docket.tests.unit.Order);" in fault
    (fault,) = faults(graph, Order, Money)
    given = fault.partition("(given: ")[2].partition(")")[0].split(", ")
    assert sorted(given) == ["docket.tests.unit.Money", "docket.tests.unit.Order"]


def test_two_producers_of_a_type_are_refused() -> None:
    """Both are named, with their places."""
    graph = Graph("shop")
    graph.register(charge)
    graph.register(charge, name="charge_again")
    (fault,) = faults(graph)
    assert fault.startswith("DC113 two producers: docket.tests.unit.Charge is made by 'charge'")
    assert "'charge_again'" in fault
    assert fault.count("test_wiring.py:") == 2


def test_a_duplicate_name_is_refused() -> None:
    """Names identify checkpoints."""
    graph = Graph("shop")
    graph.register(charge, name="same")
    graph.register(label, name="same")
    (fault,) = faults(graph)
    assert fault.startswith("DC112 duplicate name: step 'same' is registered at")
    assert fault.count("test_wiring.py:") == 2


@pytest.mark.parametrize("former", ["label", "older", "charge"])
def test_a_former_name_belongs_to_one_step(former: str) -> None:
    """Two steps with one name in common would restore each other's checkpoints."""
    graph = Graph("shop")
    graph.register(charge, persist=Scope.WORKFLOW, renamed_from=("oldest", former))
    graph.register(label, persist=Scope.WORKFLOW, renamed_from=("older",))
    (fault,) = faults(graph)
    assert fault.startswith("DC117 former name")
    assert repr(former) in fault


def test_steps_of_one_cache_return_one_type() -> None:
    """Each would read the other's entries; values of one type that only names tell apart may share them."""
    graph = Graph("shop")
    graph.register(charge, persist=Scope.GLOBAL, cache="rates")
    graph.register(label, persist=Scope.GLOBAL, cache="rates")
    (fault,) = faults(graph, Order)
    assert fault.startswith("DC119 shared cache: cache='rates' is named by step 'charge' (")
    assert "Charge, and by step 'label' (" in fault
    graph = Graph("shop")
    for name in ("net", "gross"):
        add_step(graph, name, [], total, persist=Scope.GLOBAL, cache="rates")
    graph.validate()


def test_all_faults_stand_in_one_report() -> None:
    """A duplicate, a second producer, a bad signature, a missing producer and a cycle at once."""
    graph = build({"a": ["b"], "b": ["a"]}, total)
    graph.register(charge)
    graph.register(charge, name="again")
    graph.register(label, name="again")

    def untyped(_order, _count: int) -> Reservation:  # type: ignore[no-untyped-def]
        return Reservation()

    graph.register(untyped)
    add_step(graph, "lonely", ["nowhere"], total)
    codes = sorted(fault[:5] for fault in faults(graph, Order))
    assert codes == ["DC111", "DC111", "DC112", "DC113", "DC114", "DC115"]


def test_a_graph_with_faults_does_not_run() -> None:
    """Also where the target could be made without the faulty steps: what is ambiguous is not guessed."""
    graph = build({"a": ["b"], "b": ["a"]}, total)
    graph.register(charge)
    with pytest.raises(GraphError, match="DC115"):
        graph.execute(Charge, Order())


def test_a_plan_holds_only_what_the_target_needs() -> None:
    """Labels are not printed for a shipment, and a shipment is not made for a charge."""
    assert list(shop().plan(Shipment, Order)) == ["charge", "reserve", "ship"]
    assert list(shop().plan(Charge, Order)) == ["charge"]
    assert list(shop().plan(Shipment)) == ["charge", "reserve", "ship"]


def test_a_given_type_is_not_produced_again() -> None:
    """A caller who has the charge gets no second one, in plan and in run."""
    assert list(shop().plan(Shipment, Order, Charge)) == ["reserve", "ship"]
    shipment = shop().execute(Shipment, Order(order_id="1"), Charge(charge_id="paid before"))
    assert shipment == Shipment(tracking_id="paid before")


def test_asking_for_a_given_type_returns_it() -> None:
    """Nothing runs for what the caller already has."""
    given = Order(order_id="7")
    assert shop().execute(Order, given) is given


def test_a_type_is_given_once() -> None:
    """Two orders would leave it open which one the steps get."""
    with pytest.raises(InvalidArguments) as caught:
        shop().execute(Shipment, Charge(), Order(), Order())
    assert caught.value.what == "graph 'shop'"
    assert caught.value.problem.startswith("docket.tests.unit.Order is given twice;")


def test_a_missing_input_is_named_with_what_was_given() -> None:
    """A step's or the caller's wish that nothing fulfils stands in the fault of the right graph."""
    for given, shown in (((), "nothing"), ((Money(),), "docket.tests.unit.Money")):
        with pytest.raises(GraphError) as caught:
            shop().execute(Charge, *given)
        assert caught.value.graph == "shop"
        (fault,) = caught.value.faults
        assert fault.startswith("DC114 no producer: step 'charge' (")
        assert (
            f"needs docket.tests.unit.Order, which no step returns and the caller does not give (given: {shown});"
            in fault
        )


def test_a_target_that_no_step_makes_is_refused() -> None:
    """The fault says who wants it and what was given."""
    with pytest.raises(GraphError, match=r"DC122 no result: the caller asks for docket.tests.unit.Money"):
        shop().execute(Money, Order())


@pytest.mark.parametrize("inputs", [["text"], [Order], [None]])
def test_inputs_must_be_messages(inputs: list[object]) -> None:
    """A class or a string is refused before anything runs."""
    with pytest.raises(InvalidArguments, match="inputs are Protocol Buffers messages"):
        shop().execute(Charge, *inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [Order(), str, "shop.Order"])
def test_targets_must_be_message_types(target: object) -> None:
    """A message instead of its class is refused."""
    with pytest.raises(InvalidArguments, match="expected a Protocol Buffers message type"):
        shop().execute(target, Order())  # type: ignore[arg-type]


def test_a_graph_is_frozen_by_its_first_run() -> None:
    """Before it, steps may be added after a plan; after it, none."""
    graph = shop()
    assert list(graph.plan(Charge)) == ["charge"]
    graph.execute(Charge, Order())
    with pytest.raises(GraphError, match="DC116 frozen: step 'late'"):
        graph.register(label, name="late")


def test_ties_break_by_registration() -> None:
    """Steps that are ready together stand in the order in which they were registered."""
    graph = build({"z": [], "a": [], "m": [], "end": ["a", "m", "z"]}, total)
    assert list(compiled(graph, "end")) == ["z", "a", "m", "end"]


def test_planning_is_deterministic() -> None:
    """The same registrations give the same plan."""
    edges = {f"s{i}": [f"s{j}" for j in range(i) if (i * j) % 3 == 1] for i in range(40)}
    plans = {tuple(compiled(build(edges, total), "s39")) for _ in range(5)}
    assert len(plans) == 1


def test_levels_hold_what_may_run_together() -> None:
    """A step stands one level below the deepest of its sources."""
    edges = {"a": [], "b": [], "c": ["a"], "d": ["b", "c"], "end": ["a", "d"]}
    assert compiled(build(edges, total), "end").levels == (("a", "b"), ("c",), ("d",), ("end",))


def test_a_plan_draws_itself() -> None:
    """Mermaid shows given values, steps and the types between them."""
    assert shop().plan(Shipment, Order).mermaid().splitlines() == [
        "flowchart TD",
        '    in0(["Order"])',
        '    s0["charge"]',
        '    s1["reserve"]',
        '    s2["ship"]',
        '    in0 -->|"Order"| s0',
        '    in0 -->|"Order"| s1',
        '    s0 -->|"Charge"| s1',
        '    s0 -->|"Charge"| s2',
        '    s1 -->|"Reservation"| s2',
    ]


def test_a_plan_draws_named_values_with_their_names() -> None:
    """Two values of one type are told apart in the picture too."""
    assert compiled(build({"a": [], "b": ["a"]}, total), "b").mermaid().splitlines() == [
        "flowchart TD",
        '    s0["a"]',
        '    s1["b"]',
        '    s0 -->|"Money a"| s1',
    ]


def test_a_plan_shows_itself_in_one_line() -> None:
    """A log names the graph, what is given, the target and the first eight steps."""
    assert repr(shop().plan(Shipment, Order)) == (
        "<Plan shop: docket.tests.unit.Order -> docket.tests.unit.Shipment by charge, reserve, ship>"
    )
    chain = build({f"s{i}": [f"s{i - 1}"] if i else [] for i in range(9)}, total)
    names = ", ".join(f"s{i}" for i in range(8))
    for last, shown in ((7, names), (8, f"{names}, … 1 more")):
        target = f"s{last}"
        expected = f'<Plan shape: nothing -> docket.tests.unit.Money named "{target}" by {shown}>'
        assert repr(compiled(chain, target)) == expected
    two = shop().plan(Shipment, Order, Charge)
    assert repr(two).startswith("<Plan shop: docket.tests.unit.Order, docket.tests.unit.Charge -> ")
    assert repr(shop().plan(Order, Order)).endswith("-> docket.tests.unit.Order by nothing>")


def test_a_plan_of_long_names_and_many_values_stays_short() -> None:
    """Names of 200 characters, 50 given values and 50 steps are still one line of a log."""
    sources = [f"{i}".zfill(200) for i in range(50)]
    graph = build({f"{i}".zfill(199): sources for i in range(50)}, total, name="g" * 200)
    add_step(graph, "end" * 66, [f"{i}".zfill(199) for i in range(50)], total)
    shown = repr(graph.compiled(key("end" * 66), tuple(key(name) for name in sources)))
    assert len(shown) < 1400
    assert shown.count("… 42 more") == shown.count("… 43 more") + 0 == 1 or "… 43 more" in shown
    assert "\n" not in shown


def test_everything_that_is_missing_for_a_target_is_reported_at_once() -> None:
    """Two missing inputs of two steps, beside a fault elsewhere: one report."""
    graph = shop()
    add_step(graph, "one", ["nowhere", "nothing"], total)
    add_step(graph, "two", ["one", "never"], total)
    graph.register(label, name="label_again")
    with pytest.raises(GraphError) as caught:
        graph.compiled(key("two"), ())
    found = sorted(caught.value.faults)
    assert [fault[:5] for fault in found] == ["DC113", "DC114", "DC114", "DC114"]
    assert [name for name in ("nowhere", "nothing", "never") if f'named "{name}"' in "".join(found)] == [
        "nowhere",
        "nothing",
        "never",
    ]


def test_a_step_that_cannot_be_read_does_not_make_others_look_wrong() -> None:
    """What it returns is known all the same: nobody is told to register a step for it."""
    graph = Graph("shop")

    def charge(order) -> Charge:  # type: ignore[no-untyped-def]
        return Charge()

    graph.register(charge)
    graph.register(reserve)
    (fault,) = faults(graph, Order)
    assert fault.startswith("DC111")


def test_long_cycles_are_shown_by_their_ends() -> None:
    """Nobody reads a path of a thousand names, and a thousand cycles of them are not built."""
    count = 1000
    edges = {f"s{i}": [f"s{(i + 1) % count}", *(["s0"] if i else [])] for i in range(count)}
    found = faults(build(edges, total))
    assert len(found) >= 1
    assert max(map(len, found)) < 2500
    assert any(" needs ... needs " in fault for fault in found)


def lines_of_work(edges: dict[str, list[str]]) -> int:
    """Count the lines of the engine that validating and planning executes."""
    graph, count = build(edges, total), 0

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        if "docket_celery" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        graph.validate()
        compiled(graph, list(edges)[-1])
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("shape", ["chain", "fan", "lattice"])
def test_work_grows_with_steps_and_edges_and_no_faster(shape: str) -> None:
    """Four times the graph is four times the lines executed, whatever its shape."""

    def edges(count: int) -> dict[str, list[str]]:
        if shape == "chain":
            return {f"s{i}": [f"s{i - 1}"] if i else [] for i in range(count)}
        if shape == "fan":
            return {f"s{i}": [] for i in range(count)} | {"end": [f"s{i}" for i in range(count)]}
        return {f"s{i}": [f"s{j}" for j in range(max(0, i - 5), i)] for i in range(count)}

    assert lines_of_work(edges(800)) / lines_of_work(edges(200)) < 4.2


@pytest.mark.parametrize("shape", ["chain", "fan"])
def test_ten_thousand_steps_validate_compile_and_run(shape: str) -> None:
    """Neither depth nor breadth meets a recursion limit."""
    count = 10_000
    if shape == "chain":
        edges = {f"s{i}": [f"s{i - 1}"] if i else [] for i in range(count)}
    else:
        # Python functions take any number of parameters; the join has all the others.
        edges = {f"s{i}": [] for i in range(count - 1)} | {"end": [f"s{i}" for i in range(count - 1)]}
    graph = build(edges, total)
    graph.validate()
    plan = compiled(graph, list(edges)[-1])
    assert len(plan) == count
    assert len(plan.levels) == (count if shape == "chain" else 2)
    assert deliver(graph, list(edges)[-1], threads=2).value == Money(cents=count)


def compiled(graph: Graph, target: str) -> Plan:
    """Return the plan for the value *target* from nothing."""
    return graph.compiled(key(target), ())
