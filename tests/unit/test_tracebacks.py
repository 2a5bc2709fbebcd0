"""Tracebacks that users see start in their own code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import traceback
from collections.abc import Callable, Generator
from typing import Any

import pytest

import docket_celery
from docket_celery import settings
from docket_celery.errors import AbortError, StepFailed
from docket_celery.graph import Graph
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import FixedBackoff, RetryPolicy, Scope
from docket_celery.store import MemoryStore
from tests.unit.graphs import execute, within
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Shipment

ENGINE = os.path.dirname(docket_celery.__file__)


def frames(error: BaseException | None) -> list[str]:
    """Return the functions of the traceback, outermost first; the engine's with a star."""
    assert error is not None
    return [
        ("*" if frame.filename.startswith(ENGINE) else "") + frame.name
        for frame in traceback.extract_tb(error.__traceback__)
    ]


def deeper() -> Charge:
    """Fail in a helper."""
    raise ConnectionError("no answer")


def charge(order: Order) -> Charge:
    """Charge by a helper."""
    return deeper()


async def charge_on_loop(order: Order) -> Charge:
    """The same after a wait."""
    await asyncio.sleep(0)
    return deeper()


class Charger:
    """The same in an object."""

    def compute(self, order: Order) -> Charge:
        """Charge by a helper."""
        return charge(order)


def failure(run: Callable[[], object]) -> StepFailed:
    """Return what *run* raises."""
    with pytest.raises(StepFailed) as caught:
        run()
    return caught.value


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("step", [charge, charge_on_loop])
@pytest.mark.parametrize("helps", [False, True])
@pytest.mark.parametrize("options", [{}, {"timeout": 30}, {"max_concurrent": 1}, {"persist": Scope.WORKFLOW}])
def test_the_causes_traceback_starts_in_the_step(
    threads: int, step: Any, helps: bool, options: dict[str, Any]
) -> None:
    """Whichever thread or loop called it, with a deadline, a slot or a store."""
    graph = Graph("shop", store=MemoryStore())
    graph.register(step, **options)
    failed = failure(lambda: within(lambda: execute(graph, Charge, Order(), threads=threads, helps=helps)))
    assert frames(failed.__cause__) == [step.__name__, "deeper"]


def test_the_causes_traceback_starts_in_the_step_under_aexecute() -> None:
    """On the caller's loop as well."""
    graph = Graph("shop")
    graph.register(charge_on_loop)
    failed = failure(lambda: asyncio.run(graph.aexecute(Charge, Order())))
    assert frames(failed.__cause__) == ["charge_on_loop", "deeper"]


def test_the_last_attempts_traceback_is_the_one_shown() -> None:
    """Three attempts do not pile up frames, and nothing of the earlier ones hangs on the last."""
    graph = Graph("shop")

    @graph.step(retry=RetryPolicy(max_attempts=3, backoff=FixedBackoff(0)))
    def pay(order: Order, ctx: StepContext) -> Charge:
        raise ValueError(ctx.attempt)

    failed = failure(lambda: within(lambda: execute(graph, Charge, Order())))
    assert str(failed.__cause__) == "3"
    assert frames(failed.__cause__) == ["pay"]
    assert failed.__cause__ is not None
    assert failed.__cause__.__context__ is None


@contextlib.contextmanager
def watching() -> Generator[None]:
    """A hook that lets everything through."""
    yield


@contextlib.contextmanager
def refusing() -> Generator[None]:
    """A hook that fails at its start."""
    deeper()
    yield


@pytest.mark.parametrize(("hook", "expected"), [(watching, ["deeper"]), (refusing, ["refusing", "deeper"])])
@pytest.mark.parametrize("step", [charge, charge_on_loop])
def test_hooks_add_no_frames_but_their_own(hook: Any, expected: list[str], step: Any) -> None:
    """A step inside a hook looks like one without; a hook that fails is named."""
    graph = Graph("shop")
    graph.register(step)
    settings(step_hooks=[hook])
    try:
        failed = failure(lambda: within(lambda: graph.execute(Charge, Order())))
    finally:
        settings(step_hooks=None)
    assert frames(failed.__cause__) == (expected if hook is refusing else [step.__name__, *expected])


def make_charger() -> Charger:
    """A factory that fails."""
    deeper()
    return Charger()


@pytest.mark.parametrize(("factory", "first"), [(Charger, "compute"), (make_charger, "make_charger")])
def test_what_a_factory_makes_and_the_factory_itself_come_first(factory: Any, first: str) -> None:
    """Nothing of how the instance is kept."""
    graph = Graph("shop")
    graph.register(Charger, factory=factory)
    failed = failure(lambda: within(lambda: execute(graph, Charge, Order())))
    assert frames(failed.__cause__)[0] == first
    assert frames(failed.__cause__)[-1] == "deeper"


def strange(error: BaseException) -> bool:
    """A predicate that fails."""
    raise LookupError("no rule")


def odd_key(order: Order) -> Order:
    """A key function that fails."""
    raise LookupError("no key")


class OddBackoff:
    """A backoff that fails."""

    def delay_s(self, *_: object) -> float:
        """Fail."""
        raise LookupError("no wait")


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"retriable": strange}, "strange"),
        ({"retry": RetryPolicy(backoff=OddBackoff())}, "delay_s"),
        ({"persist": Scope.GLOBAL, "key": odd_key}, "odd_key"),
    ],
)
def test_options_that_are_functions_come_first_in_their_own_failures(
    options: dict[str, Any], first: str
) -> None:
    """Users' code is not only the step's."""
    graph = Graph("shop", store=MemoryStore())
    graph.register(charge, **options)
    failed = failure(lambda: within(lambda: execute(graph, Charge, Order())))
    assert frames(failed.__cause__) == [first]


@pytest.mark.parametrize(
    ("kind", "is_async"),
    [(SystemExit, False), (KeyboardInterrupt, False), (AbortError, False), (AbortError, True)],
)
def test_what_passes_through_shows_the_callers_frames_then_the_steps(
    kind: type[BaseException], is_async: bool
) -> None:
    """Between the call of the graph and the step there are two frames, however deep the engine was."""
    graph = Graph("shop")

    def stop(order: Order) -> Charge:
        raise kind("enough")

    async def stop_on_loop(order: Order) -> Charge:
        raise kind("enough")

    graph.register(stop_on_loop if is_async else stop)
    with pytest.raises(kind) as caught:
        within(lambda: graph.execute(Charge, Order()))
    names = frames(caught.value)
    assert names[-3:] == ["*execute", "*read_value", "stop_on_loop" if is_async else "stop"]
    assert sum(name.startswith("*") for name in names) == 2


def test_all_failing_branches_show_their_tracebacks() -> None:
    """The first failure is raised; the others stand in its text and, with their tracebacks, in its notes."""
    graph, both = Graph("shop"), threading.Barrier(2)

    @graph.step
    def pay(order: Order) -> Charge:
        both.wait(30)
        return deeper()

    @graph.step
    async def label(order: Order) -> Label:
        await asyncio.to_thread(both.wait, 30)
        raise KeyError("printer")

    @graph.step
    def ship(charge: Charge, label: Label) -> Shipment:
        return Shipment()

    failed = failure(lambda: within(lambda: execute(graph, Shipment, Order(), threads=2, helps=False)))
    shown = "".join(traceback.format_exception(failed))
    for text in ("in pay", "in deeper", "ConnectionError: no answer", "in label", "KeyError: 'printer'"):
        assert text in shown
    assert "attempt.py" not in shown
    assert len(failed.others) == 1


def test_a_fault_of_a_call_without_any_frame_of_the_users_keeps_what_there_is() -> None:
    """A callable that lies about its parameters fails in the engine's own line, which must not be hidden."""
    graph = Graph("shop")

    def none() -> Charge:
        return Charge()

    lying: Any = none
    lying.__annotations__ = {"order": Order, "return": Charge}
    import inspect

    parameter = inspect.Parameter("order", inspect.Parameter.POSITIONAL_ONLY)
    lying.__signature__ = inspect.Signature([parameter])
    graph.register(lying)
    failed = failure(lambda: within(lambda: execute(graph, Charge, Order())))
    assert isinstance(failed.__cause__, TypeError)
    assert frames(failed.__cause__)[-1] == "*_invoke"


def test_asking_a_handle_again_does_not_add_frames() -> None:
    """Each `result` raises the same error; its traceback is that of the last call."""
    graph = Graph("shop")
    graph.register(charge)
    run = graph.start(Charge, Order())
    first = frames(failure(run.result))
    assert frames(failure(run.result)) == first
