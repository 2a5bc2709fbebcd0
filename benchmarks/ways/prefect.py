"""Prefect: a flow of tasks that persist their results (docs.prefect.io, v3/advanced/results).

A flow talks to a server. Here it is the one that Prefect starts for a program that names none, on SQLite: on Postgres
it wants the extension pg_trgm, which the wheel that brings Postgres does not have. Results are files, its default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from benchmarks.host import Run, repeat
from benchmarks.ways.peers import load


@contextmanager
def tasks(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Flows of four tasks."""
    # Kept in the peers' environment: its server takes most of a minute to make its tables.
    os.environ |= {
        "PREFECT_HOME": os.path.join(sys.prefix, "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_LEVEL": "ERROR",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    }
    library = load("prefect")

    def step(*values: int) -> int:
        return values[0] + 1

    task = library.task(persist_result=True)(step)

    def chain(value: int) -> Any:
        return task(task(task(task(value))))

    def fan(value: int) -> Any:
        made = [task.submit(value) for _ in range(3)]
        return task(*(each.result() for each in made))

    chain_flow, fan_flow = (library.flow(persist_result=True)(each) for each in (chain, fan))
    with load("prefect.server.api.server").SubprocessASGIServer() as server:
        os.environ["PREFECT_API_URL"] = server.api_url
        with load("prefect.settings").temporary_settings(
            {load("prefect.settings").PREFECT_API_URL: server.api_url}
        ):
            yield {"chain": repeat(lambda: chain_flow(1)), "fan": repeat(lambda: fan_flow(1))}
