from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from typing_extensions import TypeAliasType

from docket_celery import BatchResult, InvalidArguments, InvalidDeclaration, Named, StepContext
from docket_celery.engine.run_row import digest_job
from docket_celery.errors import DecodeFailed
from docket_celery.task.declaration import is_empty, read_function, read_generic
from docket_celery.task.envelope import Result, Undecodable
from docket_celery.task.options import add_routing, take_routing
from tests.unit.protos.shop_pb2 import Charge, Money, Order, Shipment

ROOT = Path(__file__).resolve().parents[2]

BODIES = '''
def ellipsis(order: int) -> int: ...
def docstring(order: int) -> int:
    """Text."""
def docstring_and_ellipsis(order: int) -> int:
    """Text."""
    ...
def passing(order: int) -> int:
    pass
def not_implemented(order: int) -> int:
    raise NotImplementedError
def not_implemented_called(order: int) -> int:
    """Text."""
    raise NotImplementedError()
def not_implemented_with_text(order: int) -> int:
    raise NotImplementedError("the graph does the work")
def returns_none(order: int) -> int:
    return None
def returns_input(order: int) -> int:
    return order
def returns_constant(order: int) -> int:
    return 7
def returns_text(order: int) -> int:
    return "text"
def calls(order: int) -> int:
    print(order)
def assigns(order: int) -> int:
    x = order
def raises_other(order: int) -> int:
    raise ValueError
def raises_input(order: int) -> int:
    raise order
def raises_attribute(order: int) -> int:
    raise order.NotImplementedError
def branches(order: int) -> int:
    if order:
        raise NotImplementedError
def generates(order: int) -> int:
    yield order
def yields_nothing(order: int) -> int:
    yield
async def coroutine(order: int) -> int: ...
class Callable:
    def __call__(self, order: int) -> int: ...
instance = Callable()
'''
EMPTY = {
    *("ellipsis", "docstring", "docstring_and_ellipsis", "passing", "not_implemented"),
    *("not_implemented_called", "not_implemented_with_text", "returns_none"),
}


def names() -> dict[str, Callable[..., Any]]:
    """Return the functions of BODIES."""
    space: dict[str, Any] = {}
    exec(BODIES, space)  # noqa: S102 -- the same text runs under other Pythons below
    return {name: value for name, value in space.items() if callable(value) and name != "Callable"}


@pytest.mark.parametrize("name", sorted(names()))
def test_an_empty_body_is_told_from_one_with_work(name: str) -> None:
    """Code in a body would never run; only what plainly does nothing passes."""
    assert is_empty(names()[name]) == (name in EMPTY)


BESIDE = sorted(Path(sys.base_prefix).parent.glob("3.1[1-9]*/bin/python"))
PYTHONS = BESIDE or [Path(sys.executable)]


@pytest.mark.parametrize("python", PYTHONS, ids=lambda path: path.parts[-3])
def test_other_pythons_compile_empty_bodies_to_what_is_known(python: Path) -> None:
    """Bytecode differs between releases; the function is tried under each that is installed beside this one."""
    source = (ROOT / "docket_celery" / "task" / "declaration.py").read_text(encoding="utf-8")
    start = source.index("_EMPTY_BODIES = ")
    bodies = source[start : source.index("\n\n\n", start)]
    begin = source.index("def is_empty(")
    functions = source[begin : source.index("def _declaration(", begin)]
    script = "\n".join(
        [
            "from __future__ import annotations",
            "import functools, inspect, json, types",
            "from collections.abc import Callable",
            "from typing import Any",
            bodies,
            functions,
            f"space = {{}}\nexec({BODIES!r}, space)",
            "print(json.dumps(sorted(n for n, f in space.items() if hasattr(f, '__code__') and is_empty(f))))",
        ]
    )
    done = subprocess.run(
        [python, "-I", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert set(json.loads(done.stdout)) == EMPTY


def test_a_function_says_what_goes_in_and_out() -> None:
    """Parameters in order, with names that tell two of one type apart."""

    def pay(
        order: Order, tax: Annotated[Money, Named("tax")], tip: Annotated[Money, Named("tip")]
    ) -> Shipment:
        raise NotImplementedError

    found = read_function("pay", pay)
    assert [(key.kind, key.name) for key in found.given] == [(Order, ""), (Money, "tax"), (Money, "tip")]
    assert found.target.kind is Shipment
    order, tax, tip = Order(order_id="1"), Money(cents=1), Money(cents=2)
    assert found.bind((order,), {"tip": tip, "tax": tax}) == (order, tax, tip)


@pytest.mark.parametrize(
    ("signature", "fault"),
    [
        ("(order) -> Shipment", "parameter 'order' has no annotation"),
        ("(order: Order)", "its result has no annotation"),
        ("(order: str) -> Shipment", "parameter 'order'"),
        ("(order: Order) -> str", "its result"),
        ("(order: Order) -> None", "its result"),
        ("(*orders: Order) -> Shipment", "'orders' is variadic"),
        ("(**orders: Order) -> Shipment", "'orders' is variadic"),
        ("(order: Order = Order()) -> Shipment", "'order' has a default"),
        ("(order: Order, ctx: StepContext) -> Shipment", "'ctx' is a StepContext"),
        ("() -> Shipment", "takes no message"),
        ("(first: Order, second: Order) -> Shipment", 'Named("...")'),
        ("(order: NoSuchType) -> Shipment", "NoSuchType"),
        ("(order: Order.NoSuchType) -> Shipment", "annotations cannot be read"),
        ("(order: 'No such type') -> Shipment", "annotations cannot be read"),
    ],
)
def test_a_signature_that_cannot_work_is_refused(signature: str, fault: str) -> None:
    """The error names the task, the place and the fix."""
    space: dict[str, Any] = {"Order": Order, "Shipment": Shipment, "StepContext": StepContext}
    exec(f"from __future__ import annotations\ndef pay{signature}: ...", space)  # noqa: S102 -- text of a signature
    with pytest.raises(InvalidDeclaration) as caught:
        read_function("shop.pay", space["pay"])
    assert caught.value.task == "shop.pay"
    assert fault in caught.value.problem


def test_a_type_under_type_checking_is_explained_as_for_steps(tmp_path: Path) -> None:
    """The commonest way to have no type at run time, and the fix."""
    file = tmp_path / "checked.py"
    file.write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from shop import Order\ndef pay(order: Order) -> Order: ...\n"
    )
    space: dict[str, Any] = {}
    exec(compile(file.read_text(), file, "exec"), space)  # noqa: S102 -- a module of the test's own
    with pytest.raises(InvalidDeclaration, match="names Order, which is imported under TYPE_CHECKING alone"):
        read_function("shop.pay", space["pay"])


def test_an_alias_declares_what_it_stands_for() -> None:
    """As a parameter, and as the list of results of a batch."""
    orders = TypeAliasType("orders", list[Order])
    charges = TypeAliasType("charges", BatchResult[Charge])

    def pay(given):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    pay.__annotations__ = {"given": orders, "return": charges}
    found = read_function("pay", pay)
    assert (found.batch, found.form) == (found.given[0], "BatchResult")
    assert (found.given[0].kind, found.target.kind) == (Order, Charge)


def test_a_body_with_work_is_refused() -> None:
    """It would never run."""
    with pytest.raises(InvalidDeclaration, match="its body would never run"):
        read_function("shop.pay", names()["calls"])


@pytest.mark.parametrize(
    "arguments", [(Order, Shipment), ([Order],), ([str], Shipment), ([Order], str), ([], Order)]
)
def test_type_arguments_that_are_no_messages_are_refused(arguments: tuple[Any, ...]) -> None:
    """A class names its messages as GraphTask[[In], Out]."""
    with pytest.raises(InvalidDeclaration):
        read_generic("shop.pay", arguments)


def test_a_result_and_a_placeholder_are_arguments_too() -> None:
    """An earlier task of a chain hands over a Result in its own process, and damage arrives as a placeholder."""
    found = read_generic("pay", ([Order], Shipment))
    order = Order(order_id="1")
    assert found.bind((Result(order),), None) == (order,)
    with pytest.raises(DecodeFailed, match="damaged"):
        found.bind((Undecodable({}, DecodeFailed("x", "damaged")),), None)
    with pytest.raises(
        InvalidArguments, match=r"pay\(input_1: Order\): argument 'input_1' must be a .*Order, not a .*Charge"
    ):
        found.bind((Charge(),), None)


def test_routing_is_taken_off_the_class_and_kept() -> None:
    """Celery warns of these attributes where a class has them itself."""

    class Base:
        routing: dict[str, Any] = {"queue": "base", "priority": 1}  # noqa: RUF012 -- as a task has it

    class Task(Base):
        queue = "own"
        delivery_mode = 1

    Task.routing = take_routing(Task)
    assert Task.routing == {"queue": "own", "priority": 1, "delivery_mode": 1}
    assert "queue" not in Task.__dict__


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"queue": "own", "priority": 1}),
        ({"countdown": 1, "priority": None}, {"countdown": 1, "queue": "own", "priority": 1}),
        ({"queue": "other"}, {"queue": "other", "priority": 1}),
        ({"exchange": "e", "routing_key": "k"}, {"exchange": "e", "routing_key": "k", "priority": 1}),
        ({"queue": None, "priority": 0}, {"queue": "own", "priority": 0}),
    ],
)
def test_a_submission_says_otherwise(options: dict[str, Any], wanted: dict[str, Any]) -> None:
    """A destination replaces the declared one as a whole; the rest is added."""
    assert add_routing({"queue": "own", "priority": 1}, options) == wanted


def test_the_digest_of_a_declared_job_is_the_engines() -> None:
    """A job is named at submit by its declaration, and by its plan where it was sent without a digest."""

    def declared(order: Order, tax: Annotated[Money, Named("tax")], charges: list[Charge]) -> list[Shipment]:
        raise NotImplementedError

    declaration = read_function("shop.ship", declared)
    values: list[Any] = [Order(order_id="7"), Money(cents=7), [Charge(charge_id="1"), Charge(charge_id="2")]]
    assert declaration.digest(values) == digest_job(declaration.given, values)
    others: list[Any] = [*values[:2], [Charge(charge_id="12")]]
    assert declaration.digest(others) != declaration.digest(values)
