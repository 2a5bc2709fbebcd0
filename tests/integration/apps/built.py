"""An app whose step is an instance that a factory builds; it writes down where it is built and closed."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery

from docket_celery import Graph, graph_task
from tests.unit.protos.shop_pb2 import Label, Order

VARIABLE = "TEST_BUILT_FILE"

app = Celery("built")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1

graph = Graph("tests.built")


def note(what: str) -> None:
    """Add a line with this process's id."""
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(f"{what} {os.getpid()}\n")


class Scorer:
    """Something that is expensive to build and must be closed."""

    def __init__(self) -> None:
        note("built")

    def compute(self, order: Order) -> Label:
        """Answer with the process, once all that the test wants have come together."""
        note("called")
        wanted = order.amount_cents
        lines = [""]
        while len({line for line in lines if line.startswith("called")}) < wanted:
            lines = Path(os.environ[VARIABLE]).read_text(encoding="utf-8").splitlines()
        return Label(text=str(os.getpid()))

    def close(self) -> None:
        """End it."""
        note("closed")


def make_scorer() -> Scorer:
    """Build the scorer."""
    return Scorer()


graph.register(Scorer, factory=make_scorer)


@graph_task(app, graph, name="built.score")
def score(order: Order) -> Label:
    """Score an order."""
    raise NotImplementedError


if __name__ == "__main__":
    print(graph.execute(Label, Order()).text)  # noqa: T201 -- the script's answer
