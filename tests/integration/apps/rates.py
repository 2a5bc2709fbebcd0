"""A shared step in many processes: as GraphTasks, or as a script (``python -m ... PREFIX CALLS``).

An order's ``stock`` says what happens to the first call that computes: ``hang`` keeps it, ``fail`` fails it after as
many milliseconds; ``spend`` is what every other one takes.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from celery import Celery

from docket_celery import Graph, Scope, StepContext, StepFailed, graph_task, settings
from docket_celery.store import SQLStore
from tests.integration.apps import book
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order

app = Celery("rates")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_soft_shutdown_timeout = 0.0
rates = Graph("rates")


@rates.step(
    persist=Scope.GLOBAL,
    cache="exchange",
    ttl=3600,
    version=os.environ.get("RATES_VERSION", "1"),
    key=lambda order: Order(order_id=order.order_id),
)
def find_rate(order: Order, ctx: StepContext) -> Money:
    """Find a rate, which takes its time, and say by how many computations it was found."""
    with book.act(ctx):
        number = count_calls()
        if number == 1 and order.stock.get("hang"):
            ctx.sleep(3600)
        if number == 1 and order.stock.get("fail"):
            time.sleep(order.stock["fail"] / 1000)
            raise ConnectionError("no rate today")
        time.sleep(order.stock.get("spend", 0) / 1000)
    return Money(cents=number)


@rates.step
def convert(order: Order, rate: Money) -> Charge:
    """Convert."""
    return Charge(charge_id=order.order_id, amount_cents=rate.cents)


@graph_task(app, rates, name="rates.convert")
def convert_order(order: Order) -> Charge:
    """Convert an order."""
    raise NotImplementedError


quotes = Graph("quotes")


@quotes.step(persist=Scope.GLOBAL, cache="exchange", version="1")
def look_up(order: Order, ctx: StepContext) -> Money:
    """The same cache under other names."""
    with book.act(ctx):
        return Money(cents=-1)


@quotes.step
def quote(rate: Money) -> Label:
    """Quote."""
    return Label(text=str(rate.cents))


@graph_task(app, quotes, name="rates.quote")
def quote_order(order: Order) -> Label:
    """Quote an order."""
    raise NotImplementedError


def count_calls() -> int:
    """Return how many calls of the step have begun, in all processes."""
    with book.open_database() as connection:
        found = connection.execute("SELECT count(*) FROM test_acts WHERE step = 'find_rate'").fetchone()
    return 0 if found is None else int(found[0])


def main(prefix: str, calls: int) -> None:
    """Wait for a line on stdin, ask for one rate many times at once, and print what each got."""
    settings(threads=2)
    rates.store = SQLStore(os.environ["DOCKET_CELERY_DATABASE_URL"])
    order = Order(order_id="7")
    order.stock.update({name: int(value) for name, value in (word.split("=") for word in sys.argv[3:])})

    def ask(number: int) -> str:
        name = f"{prefix}-{number}"
        book.note(name, "ask")
        try:
            return str(rates.execute(Charge, order, execution_id=name).amount_cents)
        except StepFailed as error:
            return error.cause_text

    tell("ready")
    sys.stdin.readline()
    with ThreadPoolExecutor(calls) as pool:
        for answer in pool.map(ask, range(calls)):
            tell(answer)


def tell(line: str) -> None:
    """Print a line for the test that reads it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
