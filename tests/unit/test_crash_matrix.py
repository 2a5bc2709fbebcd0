from __future__ import annotations

import asyncio
import os
import signal
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from docket_celery import (
    FixedBackoff,
    Graph,
    InvalidArguments,
    MemoryStore,
    RetryPolicy,
    Scope,
    SQLStore,
    StepContext,
)
from docket_celery.store.records import Checkpoint
from docket_celery.testing import CrashMatrixFailed, crash_matrix, inline
from docket_celery.testing.forking import in_child
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Reservation, Shipment

ORDER = Order(order_id="7", amount_cents=100)


class Ledger:
    """What steps did to the outside world: lines of a file, since a killed process takes its memory along."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, line: str) -> None:
        """Add a line at once."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[str]:
        """Return all lines."""
        return self._path.read_text(encoding="utf-8").split() if self._path.exists() else []


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Empty."""
    return Ledger(tmp_path / "ledger")


def make_shop(ledger: Ledger, reserve: Scope | None = Scope.WORKFLOW) -> Graph:
    """Return a graph that charges, then reserves and writes a label side by side, then ships."""
    graph = Graph("crashing")

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order, ctx: StepContext) -> Charge:
        ledger.write("charge")
        return Charge(charge_id=ctx.idempotency_key)

    def reserve_stock(charge: Charge) -> Reservation:
        ledger.write("reserve")
        return Reservation(reservation_id=f"r-{charge.charge_id}")

    graph.register(reserve_stock, name="reserve", persist=reserve)

    @graph.step
    async def label(charge: Charge) -> Label:
        await asyncio.sleep(0)
        return Label(text=charge.charge_id)

    @graph.step
    def ship(reservation: Reservation, label: Label) -> Shipment:
        return Shipment(tracking_id=f"{reservation.reservation_id} {label.text}")

    return graph


def test_a_job_survives_a_kill_at_every_boundary(ledger: Ledger) -> None:
    """Before and after each body and save, and around the writing of the end."""
    report = crash_matrix(make_shop(ledger), Shipment, ORDER, execution_id="order-7", effects=["charge"])
    assert sorted(report.boundaries) == sorted(
        [
            *(
                f"{when} the {what} of {step!r}"
                for step in ("charge", "reserve")
                for what in ("body", "save")
                for when in ("before", "after")
            ),
            *(f"{when} the body of {step!r}" for step in ("label", "ship") for when in ("before", "after")),
            "before the run's end is written",
            "after the run's end is written, before the ack",
        ]
    )
    assert report.boundaries[0] == "before the body of 'charge'"
    assert isinstance(report.result, Shipment)
    assert "killed before the body of 'ship': the same result" in str(report)
    # 14 kills and an undisturbed run: 15 times, and once more where the process died before the checkpoint was there.
    assert ledger.read().count("charge") == 15 + 2


def test_the_kills_are_real(ledger: Ledger, tmp_path: Path) -> None:
    """Each boundary has a process of its own that ended in the middle of its work."""
    graph, pids = Graph("pids"), Ledger(tmp_path / "pids")

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        pids.write(str(os.getpid()))
        try:
            return Charge()
        finally:
            ledger.write("end")

    report = crash_matrix(graph, Charge, ORDER)
    assert len(report.boundaries) == 5
    assert str(os.getpid()) not in pids.read()
    # Not called before its body; called again after its body and before the end, which saves it.
    assert len(pids.read()) == len(set(pids.read())) == 1 + 5 + 2


def test_an_effect_that_is_not_kept_is_found(ledger: Ledger) -> None:
    """The text names the boundaries, the step, the fix, and what the processes did."""
    graph = make_shop(ledger, reserve=None)
    crash_matrix(graph, Shipment, ORDER)
    with pytest.raises(CrashMatrixFailed) as caught:
        crash_matrix(graph, Shipment, ORDER, effects=["charge", Reservation])
    text = str(caught.value)
    assert "broke a promise of graph 'crashing'" in text
    assert "killed before the body of 'ship':\n  - step 'reserve' has effects and ran again" in text
    assert "persist=Scope.WORKFLOW" in text
    assert "first process: charge body, charge returned, charge save, charge saved, " in text
    assert "killed after the body of 'reserve':" not in text
    assert "'charge' has effects" not in text


class Forgetful(SQLStore):
    """Says that it saved, and did not."""

    def save(self, lease: Any, checkpoint: Checkpoint, *_: Any, **__: Any) -> Checkpoint:  # noqa: ARG002
        return checkpoint


class Muddled(SQLStore):
    """Gives back another value than was saved."""

    def acquire_and_restore(self, *arguments: Any, **options: Any) -> Any:
        found = super().acquire_and_restore(*arguments, **options)
        if isinstance(found, tuple):
            lease, read = found
            value = Charge(charge_id="muddled").SerializeToString()
            return lease, lambda: [replace(kept, output_data=value) for kept in read()]
        return found


class Deaf(SQLStore):
    """Says that the end was written, and did not."""

    def end(self, lease: Any, end: Any) -> None:  # noqa: ARG002
        return


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Forgetful, "started again after its checkpoint was saved"),
        (Forgetful, "step 'charge' has 0 checkpoints"),
        (Muddled, "the resumed run ended with"),
        (Deaf, "the undisturbed run failed:\nit had not ended after 3 s"),
    ],
)
def test_a_store_that_lies_is_found(tmp_path: Path, kind: type[SQLStore], words: str) -> None:
    """Whatever it lies about."""
    graph = Graph("lied to")

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order) -> Charge:
        return Charge(charge_id=order.order_id)

    @graph.step
    def ship(charge: Charge) -> Shipment:
        return Shipment(tracking_id=charge.charge_id)

    def make() -> SQLStore:
        store = kind(f"sqlite:///{tmp_path / uuid.uuid4().hex}.db")
        store.migrate()
        return store

    with pytest.raises(CrashMatrixFailed) as caught:
        crash_matrix(graph, Shipment, ORDER, store=make, timeout_s=3)
    assert words in str(caught.value)


def test_a_result_that_changes_is_found(ledger: Ledger) -> None:
    """A step that is not kept, and answers differently the second time."""
    graph = Graph("changing")

    @graph.step
    def count(order: Order) -> Money:
        ledger.write("count")
        return Money(cents=len(ledger.read()))

    @graph.step(persist=Scope.WORKFLOW)
    def label(money: Money) -> Label:
        return Label(text=str(money.cents))

    with pytest.raises(CrashMatrixFailed, match="the resumed run ended with"):
        crash_matrix(graph, Label, ORDER)


def test_a_boundary_that_is_not_reached_again_is_found(ledger: Ledger) -> None:
    """A run that fails at first and not later takes another way."""
    graph = Graph("moody")

    @graph.step(retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0)))
    def label(order: Order) -> Label:
        ledger.write("call")
        if len(ledger.read()) == 1:
            raise ConnectionError
        return Label()

    with pytest.raises(CrashMatrixFailed, match="this boundary was not reached again"):
        crash_matrix(graph, Label, ORDER)


def test_attempts_are_boundaries_of_their_own() -> None:
    """By an order's own failures, which come back in each process."""
    graph = Graph("attempts")

    @graph.step(retry=RetryPolicy(max_attempts=3, backoff=FixedBackoff(60)), persist=Scope.WORKFLOW)
    def label(order: Order, ctx: StepContext) -> Label:
        if ctx.attempt < 3:
            raise ConnectionError
        return Label()

    with inline():
        report = crash_matrix(graph, Label, ORDER)
    assert [b for b in report.boundaries if "body" in b] == [
        "before the body of 'label'",
        "before the body of 'label', time 2",
        "before the body of 'label', time 3",
        "after the body of 'label'",
    ]


def test_shared_results_are_computed_again_only_if_they_were_not_saved(ledger: Ledger) -> None:
    """A dead process's claim holds nobody up here; each playing begins without the others' results."""
    graph = Graph("cached")

    @graph.step(persist=Scope.GLOBAL)
    def label(order: Order) -> Label:
        ledger.write("label")
        return Label(text=order.order_id)

    report = crash_matrix(graph, Label, ORDER, effects=[Label])
    assert len(report.boundaries) == 4
    assert len(ledger.read()) == 1 + 4 + 2


def test_a_graph_that_keeps_nothing_begins_anew() -> None:
    """No store, no second submission; the result is the same."""
    graph = Graph("plain")

    @graph.step
    def label(order: Order) -> Label:
        return Label(text=order.order_id)

    report = crash_matrix(graph, Label, ORDER)
    assert report.boundaries == (
        "before the body of 'label'",
        "after the body of 'label'",
        "after the run, before the ack",
    )


def test_replaced_steps_are_the_ones_that_run(ledger: Ledger) -> None:
    """What the test has put in their place comes along into the children."""
    graph = make_shop(ledger)

    def charge(order: Order) -> Charge:
        return Charge(charge_id="fake")

    with graph.override({"charge": charge, "label": Label(text="fixed")}):
        report = crash_matrix(graph, Shipment, ORDER)
    assert report.result == Shipment(tracking_id="r-fake fixed")
    assert "charge" not in ledger.read()


def test_an_undisturbed_run_that_fails_is_told_first() -> None:
    """With the step's own traceback."""
    graph = Graph("failing")

    @graph.step
    def label(order: Order) -> Label:
        raise ValueError("never")

    with pytest.raises(CrashMatrixFailed, match=r"the undisturbed run failed(.|\n)*ValueError: never"):
        crash_matrix(graph, Label, ORDER)


def test_a_process_that_hangs_is_ended(ledger: Ledger) -> None:
    """And reported with its seconds."""
    graph = Graph("hanging")

    @graph.step
    def label(order: Order) -> Label:
        threading.Event().wait()
        return Label()

    with pytest.raises(CrashMatrixFailed, match="it had not ended after"):
        crash_matrix(graph, Label, ORDER, timeout_s=0.5)


def test_runs_that_go_on_meanwhile_are_left_alone() -> None:
    """A retry that this process waits for still comes."""
    other, failed = Graph("other"), threading.Event()

    @other.step(retry=RetryPolicy(max_attempts=2, backoff=FixedBackoff(0.5)))
    def label(order: Order, ctx: StepContext) -> Label:
        if ctx.attempt == 1:
            failed.set()
            raise ValueError("again")
        return Label()

    run = other.start(Label, Order())
    assert failed.wait(30)
    assert in_child(lambda: 7, within_s=30).value == 7
    assert run.result(30) == Label()


def test_another_signal_is_no_crash_of_ours() -> None:
    """A step that ends its process is told apart."""
    graph = Graph("segfault")

    @graph.step
    def label(order: Order) -> Label:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(5)
        return Label()

    with pytest.raises(CrashMatrixFailed, match="it was ended by SIGTERM"):
        crash_matrix(graph, Label, ORDER)


def refused() -> list[tuple[Any, str]]:
    """Return stores that cannot do."""
    memory: Callable[[], MemoryStore] = MemoryStore
    return [
        (SQLStore("sqlite://"), "cannot see a store in memory"),
        (memory, "cannot see a store in memory"),
        (MemoryStore(), "an SQLStore or a function"),
    ]


@pytest.mark.parametrize(("store", "words"), refused())
def test_a_store_in_memory_is_refused(ledger: Ledger, store: Any, words: str) -> None:
    """Other processes could not see it."""
    with pytest.raises(InvalidArguments, match=words):
        crash_matrix(make_shop(ledger), Shipment, ORDER, store=store)


def test_items_are_refused() -> None:
    """A step that splits a value opens a fan-out, whose checkpoints have items."""
    graph = Graph("splitting")

    @graph.step
    def split(order: Order) -> list[Money]:
        return [Money()]

    @graph.aggregate
    def add(moneys: list[Money]) -> Label:
        return Label(text=str(len(moneys)))

    assert graph.execute(Label, ORDER).text == "1"
    with pytest.raises(InvalidArguments, match="only runs of single messages"):
        crash_matrix(graph, Label, ORDER)
