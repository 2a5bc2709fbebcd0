"""GLOBAL steps over real processes and Postgres: one computes, whatever happens to it; waiting holds up nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack

import pytest
from celery import Celery
from sqlalchemy.pool import QueuePool

from docket_celery import Graph, Scope, StepFailed
from docket_celery.plan.messages import to_bytes, type_name
from docket_celery.store import SQLStore
from docket_celery.store.identity import global_key
from tests.conformance.samples import SQLBench, shared
from tests.conftest import StartWorker
from tests.infra.processes import ROOT, wait_until
from tests.integration.apps.book import Book
from tests.integration.apps.rates import app, convert_order, quote_order, rates
from tests.unit.graphs import execute, reached, start
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

APP = "tests.integration.apps.rates"
WITHIN_S = 60.0
Process = subprocess.Popen[str]


class StartAskers:
    """Starts processes that ask for one rate at the same moment."""

    def __init__(self, env: dict[str, str], stack: ExitStack) -> None:
        self._env, self._stack = env, stack

    def __call__(self, processes: int, calls: int, lease_s: float, *words: str) -> list[Process]:
        """Start so many processes with so many calls each; they wait for `go`."""
        started: list[Process] = []
        for number in range(processes):
            process = subprocess.Popen(
                [sys.executable, "-m", APP, f"p{number}-{len(words)}", str(calls), *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**self._env, "DOCKET_CELERY_LEASE_SECONDS": str(lease_s)},
            )
            self._stack.enter_context(process)
            self._stack.callback(process.kill)
            started.append(process)
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        return started


def go(processes: list[Process]) -> None:
    """Let them ask."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def answers(process: Process) -> list[str]:
    """Return what each call of a process got, once it has ended."""
    out, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0
    return out.split("\n")[:-1]


@pytest.fixture
def book(connect_app: Callable[[Celery], Celery], database_url: str) -> Book:
    """The calls of the step, in empty tables; the app is connected to the test's servers."""
    connect_app(app)
    made = Book(database_url)
    made.create()
    return made


@pytest.fixture
def start_askers(worker_env: dict[str, str], book: Book) -> Generator[StartAskers]:
    """A function that starts processes, killed after the test."""
    with ExitStack() as stack:
        yield StartAskers(worker_env, stack)


@pytest.fixture
def bench(database_url: str) -> Generator[SQLBench]:
    """A store on the test's database."""
    store = SQLStore(database_url)
    yield SQLBench(store)
    store.close()


def wait_for_owner(book: Book, within_s: float = WITHIN_S) -> int:
    """Return the process that computes, once one does."""
    wait_until(lambda: bool(book.acts(step="find_rate")), within_s=within_s, what="somebody computes")
    return book.acts(step="find_rate")[0].pid


class TestProcesses:
    """In process: `graph.execute` from many processes."""

    def test_of_32_cold_calls_one_computes(self, start_askers: StartAskers, book: Book) -> None:
        """Four processes with eight calls each: all get the value, and it was found once."""
        processes = start_askers(4, 8, 60.0, "spend=500")
        go(processes)
        assert [answers(process) for process in processes] == [["1"] * 8] * 4
        assert len(book.acts(step="find_rate")) == 1
        assert book.rows(
            "SELECT count(*) FROM docket_executions WHERE step_name = 'find_rate' AND cached"
        ) == [(31,)]

    @pytest.mark.slow
    @pytest.mark.leaves_lease
    def test_after_a_killed_owner_one_more_computes(self, start_askers: StartAskers, book: Book) -> None:
        """The rest go on once its claim is over, and not before: it might be alive."""
        owner, *others = start_askers(4, 8, 3.0, "hang=1", "spend=300")
        go([owner])
        assert wait_for_owner(book) == owner.pid
        go(others)
        wait_until(
            lambda: len(book.acts(step="ask")) == 32,
            within_s=WITHIN_S,
            what="all have begun",
        )
        time.sleep(3.5)  # longer than the claim: its owner lives and extends it
        assert len(book.acts(step="find_rate")) == 1
        owner.send_signal(signal.SIGKILL)
        assert [answers(process) for process in others] == [["2"] * 8] * 3
        assert len(book.acts(step="find_rate")) == 2

    @pytest.mark.slow
    def test_after_a_failed_owner_others_go_on_at_once(self, start_askers: StartAskers, book: Book) -> None:
        """It gives its claim up, which would hold for ten minutes; its own run fails, and one more computes."""
        processes = start_askers(4, 8, 600.0, "fail=1000", "spend=300")
        go(processes)
        found = sorted(answer for process in processes for answer in answers(process))
        assert found == ["2"] * 31 + ["no rate today"]
        first, second = book.acts(step="find_rate")
        assert first.ended_at is not None
        assert (second.began_at - first.ended_at).total_seconds() < 15


class TestGraphTasks:
    """The same through Celery workers."""

    def test_of_32_cold_tasks_one_computes(self, start_worker: StartWorker, book: Book) -> None:
        """Two workers with three children each; waiting tasks keep their child, as any task does."""
        for _ in range(2):
            start_worker("prefork", 3, app=APP)
        order = Order(order_id="7", stock={"spend": 500})
        results = [convert_order.delay(order) for _ in range(32)]
        assert {result.get(timeout=WITHIN_S).amount_cents for result in results} == {1}
        assert len(book.acts(step="find_rate")) == 1

    def test_after_a_killed_child_one_more_computes(self, start_worker: StartWorker, book: Book) -> None:
        """All tasks succeed, the killed one too: Celery delivers it again."""
        worker = start_worker("prefork", 4, app=APP, env={"DOCKET_CELERY_LEASE_SECONDS": "3"})
        order = Order(order_id="7", stock={"hang": 1})
        results = [convert_order.delay(order) for _ in range(8)]
        worker.kill_child(wait_for_owner(book))
        assert {result.get(timeout=WITHIN_S).amount_cents for result in results} == {2}
        assert len(book.acts(step="find_rate")) == 2

    @pytest.mark.usefixtures("book")
    def test_a_failed_owner_fails_its_task_alone(self, start_worker: StartWorker) -> None:
        """The others neither fail nor wait for a lease."""
        start_worker("threads", 4, app=APP, env={"DOCKET_CELERY_LEASE_SECONDS": "600"})
        order = Order(order_id="7", stock={"fail": 500})
        results = [convert_order.delay(order) for _ in range(8)]
        outcomes = [result.get(timeout=WITHIN_S, propagate=False) for result in results]
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Charge"] * 7 + ["StepFailed"]
        assert {outcome.amount_cents for outcome in outcomes if isinstance(outcome, Charge)} == {2}

    @pytest.mark.usefixtures("book")
    def test_what_names_an_entry(self, start_worker: StartWorker, bench: SQLBench) -> None:
        """Cache, version, and what ``key=`` leaves of the inputs; for an hour of the database's clock."""

        def ask(order_id: str = "7", amount_cents: int = 0) -> int:
            order = Order(order_id=order_id, amount_cents=amount_cents)
            return convert_order.delay(order).get(timeout=WITHIN_S).amount_cents

        with start_worker("solo", app=APP):
            assert (ask(), ask(amount_cents=5), ask(order_id="8")) == (1, 1, 2)
            # Another graph, another step, the same cache.
            assert quote_order.delay(Order(order_id="7")).get(timeout=WITHIN_S) == Label(text="1")
            bench.pass_time(3590)
            assert ask() == 1
            bench.pass_time(20)
            assert ask() == 3
            assert rates.forget("find_rate", Order(order_id="7"), store=bench.store)
            assert ask() == 4
        with start_worker("solo", app=APP, env={"RATES_VERSION": "2"}):
            assert ask() == 5
        with start_worker("solo", app=APP):
            assert ask() == 4


class TestWaiting:
    """What a step costs that waits for another process."""

    @pytest.fixture
    def waiting(self, bench: SQLBench) -> tuple[Graph, threading.Event, Callable[[], None]]:
        """A graph whose shared step waits, an event of its other step, and what ends the waiting."""
        graph, shipped = Graph("waiting", store=bench.store), threading.Event()
        order = Order(order_id="7")

        @graph.step(persist=Scope.GLOBAL)
        def find_rate(order: Order) -> Money:
            raise AssertionError("another one computes")

        @graph.step
        def ship(order: Order) -> Shipment:
            shipped.set()
            return Shipment()

        @graph.step
        def charge(rate: Money, shipment: Shipment) -> Charge:
            return Charge(amount_cents=rate.cents)

        key = global_key("waiting", "find_rate", "", [(type_name(order), to_bytes(order))])
        assert bench.store.lookup(key, "rival", 600.0) is True

        def publish() -> None:
            data, kind = to_bytes(Money(cents=5)), type_name(Money)
            bench.store.publish(shared("find_rate", data, key=key, output_type=kind), "rival", None)

        return graph, shipped, publish

    def test_it_holds_neither_a_thread_nor_a_connection(
        self, waiting: tuple[Graph, threading.Event, Callable[[], None]], bench: SQLBench
    ) -> None:
        """On a pool of one thread the other steps of this run and of other runs go on."""
        graph, shipped, publish = waiting
        assert isinstance(bench.store, SQLStore)
        pool = bench.store.engine.pool
        assert isinstance(pool, QueuePool)
        held: list[int] = []
        run = start(lambda: execute(graph, Charge, Order(order_id="7"), threads=1))
        reached(shipped)
        beside = Graph("beside")

        @beside.step
        def label(order: Order) -> Label:
            held.append(pool.checkedout())
            return Label()

        for number in range(20):
            execute(beside, Label, Order(), threads=1, helps=False, execution_id=f"beside-{number}")
            time.sleep(0.05)
        assert not run.done()
        # Between two looks there is none; a look itself takes one for a moment.
        assert held.count(0) >= 15, held
        publish()
        assert run.result(30) == Charge(amount_cents=5)

    def test_many_wait_on_one_thread(
        self, waiting: tuple[Graph, threading.Event, Callable[[], None]]
    ) -> None:
        """Ten runs that wait are ten timers, and each gets the value."""
        graph, _, publish = waiting
        runs = [
            start(
                lambda number=number: execute(  # type: ignore[misc]
                    graph, Charge, Order(order_id="7"), threads=1, execution_id=f"o-{number}"
                )
            )
            for number in range(10)
        ]
        publish()
        assert [run.result(30) for run in runs] == [Charge(amount_cents=5)] * 10


def test_a_broken_step_keeps_no_claim(bench: SQLBench) -> None:
    """Nothing of a failed computation is left in the tables but its history."""
    graph = Graph("broken", store=bench.store)

    @graph.step(persist=Scope.GLOBAL)
    def find_rate(order: Order) -> Money:
        raise ConnectionError("no rate today")

    with pytest.raises(StepFailed):
        graph.execute(Money, Order(order_id=str(os.getpid())))
    assert bench.sql("SELECT 1 FROM docket_claims WHERE lease_until > now()") == []
    assert bench.sql("SELECT 1 FROM docket_cache") == []
