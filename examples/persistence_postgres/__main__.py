"""``python -m examples.persistence_postgres``: a miss, a hit, another input, and a miss after the TTL.

Runs on a temporary Postgres of its own, or on the one that DOCKET_CELERY_DATABASE_URL names.
"""

from __future__ import annotations

import time
import uuid

from docket_celery import Graph
from docket_celery.devserver import dev_servers
from docket_celery.store import SQLStore
from examples.demo.database import Database
from examples.persistence_postgres.graph import TTL_S, Model, inference_graph
from examples.persistence_postgres.persistence_postgres_pb2 import Document, Sentiment


def infer(graph: Graph, model: Model, store: SQLStore, text: str) -> None:
    """Run the graph once, under a new execution id, and print what it took and whether the model was asked."""
    before, began = model.calls, time.perf_counter()
    sentiment = graph.execute(Sentiment, Document(text=text), store=store)
    took_ms = (time.perf_counter() - began) * 1000
    found = "hit: the model was not asked" if model.calls == before else "miss: the model was asked"
    print(f"   {text!r} -> {sentiment.label}, {took_ms:.1f} ms ({found})\n")


def wait_for_expiry(database: Database, version: str) -> None:
    """Wait until no row of *version* counts any more; the database's clock decides, not ours."""
    while database.rows(
        "SELECT 1 FROM docket_cache WHERE step_version = %s AND expires_at > clock_timestamp()", version
    ):
        time.sleep(0.1)


def show_rows(database: Database) -> None:
    """Print what is kept, as anybody can ask for it."""
    print("What Postgres holds:\n")
    database.show("""
        SELECT
            step_name,
            input_hash,
            output_data,
            created_at
        FROM docket_cache
        WHERE step_name = 'MLInference'
        ORDER BY created_at DESC;
    """)
    print("The same, readable, with the time each row has left:\n")
    database.show("""
        SELECT left(input_hash, 8) AS input, output_type, output_json, expires_at - now() AS remaining
        FROM docket_cache
        WHERE step_name = 'MLInference'
        ORDER BY created_at DESC;
    """)


def play(database_url: str) -> None:
    """Run everything against one database, whose tables are made if they are not there.

    Raises:
        SystemExit: It is no Postgres.
    """
    if not database_url.startswith("postgres"):
        raise SystemExit(
            "this example reads a Postgres; unset DOCKET_CELERY_DATABASE_URL, or let it name one"
        )
    store = SQLStore(database_url)
    try:
        store.migrate()
        # A new version each time: in a database that is kept, the first run would find the last one's rows.
        version = f"model-{uuid.uuid4()}"
        model, database = Model(), Database(database_url)
        graph = inference_graph(model, version)
        print("1. First execution:")
        infer(graph, model, store, "hello world")
        print("2. The same input in another execution:")
        infer(graph, model, store, "hello world")
        print("3. Another input has another hash:")
        infer(graph, model, store, "goodbye world")
        show_rows(database)
        wait_for_expiry(database, version)
        print(f"4. The first input again, after its TTL of {TTL_S:g} s:")
        infer(graph, model, store, "hello world")
        print(f"{model.calls} calls of the model for 4 executions.")
    finally:
        store.close()


def main() -> None:
    """Find or start a Postgres and play."""
    with dev_servers(redis=False) as servers:
        play(servers.database_url)


if __name__ == "__main__":
    main()
