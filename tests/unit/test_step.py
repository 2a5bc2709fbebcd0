from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NewType, Optional, TypeVar, Union

import pytest
from typing_extensions import TypeAliasType

from docket_celery.errors import GraphError
from docket_celery.graph import Graph
from docket_celery.plan.annotation import Named
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import RetryPolicy, Scope, StepOptions
from tests.unit.protos import shop_pb2 as pb
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Reservation, Shipment


class Charger:
    """A step with state: an object with ``compute``."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def compute(self, order: Order) -> Charge:
        """Charge the order."""
        return Charge(charge_id=self.prefix + order.order_id)

    async def later(self, order: Order) -> Charge:
        """Charge the order on a loop."""
        return Charge(charge_id="later " + order.order_id)


class Caller:
    """A step that is called."""

    def __call__(self, order: Order) -> Charge:
        """Charge the order."""
        return Charge(charge_id="called " + order.order_id)


def with_prefix(prefix: str, order: Order) -> Charge:
    """Charge the order."""
    return Charge(charge_id=prefix + order.order_id)


def charge(order: Order) -> Charge:
    """Charge the order."""
    return Charge(charge_id="plain " + order.order_id)


def quoted(order: "pb.Order") -> "Charge":  # noqa: UP037 -- quoted on purpose
    """Charge the order."""
    return Charge(charge_id="quoted " + order.order_id)


async def awaited(order: Order) -> Charge:
    """Charge the order on a loop."""
    return Charge(charge_id="awaited " + order.order_id)


def keyword_only(*, order: Order) -> Charge:
    """Charge the order."""
    return Charge(charge_id="keyword " + order.order_id)


def with_default(order: Order, currency: str = "EUR", note=None) -> Charge:  # type: ignore[no-untyped-def]
    """Charge the order."""
    return Charge(charge_id=f"{currency} {note} {order.order_id}")


def context_first(ctx: StepContext, order: Order) -> Charge:
    """Charge the order."""
    return Charge(charge_id=f"{ctx.step} {order.order_id}")


def context_keyword(order: Order, *, ctx: StepContext) -> Charge:
    """Charge the order."""
    return Charge(charge_id=f"{ctx.step} {order.order_id}")


@functools.wraps(charge)
def wrapped(*args: Any, **kwargs: Any) -> Any:
    """Charge the order."""
    return charge(*args, **kwargs)


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        (charge, {}, "plain 7"),
        (quoted, {}, "quoted 7"),
        (awaited, {}, "awaited 7"),
        (keyword_only, {}, "keyword 7"),
        (with_default, {}, "EUR None 7"),
        (context_first, {}, "context_first 7"),
        (context_keyword, {}, "context_keyword 7"),
        (wrapped, {}, "plain 7"),
        (functools.partial(with_prefix, "p"), {"name": "partial"}, "p7"),
        (functools.partial(with_prefix, prefix="k"), {"name": "partial"}, "k7"),
        (Charger("o"), {}, "o7"),
        (Charger("m").compute, {}, "m7"),
        (Charger("a").later, {}, "later 7"),
        (Caller(), {}, "called 7"),
    ],
)
def test_whatever_can_be_called_is_a_step(target: Any, options: dict[str, Any], expected: str) -> None:
    """Functions, partials, bound methods, objects; inputs by position or keyword; the context anywhere."""
    graph = Graph("shop")
    graph.register(target, **options)
    assert graph.execute(Charge, Order(order_id="7")) == Charge(charge_id=expected)


def test_a_step_may_use_what_is_defined_after_it() -> None:
    """A local name that is not assigned yet when the signature is read is no fault."""
    graph = Graph("shop")

    @graph.step
    def charge(order: Order) -> Charge:
        return Charge(charge_id=later + order.order_id)

    graph.validate(Order)
    later = "later "
    assert graph.execute(Charge, Order(order_id="7")) == Charge(charge_id="later 7")


def test_decorating_returns_the_function_itself() -> None:
    """With and without options, a step stays an ordinary function for its tests."""
    graph = Graph("shop")
    assert graph.step(charge) is charge
    assert graph.step(StepOptions(timeout=3), name="other", timeout=5)(awaited) is awaited


@pytest.mark.parametrize(
    ("target", "name"), [(charge, "charge"), (Charger("x"), "Charger"), (Charger("x").compute, "compute")]
)
def test_a_step_is_named_after_its_function_or_class(target: Any, name: str) -> None:
    """Without ``name=`` the code's own name is the step's."""
    graph = Graph("shop")
    graph.register(target)
    assert list(graph.plan(Charge, Order)) == [name]


@pytest.mark.parametrize("target", [lambda _order: Charge(), functools.partial(with_prefix, "p")])
def test_lambdas_and_partials_need_a_name(target: Any) -> None:
    """They have none of their own, and a checkpoint's identity must not be made up."""
    with pytest.raises(GraphError, match=r"DC110 no name.*test_step\.py"):
        Graph("shop").register(target)


@pytest.mark.parametrize("name", ["a\nb", "x" * 201, "nul\0", 7])
def test_names_must_be_printable_text(name: Any) -> None:
    """A step's name stands in rows, logs and keys."""
    with pytest.raises(GraphError, match="DC110"):
        Graph("shop").register(charge, name=name)


def test_values_of_one_type_are_told_apart_by_name() -> None:
    """Net and tax are both Money and reach the parameters that name them."""
    graph = Graph("shop")

    @graph.step
    def net(order: Order) -> Annotated[Money, Named("net")]:
        return Money(cents=order.amount_cents)

    @graph.step
    def tax(net: Annotated[Money, Named("net")]) -> Annotated[Money, Named("tax")]:
        return Money(cents=net.cents // 5)

    @graph.step
    def gross(tax: Annotated[Money, Named("tax")], net: Annotated[Money, "cents", Named("net")]) -> Money:
        return Money(cents=1000 * net.cents + tax.cents)

    assert graph.execute(Money, Order(amount_cents=100)) == Money(cents=100_020)


def no_annotation(order) -> Charge:  # type: ignore[no-untyped-def] # noqa: D103
    return Charge()


def no_result(order: Order):  # type: ignore[no-untyped-def] # noqa: D103
    return Charge()


def none_result(order: Order) -> None:  # noqa: D103
    return None


def plain_type(order: Order, count: int) -> Charge:  # noqa: D103
    return Charge()


def variadic(*orders: Order) -> Charge:  # noqa: D103
    return Charge()


def undefined(order: Missing) -> Charge:  # type: ignore[name-defined] # noqa: D103, F821
    return Charge()


def missing_attribute(order: pb.Missing) -> Charge:  # type: ignore[name-defined] # noqa: D103
    return Charge()


def listed(orders: list[Order]) -> Charge:  # noqa: D103
    return Charge()


def named_twice(order: Annotated[Order, Named("a"), Named("b")]) -> Charge:  # noqa: D103
    return Charge()


def optional(order: Order | None) -> Charge:  # noqa: D103
    return Charge()


def optional_by_name(order: Optional[Order]) -> Charge:  # noqa: D103, UP045
    return Charge()


def optional_with_default(order: Order, label: Label | None = None) -> Charge:  # noqa: D103
    return Charge()


def optional_context(order: Order, ctx: StepContext | None = None) -> Charge:  # noqa: D103
    return Charge()


def optional_result(order: Order) -> Charge | None:  # noqa: D103
    return Charge()


def one_of_two(order: Union[Order, Label]) -> Charge:  # noqa: D103, UP007
    return Charge()


def same_type_twice(order: Order, again: Order) -> Charge:  # noqa: D103
    return Charge()


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator without functools.wraps."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


def forgetful(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that forgets the annotations of its own function as well."""

    def inner(*args, **kwargs):  # type: ignore[no-untyped-def]
        return function(*args, **kwargs)

    return inner


unwrapped = forgetful(charge)


class Methods:
    """Steps that were meant for an instance or a class."""

    def charge(self, order: Order) -> Charge:
        return Charge(charge_id=order.order_id)

    @classmethod
    def made(cls, order: Order) -> Charge:
        return Charge(charge_id=order.order_id)


def generating(order: Order) -> Charge:  # type: ignore[misc] # noqa: D103
    yield Charge()


async def generating_on_loop(order: Order) -> Charge:  # type: ignore[misc] # noqa: D103
    yield Charge()


Paid = NewType("Paid", Order)
Alias = TypeAliasType("Alias", Order)
Endless = TypeAliasType("Endless", "Endless")  # type: ignore[misc]


class Mailer:
    """What a step works with, and no message."""


def with_mailer(order: Order, mailer: Mailer) -> Charge:  # noqa: D103
    return Charge()


def of_new_type(order: Paid) -> Charge:  # noqa: D103
    return Charge()


def of_endless_alias(order: Endless) -> Charge:  # noqa: D103
    return Charge()


def with_default_message(order: Order, label: Label = Label()) -> Charge:  # noqa: B008, D103
    return Charge()


def named_nothing(order: Annotated[Order, Named("")]) -> Charge:  # noqa: D103
    return Charge()


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (no_annotation, "parameter 'order' has no annotation"),
        (no_result, "its return annotation is missing"),
        (none_result, "its result is None, not a Protocol Buffers message"),
        (plain_type, "parameter 'count' is int, not a Protocol Buffers message"),
        (variadic, "parameter *orders is variadic"),
        (logged(charge), "its inputs are hidden behind *args, **kwargs; if a decorator made it"),
        (undefined, "names something that is not defined"),
        (missing_attribute, "its annotations cannot be read"),
        (listed, "it takes a list, so it is an aggregate"),
        (named_twice, "has 2 Named"),
        (
            optional,
            "'order' is Order | None; a step runs when all its inputs are there: annotate it with Order",
        ),
        (optional_by_name, "'order' is Order | None; a step runs when"),
        (optional_with_default, "'label' is Label | None; a step runs when"),
        (
            optional_context,
            "'ctx' is StepContext | None; a step always gets one: annotate it with StepContext",
        ),
        (optional_result, "its result is Charge | None; a step returns a value or raises"),
        (one_of_two, "'order' is Order | Label; a value has one type"),
        (
            same_type_twice,
            "parameters 'order' and 'again' are both docket.tests.unit.Order, of which a run has one",
        ),
        (
            unwrapped,
            "its inputs are hidden behind *args, **kwargs; if a decorator made it, put @functools.wraps",
        ),
        (Methods.charge, "it is a method without an instance, for its self; register instance.charge"),
        (Methods.__dict__["made"], "it is a classmethod that belongs to no class yet"),
        (generating, "it is a generator"),
        (generating_on_loop, "it is a generator"),
        (named_nothing, "Named takes 1 to 200 printable characters, not ''"),
        (
            with_mailer,
            "parameter 'mailer' is Mailer, not a Protocol Buffers message; a step takes messages alone",
        ),
        (
            with_mailer,
            "make the step a class that holds one, with the messages as parameters of its compute method",
        ),
        (of_new_type, """to tell two values of one type apart, write Annotated[Order, Named("paid")]"""),
        (of_endless_alias, "the type alias Endless"),
        (with_default_message, "parameter 'label' has a message as its default"),
        (Charger, "is a class; register an instance"),
        (7, "neither a function nor an object with a compute method"),
    ],
)
def test_a_signature_that_cannot_be_read_is_refused(target: Any, text: str) -> None:
    """The fault names the step, where it is, and which part is wrong."""
    graph = Graph("shop")
    graph.register(target, name="broken")
    with pytest.raises(GraphError) as caught:
        graph.validate()
    (fault,) = caught.value.faults
    assert fault.startswith("DC111 signature: step 'broken'")
    assert text in fault
    assert "test_step.py" in fault or target == 7


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"key": lambda order: order}, "key= names GLOBAL checkpoints"),
        ({"key": 5, "persist": Scope.GLOBAL}, "key= is a function"),
        ({"cache": "rates"}, "cache= names where GLOBAL checkpoints are; add persist=Scope.GLOBAL"),
        ({"cache": "rates", "persist": Scope.WORKFLOW}, "cache= names where GLOBAL checkpoints are"),
        *(
            ({"cache": name, "persist": Scope.GLOBAL}, "cache= is a name of 1 to 200 printable characters")
            for name in ("", "a" * 201, "a\nb", "a\0b", True, b"rates")
        ),
        ({"ttl": 5}, "ttl= without persist="),
        ({"ttl": -5, "persist": Scope.GLOBAL}, "ttl must not be negative"),
        ({"timeout": -1}, "timeout must not be negative"),
        ({"timeout": float("inf")}, "timeout must be at most"),
        ({"timeout": "soon"}, "timeout must be seconds"),
        ({"on_input_change": "error"}, "concerns WORKFLOW checkpoints"),
        ({"on_input_change": "explode", "persist": Scope.WORKFLOW}, 'is "reuse" or "error"'),
        ({"persist": "workflow"}, "persist= is Scope.GLOBAL or Scope.WORKFLOW"),
        ({"retry": 3}, "retry= is a RetryPolicy"),
        ({"retriable": "ValueError"}, "retriable= is a predicate"),
        ({"retriable": (ValueError, int)}, "retriable= is a predicate"),
        ({"version": 2}, "version= is text"),
        ({"version": "\ud800"}, "version= is text of printable characters"),
        ({"renamed_from": "old"}, "is a tuple of names"),
        ({"renamed_from": ("",)}, "is a tuple of names"),
        ({"renamed_from": ("\ud800",)}, "is a tuple of names"),
        ({"max_concurrent": 0}, "max_concurrent= is a whole number from 1"),
        ({"max_concurrent": True}, "max_concurrent= is a whole number from 1"),
        ({"max_concurrent": 2.5}, "max_concurrent= is a whole number from 1"),
    ],
)
def test_options_that_contradict_or_cannot_be_used_are_refused(options: dict[str, Any], text: str) -> None:
    """What would be misread at run time is a fault of the graph."""
    graph = Graph("shop")
    graph.register(charge, **options)
    with pytest.raises(GraphError, match="DC121 options: step") as caught:
        graph.validate(Order)
    assert text in caught.value.faults[0]


def test_an_unknown_option_is_refused_with_its_neighbour() -> None:
    """A slip of the keyboard must not switch retries off."""
    with pytest.raises(TypeError, match=r"unknown step option persit.*did you mean persist"):
        Graph("shop").step(persit=Scope.GLOBAL)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("retries", "retry=RetryPolicy(max_attempts=...)"),
        ("autoretry_for", "retriable="),
        ("soft_time_limit", "timeout="),
        ("cached", "persist=Scope.WORKFLOW or GLOBAL"),
    ],
)
def test_an_option_by_another_librarys_name_is_translated(name: str, meant: str) -> None:
    """Spelling alone would lead from retries to retriable."""
    with pytest.raises(TypeError, match=re.escape(f"did you mean {meant}?")):
        Graph("shop").step(**{name: 3})  # type: ignore[call-overload]


def test_presets_are_overridden_one_by_one() -> None:
    """What the call does not name is the preset's."""
    preset = StepOptions(timeout=3, retry=RetryPolicy(max_attempts=5))
    assert preset.override(timeout=7) == StepOptions(timeout=7, retry=RetryPolicy(max_attempts=5))


def test_a_type_that_only_a_default_needs_is_not_an_input() -> None:
    """A parameter that is no message keeps its default, also where inputs follow it."""
    graph = Graph("shop")

    @graph.step
    def ship(order: Order, copies: int = 2, ctx: StepContext = None) -> Shipment:  # type: ignore[assignment]
        return Shipment(tracking_id=f"{order.order_id} {copies} {ctx.step}")

    assert graph.execute(Shipment, Order(order_id="17")) == Shipment(tracking_id="17 2 ship")


def test_a_bound_message_stays_and_is_no_input() -> None:
    """What a partial fixes is the step's own, in a run and where the graph makes such a value too."""
    graph = Graph("shop")

    def ship(order: Order, label: Label, charge: Charge) -> Shipment:
        return Shipment(tracking_id=f"{order.order_id} {label.text} {charge.charge_id}")

    graph.register(functools.partial(ship, label=Label(text="bound")), name="ship")
    graph.register(charge)

    @graph.step
    def print_label(order: Order) -> Label:
        return Label(text=order.order_id)

    plan = graph.plan(Shipment, Order)
    assert list(plan) == ["charge", "ship"]
    assert graph.execute(Shipment, Order(order_id="17")) == Shipment(tracking_id="17 bound plain 17")


def test_an_alias_is_what_it_stands_for() -> None:
    """As an input, a result, in a list, with a name, and behind another alias."""
    item = TypeVar("item")
    many = TypeAliasType("many", list[item], type_params=(item,))
    tax = TypeAliasType("tax", Annotated[Money, Named("tax")])
    context = TypeAliasType("context", StepContext)

    def split(order, ctx):  # type: ignore[no-untyped-def]
        return [Money(cents=order.amount_cents), Money(cents=1)]

    def merge(parts):  # type: ignore[no-untyped-def]
        return Money(cents=sum(part.cents for part in parts))

    def bill(tax):  # type: ignore[no-untyped-def]
        return Charge(charge_id=str(tax.cents))

    split.__annotations__ = {"order": TypeAliasType("again", Alias), "ctx": context, "return": many[Money]}
    merge.__annotations__ = {"parts": many[Money], "return": tax}
    bill.__annotations__ = {"tax": Annotated[tax, "theirs"], "return": Charge}
    graph = Graph("shop")
    graph.register(split)
    graph.register_aggregate(merge)
    graph.register(bill)
    assert graph.execute(Charge, Order(amount_cents=16)) == Charge(charge_id="17")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax is of Python 3.12")
def test_a_type_statement_is_an_alias() -> None:
    """PEP 695's own form, whose value is looked up late."""
    space: dict[str, Any] = {"Order": Order, "Charge": Charge}
    exec("type Job = Order\ndef charge(order: Job) -> Charge: return Charge(charge_id=order.order_id)", space)  # noqa: S102
    graph = Graph("shop")
    graph.register(space["charge"])
    assert graph.execute(Charge, Order(order_id="17")) == Charge(charge_id="17")


def test_retries_by_another_name_lead_to_max_attempts() -> None:
    """The first call counts here and not there, so nothing is translated in silence."""
    arguments: dict[str, Any] = {"max_retries": 3}
    with pytest.raises(
        TypeError, match=r"no max_retries; it takes max_attempts, which counts the first call"
    ):
        RetryPolicy(**arguments)


def reserve(charge: Charge) -> Reservation:
    """Reserve after charging."""
    return Reservation(reservation_id=charge.charge_id)


@pytest.mark.parametrize("order", [(charge, reserve), (reserve, charge)])
def test_the_order_of_registration_does_not_matter(order: tuple[Callable[..., Any], ...]) -> None:
    """Types wire the steps, also to ones that are registered later."""
    graph = Graph("shop")
    for target in order:
        graph.register(target)
    assert graph.execute(Reservation, Order(order_id="1")) == Reservation(reservation_id="plain 1")


def test_all_faults_of_one_step_are_reported_together() -> None:
    """Two parameters, the result and two options: whoever mends one does not find the next one after that."""
    graph = Graph("shop")

    def broken(order, count: int):  # type: ignore[no-untyped-def]
        return Charge()

    graph.register(broken, ttl=-1, max_concurrent=0)
    with pytest.raises(GraphError) as caught:
        graph.validate()
    texts = [(fault[:5], fault.partition("): ")[2].partition(";")[0]) for fault in caught.value.faults]
    assert texts == [
        ("DC111", "its return annotation is missing"),
        ("DC111", "parameter 'order' has no annotation"),
        ("DC111", "parameter 'count' is int, not a Protocol Buffers message"),
        ("DC121", "max_concurrent= is a whole number from 1, not 0"),
        ("DC121", "ttl must not be negative, got -1"),
        ("DC121", "ttl= without persist= keeps nothing"),
    ]


CHECKED = """
from __future__ import annotations
import typing
from typing import TYPE_CHECKING
from tests.unit.protos.shop_pb2 import Charge
if {condition}:
    from tests.unit.protos.shop_pb2 import Label, Order

def charge(order: Order) -> Charge:
    return Charge()
"""


@pytest.mark.parametrize("condition", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_a_type_that_only_checkers_import_is_named_with_the_reason(tmp_path: Path, condition: str) -> None:
    """The commonest way to have no type at run time has a text of its own."""
    file = tmp_path / "checked.py"
    file.write_text(CHECKED.format(condition=condition))
    module: dict[str, Any] = {}
    exec(compile(file.read_text(), file, "exec"), module)  # noqa: S102 -- a module of the test's own
    graph = Graph("shop")
    graph.register(module["charge"])
    with pytest.raises(
        GraphError, match=r"names Order, which is imported under TYPE_CHECKING alone.*outside of that"
    ):
        graph.validate()


def test_a_local_type_in_text_is_explained() -> None:
    """``from __future__ import annotations`` inside of a function is the second commonest way."""
    source = """
from __future__ import annotations
def make():
    from tests.unit.protos.shop_pb2 import Order, Charge
    def charge(order: Order) -> Charge: return Charge()
    return charge
"""
    space: dict[str, Any] = {}
    exec(source, space)  # noqa: S102 -- a module of the test's own
    graph = Graph("shop")
    graph.register(space["make"]())
    with pytest.raises(
        GraphError, match="Order, which its module does not define; annotations that are text"
    ):
        graph.validate()


def test_a_context_may_be_annotated_too() -> None:
    """``Annotated`` with somebody else's marks is read through."""
    graph = Graph("shop")

    @graph.step
    def charge(order: Order, ctx: Annotated[StepContext, "theirs"]) -> Charge:
        return Charge(charge_id=ctx.step)

    assert graph.execute(Charge, Order()) == Charge(charge_id="charge")


def test_a_staticmethod_is_a_step_inside_and_outside_of_its_class() -> None:
    """Decorated in the class body it is not a function yet, with ``async def`` neither."""
    graph = Graph("shop")

    class Steps:
        @graph.step(name="inside")
        @staticmethod
        def label(order: Order) -> Label:
            return Label(text=order.order_id)

        @staticmethod
        def charge(label: Label) -> Charge:
            return Charge(charge_id=label.text)

        @graph.step(name="on loop")
        @staticmethod
        async def reserve(charge: Charge) -> Reservation:
            return Reservation(reservation_id=charge.charge_id)

    graph.register(Steps.charge)
    assert graph.execute(Reservation, Order(order_id="7")) == Reservation(reservation_id="7")
