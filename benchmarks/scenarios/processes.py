"""What a process takes before it does anything, and what it holds."""

from __future__ import annotations

from benchmarks.budgets import Budget
from benchmarks.scenario import OURS, Figure, Scenario, Way

CELERY, PLUGIN = "Celery", f"{OURS} installed, not used"

SCENARIOS = (
    Scenario(
        name="start",
        title="Import",
        figures=(Figure(name="import", title="a Python that imports it and ends"),),
        ways=(
            Way(name=OURS, target="starting:imports", options={"what": "ours"}),
            Way(
                name=CELERY,
                target="starting:imports",
                options={"what": "celery"},
                why="part of what is imported here",
            ),
            Way(name="SQLAlchemy and psycopg", target="starting:imports", options={"what": "sql"}),
            Way(
                name="Python alone",
                target="starting:imports",
                options={"what": "nothing"},
                why="it imports nothing",
            ),
        ),
        round_s=1.0,
    ),
    Scenario(
        name="idle",
        title="A worker with two children: redis, prefork",
        figures=(
            Figure(name="worker", title="start until ready", runs=1),
            Figure(name="idle", title="memory when idle (PSS of all its processes)", unit="MB", runs=1),
        ),
        ways=tuple(
            Way(
                name=name,
                target="starting:workers",
                options={"app": app, "plugin": plugin},
                peer=True,
                why="its app declares no GraphTask: Protocol Buffers and this library are not imported",
            )
            for name, app, plugin in (
                (OURS, "celery_app", True),
                (PLUGIN, "celery_plain_app", True),
                (CELERY, "celery_plain_app", False),
            )
        ),
        servers=("redis",),
        rounds=3,
    ),
    Scenario(
        name="memory",
        title="Memory in process",
        figures=(
            Figure(name="run", title="held by a run that waits in a coroutine", unit="KB", runs=1),
            Figure(name="item", title="peak of a batch of no-op items, an item", unit="KB", runs=1),
        ),
        ways=(
            Way(name=OURS, target="memory:ours"),
            Way(name="by hand", target="memory:by_hand", why="a coroutine, and a list of results"),
        ),
        rounds=3,
    ),
)

BUDGETS = (
    Budget(figure="start_import", text="Celery + 100 ms", against=CELERY, plus_s=0.1),
    Budget(figure="idle_worker", text="Celery + 50 ms", way=PLUGIN, against=CELERY, plus_s=0.05),
)
