"""Calls that both type checkers must refuse, each on the line that its mark stands on, and no other line."""

from __future__ import annotations

from celery import Celery

from docket_celery import (
    ExponentialBackoff,
    FixedBackoff,
    Graph,
    GraphTask,
    RetryPolicy,
    RunTimedOut,
    Scope,
    StepOptions,
    StoreMissing,
    WrongResult,
    graph_task,
    shared_graph_task,
)
from workers.orders_pb2 import ChargeResult, Order, Reservation, Shipment

app = Celery("shop")
checkout = Graph("checkout")
order = Order()


@checkout.step
def reserve(order: Order, charge: ChargeResult) -> Reservation:
    """Reserve."""
    return Reservation(reservation_id=order.order_id + charge.charge_id)


@graph_task(app, checkout)
def process_order(order: Order) -> Shipment:
    """Process."""
    raise NotImplementedError


@shared_graph_task(checkout)
def process_shared(order: Order, charge: ChargeResult) -> Shipment:
    """Process."""
    raise NotImplementedError


class ProcessOrder(GraphTask[[Order], Shipment]):
    """Process."""

    graph = checkout


process_class = ProcessOrder()


class Ship:
    """A step with state."""

    def compute(self, reservation: Reservation) -> Shipment:
        """Ship."""
        return Shipment(tracking_number=reservation.reservation_id)


# --- arguments of tasks
process_order.delay()  # expect-error
process_order.delay("17")  # expect-error
process_order.delay(Shipment())  # expect-error
process_order.delay_on_commit(Shipment())  # expect-error
process_class.delay_on_commit()  # expect-error
process_order.delay(order, order)  # expect-error
process_order.delay(orders=order)  # expect-error
process_order()  # expect-error
process_order(Reservation())  # expect-error
process_shared.delay(order)  # expect-error
process_shared.delay(ChargeResult(), order)  # expect-error
process_shared(order, charge=order)  # expect-error
process_class.delay()  # expect-error
process_class.delay(Shipment())  # expect-error
process_class(Shipment())  # expect-error
process_order.apply_async((order,), execution_id=17)  # expect-error
process_order.apply_async((order,), context=["a"])  # expect-error

# --- results of tasks
r1: Reservation = process_order.delay(order).get()  # expect-error
r2: Reservation = process_order(order)  # expect-error
r3: Reservation = process_shared.delay(order, ChargeResult()).get()  # expect-error
r4: Reservation = process_class.delay(order).get()  # expect-error
r5 = process_order.delay(order).get().weight  # expect-error

# --- running in process
e1: Reservation = checkout.execute(Shipment, order)  # expect-error
checkout.execute(Shipment, "17")  # expect-error
checkout.execute(str, order)  # expect-error
checkout.execute(Shipment(), order)  # expect-error
checkout.execute(Shipment, order, execution_id=17)  # expect-error
checkout.execute(Shipment, order, timeout="1")  # expect-error
checkout.execute(Shipment, order, max_concurency=1)  # expect-error
checkout.plan(Shipment, Order())  # expect-error
checkout.validate("Order")  # expect-error

# --- steps keep their types
reserve(order)  # expect-error
reserve(order, order)  # expect-error
s1: Shipment = reserve(order, ChargeResult())  # expect-error

# --- options of steps
checkout.step(retires=RetryPolicy())  # expect-error
checkout.step(retry=3)  # expect-error
checkout.step(persist="workflow")  # expect-error
checkout.step(timeout="30")  # expect-error
checkout.step(on_input_change="ignore")  # expect-error
checkout.step(renamed_from="pay")  # expect-error
checkout.step(max_concurrent="4")  # expect-error
checkout.step(retriable=OSError())  # expect-error
checkout.register(reserve, retires=RetryPolicy())  # expect-error
checkout.register(reserve, factory=Ship)  # expect-error
checkout.register(Ship(), factory=Ship)  # expect-error
checkout.register(Ship, factory=Ship())  # expect-error
checkout.register(Ship, factory=Order)  # expect-error
checkout.register(Order, factory=Order)  # expect-error
checkout.register(reserve, persist=Scope)  # expect-error
StepOptions(ttl="1d")  # expect-error
RetryPolicy(max_attempts="3")  # expect-error
RetryPolicy(backoff=1.0)  # expect-error
FixedBackoff("1")  # expect-error
ExponentialBackoff(factor="2")  # expect-error
o1 = Scope.TASK  # expect-error

# --- declarations
graph_task(checkout, app)  # expect-error
Graph()  # expect-error
Graph("checkout", store="postgresql://")  # expect-error

# --- errors
RunTimedOut("order-1", "2.5")  # expect-error
StoreMissing("shop")  # expect-error
WrongResult("ship", 1, expected="shop.Shipment", given="None")  # expect-error
