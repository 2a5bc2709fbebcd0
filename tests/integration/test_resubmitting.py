"""What submitting an execution id again means on real workers, also after a deploy has changed the graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator

import pytest
from celery import Celery

from docket_celery import GraphChanged, InputsChanged, RunCancelled, RunConflict, StepFailed
from docket_celery.graph import Graph
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import Scope
from docket_celery.store import SQLStore
from docket_celery.store.identity import idempotency_key
from docket_celery.store.records import Purged
from tests.conftest import StartWorker
from tests.integration.apps.deploys import app, charge_order, ship_order
from tests.integration.apps.journal import Journals
from tests.unit.graphs import reached
from tests.unit.protos.shop_pb2 import Charge, Label, Order, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

APP = "tests.integration.apps.deploys"
ORDER, LABEL = Order(order_id="7"), Label(text="fragile")
KEY = idempotency_key("deploys", "o-1", "charge")


@pytest.fixture
def journals(connect_app: Callable[[Celery], Celery], result_url: str) -> Journals:
    """What the steps noted; the app is connected to the test's servers."""
    connect_app(app)
    return Journals(result_url)


@pytest.fixture
def store(database_url: str) -> Generator[SQLStore]:
    """A store on the workers' database."""
    store = SQLStore(database_url)
    yield store
    store.close()


@pytest.fixture
def deploy(start_worker: StartWorker) -> Callable[..., Shipment]:
    """A function that has a worker of one deploy run the job, and stops it again."""

    def run(name: str, *, fails: bool = False, order: Order = ORDER, execution_id: str = "o-1") -> Shipment:
        env = {"DEPLOY": name, "FAIL": "1"} if fails else {"DEPLOY": name}
        with start_worker("solo", 1, app=APP, env=env):
            return ship_order.apply_async((order, LABEL), execution_id=execution_id).get(timeout=40)

    return run


@pytest.mark.slow
def test_a_failed_run_goes_on_through_a_chain_of_renames(
    deploy: Callable[..., Shipment], journals: Journals
) -> None:
    """Each deploy finds the checkpoint of the first one; a new run has the key that it would have had then."""
    for name in ("first", "renamed"):
        with pytest.raises(StepFailed, match="no carrier"):
            deploy(name, fails=True)
    assert deploy("renamed again") == Shipment(tracking_id=KEY)
    assert journals.read("calls") == [f"charge {KEY}", "ship", "ship", "ship"]
    other = idempotency_key("deploys", "o-2", "charge")
    assert deploy("renamed again", execution_id="o-2") == Shipment(tracking_id=other)


def test_a_step_that_is_gone_runs_nothing_and_names_the_fixes(
    deploy: Callable[..., Shipment], journals: Journals
) -> None:
    """A dropped name must not charge again under another one; with the step back the run goes on."""
    with pytest.raises(StepFailed):
        deploy("first", fails=True)
    with pytest.raises(GraphChanged, match="holds checkpoints of 'charge'") as caught:
        deploy("gone")
    for fix in ("put the step back", "renamed_from=", "use a new execution_id"):
        assert fix in str(caught.value)
    assert journals.read("calls") == [f"charge {KEY}", "ship"]
    assert deploy("first") == Shipment(tracking_id=KEY)
    assert journals.read("calls") == [f"charge {KEY}", "ship", "ship"]


def test_a_checkpoint_from_other_inputs_is_reused_and_told_of_or_refused(
    deploy: Callable[..., Shipment], journals: Journals
) -> None:
    """A deploy gave the step one input more, which is at hand: the policy decides, before anything runs."""
    with pytest.raises(StepFailed):
        deploy("first", fails=True)
    with pytest.raises(
        InputsChanged, match="checkpoint of step 'charge' was made from other inputs"
    ) as caught:
        deploy("strict")
    assert 'on_input_change="reuse"' in str(caught.value)
    assert journals.read("calls") == [f"charge {KEY}", "ship"]
    assert journals.read("events") == []
    assert deploy("wider") == Shipment(tracking_id=KEY)
    assert journals.read("calls") == [f"charge {KEY}", "ship", "ship"]
    assert journals.read("events") == ["charge: checkpoint reused"]


def test_the_same_name_for_another_job_or_target_is_a_conflict(
    start_worker: StartWorker, journals: Journals
) -> None:
    """Nothing runs; the same job again is a read of the stored result."""
    with start_worker("solo", 1, app=APP):
        first = ship_order.apply_async((ORDER, LABEL), execution_id="o-1").get(timeout=40)
        other = ship_order.apply_async((Order(order_id="8"), LABEL), execution_id="o-1")
        with pytest.raises(RunConflict, match="exists with another job"):
            other.get(timeout=40)
        with pytest.raises(RunConflict, match="exists with another target"):
            charge_order.apply_async((ORDER, LABEL), execution_id="o-1").get(timeout=40)
        assert ship_order.apply_async((ORDER, LABEL), execution_id="o-1").get(timeout=40) == first
    assert journals.read("calls") == [f"charge {KEY}", "ship"]


def test_a_purged_run_is_unknown_and_starts(
    start_worker: StartWorker, journals: Journals, store: SQLStore
) -> None:
    """With no retention at all an ended run may go at once; before that, its result is still there."""
    with start_worker("solo", 1, app=APP, env={"DOCKET_CELERY_RETENTION": "0"}):
        for calls in (2, 2, 4):
            if calls == 4:
                assert store.purge(10) == Purged(runs=1, checkpoints=1, executions=2)
                assert store.find_run("deploys", "o-1") is None
            ship_order.apply_async((ORDER, LABEL), execution_id="o-1").get(timeout=40)
            assert len(journals.read("calls")) == calls
    assert journals.read("calls") == [f"charge {KEY}", "ship"] * 2


def test_a_run_that_was_cancelled_elsewhere_stays_cancelled(
    start_worker: StartWorker, journals: Journals, store: SQLStore
) -> None:
    """A script cancelled it; the task is told so and calls nothing."""
    graph, charging = Graph("deploys", store=store), threading.Event()

    @graph.step(persist=Scope.WORKFLOW)
    def charge(order: Order, ctx: StepContext) -> Charge:
        charging.set()
        ctx.sleep(3600)
        return Charge()

    @graph.step
    def ship(charge: Charge) -> Shipment:
        return Shipment()

    handle = graph.start(Shipment, ORDER, LABEL, execution_id="o-1")
    reached(charging)
    handle.cancel()
    with pytest.raises(RunCancelled):
        handle.result(timeout=30)
    with start_worker("solo", 1, app=APP), pytest.raises(RunCancelled, match="run 'o-1' was cancelled"):
        ship_order.apply_async((ORDER, LABEL), execution_id="o-1").get(timeout=40)
    assert journals.read("calls") == []
