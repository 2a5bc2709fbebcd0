"""LangGraph: tasks of an entrypoint with the Postgres checkpointer (docs.langchain.com, langgraph/functional-api).

``durability="sync"`` writes each task's output before the next begins, as the persisted steps here do. Connections
are made as the checkpointer's page asks: autocommit, dict_row, from a pool.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from sqlalchemy.engine import make_url

from benchmarks.host import Run, repeat
from benchmarks.ways.peers import load


@contextmanager
def tasks(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Threads (its word for runs) with a fresh id."""
    func = load("langgraph.func")
    address = make_url(options["database"]).set(drivername="postgresql")
    with load("psycopg_pool").ConnectionPool(
        address.render_as_string(hide_password=False),
        min_size=1,
        max_size=10,
        kwargs={"autocommit": True, "prepare_threshold": 0, "row_factory": load("psycopg.rows").dict_row},
    ) as pool:
        saver = load("langgraph.checkpoint.postgres").PostgresSaver(pool)
        saver.setup()

        def step(*values: int) -> int:
            return values[0] + 1

        task = func.task(step)

        def chain(value: int) -> Any:
            for _ in range(4):
                value = task(value).result()
            return value

        def fan(value: int) -> Any:
            made = [task(value) for _ in range(3)]
            return task(*(each.result() for each in made)).result()

        def one(value: int) -> Any:
            return task(value).result()

        made = {each.__name__: func.entrypoint(checkpointer=saver)(each) for each in (chain, fan, one)}
        yield from _figures(made)


def _figures(made: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    def config(thread: str = "") -> dict[str, Any]:
        return {"configurable": {"thread_id": thread or str(uuid.uuid4())}}

    def call(name: str) -> Callable[[], Any]:
        return lambda: made[name].invoke(1, config(), durability="sync")

    made["chain"].invoke(1, config("again"), durability="sync")
    with ThreadPoolExecutor(8) as callers:

        def run_on_8(count: int) -> None:
            for each in [callers.submit(call("chain")) for _ in range(count)]:
                each.result()

        yield {
            "chain": repeat(call("chain")),
            "fan": repeat(call("fan")),
            "threads_8": run_on_8,
            "one_step": repeat(call("one")),
            # Without an input it continues a thread; one that has ended gives its state.
            "again": repeat(lambda: made["chain"].get_state(config("again"))),
        }
