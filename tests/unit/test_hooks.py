"""``docket_step_hooks``: what surrounds each call of a step."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any

import pytest
from celery import Celery
from google.protobuf.message import Message

from docket_celery import graph_task
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run_context import Submission
from docket_celery.errors import InvalidSettings, StepFailed, StepTimedOut
from docket_celery.graph import Graph
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.context import StepContext, current_context
from docket_celery.plan.options import FixedBackoff, RetryPolicy, Scope
from docket_celery.store import MemoryStore
from docket_celery.store.contract import Store
from docket_celery.task import checks
from tests.unit.graphs import WAIT_S, reached, within
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Shipment

TENANT: ContextVar[str] = ContextVar("tenant", default="nobody")
THREADS = pytest.mark.parametrize("threads", [0, 1, 4])
AT_ONCE = RetryPolicy(max_attempts=3, backoff=FixedBackoff(0))
told: list[str] = []


@pytest.fixture(autouse=True)
def _tell_anew() -> None:
    told.clear()


def telling(name: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a hook that notes when it is entered and exited, and around which step."""

    @contextlib.contextmanager
    def hook() -> Generator[None]:
        told.append(f"{name} enters {current_context().step}")
        try:
            yield
        except BaseException as error:
            told.append(f"{name} sees {type(error).__name__}")
            raise
        finally:
            told.append(f"{name} exits")

    return hook


@contextlib.contextmanager
def tenant() -> Generator[None]:
    """What a user's hook does: make a fact of the run known to all code below."""
    TENANT.set(str(current_context().values.get("tenant")))
    yield


@contextlib.contextmanager
def swallow() -> Generator[None]:
    """Forget every error."""
    with contextlib.suppress(Exception):
        yield


class Broken:
    """A hook that fails where it is told to."""

    def __init__(self, where: str, error: BaseException) -> None:
        self.where, self.error = where, error

    def __call__(self) -> Broken:
        """Return itself, or fail before."""
        if self.where == "call":
            raise self.error
        return self

    def __enter__(self) -> None:
        if self.where == "enter":
            raise self.error

    def __exit__(self, *_: object) -> None:
        if self.where == "exit":
            raise self.error


def broken(where: str, error: BaseException) -> Callable[[], Any]:
    """Return a hook whose context manager is `Broken`."""

    def hook() -> Broken:
        return Broken(where, error)()

    return hook


def run(
    graph: Graph,
    target: type[Message],
    *hooks: Any,
    threads: int = 2,
    store: Store | None = None,
    values: dict[str, Any] | None = None,
    execution_id: str = "r",
) -> Any:
    """Run *graph* for an order with these hooks and return the target, or raise what ended it."""
    submission = Submission(execution_id=execution_id, values=values or {}, listeners=graph.listeners)
    settings = Settings(threads=threads, step_hooks=hooks)
    job = [Order(order_id="1")]
    plan = graph.plan_for(ValueKey(target), job)
    outcome = within(lambda: graph.deliver(plan, job, submission, settings, store=store))
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


@THREADS
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_hooks_surround_each_call_the_first_outermost(threads: int, kind: str) -> None:
    """Around either kind of step, in the order of the list."""
    graph = Graph("shop")

    def body(order: Order) -> Charge:
        told.append("charge")
        return Charge()

    async def waiting_body(order: Order) -> Charge:
        told.append("charge begins")
        await asyncio.sleep(0)
        told.append("charge ends")
        return Charge()

    graph.register(body if kind == "sync" else waiting_body, name="charge")
    run(graph, Charge, telling("first"), telling("second"), threads=threads)
    inside = ["charge"] if kind == "sync" else ["charge begins", "charge ends"]
    head = ["first enters charge", "second enters charge"]
    assert told == [*head, *inside, "second exits", "first exits"]


@THREADS
def test_what_a_hook_sets_is_seen_by_its_step_alone(threads: int) -> None:
    """On the step's own thread, in its own copy of the context variables."""
    graph, threads_seen = Graph("shop"), list[int]()

    @contextlib.contextmanager
    def note_thread() -> Generator[None]:
        threads_seen.append(threading.get_ident())
        yield

    @graph.step
    def charge(order: Order) -> Charge:
        threads_seen.append(threading.get_ident())
        return Charge(charge_id=TENANT.get())

    @graph.step
    async def label(charge: Charge) -> Label:
        await asyncio.sleep(0)
        return Label(text=f"{charge.charge_id} {TENANT.get()}")

    label_made = run(graph, Label, tenant, note_thread, threads=threads, values={"tenant": "ann"})
    assert label_made == Label(text="ann ann")
    assert threads_seen[0] == threads_seen[1]
    assert TENANT.get() == "nobody"


def test_a_hook_lasts_over_all_waits_of_an_async_step() -> None:
    """Two steps wait on one loop at the same time, each inside a hook of its own."""
    graph, both = Graph("shop"), list[str]()

    async def meet(name: str) -> None:
        both.append(name)
        while len(both) < 2:  # noqa: ASYNC110 -- the other step is on this loop, or the test fails at its limit
            await asyncio.sleep(0.001)
        told.append(f"{name} meets")

    @graph.step
    async def charge(order: Order) -> Charge:
        await meet("charge")
        return Charge()

    @graph.step
    async def label(order: Order) -> Label:
        await meet("label")
        return Label()

    @graph.step
    def ship(charge: Charge, label: Label) -> Shipment:
        return Shipment()

    run(graph, Shipment, telling("hook"))
    assert sorted(told[:2]) == ["hook enters charge", "hook enters label"]
    assert sorted(told[2:6]) == ["charge meets", "hook exits", "hook exits", "label meets"]
    assert told[6:] == ["hook enters ship", "hook exits"]


def test_a_hook_runs_for_each_attempt_but_not_for_a_restored_step() -> None:
    """Three attempts are three uses; a run that finds a checkpoint calls nothing."""
    graph, store = Graph("shop"), MemoryStore()

    @graph.step(retry=AT_ONCE, persist=Scope.GLOBAL)
    def charge(order: Order, ctx: StepContext) -> Charge:
        if ctx.attempt < 3:
            raise ConnectionError
        return Charge()

    run(graph, Charge, telling("hook"), store=store)
    seen = ["hook enters charge", "hook sees ConnectionError", "hook exits"]
    assert told == [*seen, *seen, "hook enters charge", "hook exits"]
    told.clear()
    run(graph, Charge, telling("hook"), store=store, execution_id="another")
    assert told == []


@THREADS
@pytest.mark.parametrize("where", ["call", "enter"])
def test_a_hook_that_cannot_be_entered_fails_the_attempt_and_is_named(threads: int, where: str) -> None:
    """The body is not called, the hooks outside of it are exited, and retries count as for the step itself."""
    graph, called = Graph("shop"), list[str]()

    @graph.step(retry=AT_ONCE, retriable=ConnectionError)
    def charge(order: Order) -> Charge:
        called.append("charge")
        return Charge()

    hooks = telling("outer"), broken(where, ConnectionError("no tenants")), telling("inner")
    with pytest.raises(StepFailed, match=r"after 3 attempts \(attempts used up\)") as failed:
        run(graph, Charge, *hooks, threads=threads)
    assert failed.value.caused_by(ConnectionError)
    name = r"tests.unit.test_hooks:broken.<locals>.hook"
    assert f"no tenants; raised by step hook {name} when it was entered" in str(failed.value)
    assert called == []
    assert told == ["outer enters charge", "outer sees ConnectionError", "outer exits"] * 3
    with pytest.raises(StepFailed, match=r"after 1 attempt \(not retriable\)"):
        run(graph, Charge, broken(where, ValueError("no tenants")), threads=threads)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hook_that_fails_on_the_way_out_fails_the_attempt_and_is_named(kind: str) -> None:
    """The hooks outside of it are exited all the same."""
    graph = Graph("shop")

    def charge(order: Order) -> Charge:
        return Charge()

    async def charge_later(order: Order) -> Charge:
        return Charge()

    graph.register(charge if kind == "sync" else charge_later, name="charge")
    with pytest.raises(StepFailed, match=r"raised by step hook .* when it was exited") as failed:
        run(graph, Charge, telling("outer"), broken("exit", OSError("cannot leave")))
    assert failed.value.caused_by(OSError)
    assert told == ["outer enters charge", "outer sees OSError", "outer exits"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hook_cannot_swallow_the_error_of_its_step(kind: str) -> None:
    """It has no result to offer instead: the step's own error stands."""
    graph = Graph("shop")

    def charge(order: Order) -> Charge:
        raise ValueError("sold out")

    async def charge_later(order: Order) -> Charge:
        raise ValueError("sold out")

    graph.register(charge if kind == "sync" else charge_later)
    with pytest.raises(StepFailed, match=r"ValueError: sold out\n"):
        run(graph, Charge, swallow)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_hooks_of_an_attempt_past_its_timeout_are_exited_when_it_stops(kind: str) -> None:
    """On the abandoned thread once the step returns, on the loop at the cancellation."""
    graph, go_on, left = Graph("shop"), threading.Event(), threading.Event()

    @contextlib.contextmanager
    def leaving() -> Generator[None]:
        try:
            yield
        finally:
            left.set()

    def charge(order: Order) -> Charge:
        reached(go_on)
        return Charge()

    async def charge_later(order: Order) -> Charge:
        await asyncio.sleep(WAIT_S)
        return Charge()

    graph.register(charge if kind == "sync" else charge_later, timeout=0.02)
    with pytest.raises(StepTimedOut):
        run(graph, Charge, leaving)
    assert kind == "async" or not left.is_set()
    go_on.set()
    reached(left)


@pytest.mark.parametrize(
    ("make", "shown"),
    [(lambda: None, "None"), (lambda: contextlib.aclosing(None), "aclosing")],  # type: ignore[type-var]
)
def test_a_hook_that_makes_no_context_manager_is_a_mistake_in_the_settings(
    make: Callable[[], Any], shown: str
) -> None:
    """No retry could cure it; the text says which hook, what it returned and what to do."""
    graph = Graph("shop")

    @graph.step(retry=AT_ONCE)
    def charge(order: Order) -> Charge:
        return Charge()

    with pytest.raises(
        StepFailed, match=rf"1 attempt .*lambda.* returned .*{shown}.*contextmanager"
    ) as failed:
        run(graph, Charge, make)
    assert failed.value.caused_by(InvalidSettings)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (tenant, "must be a list, got <function tenant"),
        ([tenant, 5], "entry 5 "),
        ([tenant()], "entry <contextlib._GeneratorContextManager"),
        (["shop.hooks.tenant"], "entry 'shop.hooks.tenant' is no import path"),
        (["shop hooks:tenant"], "entry 'shop hooks:tenant' is no import path"),
        ([None], "entry None "),
        ({"a:b": 1}, "must be a list"),
    ],
)
def test_hooks_of_another_form_are_refused(value: Any, shown: str) -> None:
    """When the settings are read, by the entry that is wrong."""
    with pytest.raises(InvalidSettings, match="setting docket_step_hooks: ") as refused:
        Settings.read({"docket_step_hooks": value}, {})
    assert shown in str(refused.value)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("tests.unit.no_such_module:tenant", "cannot be imported: ModuleNotFoundError"),
        ("tests.unit.test_hooks:no_such_name", "cannot be imported: AttributeError"),
        ("tests.unit.test_hooks:WAIT_S", "is 30.0; an entry is a callable"),
    ],
)
def test_an_import_path_that_leads_nowhere_stops_runs_and_workers(path: str, shown: str) -> None:
    """Before anything of a run is called, and before a worker consumes."""
    graph = Graph("shop")

    @graph.step
    def charge(order: Order) -> Charge:
        raise AssertionError("called without its hooks")

    with pytest.raises(InvalidSettings) as refused:
        run(graph, Charge, path)
    assert f"entry {path!r} {shown}" in str(refused.value)
    app = Celery("hooks", set_as_current=False)
    app.conf.docket_step_hooks = [path]
    (fault,) = checks.find_faults(app, "prefork")
    assert path in fault


def test_hooks_are_named_by_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As import paths, separated by commas; dots after the colon lead into classes."""
    paths = "tests.unit.test_hooks:tenant, tests.unit.test_hooks:Hooks.tell"
    monkeypatch.setenv("DOCKET_CELERY_STEP_HOOKS", paths)
    graph = Graph("shop")

    @graph.step
    def charge(order: Order) -> Charge:
        return Charge(charge_id=TENANT.get())

    assert graph.execute(Charge, Order(), context={"tenant": "bob"}) == Charge(charge_id="bob")
    assert told == ["hook enters charge", "hook exits"]


class Hooks:
    """Where some keep theirs."""

    tell = staticmethod(telling("hook"))


def test_hooks_of_an_app_surround_the_steps_of_its_tasks() -> None:
    """Eagerly and by a direct call; the app's own, not those of the process."""
    app = Celery("hooked", set_as_current=False)
    app.conf.update(task_always_eager=True, docket_step_hooks=[telling("app"), f"{__name__}:tenant"])
    graph = Graph("shop")

    @graph.step
    def charge(order: Order) -> Charge:
        return Charge(charge_id=TENANT.get())

    @graph_task(app, graph, name="hooked.charge", shared=False)
    def charge_order(order: Order) -> Charge:
        raise NotImplementedError

    submitted = charge_order.apply_async((Order(),), context={"tenant": "cid"})
    assert submitted.get() == Charge(charge_id="cid")
    assert charge_order(Order()) == Charge(charge_id="None")
    assert told == ["app enters charge", "app exits"] * 2
    told.clear()
    assert graph.execute(Charge, Order()) == Charge(charge_id="nobody")
    assert told == []
