"""DBOS: a workflow of steps in Postgres (docs.dbos.dev, python/tutorials/workflow-tutorial and step-tutorial)."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from benchmarks.host import Run, repeat
from benchmarks.ways.peers import load


@contextmanager
def steps(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Workflows that are called by a fresh id; steps in parallel by asyncio.gather.

    Outputs are integers: it writes what it is given by pickle.
    """
    library = load("dbos")
    # Its admin server and its logs are of no use here.
    config = {
        "name": "bench",
        "system_database_url": options["database"],
        "run_admin_server": False,
        "log_level": "ERROR",
    }
    dbos = library.DBOS
    dbos(config=config)

    def step(value: int) -> int:
        return value + 1

    async def async_step(value: int) -> int:
        return value + 1

    async def async_join(*values: int) -> int:
        return values[0]

    do = dbos.step()(step)
    do_async, join_async = dbos.step()(async_step), dbos.step()(async_join)

    def chain(value: int) -> Any:
        return do(do(do(do(value))))

    async def fan(value: int) -> Any:
        return await join_async(*await asyncio.gather(*(do_async(value) for _ in range(3))))

    def one(value: int) -> Any:
        return do(value)

    chain_workflow, one_workflow = dbos.workflow()(chain), dbos.workflow()(one)
    fan_workflow = dbos.workflow()(fan)
    dbos.launch()

    def run(workflow: Any, workflow_id: str = "") -> Any:
        with library.SetWorkflowID(workflow_id or str(uuid.uuid4())):
            return workflow(1)

    run(chain_workflow, "again")
    with asyncio.Runner() as loop, ThreadPoolExecutor(8) as callers:

        def run_on_8(count: int) -> None:
            for made in [callers.submit(run, chain_workflow) for _ in range(count)]:
                made.result()

        async def run_fans(count: int) -> None:
            for _ in range(count):
                await run(fan_workflow)

        yield {
            "chain": repeat(lambda: run(chain_workflow)),
            "fan": lambda count: loop.run(run_fans(count)),
            "threads_8": run_on_8,
            "again": repeat(lambda: run(chain_workflow, "again")),
            "one_step": repeat(lambda: run(one_workflow)),
        }
    dbos.destroy()
