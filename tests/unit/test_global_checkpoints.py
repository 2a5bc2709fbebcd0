from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeAlias

import pytest

from docket_celery.engine.execution import Scheduler
from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.process.timer import Alarm, Timer
from docket_celery.engine.run_context import Submission
from docket_celery.errors import AbortError, InvalidArguments, LeaseLost, StepFailed, StoreUnavailable
from docket_celery.graph import Graph
from docket_celery.observe.events import Event, EventKind
from docket_celery.plan.annotation import Named, ValueKey
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import FixedBackoff, RetryPolicy, Scope
from docket_celery.store import MemoryStore
from docket_celery.store.records import Checkpoint, Halt, Lease, StepExecution
from tests.unit.graphs import WAIT_S, execute, pass_on, reached, start, within
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Reservation, Shipment

Paid: TypeAlias = Annotated[Label, Named("paid")]
Owed: TypeAlias = Annotated[Label, Named("owed")]


class WatchedStore(MemoryStore):
    """A store that counts look-ups, tells when one had to wait, and refuses to publish when told to."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.waited, self.released = threading.Event(), threading.Event()
        self.refusals = 0

    def lookup(
        self, key: bytes, owner: str, lease_s: float, hit: StepExecution | None = None
    ) -> Checkpoint | bool:
        found = super().lookup(key, owner, lease_s, hit)
        if found is False:
            self.waited.set()
        return found

    def publish(
        self,
        checkpoint: Checkpoint,
        owner: str,
        execution: StepExecution | None,
        *,
        replace: bool = False,
    ) -> Checkpoint:
        if self.refusals:
            self.refusals -= 1
            raise StoreUnavailable("answer", "gone for a moment")
        return super().publish(checkpoint, owner, execution, replace=replace)

    def release_claim(self, key: bytes, owner: str) -> None:
        super().release_claim(key, owner)
        self.released.set()

    @property
    def claims(self) -> int:
        """How many GLOBAL checkpoints somebody says to be computing."""
        return len(self._claims)


class Rates:
    """A graph with one shared step, which counts its calls."""

    def __init__(self, name: str = "rates", **options: Any) -> None:
        self.now = 1000.0
        self.calls: list[str] = []
        self.body: Callable[[StepContext], object] = lambda _ctx: None
        self.store = WatchedStore(lambda: self.now)
        self.graph = Graph(name, store=self.store)
        self.graph.register(self.charge, persist=Scope.GLOBAL, **options)

    def charge(self, order: Order, ctx: StepContext) -> Charge:
        """Make a charge that tells how often it was made."""
        self.calls.append(order.order_id)
        self.body(ctx)
        return Charge(charge_id=f"{order.order_id} {len(self.calls)}")

    def ask(self, order_id: str = "7", **fields: Any) -> str:
        """Return the charge's id for an order, in a run of its own."""
        return self.graph.execute(Charge, Order(order_id=order_id, **fields)).charge_id


def test_runs_share_a_checkpoint_for_equal_inputs() -> None:
    """The second run reads what the first one computed; other inputs are computed."""
    rates = Rates()
    assert [within(rates.ask) for _ in range(3)] == ["7 1"] * 3
    assert within(lambda: rates.ask("8")) == "8 2"
    assert rates.calls == ["7", "8"]


def test_map_fields_in_any_order_are_equal_inputs() -> None:
    """The key is made of deterministic bytes."""
    rates = Rates()
    names = [f"article {i}" for i in range(20)]
    within(lambda: rates.ask(stock=dict.fromkeys(names, 1)))
    within(lambda: rates.ask(stock=dict.fromkeys(reversed(names), 1)))
    assert rates.calls == ["7"]


def test_a_checkpoint_expires_by_the_stores_clock() -> None:
    """Up to ``ttl`` seconds after saving it is reused, then computed and kept anew."""
    rates = Rates(ttl=60)
    within(rates.ask)
    rates.now += 59
    assert within(rates.ask) == "7 1"
    rates.now += 1
    assert within(rates.ask) == "7 2"
    rates.now += 59
    assert within(rates.ask) == "7 2"


def test_another_version_is_another_checkpoint() -> None:
    """Changed code asks for a changed ``version`` and finds nothing."""
    rates = Rates(version="1")
    within(rates.ask)
    newer = Graph("rates", store=rates.store)
    newer.register(rates.charge, persist=Scope.GLOBAL, version="2")
    assert within(lambda: newer.execute(Charge, Order(order_id="7"))).charge_id == "7 2"


def test_the_same_bytes_under_other_names_are_other_inputs() -> None:
    """Two values of one type: what one paid and owed is not what the other owed and paid."""
    store = MemoryStore()

    def before(paid: Paid, owed: Owed) -> Charge:
        return Charge(charge_id=f"paid {paid.text}, owed {owed.text}")

    def after(owed: Owed, paid: Paid) -> Charge:
        return Charge(charge_id=f"paid {paid.text}, owed {owed.text}")

    found: list[str] = []
    for step, paid, owed in ((before, "1", "2"), (after, "2", "1")):
        graph = Graph("billing", store=store)
        graph.register(step, name="settle", persist=Scope.GLOBAL)

        graph.register(_paying(paid), name="pay")
        graph.register(_owing(owed), name="owe")
        found.append(graph.execute(Charge, Order()).charge_id)
    assert found == ["paid 1, owed 2", "paid 2, owed 1"]


def _paying(text: str) -> Callable[[Order], Paid]:
    def pay(order: Order) -> Paid:
        return Label(text=text)

    return pay


def _owing(text: str) -> Callable[[Order], Owed]:
    def owe(order: Order) -> Owed:
        return Label(text=text)

    return owe


def test_key_says_what_of_the_inputs_counts() -> None:
    """A field that ``key`` leaves out does not spoil the cache."""
    rates = Rates(key=lambda order: Order(order_id=order.order_id))
    within(lambda: rates.ask(amount_cents=1))
    assert within(lambda: rates.ask(amount_cents=2)) == "7 1"


@pytest.mark.parametrize(
    ("broken", "expected", "text"),
    [
        (lambda _order: None, InvalidArguments, "key= of step 'charge': returned NoneType"),
        (lambda order: order.missing, StepFailed, "AttributeError"),
    ],
    ids=["no message", "raises"],
)
def test_a_broken_key_fails_the_run(broken: Any, expected: type[Exception], text: str) -> None:
    """Without a key there is nothing to look up, and nothing is called."""
    rates = Rates(key=broken)
    with pytest.raises(expected, match=text):
        within(rates.ask)
    assert rates.calls == []


def test_of_many_runs_at_once_one_computes() -> None:
    """The others wait for its value without holding a thread: they share two, and each gets it."""
    rates = Rates()
    rates.body = lambda _ctx: reached(rates.store.waited)

    def ask() -> str:
        return execute(
            rates.graph,
            Charge,
            Order(order_id="7"),
            threads=2,
            execution_id=threading.current_thread().name + str(threading.get_ident()),
        ).charge_id

    runs = [start(ask) for _ in range(6)]
    assert [run.result(WAIT_S) for run in runs] == ["7 1"] * 6
    assert rates.calls == ["7"]
    assert rates.store.claims == 0


def test_of_two_runs_that_computed_the_first_to_save_counts() -> None:
    """A claim that expired lets another run in; whoever was overtaken takes that one's value, not its own."""
    rates, other = Rates(), list[str]()

    def overtake(ctx: StepContext) -> None:
        rates.body = lambda _ctx: None
        rates.now += 1000
        other.append(rates.ask())
        rates.calls.append("more")

    rates.body = overtake
    assert within(rates.ask) == "7 2"
    assert other == ["7 2"]


@pytest.mark.parametrize("fault", ["fails", "aborts", "times out", "cannot save"])
def test_a_claim_is_given_up_however_its_step_ends(fault: str) -> None:
    """The next run computes at once instead of waiting for a lease that a heartbeat keeps alive."""
    rates = Rates(timeout=0.05 if fault == "times out" else None)

    def body(ctx: StepContext) -> None:
        if fault == "fails":
            raise ValueError(fault)
        if fault == "aborts":
            raise AbortError(fault)
        ctx.cancelled.wait(WAIT_S)

    if fault == "cannot save":
        rates.store.refusals = 99
    else:
        rates.body = body
    with pytest.raises((StepFailed, AbortError, StoreUnavailable)):
        within(rates.ask)
    reached(rates.store.released)
    rates.body, rates.store.refusals = (lambda _ctx: None), 0
    assert within(rates.ask) == "7 2"
    assert rates.store.claims == 0


def test_a_run_aborted_beside_a_claim_gives_it_up() -> None:
    """A step that computes for others is let go with its run; a run that waits for it takes over."""
    rates = Rates()
    computing = threading.Event()

    def compute(ctx: StepContext) -> None:
        computing.set()
        ctx.sleep(3600)

    rates.body = compute
    graph = Graph("rates", store=rates.store)
    graph.register(rates.charge, persist=Scope.GLOBAL)

    @graph.step
    def reserve(order: Order) -> Reservation:
        reached(rates.store.waited)
        raise AbortError("stop")

    @graph.step
    def ship(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    aborted = start(lambda: graph.execute(Shipment, Order(order_id="7")))
    reached(computing)
    rates.body = lambda _ctx: None
    waiting = start(rates.ask)
    with pytest.raises(AbortError):
        aborted.result(WAIT_S)
    assert waiting.result(WAIT_S) == "7 2"


def test_a_claim_is_dropped_on_the_pool_when_the_calling_thread_fails() -> None:
    """The thread that waits for a run may run its simple steps, but no SQL."""
    threads, retrying = list[threading.Thread](), threading.Event()

    class NotingStore(MemoryStore):
        def release_claim(self, key: bytes, owner: str) -> None:
            threads.append(threading.current_thread())
            super().release_claim(key, owner)

    graph = Graph("rates", store=NotingStore())
    graph.listeners.append(lambda event: retrying.set() if event.kind is EventKind.STEP_RETRYING else None)

    @graph.step(persist=Scope.GLOBAL, retry=RetryPolicy(backoff=FixedBackoff(3600)))
    def charge(order: Order) -> Charge:
        raise ConnectionError("again")

    @graph.step
    def reserve(order: Order) -> Reservation:
        reached(retrying)
        raise KeyError("none left")

    @graph.step
    def ship(charge: Charge, reservation: Reservation) -> Shipment:
        return Shipment()

    caller = list[threading.Thread]()

    def ask() -> None:
        caller.append(threading.current_thread())
        graph.execute(Shipment, Order(order_id="7"))

    with pytest.raises(StepFailed, match="none left"):
        within(ask)
    assert len(threads) == 1
    assert threads[0] is not caller[0]


def ship(charge: Charge) -> Shipment:
    """Ship what was charged."""
    return Shipment(tracking_id=charge.charge_id)


def test_a_claim_that_comes_after_the_lease_was_lost_is_given_up() -> None:
    """The look-up answers when the run has ended: nobody may wait for a step that will never run."""
    rates = Rates()
    rates.graph.register(ship, persist=Scope.WORKFLOW)
    asked, answer = threading.Event(), threading.Event()
    look_up = rates.store.lookup

    def slow(*args: Any, **options: Any) -> Checkpoint | bool:
        pass_on(asked, answer)
        return look_up(*args, **options)

    rates.store.lookup = slow  # type: ignore[method-assign]
    run = rates.graph.start(Shipment, Order(order_id="7"))
    reached(asked)
    held = run._run.context.held
    assert held is not None
    held.lost = True
    with pytest.raises(LeaseLost):
        run.result(WAIT_S)
    rates.store.lookup = look_up  # type: ignore[method-assign]
    answer.set()
    reached(rates.store.released)
    assert rates.store.claims == 0
    assert not process.heartbeat(rates.store)._claims
    assert within(rates.ask) == "7 1"


def test_a_step_that_waits_for_a_claim_is_withdrawn_when_another_step_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run does not sit out somebody else's computation, but what it runs itself still ends and is saved."""
    rates = Rates()
    withdrawn, finish, labelling = threading.Event(), threading.Event(), threading.Event()
    hold = Scheduler.hold

    @rates.graph.step
    def reserve(order: Order) -> Reservation:
        reached(rates.store.waited)
        reached(labelling)
        raise KeyError("sold out")

    @rates.graph.step(persist=Scope.WORKFLOW)
    def label(order: Order) -> Label:
        pass_on(labelling, finish)
        return Label()

    @rates.graph.step
    def ship(charge: Charge, reservation: Reservation, label: Label) -> Shipment:
        return Shipment()

    def note(execution: Scheduler) -> None:
        hold(execution)
        withdrawn.set()

    monkeypatch.setattr(Scheduler, "hold", note)
    heard: list[tuple[EventKind, str]] = []
    rates.graph.listeners.append(lambda event: heard.append((event.kind, event.step)))
    holding, go = threading.Event(), threading.Event()
    rates.body = lambda _: pass_on(holding, go)
    first = start(rates.ask)
    reached(holding)
    run = start(lambda: execute(rates.graph, Shipment, Order(order_id="7")))
    reached(withdrawn)
    assert not run.done(), "the run ended before its running step"
    finish.set()
    with pytest.raises(StepFailed, match="sold out") as caught:
        run.result(WAIT_S)
    assert caught.value.others == ()
    assert (EventKind.STEP_SUCCEEDED, "label") in heard
    assert not first.done()
    go.set()
    assert first.result(WAIT_S) == "7 1"
    assert rates.calls == ["7"]


def test_waiting_for_a_claim_looks_ever_less_often() -> None:
    """After 50 ms, then after twice as long each time, at last once a second."""
    rates, waits = Rates(), list[float]()

    class Patience(Timer):
        def after(self, delay_s: float, call: Callable[[], None]) -> Alarm:
            waits.append(delay_s)
            if len(waits) == 8:
                go.set()
            return super().after(0.001, call)

    holding, go = threading.Event(), threading.Event()
    rates.body = lambda _: pass_on(holding, go)
    first = start(rates.ask)
    reached(holding)
    process.runtime(2).timer = Patience()
    second = start(lambda: execute(rates.graph, Charge, Order(order_id="7"), threads=2))
    assert (first.result(WAIT_S), second.result(WAIT_S).charge_id) == ("7 1", "7 1")
    assert waits[:8] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


def test_a_run_that_is_stopped_while_it_waits_for_a_claim_ends() -> None:
    """It neither computes nor keeps looking once its own time is over."""
    rates = Rates()
    computing, go = threading.Event(), threading.Event()
    rates.body = lambda _ctx: pass_on(computing, go)
    first = start(rates.ask)
    reached(computing)
    with pytest.raises(Exception, match="passed its timeout"):
        within(lambda: rates.graph.execute(Charge, Order(order_id="7"), timeout=0.1))
    go.set()
    assert first.result(WAIT_S) == "7 1"
    assert rates.calls == ["7"]


def test_a_claim_outlives_the_attempts_of_its_step() -> None:
    """Between two attempts nobody else begins."""
    rates = Rates(retry=RetryPolicy(backoff=FixedBackoff(0.2)))
    heard: list[Event] = []
    rates.graph.listeners.append(heard.append)

    def body(ctx: StepContext) -> None:
        if ctx.attempt == 1:
            raise ConnectionError("again")
        reached(rates.store.waited)

    rates.body = body
    runs = [start(rates.ask) for _ in range(2)]
    assert [run.result(WAIT_S) for run in runs] == ["7 2"] * 2
    assert [event.kind for event in heard].count(EventKind.STEP_RESTORED) == 1


def test_a_claim_is_extended_on_the_calling_thread_too() -> None:
    """With `docket_threads` = 0, although such a run has no lease that would be extended beside it."""
    extended = threading.Event()

    class Extending(MemoryStore):
        def extend(
            self, leases: Sequence[Lease], claims: Sequence[tuple[bytes, str, float]] = ()
        ) -> dict[tuple[str | int, ...], Halt | None]:
            if claims:
                extended.set()
            return super().extend(leases, claims)

    graph, store = Graph("shop"), Extending()

    @graph.step(persist=Scope.GLOBAL)
    def charge(order: Order, ctx: StepContext) -> Charge:
        until = time.monotonic() + WAIT_S
        while not extended.is_set() and time.monotonic() < until:
            ctx.sleep(0.01)
        return Charge()

    settings = Settings(threads=0, lease_seconds=1)
    plan = graph.plan_for(ValueKey(Charge), (Order(),))
    within(lambda: graph.deliver(plan, (Order(),), Submission(execution_id="run"), settings, store=store))
    assert extended.is_set()


def test_of_equal_items_one_computes() -> None:
    """The other items of the batch wait for its claim as other runs do."""
    rates = Rates()
    rates.body = lambda _ctx: reached(rates.store.waited)
    orders = [Order(order_id="7")] * 4
    made = within(lambda: rates.graph.execute_batch(Charge, orders, max_concurrency=4))
    assert [charge.charge_id for charge in made] == ["7 1"] * 4
    assert rates.calls == ["7"]
    assert rates.store.claims == 0


def test_an_item_that_fails_drops_its_own_claim_alone() -> None:
    """The next one computes under a claim of its own, which nobody else gives up."""
    rates = Rates()
    claims: list[int] = []

    def body(_ctx: StepContext) -> None:
        if len(rates.calls) == 1:
            reached(rates.store.waited)
            raise ValueError("first")
        reached(rates.store.released)
        claims.append(rates.store.claims)

    rates.body = body
    orders = [Order(order_id="7")] * 3
    done = within(lambda: rates.graph.execute_batch(Charge, orders, max_concurrency=3, on_error="collect"))
    assert len(done.errors) == 1
    assert {charge.charge_id for _, charge in done.succeeded()} == {"7 2"}
    assert (rates.calls, claims, rates.store.claims) == (["7", "7"], [1], 0)


def test_of_two_steps_with_one_cache_one_computes() -> None:
    """Steps of one run that share entries wait for each other too."""
    store, calls = WatchedStore(lambda: 1000.0), list[str]()
    graph = Graph("twins", store=store)

    def compute(order: Order) -> Charge:
        calls.append(order.order_id)
        reached(store.waited)
        return Charge(charge_id=f"{order.order_id} {len(calls)}")

    @graph.step(persist=Scope.GLOBAL, cache="twins")
    def first(order: Order) -> Annotated[Charge, Named("first")]:
        return compute(order)

    @graph.step(persist=Scope.GLOBAL, cache="twins")
    def second(order: Order) -> Annotated[Charge, Named("second")]:
        return compute(order)

    @graph.step
    def join(one: Annotated[Charge, Named("first")], other: Annotated[Charge, Named("second")]) -> Shipment:
        return Shipment(tracking_id=f"{one.charge_id}, {other.charge_id}")

    assert within(lambda: graph.execute(Shipment, Order(order_id="7"))).tracking_id == "7 1, 7 1"
    assert calls == ["7"]
