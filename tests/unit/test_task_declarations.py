from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Generator
from typing import Any

import pytest
from celery import Celery, _state, shared_task

from docket_celery import Graph, GraphTask, InvalidDeclaration, StepFailed, graph_task, shared_graph_task
from tests.unit.protos.shop_pb2 import Charge, Order, Shipment

Declare = Callable[..., Any]


class BusyError(Exception):
    """A step's own failure."""


@pytest.fixture
def app() -> Generator[Celery]:
    """An app of the test's own, current while the test runs; shared tasks do not outlive it."""
    state: Any = _state
    finalizers, before = set(state._on_app_finalizers), state.default_app
    made = Celery("declarations", broker="memory://", backend="cache+memory://")
    made.set_current()
    made.set_default()
    yield made
    state._on_app_finalizers.clear()
    state._on_app_finalizers.update(finalizers)
    state.default_app = before
    state._tls.current_app = None
    made.close()


@pytest.fixture
def graph() -> Graph:
    """Order to Shipment, failing for orders without a name."""
    made = Graph("declarations")

    @made.step
    def ship(order: Order) -> Shipment:
        if not order.order_id:
            raise BusyError("no name")
        return Shipment(tracking_id=f"T-{order.order_id}")

    return made


def by_class(app: Celery, graph: Graph, **options: Any) -> Declare:
    """Return a decorator that declares a class from a function's name."""

    def declare(function: Callable[..., Any]) -> Any:
        space = {"graph": graph, "__doc__": function.__doc__, "name": f"declarations.{function.__name__}"}
        base: Any = GraphTask[[Order], Shipment]

        class Task(base):  # type: ignore[misc, unused-ignore]
            locals().update(space | options)

        return app.register_task(Task())

    return declare


WAYS: dict[str, Callable[..., Declare]] = {
    "graph_task": graph_task,
    "shared_graph_task": lambda _app, graph, **options: shared_graph_task(graph, **options),
    "class": by_class,
    "app.task": lambda app, graph, **options: app.task(base=GraphTask, graph=graph, **options),
    "shared_task": lambda _app, graph, **options: shared_task(base=GraphTask, graph=graph, **options),
}
DECORATORS = sorted(WAYS.keys() - {"class"})


@pytest.fixture(params=sorted(WAYS))
def declare(request: pytest.FixtureRequest, app: Celery, graph: Graph) -> Declare:
    """A function that declares a task of the graph, with Celery's options, in one of the ways."""
    way = WAYS[request.param]

    def declared(**options: Any) -> Any:
        def ship_order(order: Order) -> Shipment:
            """Ship an order."""
            raise NotImplementedError

        # Shared tasks reach every app that is alive, so names are told apart.
        name = f"declarations.{uuid.uuid4().hex}.ship_order"
        return way(app, graph, **{"name": name, **options})(ship_order)

    return declared


def test_options_mean_the_same_in_each_way(declare: Declare) -> None:
    """Celery's attributes and ours, on the task as it was declared."""
    task = declare(
        max_retries=7, rate_limit="2/s", soft_time_limit=5, execution_id=lambda order: order.order_id
    )
    assert (task.max_retries, task.declared_max_retries) == (7, 7)
    assert (task.rate_limit, task.soft_time_limit) == ("2/s", 5)
    assert task.execution_id(Order(order_id="x")) == "x"
    assert task(Order(order_id="7")) == Shipment(tracking_id="T-7")


def test_a_queue_is_declared_without_a_warning(declare: Declare) -> None:
    """Celery deprecates the attribute; ours is given with each submission."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = declare(queue="orders", priority=3)
        assert task.routing == {"queue": "orders", "priority": 3}
    task.delay(Order(order_id="7"))
    with task.app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        assert channel.queue_declare("orders", passive=True).message_count == 1
        channel.queue_purge("orders")


def test_throws_and_autoretry_see_the_cause(declare: Declare) -> None:
    """All that Celery does with throws is an isinstance."""
    task = declare(throws=(BusyError,))
    failed = StepFailed.from_cause("ship", 1, True, BusyError("no"))
    assert isinstance(failed, task.throws)
    assert isinstance(BusyError("no"), task.throws)
    assert not isinstance(StepFailed.from_cause("ship", 1, True, KeyError("no")), task.throws)


def test_a_failing_step_raises_here(declare: Declare) -> None:
    """A direct call fails as the run does, with the user's own exception as the cause."""
    with pytest.raises(StepFailed) as caught:
        declare()(Order())
    assert isinstance(caught.value.__cause__, BusyError)


def test_a_task_knows_its_name_and_text(declare: Declare) -> None:
    """As any task."""
    task = declare()
    assert task.name.endswith("ship_order")
    assert task.__doc__ == "Ship an order."
    assert task.app.tasks[task.name].plan().target.kind is Shipment


@pytest.mark.parametrize("way", DECORATORS)
def test_bind_is_refused(way: str, app: Celery, graph: Graph) -> None:
    """The body never runs, so it needs no task."""

    def ship_order(self: Any, order: Order) -> Shipment:
        raise NotImplementedError

    with pytest.raises(InvalidDeclaration, match="bind=True"):
        _ = WAYS[way](app, graph, bind=True)(ship_order).name


@pytest.mark.parametrize("way", DECORATORS)
def test_a_body_with_work_is_refused(way: str, app: Celery, graph: Graph) -> None:
    """It would be silently ignored."""

    def ship_order(order: Order) -> Shipment:
        return Shipment(tracking_id=order.order_id)

    with pytest.raises(InvalidDeclaration, match="its body would never run"):
        _ = WAYS[way](app, graph)(ship_order).name


@pytest.mark.parametrize("way", DECORATORS)
def test_a_type_that_is_no_message_is_refused(way: str, app: Celery, graph: Graph) -> None:
    """In or out."""

    def ship_order(order: str) -> Shipment:
        raise NotImplementedError

    with pytest.raises(InvalidDeclaration, match="order"):
        _ = WAYS[way](app, graph)(ship_order).name


@pytest.mark.parametrize("way", DECORATORS)
def test_a_graph_that_is_none_is_refused(way: str, app: Celery) -> None:
    """A mistake at the decorator, not at the first run."""

    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    with pytest.raises(InvalidDeclaration, match="Graph"):
        _ = WAYS[way](app, "checkout")(ship_order).name


def test_a_class_without_types_is_refused(graph: Graph) -> None:
    """It says how to write them."""
    wanted = graph
    with pytest.raises(InvalidDeclaration, match=r"GraphTask\[\[InputType\], OutputType\]"):

        class ShipOrder(GraphTask):  # type: ignore[type-arg]
            graph = wanted


def test_a_class_with_a_run_method_is_refused(graph: Graph) -> None:
    """The graph is what runs."""
    wanted = graph
    with pytest.raises(InvalidDeclaration, match="drop its run method"):

        class ShipOrder(GraphTask[[Order], Shipment]):
            graph = wanted

            def run(self, order: Order) -> Shipment:
                return Shipment(tracking_id=order.order_id)


def test_a_class_with_no_message_types_is_refused(graph: Graph) -> None:
    """Types are messages."""
    wanted = graph
    with pytest.raises(InvalidDeclaration):

        class ShipOrder(GraphTask[[int], Shipment]):  # type: ignore[type-var, unused-ignore]
            graph = wanted


def test_a_base_class_of_ones_own_may_hold_options(app: Celery, graph: Graph) -> None:
    """A class without a graph is abstract; its options are inherited, and a chosen class wins."""

    class Durable(GraphTask[[Order], Shipment]):
        max_retries = 9

    wanted = graph

    class ShipOrder(Durable, GraphTask[[Order], Shipment]):
        graph = wanted

    task = app.register_task(ShipOrder())
    assert task.declared_max_retries == 9
    assert task(Order(order_id="1")) == Shipment(tracking_id="T-1")


def test_two_tasks_share_a_graph(app: Celery, graph: Graph) -> None:
    """Each has its own types."""

    @graph.step
    def charge(order: Order) -> Charge:
        return Charge(charge_id=order.order_id)

    @graph_task(app, graph)
    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    @graph_task(app, graph)
    def charge_order(order: Order) -> Charge:
        raise NotImplementedError

    assert ship_order(Order(order_id="1")) == Shipment(tracking_id="T-1")
    assert charge_order(Order(order_id="1")) == Charge(charge_id="1")
