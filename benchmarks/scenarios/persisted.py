"""Steps whose outputs are kept in Postgres, with fsync and without."""

from __future__ import annotations

from benchmarks.budgets import Budget
from benchmarks.scenario import OURS, Figure, Scenario, Way

SEVEN, INSERTS, SELECTS = "seven statements", "INSERT and commit", "SELECT by key"
DBOS, LANGGRAPH = "DBOS", "LangGraph"

FIGURES = (
    Figure(name="chain", title="4 steps, chain"),
    Figure(name="fan", title="3 steps and a join"),
    Figure(name="threads_8", title="4 steps, chain, from 8 threads", unit="runs/s", runs=64),
    Figure(name="again", title="finished run submitted again"),
    Figure(name="one_step", title="1 step"),
    Figure(name="hits_1", title="1 GLOBAL hit"),
    Figure(name="hits_4", title="4 GLOBAL hits, chain"),
    Figure(name="hits_8", title="8 GLOBAL hits, chain"),
)
WAYS = (
    Way(name=OURS, target="ours:persisted"),
    Way(
        name=SEVEN,
        target="by_hand:seven_statements",
        why="rows of one or two columns on a connection of the caller's: no lease, no fence, no history, no checksum",
    ),
    Way(name=INSERTS, target="by_hand:inserts", why="the outputs alone: nobody could resume a run from them"),
    Way(name=SELECTS, target="by_hand:selects", why="a row by its key: no job that is compared, no checksum"),
    Way(name=DBOS, target="dbos:steps", peer=True),
    Way(
        name=LANGGRAPH,
        target="langgraph:tasks",
        peer=True,
        why="submitted again, it reads the state of the thread and compares no job",
    ),
)

SCENARIOS = (
    Scenario(
        name="persisted",
        title="Persisted steps, Postgres with fsync",
        figures=FIGURES,
        ways=(*WAYS, Way(name="Prefect, SQLite", target="prefect:tasks", peer=True)),
        servers=("postgres",),
    ),
    Scenario(
        name="nofsync",
        title="Persisted steps, Postgres without fsync",
        figures=FIGURES,
        ways=WAYS,
        servers=("postgres-nofsync",),
        rounds=5,
    ),
)

BUDGETS = (
    Budget(figure="persisted_chain", text="2 x seven statements", against=SEVEN, times=2),
    Budget(figure="persisted_chain", text="DBOS / 6", against=DBOS, times=1 / 6),
    Budget(figure="persisted_chain", text="LangGraph / 3", against=LANGGRAPH, times=1 / 3),
    Budget(figure="persisted_fan", text="our chain", against=OURS, of="persisted_chain"),
    Budget(figure="persisted_threads_8", text="50 % of seven statements", against=SEVEN, times=2),
    Budget(figure="persisted_again", text="1 ms", plus_s=1e-3),
    Budget(figure="nofsync_hits_1", text="0.6 ms + 0.3 ms a hit", plus_s=0.9e-3),
    Budget(figure="nofsync_hits_4", text="0.6 ms + 0.3 ms a hit", plus_s=1.8e-3),
    Budget(figure="nofsync_hits_8", text="0.6 ms + 0.3 ms a hit", plus_s=3.0e-3),
)
