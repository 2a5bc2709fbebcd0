"""The generated parts of docs/errors.md: an example of each fault of a graph, and the text of each error.

``python -m tests.error_page`` writes them; `tests/unit/test_error_page.py` compares.
"""

from __future__ import annotations

import linecache
import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

from docket_celery.errors import DocketError, GraphError
from tests.unit.test_errors import WITH_FIELDS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
FILE = "shop.py"
BEGIN, END = "<!-- {}: written by python -m tests.error_page -->", "<!-- end of {} -->"

PREAMBLE = """\
from typing import TYPE_CHECKING, Annotated, Optional
from docket_celery import Graph, Named, RetryPolicy, Scope, StepContext
from examples.order.order_pb2 import ChargeResult, Order, Reservation, Shipment

shop = Graph("shop")
"""


@dataclass(frozen=True, slots=True)
class Example:
    """A graph with one kind of fault.

    Attributes:
        code: Of the fault.
        title: What went wrong, for the heading.
        script: Code after `PREAMBLE` that makes it and asks for the report.
    """

    code: str
    title: str
    script: str


def example(code: str, title: str, script: str) -> Example:
    """Return an example with its *script* moved to the left edge."""
    return Example(code, title, dedent(script).strip() + "\n")


EXAMPLES = [
    example("DC110", "A step without a name", 'shop.register(lambda order: Shipment(tracking_number="17"))'),
    example(
        "DC111",
        "Parameters and results that are no messages",
        """
        @shop.step
        def charge(order, currency: str) -> None:
            print(order, currency)

        shop.validate()
        """,
    ),
    example(
        "DC111",
        "An optional input, and one type twice",
        """
        @shop.step
        def ship(order: Order, charge: Optional[ChargeResult] = None) -> Shipment:
            return Shipment()

        @shop.step
        def compare(old: Order, new: Order, ctx: StepContext | None = None) -> Reservation:
            return Reservation()

        shop.validate()
        """,
    ),
    example(
        "DC111",
        "A decorator that hides the signature",
        """
        def logged(function):
            def inner(*args, **kwargs):
                print(function.__name__)
                return function(*args, **kwargs)
            return inner

        @shop.step(name="charge")
        @logged
        def charge(order: Order) -> ChargeResult:
            return ChargeResult()

        shop.validate()
        """,
    ),
    example(
        "DC111",
        "A type that only type checkers import",
        """
        from __future__ import annotations

        if TYPE_CHECKING:
            from examples.checkpointing.checkpointing_pb2 import VideoJob

        @shop.step
        def bill(job: VideoJob) -> ChargeResult:
            return ChargeResult()

        shop.validate()
        """,
    ),
    example(
        "DC111",
        "A class, a method without an instance, and a factory for neither",
        """
        class Charger:
            def compute(self, order: Order) -> ChargeResult:
                return ChargeResult()

        shop.register(Charger)
        shop.register(Charger.compute)
        shop.register(Charger(), factory=Charger, name="built")
        shop.validate()
        """,
    ),
    example(
        "DC112",
        "Two steps of one name",
        """
        @shop.step(name="pay")
        def charge(order: Order) -> ChargeResult:
            return ChargeResult()

        @shop.step(name="pay")
        def reserve(order: Order) -> Reservation:
            return Reservation()

        shop.validate()
        """,
    ),
    example(
        "DC113",
        "Two steps of one result",
        """
        @shop.step
        def charge_card(order: Order) -> ChargeResult:
            return ChargeResult()

        @shop.step
        def charge_voucher(order: Order) -> ChargeResult:
            return ChargeResult()

        shop.validate()
        """,
    ),
    example(
        "DC114",
        "A value that nobody makes",
        """
        @shop.step
        def ship(order: Order, reservation: Reservation) -> Shipment:
            return Shipment()

        shop.validate(Order)
        """,
    ),
    example(
        "DC115",
        "Steps that wait for each other",
        """
        @shop.step
        def charge(order: Order, reservation: Reservation) -> ChargeResult:
            return ChargeResult()

        @shop.step
        def reserve(charge: ChargeResult) -> Reservation:
            return Reservation()

        shop.validate()
        """,
    ),
    example(
        "DC116",
        "A step after the first run",
        """
        @shop.step
        def charge(order: Order) -> ChargeResult:
            return ChargeResult()

        shop.execute(ChargeResult, Order())

        @shop.step
        def reserve(order: Order) -> Reservation:
            return Reservation()
        """,
    ),
    example(
        "DC117",
        "A former name that another step has",
        """
        @shop.step(persist=Scope.WORKFLOW)
        def charge(order: Order) -> ChargeResult:
            return ChargeResult()

        @shop.step(persist=Scope.WORKFLOW, renamed_from=("charge",))
        def reserve(order: Order) -> Reservation:
            return Reservation()

        shop.validate()
        """,
    ),
    example(
        "DC118",
        "A test that replaces what is not there",
        """
        @shop.step
        def charge(order: Order) -> ChargeResult:
            return ChargeResult()

        with shop.override({"chrage": ChargeResult(), charge: Reservation()}):
            shop.execute(ChargeResult, Order())
        """,
    ),
    example(
        "DC119",
        "A cache of two types",
        """
        @shop.step(persist=Scope.GLOBAL, cache="prices")
        def charge(order: Order) -> ChargeResult:
            return ChargeResult()

        @shop.step(persist=Scope.GLOBAL, cache="prices")
        def reserve(order: Order) -> Reservation:
            return Reservation()

        shop.validate()
        """,
    ),
    example(
        "DC120",
        "A list of what is made once",
        """
        @shop.step
        def charge(order: Order) -> ChargeResult:
            return ChargeResult()

        @shop.aggregate
        def ship(charges: list[ChargeResult]) -> Shipment:
            return Shipment()

        shop.validate(Order)
        """,
    ),
    example(
        "DC121",
        "Options that contradict each other or mean nothing",
        """
        @shop.step(ttl=3600, key=lambda order: order, retry=3, max_concurrent=0)
        def charge(order: Order) -> ChargeResult:
            return ChargeResult()

        shop.validate()
        """,
    ),
    example(
        "DC122",
        "A result that no step makes",
        """
        @shop.step
        def charge(order: Order) -> ChargeResult:
            return ChargeResult()

        shop.plan(Shipment, Order)
        """,
    ),
    example(
        "DC123",
        "A step that takes what it returns",
        """
        @shop.step
        def normalize(order: Order) -> Order:
            return order

        shop.validate()
        """,
    ),
]


def report(shown: Example) -> str:
    """Run *shown* and return the text of the `GraphError` that it ends with.

    Raises:
        AssertionError: It ended without one.
    """
    space: dict[str, Any] = {"__name__": "shop"}
    exec(compile(PREAMBLE, "preamble", "exec", dont_inherit=True), space)  # noqa: S102 -- our own text, above
    # Whoever looks for the source of a step finds the lines that are shown.
    linecache.cache[FILE] = (len(shown.script), None, shown.script.splitlines(keepends=True), FILE)
    try:
        exec(compile(shown.script, FILE, "exec", dont_inherit=True), space)  # noqa: S102 -- our own text, above
    except GraphError as error:
        return str(error)
    finally:
        del linecache.cache[FILE]
    raise AssertionError(f"the example for {shown.code}, {shown.title!r}, has no fault")


def render_faults() -> str:
    """Return the examples with their reports as Markdown."""
    parts = [f"The examples begin with\n\n```python\n{PREAMBLE}```"]
    for shown in EXAMPLES:
        message = indent(report(shown), "")
        parts.append(
            f"### {shown.code}: {shown.title}\n\n```python\n{shown.script}```\n\n```text\n{message}\n```"
        )
    return "\n\n".join(parts)


def render_texts() -> str:
    """Return the text of one error of each class that is not a `GraphError`, as Markdown."""
    seen: dict[type[DocketError], str] = {}
    for error in WITH_FIELDS:
        if not isinstance(error, GraphError):
            seen.setdefault(type(error), str(error))
    ordered = sorted(seen, key=lambda kind: kind.code)
    return "```text\n" + "\n".join(seen[kind] for kind in ordered) + "\n```"


def render(page: str) -> str:
    """Return *page* with its generated parts as they should be.

    Raises:
        ValueError: A mark is missing.
    """
    for name, text in (("faults", render_faults()), ("texts", render_texts())):
        begin, end = BEGIN.format(name), END.format(name)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"{PAGE.name} needs one {begin} ... {end}")
        whole = f"{begin}\n\n{text}\n\n{end}"
        page = pattern.sub(lambda _, whole=whole: whole, page)  # type: ignore[misc] # the value of this round
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
