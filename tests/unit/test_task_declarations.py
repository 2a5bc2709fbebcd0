from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Generator
from typing import Any

import pytest
from celery import Celery, _state, shared_task

from docket_celery import (
    Graph,
    GraphError,
    GraphTask,
    InvalidArguments,
    InvalidDeclaration,
    RetryPolicy,
    Scope,
    StepFailed,
    graph_task,
    shared_graph_task,
)
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
    # Shared tasks reach every app that is alive, in which a name belongs to one graph.
    made = Graph(f"declarations-{uuid.uuid4().hex}")

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


def test_a_task_made_from_another_ones_class_has_its_own_wiring_looked_at(app: Celery, graph: Graph) -> None:
    """Its graph may have as many steps as the other one's, of which all is well."""
    broken, sound = Graph(f"broken-{uuid.uuid4().hex}"), graph

    @broken.step
    def ship(order: Charge) -> Shipment:
        del order
        return Shipment()

    class ShipOrder(GraphTask[[Order], Shipment]):
        graph = sound

    class ShipBroken(ShipOrder, GraphTask[[Order], Shipment]):
        graph = broken

    app.register_task(ShipOrder()).delay(Order(order_id="1"))
    with pytest.raises(GraphError):
        app.register_task(ShipBroken()).delay(Order(order_id="1"))


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


@pytest.mark.parametrize("way", ["graph_task", "app.task", "class"])
def test_two_graphs_of_one_name_are_refused_in_one_app(way: str, app: Celery, graph: Graph) -> None:
    """The second task would return what the first one's runs have stored; both places are named."""
    twin = Graph(graph.name)

    def first(order: Order) -> Shipment:
        raise NotImplementedError

    def second(order: Order) -> Shipment:
        raise NotImplementedError

    WAYS["graph_task"](app, graph, name="shop.first")(first)
    WAYS["graph_task"](app, graph, name="shop.again")(second)
    line = first.__code__.co_firstlineno
    with pytest.raises(InvalidDeclaration, match=rf"another Graph .*shop\.first \(.*\.py:{line}\)"):
        declare_now(app, way, twin, second, name="shop.second")
    other = Celery("other", broker="memory://")
    WAYS["graph_task"](other, twin, name="shop.second")(second)
    other.close()


def test_two_apps_of_one_process_may_each_have_a_graph_of_one_name(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery gives each app the tasks of the other one."""
    # Only here: other tests' apps are not to get these tasks.
    state: Any = _state
    monkeypatch.setattr(state, "_on_app_finalizers", set(state._on_app_finalizers))
    twin = Graph(graph.name)

    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    apps = [Celery(name, broker="memory://", set_as_current=False) for name in ("first", "second")]
    for app, own in zip(apps, (graph, twin), strict=True):
        graph_task(app, own, name=f"{app.main}.ship")(ship_order)
    for app, own in zip(apps, (graph, twin), strict=True):
        app.finalize()
        tasks: Any = app.tasks
        assert tasks[f"{app.main}.ship"].graph is own
        app.close()


def test_two_graphs_of_one_name_are_refused_for_shared_tasks(app: Celery, graph: Graph) -> None:
    """As soon as an app takes them."""

    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    def declare_both() -> None:
        shared_graph_task(graph, name="shop.first")(ship_order)
        shared_graph_task(Graph(graph.name), name="shop.second")(ship_order)
        app.finalize()

    with pytest.raises(InvalidDeclaration, match="another Graph object named 'declarations-"):
        declare_both()


def test_a_module_that_is_loaded_again_brings_its_graph_along(app: Celery, graph: Graph) -> None:
    """The same tasks with another object of the graph: nothing is told apart by it."""

    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    again = Graph(graph.name)
    for each in (graph, graph, again, again):
        for name in ("shop.first", "shop.second"):
            graph_task(app, each, name=name)(ship_order)


def declare_now(app: Celery, way: str, graph: Graph, function: Callable[..., Any], **options: Any) -> Any:
    """Declare a task and have Celery make it, which it does late where the form is its own."""
    task = WAYS[way](app, graph, **options)(function)
    return task.name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"retry": RetryPolicy()}, r"retry= is an option of a step; give it to graph.step"),
        ({"timeout": 5}, "timeout= is an option of a step"),
        ({"persist": Scope.WORKFLOW}, "persist= is an option of a step"),
        ({"rate_limt": "2/s"}, r"rate_limt= is no option of a task; did you mean rate_limit=\?"),
        ({"retries": 3}, r"if it is meant for a step, write retry=RetryPolicy\(max_attempts=...\)"),
        ({"colour": "red"}, "colour= is no option of a task; see Celery's task options"),
    ],
)
def test_an_option_that_no_task_has_is_refused(
    options: dict[str, Any], said: str, app: Celery, graph: Graph
) -> None:
    """Celery would take it as an attribute, and nothing would happen."""

    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    for way in DECORATORS:
        with pytest.raises(InvalidDeclaration, match=said):
            declare_now(app, way, graph, ship_order, **options)


def test_a_step_option_on_a_class_is_refused(app: Celery, graph: Graph) -> None:
    """Where it can be told from an attribute of one's own."""

    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    for options in ({"persist": Scope.WORKFLOW}, {"timeout": 5}, {"retry": RetryPolicy()}):
        with pytest.raises(InvalidDeclaration, match="is an option of a step"):
            by_class(app, graph, **options)(ship_order)
    by_class(app, graph, version="7", colour="red")(ship_order)


def test_a_naming_method_with_self_is_refused(graph: Graph) -> None:
    """It is called with the messages alone."""
    with pytest.raises(InvalidDeclaration, match=r"execution_id takes \(self, order\).*drop self"):

        class Ship(GraphTask[[Order], Shipment]):
            graph = Graph("named")

            def execution_id(self, order):  # type: ignore[no-untyped-def]
                return order.order_id


def test_a_naming_function_takes_each_message(app: Celery, graph: Graph) -> None:
    """One for each parameter."""

    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    def name_run(order: Order, other: Order) -> str:
        return order.order_id + other.order_id

    with pytest.raises(InvalidDeclaration, match=r"the task has 1 message\(s\)"):
        declare_now(app, "graph_task", graph, ship_order, execution_id=name_run)


def test_a_wiring_fault_raises_where_the_job_is_submitted(app: Celery, graph: Graph) -> None:
    """Not first in the worker, after the caller has gone on."""

    def label(order: Order) -> Charge:
        raise NotImplementedError

    task = graph_task(app, graph, name="shop.label")(label)
    with pytest.raises(GraphError, match="DC122"):
        task.delay(Order(order_id="7"))


def test_a_serializer_that_cannot_carry_messages_is_refused(app: Celery, declare: Declare) -> None:
    """Where it is declared, and at the call; that of the app's other tasks is not taken over."""
    app.conf.task_serializer = "yaml"
    task = declare()
    assert task.serializer == "json"
    with pytest.raises(InvalidArguments, match="serializer: is 'yaml', and messages travel in JSON"):
        task.apply_async((Order(order_id="17"),), serializer="yaml")
    with pytest.raises(InvalidArguments, match="serializer: is 'pickle'"):
        assert declare(serializer="pickle").name  # Celery's own ways are lazy
