"""The host's scopes around ``async def`` steps: entered for each stretch on the loop's thread, left at each wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest
from celery import Celery, current_task

from docket_celery import graph_task
from docket_celery.engine.attempt import await_within
from docket_celery.engine.process.hooks import MakeContext
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run_context import Submission
from docket_celery.graph import Graph
from docket_celery.plan.annotation import ValueKey
from tests.unit.graphs import WAIT_S, execute
from tests.unit.protos.shop_pb2 import Label, Order

inside: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_inside() -> Generator[None]:
    inside.clear()
    yield
    assert inside == []


def named(name: str) -> MakeContext:
    """Return a scope that is bound to its thread, as Celery's stack of tasks is: the last one entered is on top."""

    @contextlib.contextmanager
    def scope() -> Generator[None]:
        inside.append(name)
        try:
            yield
        finally:
            assert inside.pop() == name

    return scope


def task_id() -> str | None:
    """Return the id of the task that Celery takes for the current one."""
    request = getattr(current_task, "request", None)
    return None if request is None else request.id


def drive(call: Callable[[], Coroutine[Any, Any, Any]], *scopes: MakeContext) -> Any:
    """Run *call* within *scopes* on a loop of its own."""
    return asyncio.run(asyncio.wait_for(await_within(scopes, (), call), WAIT_S))


def test_coroutines_that_take_turns_see_their_own_scope_alone() -> None:
    """After each of many waits; and what the loop does between them is in no scope."""
    seen: list[tuple[str, list[str]]] = []
    between: list[list[str]] = []

    async def look(name: str) -> str:
        for number in range(20):
            seen.append((name, list(inside)))
            asyncio.get_running_loop().call_soon(lambda: between.append(list(inside)))
            # The first two turns are the loop's own; after a timer it is the clock that says who comes first.
            await asyncio.sleep(0 if number % 3 != 2 else 0.0001)
        return name

    async def both() -> list[Any]:
        return await asyncio.gather(
            *(await_within([named(name)], (), look, name) for name in ("a", "b", "c"))
        )

    assert asyncio.run(both()) == ["a", "b", "c"]
    assert all(names == [name] for name, names in seen)
    turns = [name for name, _ in seen]
    assert turns[:6] == ["a", "b", "c", "a", "b", "c"], "they did not take turns"
    assert between
    assert all(names == [] for names in between)


def test_scopes_nest_and_their_value_comes_through() -> None:
    """The first is outermost; results, errors and StopIteration are the coroutine's own."""

    async def look() -> list[str]:
        await asyncio.sleep(0)
        return list(inside)

    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("mine")

    async def stop() -> None:
        await asyncio.sleep(0)
        raise StopIteration

    assert drive(look, named("outer"), named("inner")) == ["outer", "inner"]
    with pytest.raises(LookupError, match="mine"):
        drive(fail, named("outer"))
    with pytest.raises(RuntimeError, match="StopIteration"):
        drive(stop, named("outer"))


def test_a_cancellation_is_thrown_in_within_the_scope_and_may_be_handled() -> None:
    """Clean-up code that waits runs inside the scope too."""
    seen: list[list[str]] = []

    async def clean_up() -> str:
        try:
            await asyncio.sleep(WAIT_S)
        except asyncio.CancelledError:
            seen.append(list(inside))
            await asyncio.sleep(0)
            seen.append(list(inside))
        return "cleaned up"

    async def cancel() -> str:
        task = asyncio.ensure_future(await_within([named("a")], (), clean_up))
        await asyncio.sleep(0)
        task.cancel()
        return str(await task)

    assert asyncio.run(cancel()) == "cleaned up"
    assert seen == [["a"], ["a"]]


def test_a_coroutine_that_is_dropped_is_closed_within_the_scope() -> None:
    """As a loop does that is closed with tasks pending."""
    seen: list[list[str]] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            seen.append(list(inside))

    async def drop() -> None:
        coroutine = await_within([named("a")], (), wait)
        coroutine.send(None)
        coroutine.close()

    asyncio.run(drop())
    assert seen == [["a"]]


def test_a_scope_that_cannot_be_entered_fails_the_coroutine_and_closes_it() -> None:
    """At the first resume or at a later one; no coroutine is left unawaited."""
    entered: list[str] = []

    def broken_at(number: int) -> MakeContext:
        @contextlib.contextmanager
        def scope() -> Generator[None]:
            entered.append("entered")
            if len(entered) == number:
                raise LookupError("no scope")
            yield

        return scope

    closed: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            closed.append("closed")

    for number in (1, 2):
        entered.clear()
        with pytest.raises(LookupError, match="no scope"):
            drive(wait, broken_at(number))
    assert closed == ["closed"]


@pytest.mark.parametrize("threads", [0, 2])
def test_async_steps_of_an_eager_task_see_celerys_task(threads: int) -> None:
    """Also after a wait; a direct call of the graph sees none."""
    app = Celery("current", set_as_current=False)
    app.conf.update(task_always_eager=True, docket_threads=threads)
    graph = Graph("current")

    @graph.step
    async def look(order: Order) -> Label:
        first = task_id()
        await asyncio.sleep(0)
        return Label(text=f"{first} {task_id()}")

    @graph_task(app, graph, name="current.look", shared=False)
    def look_around(order: Order) -> Label:
        raise NotImplementedError

    submitted = look_around.apply_async((Order(),), task_id="t-1")
    assert submitted.get() == Label(text="t-1 t-1")
    assert execute(graph, Label, Order(), threads=threads) == Label(text="None None")


@pytest.mark.parametrize("threads", [0, 2])
def test_a_call_on_a_thread_is_within_the_scope(threads: int) -> None:
    """Without hooks too; it is left when the call has ended."""
    graph = Graph("threads")

    @graph.step
    def look(order: Order) -> Label:
        return Label(text=",".join(inside))

    found = execute(graph, Label, Order(), threads=threads, helps=False, scopes=(named("task"),))
    assert found == Label(text="task")
    assert inside == []


def test_scopes_surround_hooks() -> None:
    """A user's hook sees Celery's task as the step does."""
    seen: list[tuple[str, list[str]]] = []

    @contextlib.contextmanager
    def hook() -> Generator[None]:
        seen.append(("enter", list(inside)))
        yield
        seen.append(("exit", list(inside)))

    graph = Graph("both")

    @graph.step
    async def look(order: Order) -> Label:
        await asyncio.sleep(0)
        return Label(text=",".join(inside))

    outcome = graph.deliver(
        graph.compiled(ValueKey(Label), (ValueKey(Order),)),
        [Order()],
        Submission(execution_id="s", scopes=(named("task"),)),
        Settings(threads=2, step_hooks=(hook,)),
    )
    assert outcome.value == Label(text="task")
    assert seen == [("enter", ["task"]), ("exit", ["task"])]
