"""What docs/scaling.md is made of: costs measured on real servers, and statements that Postgres takes."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from benchmarks.scaling.costs import Effort, measure

pytestmark = pytest.mark.integration

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def test_the_statements_set_how_the_tables_are_vacuumed(database_url: str) -> None:
    """Each table of the page has the options that the page names."""
    (block,) = re.findall(r"^```sql\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    url = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        connection.execute(block.encode())
        asked = "SELECT relname FROM pg_class WHERE reloptions @> '{autovacuum_vacuum_scale_factor=0.02}'"
        found = {name for (name,) in connection.execute(asked)}
        connection.rollback()
    assert found == {"docket_runs", "docket_cache", "docket_executions"}


@pytest.mark.slow
def test_costs_are_measured_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind commits as often as it has round trips, and all processes that take part have used CPU."""
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "BENCH_QUEUE", "DOCKET_CELERY_DATABASE_URL"):
        monkeypatch.setenv(name, "")
    told: list[str] = []
    found = measure(Effort(jobs=20, rounds=1), told.append)
    costs = found["costs"]
    assert {kind: round(each["commits"]) for kind, each in costs.items()} == {
        "plain": 0,
        "persisted_1": 2,
        "persisted_4": 5,
        "persisted_8": 9,
        "hits_4": 4,
        "items": 0,
    }
    assert costs["plain"]["wal_bytes"] < 100 < costs["persisted_1"]["wal_bytes"]
    assert costs["persisted_1"]["wal_bytes"] < costs["persisted_8"]["wal_bytes"]
    assert all(costs["persisted_8"][f"{who}_cpu_s"] > 0 for who in ("parent", "child", "postgres", "redis"))
    assert costs["plain"]["redis_commands"] > 5
    assert found["connections"] >= 2
    assert found["upkeep"]["purge"]["wal_bytes"] > 0
    assert told[-1] == "upkeep"
