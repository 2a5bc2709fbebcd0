from __future__ import annotations

import argparse
import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, cast

import pytest
from google.protobuf.descriptor_pb2 import UninterpretedOption
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from docket_celery.engine.process.loops import LoopThread
from docket_celery.engine.process.state import process
from docket_celery.errors import AbortError, InvalidArguments, StepFailed, StepTimedOut, WrongResult
from docket_celery.graph import Graph
from docket_celery.observe.events import Event, EventKind
from docket_celery.plan.context import StepContext, current_context
from docket_celery.plan.options import ErrorClassifier, ExponentialBackoff, FixedBackoff, RetryPolicy, Scope
from docket_celery.store import MemoryStore
from docket_celery.store.records import RunState
from tests.unit.graphs import WAIT_S, execute, reached, within
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Reservation, Shipment
from tests.unit.stage import Deadlines

NamePart = UninterpretedOption.NamePart
AT_ONCE = RetryPolicy(max_attempts=4, backoff=FixedBackoff(0))
caller: ContextVar[str] = ContextVar("caller", default="nobody")


def failing(error: Callable[[], BaseException], **options: Any) -> tuple[Graph, list[int]]:
    """Return a graph whose step raises *error* at each call, and the list of its attempts."""
    graph, attempts = Graph("shop"), list[int]()

    @graph.step(**options)
    def charge(order: Order, ctx: StepContext) -> Charge:
        attempts.append(ctx.attempt)
        raise error()

    return graph, attempts


def test_attempts_are_counted_with_the_first_call() -> None:
    """``max_attempts=4`` calls four times, numbered from 1, and says so in the error."""
    graph, attempts = failing(lambda: ValueError("no"), retry=AT_ONCE)
    with pytest.raises(
        StepFailed, match=r"step 'charge' failed after 4 attempts \(attempts used up\): ValueError: no"
    ) as caught:
        within(lambda: graph.execute(Charge, Order()))
    assert attempts == [1, 2, 3, 4]
    assert (caught.value.attempts, caught.value.retriable) == (4, True)
    assert not hasattr(caught.value, "__notes__")


def test_without_a_policy_a_step_has_one_attempt() -> None:
    """Retries are asked for, not assumed; the failure says so where a retry might help."""
    graph, attempts = failing(lambda: ValueError("no"))
    with pytest.raises(StepFailed, match="after 1 attempt ") as caught:
        within(lambda: graph.execute(Charge, Order()))
    assert attempts == [1]
    assert caught.value.__notes__ == [
        "A step without retry= has one attempt; retry=RetryPolicy(max_attempts=3) gives it up to three."
    ]


def test_an_attempt_that_succeeds_ends_the_retries() -> None:
    """The value of the third call counts, and listeners hear of each attempt."""
    graph, heard = Graph("shop"), list[tuple[EventKind, int]]()

    @graph.step(retry=AT_ONCE)
    def charge(order: Order, ctx: StepContext) -> Charge:
        if ctx.attempt < 3:
            raise ConnectionError("again")
        return Charge(charge_id=f"attempt {ctx.attempt}")

    graph.listeners.append(lambda event: heard.append((event.kind, event.attempt)))
    assert within(lambda: graph.execute(Charge, Order())) == Charge(charge_id="attempt 3")
    assert heard == [
        (EventKind.RUN_STARTED, 0),
        (EventKind.STEP_STARTED, 1),
        (EventKind.STEP_RETRYING, 1),
        (EventKind.STEP_STARTED, 2),
        (EventKind.STEP_RETRYING, 2),
        (EventKind.STEP_STARTED, 3),
        (EventKind.STEP_SUCCEEDED, 3),
        (EventKind.RUN_ENDED, 0),
    ]


def test_a_retry_tells_of_its_wait_and_of_what_failed() -> None:
    """The event names the step and the attempt, and says how long the next one is put off."""
    policy = RetryPolicy(max_attempts=2, backoff=FixedBackoff(0.00123456))
    graph, _ = failing(lambda: ValueError("no"), retry=policy)
    heard: list[Event] = []
    graph.listeners.append(heard.append)
    with pytest.raises(StepFailed):
        within(lambda: graph.execute(Charge, Order()))
    told = [(e.step, e.attempt, e.detail) for e in heard if e.kind is EventKind.STEP_RETRYING]
    assert told == [("charge", 1, "again in 0.00123 s: ValueError: no")]


@pytest.mark.parametrize(
    ("retriable", "calls"),
    [
        (ConnectionError, 4),
        ((KeyError, ConnectionError), 4),
        (KeyError, 1),
        ((), 1),
        (lambda error: "again" in str(error), 4),
        (lambda _error: False, 1),
        (None, 4),
    ],
    ids=["its type", "one of its types", "another type", "no type", "true", "false", "default"],
)
def test_retriable_decides(retriable: ErrorClassifier | None, calls: int) -> None:
    """Exception types or a predicate say what another attempt may cure."""
    graph, attempts = failing(lambda: ConnectionResetError("again"), retry=AT_ONCE, retriable=retriable)
    with pytest.raises(StepFailed) as caught:
        within(lambda: graph.execute(Charge, Order()))
    assert len(attempts) == calls
    assert caught.value.retriable is (calls == 4)


def test_a_predicate_that_raises_is_the_failure() -> None:
    """Nothing is retried on the word of broken code, and what it was asked about is in the notes."""
    graph, attempts = failing(
        lambda: ValueError("first"), retry=AT_ONCE, retriable=lambda error: error.missing
    )
    with pytest.raises(StepFailed, match="AttributeError") as caught:
        within(lambda: graph.execute(Charge, Order()))
    assert attempts == [1]
    assert caught.value.__cause__ is not None
    assert "ValueError: first" in caught.value.__cause__.__notes__[0]


def test_a_note_quotes_two_hundred_characters_of_the_error() -> None:
    """What a broken predicate was asked about may be long; the note is not."""
    graph, _ = failing(lambda: ValueError("x" * 300), retry=AT_ONCE, retriable=lambda error: error.missing)
    with pytest.raises(StepFailed) as caught:
        within(lambda: graph.execute(Charge, Order()))
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.__notes__[0].endswith(f"while judging ValueError: {'x' * 200}")


class Unprintable(Exception):
    """An exception of somebody who did not test it."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "kind", [Unprintable, StopIteration, StopAsyncIteration, RecursionError, MemoryError]
)
@pytest.mark.parametrize("is_async", [False, True])
def test_strange_exceptions_are_step_failures(kind: type[Exception], is_async: bool) -> None:
    """Whatever an exception does, the run ends with it."""
    graph = Graph("shop")

    def charge(order: Order) -> Charge:
        raise kind

    async def charge_on_loop(order: Order) -> Charge:
        raise kind

    graph.register(charge_on_loop if is_async else charge, retriable=lambda error: error.missing)
    with pytest.raises(StepFailed):
        within(lambda: graph.execute(Charge, Order()))


def leave(kind: type[BaseException]) -> None:
    """End the program in one of the ways in which libraries do, which a step's code should not."""
    if kind is SystemExit:
        argparse.ArgumentParser(exit_on_error=True).parse_args(["--unknown"])
    if kind is BaseExceptionGroup:
        raise BaseExceptionGroup("several", [KeyboardInterrupt(), ValueError("one of them")])
    raise kind("enough")


@pytest.mark.parametrize(
    "kind", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseExceptionGroup, BaseException]
)
@pytest.mark.parametrize("is_async", [False, True])
def test_what_ends_programs_is_a_failure_of_the_step_that_raised_it(
    kind: type[BaseException], is_async: bool
) -> None:
    """On a step thread only the step's code can raise it: the run fails, is not retried, and its row says so."""
    graph, calls, store = Graph("shop"), list[int](), MemoryStore()

    def charge(order: Order) -> Charge:
        calls.append(1)
        if not order.order_id:
            leave(kind)
        return Charge()

    async def charge_on_loop(order: Order) -> Charge:
        return charge(order)

    retry = RetryPolicy(max_attempts=3, backoff=FixedBackoff(0))
    graph.register(charge_on_loop if is_async else charge, name="charge", persist=Scope.WORKFLOW, retry=retry)
    with pytest.raises(StepFailed) as caught:
        within(lambda: graph.execute(Charge, Order(), execution_id="leaves", store=store))
    failure = caught.value
    assert (failure.step, failure.attempts, failure.retriable, len(calls)) == ("charge", 1, False, 1)
    assert failure.caused_by(kind)
    row = store.find_run("shop", "leaves")
    assert row is not None
    assert row.state is RunState.FAILED
    assert within(lambda: graph.execute(Charge, Order(order_id="7"), store=store)) == Charge()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_programs_passes_through_on_the_callers_own_thread(kind: type[BaseException]) -> None:
    """There it may as well come from a signal; the process's threads survive it."""
    graph = Graph("shop")

    @graph.step
    def charge(order: Order) -> Charge:
        if order.order_id:
            return Charge()
        raise kind

    with pytest.raises(kind):
        within(lambda: execute(graph, Charge, Order(), helps=True))
    assert within(lambda: execute(graph, Charge, Order(order_id="7"), helps=True)) == Charge()


def test_a_plain_decorator_around_a_coroutine_is_told_apart_from_other_wrong_results() -> None:
    """It returns what nobody awaits: the failure says why, and no warning of Python's follows."""
    graph = Graph("shop")

    async def charge(order: Order) -> Charge:
        return Charge()

    @functools.wraps(charge)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        return charge(*args, **kwargs)

    graph.register(decorated)
    with pytest.raises(
        WrongResult, match=r"returned a coroutine \(what decorates an async def step must be async"
    ):
        within(lambda: graph.execute(Charge, Order()))


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "None"), (Label(), "Label"), (Charge, "MessageMeta"), ("charge", "str")]
)
def test_a_wrong_result_fails_without_a_retry(value: object, shown: str) -> None:
    """None or another type is a defect of the step, which no further call cures."""
    graph, calls = Graph("shop"), list[int]()

    @graph.step(retry=AT_ONCE, retriable=Exception)
    def charge(order: Order) -> Charge:
        calls.append(1)
        return value  # type: ignore[return-value]

    with pytest.raises(WrongResult, match=f"returned {shown}, but declares docket.tests.unit.Charge"):
        within(lambda: graph.execute(Charge, Order()))
    assert calls == [1]


def nested(levels: int) -> Struct:
    """Return a Struct of so many Structs within one another."""
    outer = inner = Struct()
    for _ in range(levels - 1):
        inner = inner.fields["next"].struct_value
        inner.SetInParent()
    return outer


@pytest.mark.parametrize("persist", [None, Scope.WORKFLOW, Scope.GLOBAL])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (NamePart(name_part="zone"), "required fields are not set: is_extension"),
        (nested(40), "nested more than"),
    ],
    ids=["required", "deep"],
)
def test_a_result_that_could_not_be_read_back_is_refused_before_it_is_stored(
    value: Message, shown: str, persist: Scope | None
) -> None:
    """Whether a step persists or not: the failure names the step and why, and nothing is kept of the value."""
    graph, store, calls = Graph("shop"), MemoryStore(), list[int]()

    def make(order: Order) -> Any:
        calls.append(1)
        return value

    make.__annotations__["return"] = type(value)
    graph.register(make, persist=persist, retry=AT_ONCE)
    with pytest.raises(WrongResult, match=shown) as caught:
        within(lambda: graph.execute(type(value), Order(), execution_id="run", store=store))
    assert (caught.value.step, caught.value.attempts, calls) == ("make", 1, [1])
    if persist is Scope.WORKFLOW:
        assert [(row.step_name, row.status) for row in store.executions] == [("make", "FAILED")]


@pytest.mark.parametrize(
    "value", [NamePart(name_part="zone", is_extension=False), nested(30)], ids=["required", "deep"]
)
def test_a_result_that_can_be_read_back_is_returned(value: Message) -> None:
    """With its required fields set, or nested less deeply."""
    graph = Graph("shop")

    def make(order: Order) -> Any:
        return value

    make.__annotations__["return"] = type(value)
    graph.register(make, persist=Scope.WORKFLOW)
    assert within(lambda: graph.execute(type(value), Order(), store=MemoryStore())) == value


def test_a_timed_out_attempt_is_abandoned_and_its_late_result_never_used() -> None:
    """The second attempt's value counts; the first one's thread sees its context cancelled and is let go."""
    graph, heard = Graph("shop"), list[Event]()
    late, done = threading.Event(), threading.Event()

    @graph.step(timeout=0.05, retry=AT_ONCE)
    def charge(order: Order, ctx: StepContext) -> Charge:
        if ctx.attempt == 1:
            assert ctx.cancelled.wait(WAIT_S)
            reached(late)
            done.set()
        return Charge(charge_id=f"attempt {ctx.attempt}")

    graph.listeners.append(heard.append)
    assert within(lambda: graph.execute(Charge, Order())) == Charge(charge_id="attempt 2")
    assert EventKind.STEP_ABANDONED in [event.kind for event in heard]
    late.set()
    reached(done)


def test_a_context_sleep_wakes_at_the_timeout() -> None:
    """`ctx.sleep` and `ctx.check` raise the reason once the attempt has timed out; the deadline was known."""
    graph, seen = Graph("shop"), list[BaseException]()
    woken = threading.Event()

    @graph.step(timeout=0.05)
    def charge(order: Order, ctx: StepContext) -> Charge:
        assert ctx.deadline is not None
        waits: list[Callable[[], None]] = [functools.partial(ctx.sleep, 3600), ctx.check]
        for wait in waits:
            try:
                wait()
            except StepTimedOut as error:
                seen.append(error)
        woken.set()
        return Charge()

    with pytest.raises(StepTimedOut, match=r"step 'charge' passed timeout=0.05 s \(attempt 1\)") as caught:
        within(lambda: graph.execute(Charge, Order()))
    assert caught.value.timeout_s == 0.05
    reached(woken)
    assert seen == [caught.value] * 2


def test_an_attempt_that_ends_in_time_leaves_no_alarm() -> None:
    """A run that was quick is not disturbed by the timeouts of its steps, nor does it wait for them."""
    graph = Graph("shop")

    @graph.step(timeout=3600)
    def charge(order: Order, ctx: StepContext) -> Charge:
        assert not ctx.cancelled.is_set()
        return Charge(charge_id="quick")

    assert within(lambda: graph.execute(Charge, Order())) == Charge(charge_id="quick")


def test_a_coroutine_is_really_cancelled_at_its_timeout() -> None:
    """Unlike a thread, an ``async def`` step ends; its clean-up runs, and the next attempt starts."""
    graph, cancelled = Graph("shop"), threading.Event()

    @graph.step(timeout=0.05, retry=AT_ONCE)
    async def charge(order: Order, ctx: StepContext) -> Charge:
        if ctx.attempt == 1:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.set()
                raise
        return Charge(charge_id=f"attempt {ctx.attempt}")

    assert within(lambda: graph.execute(Charge, Order())) == Charge(charge_id="attempt 2")
    reached(cancelled)


def test_a_deadline_that_passes_while_a_coroutine_is_handed_over_cancels_it() -> None:
    """A timeout that comes before the coroutine's future is known finds nothing to cancel; that is made up for."""
    deadlines, cancelled = Deadlines(), threading.Event()
    runtime = process.runtime(2)
    runtime.timer = deadlines.timer()
    loop = cast("LoopThread", runtime.loop)

    class LateLoop(LoopThread):
        def submit(
            self, coroutine: Coroutine[Any, Any, Any], on_end: Callable[[], object] = lambda: None
        ) -> Future[Any]:
            future = loop.submit(coroutine, on_end)
            reached(begun)
            deadlines.take(3600)()
            return future

        def close(self) -> None:
            super().close()
            loop.close()

    runtime._loop = LateLoop()
    graph, begun = Graph("shop"), threading.Event()

    @graph.step(timeout=3600)
    async def charge(order: Order) -> Charge:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()
        return Charge()

    with pytest.raises(StepTimedOut):
        within(lambda: execute(graph, Charge, Order(), threads=2))
    reached(cancelled)


def test_a_coroutine_is_really_cancelled_by_an_abort() -> None:
    """Nobody waits an hour for a step of a run that is over."""
    graph = Graph("shop")
    sleeping, cancelled = threading.Event(), threading.Event()

    @graph.step
    async def charge(order: Order) -> Charge:
        sleeping.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()
        return Charge()

    @graph.step
    def reserve(order: Order) -> Reservation:
        reached(sleeping)
        raise AbortError("stop")

    @graph.step
    def ship(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    with pytest.raises(AbortError):
        within(lambda: graph.execute(Shipment, Order()))
    reached(cancelled)


def test_a_coroutine_that_cancels_itself_fails_its_step() -> None:
    """A cancelled task of the step's own must not leave the run without an end."""
    graph = Graph("shop")

    @graph.step
    async def charge(order: Order) -> Charge:
        mine = asyncio.ensure_future(asyncio.sleep(3600))
        mine.cancel()
        await mine
        return Charge()

    with pytest.raises(StepFailed) as caught:
        within(lambda: graph.execute(Charge, Order()))
    expected = "the step was cancelled from inside: CancelledError: the step cancelled itself"
    assert caught.value.cause_text == expected


def test_coroutines_overlap_on_one_pool_thread() -> None:
    """Three ``async def`` steps meet though there is one thread, which none of them holds."""
    graph, count = Graph("shop"), list[str]()
    full: Future[None] = Future()

    async def meet(name: str) -> None:
        count.append(name)
        if len(count) == 3:
            full.set_result(None)
        await asyncio.wait_for(asyncio.wrap_future(full), WAIT_S)

    @graph.step
    async def charge(order: Order) -> Charge:
        await meet("charge")
        return Charge()

    @graph.step
    async def reserve(order: Order) -> Reservation:
        await meet("reserve")
        return Reservation()

    @graph.step
    async def label(order: Order) -> Label:
        await meet("label")
        return Label()

    @graph.step
    def ship(charge: Charge, reservation: Reservation, label: Label) -> Shipment:
        return Shipment(tracking_id=str(len(count)))

    assert within(lambda: execute(graph, Shipment, Order(), threads=1)) == Shipment(tracking_id="3")


@pytest.mark.parametrize("helps", [False, True])
def test_each_call_gets_a_copy_of_the_callers_context(helps: bool) -> None:
    """Steps see the caller's contextvars; what one sets reaches neither the others nor the caller."""
    graph, seen = Graph("shop"), list[str]()

    @graph.step
    def charge(order: Order) -> Charge:
        seen.append(caller.get())
        caller.set("charge")
        return Charge()

    @graph.step
    async def reserve(charge: Charge) -> Reservation:
        seen.append(caller.get())
        caller.set("reserve")
        return Reservation()

    @graph.step
    def ship(reservation: Reservation) -> Shipment:
        seen.append(caller.get())
        return Shipment()

    def run() -> str:
        caller.set("me")
        execute(graph, Shipment, Order(), helps=helps)
        return caller.get()

    assert within(run) == "me"
    assert seen == ["me", "me", "me"]


def test_helpers_reach_the_context_of_the_step_they_serve() -> None:
    """`current_context` works in threads and on the loop, and nowhere else."""
    graph = Graph("shop")

    def describe() -> str:
        ctx = current_context()
        return (
            f"{ctx.graph} {ctx.execution_id} {ctx.step} {ctx.attempt} {ctx.delivery} {ctx.values['tenant']}"
        )

    @graph.step
    async def charge(order: Order) -> Charge:
        return Charge(charge_id=describe())

    @graph.step
    def ship(charge: Charge) -> Shipment:
        return Shipment(tracking_id=f"{charge.charge_id}, {describe()}")

    shipment = within(
        lambda: graph.execute(Shipment, Order(), execution_id="o-7", context={"tenant": "acme"})
    )
    assert shipment.tracking_id == "shop o-7 charge 1 1 acme, shop o-7 ship 1 1 acme"
    with pytest.raises(LookupError, match="inside a step only"):
        current_context()


def test_the_idempotency_key_names_run_and_step() -> None:
    """It is one for all attempts of a step in a run, and another for every other step and run."""
    graph, keys = Graph("shop"), dict[tuple[str, str], set[str]]()

    def note(ctx: StepContext) -> None:
        keys.setdefault((ctx.execution_id, ctx.step), set()).add(ctx.idempotency_key)

    @graph.step(retry=AT_ONCE)
    def charge(order: Order, ctx: StepContext) -> Charge:
        note(ctx)
        if ctx.attempt < 3:
            raise ValueError("again")
        return Charge()

    @graph.step
    def ship(charge: Charge, ctx: StepContext) -> Shipment:
        note(ctx)
        return Shipment()

    for name in ("o-1", "o-2", "o-1"):
        within(functools.partial(graph.execute, Shipment, Order(), execution_id=name))
    assert [len(found) for found in keys.values()] == [1, 1, 1, 1]
    assert len(set.union(*keys.values())) == 4


def test_a_listener_that_raises_does_not_break_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and those after it still hear of everything."""
    graph, heard = Graph("shop"), list[EventKind]()

    @graph.step
    def charge(order: Order) -> Charge:
        return Charge(charge_id="paid")

    def broken(event: Event) -> None:
        raise ValueError("listener")

    graph.listeners += [broken, lambda event: heard.append(event.kind)]
    assert within(lambda: graph.execute(Charge, Order())) == Charge(charge_id="paid")
    assert heard == [
        EventKind.RUN_STARTED,
        EventKind.STEP_STARTED,
        EventKind.STEP_SUCCEEDED,
        EventKind.RUN_ENDED,
    ]
    assert "failed on run-started" in caplog.text


@pytest.mark.parametrize(
    ("delay", "text"),
    [
        (lambda: -1.0, "ValueError: the backoff's delay must not be negative, got -1.0"),
        (lambda: float("nan"), "ValueError: the backoff's delay must not be negative, got nan"),
        (lambda: float("inf"), "ValueError: the backoff's delay must be at most"),
        (lambda: "soon", "ValueError: the backoff's delay must be seconds or a timedelta, not 'soon'"),
        (lambda: None, "ValueError: the backoff's delay must be seconds or a timedelta, not None"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["negative", "nan", "endless", "text", "nothing", "raises"],
)
def test_a_backoff_that_cannot_be_used_fails_the_step(delay: Callable[[], Any], text: str) -> None:
    """It is the step's failure, with what it was asked about; what else is running finishes first."""

    class Odd:
        def delay_s(self, *_: object) -> Any:
            return delay()

    graph, attempts = failing(lambda: ValueError("no"), retry=RetryPolicy(backoff=Odd()))
    begun, failed, finished = threading.Event(), threading.Event(), list[bool]()

    @graph.step
    def label(order: Order, ctx: StepContext) -> Label:
        begun.set()
        reached(failed)
        finished.append(not ctx.cancelled.is_set())
        return Label()

    @graph.step
    def ship(charge: Charge, label: Label) -> Shipment:
        return Shipment()

    def listen(event: Event) -> None:
        if event.kind is EventKind.STEP_STARTED and event.step == "charge":
            reached(begun)
        if event.kind is EventKind.STEP_FAILED:
            failed.set()

    graph.listeners.append(listen)
    with pytest.raises(StepFailed, match=r"'charge' failed after 1 attempt \(not retriable\)") as caught:
        within(lambda: execute(graph, Shipment, Order(), helps=False))
    assert text in str(caught.value)
    assert "raised by the backoff of step 'charge' after ValueError: no" in str(caught.value)
    assert attempts == [1]
    assert finished == [True]


def test_exponential_waits_are_asked_of_the_policy() -> None:
    """The engine waits what the backoff says for the attempt that failed."""
    asked: list[int] = []

    class Noted(ExponentialBackoff):
        def delay_s(self, attempt: int, *_: object) -> float:
            asked.append(attempt)
            return 0.0

    graph, attempts = failing(lambda: ValueError("no"), retry=RetryPolicy(max_attempts=4, backoff=Noted()))
    with pytest.raises(StepFailed):
        within(lambda: graph.execute(Charge, Order()))
    assert (asked, attempts) == ([1, 2, 3], [1, 2, 3, 4])


def test_a_bad_concurrency_is_refused() -> None:
    """Zero steps at once would never end."""
    graph, _ = failing(lambda: ValueError("no"))
    with pytest.raises(InvalidArguments, match="max_concurrency must be at least 1"):
        graph.execute(Charge, Order(), max_concurrency=0)
