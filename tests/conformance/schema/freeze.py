"""Freezes the tables of this release: ``python -m tests.conformance.schema.freeze`` writes ``*_v<VERSION>.sql``.

Do it once for each version, in the commit that raises `schema.VERSION`; a written snapshot is never changed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import DateTime, Dialect, create_mock_engine, make_url
from sqlalchemy.dialects import postgresql, sqlite

from docket_celery.store import SQLStore
from docket_celery.store.records import RunState
from docket_celery.store.sql import schema
from tests.conformance.samples import SQLBench, ending, execution, output, shared
from tests.infra import servers

HERE = Path(__file__).parent
DIALECTS: dict[str, Dialect] = {"postgresql": postgresql.dialect(), "sqlite": sqlite.dialect()}  # type: ignore[no-untyped-call]  # SQLAlchemy's own
_MOVED_S = 1000 * 86400


def snapshot(dialect: str, version: int) -> Path:
    """Return where a version of the tables is frozen."""
    return HERE / f"{dialect}_v{version}.sql"


def fill(bench: SQLBench) -> None:
    """Store what the upgrade tests look for: runs in several states, checkpoints of both scopes, a claim."""
    done = bench.take(execution_id="done")
    bench.store.save(done, output(execution_id="done", ttl_s=3600.0), execution(execution_id="done"))
    bench.store.end(done, ending(retention_s=86400.0, executions=[execution("ship", execution_id="done")]))
    failed = bench.take(execution_id="failed")
    bench.store.save(failed, output(execution_id="failed", ttl_s=3600.0), None)
    bench.store.end(failed, ending(RunState.FAILED, error={"code": "DC200", "args": ["sold out", None]}))
    bench.store.end(bench.take(execution_id="parked"), ending(RunState.WAITING, wake_in_s=5.0))
    bench.store.lookup(shared().key, "first", 30.0)
    bench.store.publish(shared(ttl_s=None), "first", None)
    bench.store.lookup(shared(key=b"\1" * 32).key, "second", 30.0)


def move_back(bench: SQLBench) -> None:
    """Date all rows to long ago: leases are over, whatever clock the tests run by."""
    for table in schema.metadata.sorted_tables:
        for column in table.columns:
            if isinstance(column.type, DateTime):
                bench.sql(f"UPDATE {table.name} SET {column.name} = {bench.earlier(column.name, _MOVED_S)}")  # noqa: S608 -- our names


def create_statements(dialect: str) -> Iterator[str]:
    """Yield the statements that make the tables."""
    found: list[str] = []
    engine = create_mock_engine(
        f"{dialect}://", lambda ddl, *_, **__: found.append(str(ddl.compile(dialect=DIALECTS[dialect])))
    )
    schema.metadata.create_all(engine, checkfirst=False)
    for statement in found:
        yield "\n".join(line.rstrip().replace("\t", "    ") for line in statement.strip().splitlines())


def insert_statements(bench: SQLBench, dialect: str) -> Iterator[str]:
    """Yield the rows as statements; the number of a step execution is the database's to give."""
    for table in schema.metadata.sorted_tables:
        names = [column.name for column in table.columns if column.identity is None]
        for row in bench.sql(f"SELECT {', '.join(names)} FROM {table.name} ORDER BY 1, 2"):  # noqa: S608 -- our names
            values = ", ".join(literal(value, dialect) for value in row)
            yield f"INSERT INTO {table.name} ({', '.join(names)})\nVALUES ({values})"


def literal(value: Any, dialect: str) -> str:
    """Return *value* as SQL."""
    if value is None or isinstance(value, int | float):
        return "NULL" if value is None else str(value)
    if isinstance(value, bytes):
        return f"x'{value.hex()}'" if dialect == "sqlite" else f"'\\x{value.hex()}'"
    if isinstance(value, datetime):
        value = value.astimezone(UTC).isoformat(" ")
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return "'" + text.replace("'", "''") + "'"


def freeze(url: str) -> None:
    """Write the snapshot of this release for the database at *url*, which must be empty."""
    dialect = make_url(url).get_backend_name()
    store = SQLStore(url)
    store.migrate()
    bench = SQLBench(store)
    fill(bench)
    move_back(bench)
    statements = [*create_statements(dialect), *insert_statements(bench, dialect)]
    snapshot(dialect, schema.VERSION).write_text(";\n\n".join(statements) + ";\n", encoding="utf-8")
    store.close()


def main() -> None:
    """Freeze this release's tables for both databases."""
    with tempfile.TemporaryDirectory() as folder:
        freeze(f"sqlite:///{folder}/store.db")
    started, urls = servers.start_servers()
    try:
        with servers.temporary_database(urls.database_url, migrated=False) as url:
            freeze(url)
    finally:
        started.stop()


if __name__ == "__main__":
    main()
