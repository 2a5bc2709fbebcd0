"""Our calls of the store over tables of many rows."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, LiteralString

from benchmarks.host import Run, repeat
from benchmarks.ways import ours, steps
from benchmarks.ways.by_hand import connect
from docket_celery import Scope
from docket_celery.store import SQLStore

TABLES: tuple[LiteralString, ...] = ("docket_runs", "docket_cache", "docket_executions")
FILL: Mapping[LiteralString, LiteralString] = {
    "docket_runs": "jsonb_build_object('execution_id', 'copy-' || number)",
    "docket_cache": "jsonb_build_object('execution_id', 'copy-' || number, 'cache_key', sha256(number::text::bytea))",
    "docket_executions": "jsonb_build_object('execution_id', 'copy-' || number, 'id', 1000000 + number)",
}
"""What tells a copied row from the one that it is a copy of."""


def fill(options: Mapping[str, Any]) -> None:
    """Copy one row of each table until there are ``options["rows"]``; ended runs, of which none is due."""
    with connect(options) as connection:
        for table, differs in FILL.items():
            connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
            connection.execute(
                f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT made.* "  # noqa: S608 -- names of ours
                f"FROM (SELECT row FROM {table} AS row LIMIT 1) AS one(old), generate_series(2, %s) AS number, "
                f"LATERAL jsonb_populate_record(old, {differs}) AS made",
                (options["rows"],),
            )
        if options["analyzed"]:
            for table in TABLES:
                connection.execute(f"VACUUM ANALYZE {table}")


@contextmanager
def rows(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """A run of four persisted steps, a finished run asked for again, and what workers look for again and again."""
    store = SQLStore(options["database"])
    store.migrate()
    chain = ours.numbered("chain", steps.chain(4), persist=Scope.WORKFLOW)

    def run(execution_id: str = "") -> object:
        return chain.execute(
            ours.Made, ours.VALUE, execution_id=execution_id or uuid.uuid4().hex, store=store
        )

    run("again")
    fill(options)
    yield {
        "chain": repeat(run),
        "again": repeat(lambda: run("again")),
        "find_lost": repeat(lambda: store.find_lost(["task"], 30.0, 10, 20)),
        "purge": repeat(lambda: store.purge(1000)),
    }
