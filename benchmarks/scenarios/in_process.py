"""Graphs of no-op steps in one process."""

from __future__ import annotations

from benchmarks.budgets import Budget
from benchmarks.scenario import OURS, Figure, Scenario, Way

POOL, DIRECT, HAMILTON = "by hand on a pool", "direct calls", "Hamilton"
WHY_DIRECT = "functions that call one another: no graph, no thread, no retry, no deadline, one step at a time"
WHY_HAMILTON = "it runs one step after the other on the calling thread, without retries, deadlines and events"

SCENARIOS = (
    Scenario(
        name="process",
        title="In process, no-op steps",
        figures=(
            Figure(name="fan", title="3 steps and a join"),
            Figure(name="chain_10", title="chain of 10 steps"),
            Figure(name="chain_100", title="chain of 100 steps"),
            Figure(name="sleeps", title="3 steps that sleep 50 ms, and a join"),
        ),
        ways=(
            Way(name=OURS, target="ours:in_process"),
            Way(
                name=POOL,
                target="by_hand:pool",
                why="four futures and nothing else, written for this one graph",
            ),
            Way(name=DIRECT, target="by_hand:direct", why=WHY_DIRECT),
            Way(name=HAMILTON, target="hamilton:sequential", peer=True, why=WHY_HAMILTON),
            Way(name="Hamilton, threads", target="hamilton:threads", peer=True),
            Way(name="pydantic-graph", target="pydantic_graph:graphs", peer=True),
            Way(name="dask", target="dask:threads", peer=True),
        ),
    ),
    Scenario(
        name="random",
        title="In process, random graphs",
        figures=(
            Figure(name="compile_1000", title="read and check 1,000 steps"),
            Figure(name="run_1000", title="run 1,000 steps"),
            Figure(name="compile_10000", title="read and check 10,000 steps"),
            Figure(name="run_10000", title="run 10,000 steps"),
        ),
        ways=(
            Way(name=OURS, target="ours:random_graphs"),
            Way(name=DIRECT, target="by_hand:direct", why=WHY_DIRECT),
            Way(name=HAMILTON, target="hamilton:random_graphs", peer=True, why=WHY_HAMILTON),
        ),
        rounds=5,
    ),
)

BUDGETS = (
    Budget(figure="process_fan", text="0.8 x by hand on a pool", against=POOL, times=0.8),
    Budget(figure="process_chain_10", text="60 us", plus_s=60e-6),
    Budget(figure="process_chain_100", text="500 us", plus_s=500e-6),
    Budget(figure="random_compile_10000", text="1 s", plus_s=1.0),
)
