"""Tables of many rows, and batches of many items."""

from __future__ import annotations

from benchmarks.scenario import OURS, Figure, Scenario, Way

SIZES = ((1, True), (50_000, False), (50_000, True), (1_000_000, True))

SCENARIOS = (
    Scenario(
        name="tables",
        title="Tables of many rows, Postgres without fsync",
        figures=(
            Figure(name="chain", title="4 persisted steps, chain"),
            Figure(name="again", title="finished run submitted again"),
            Figure(name="find_lost", title="look for lost runs, of which there are none"),
            Figure(name="purge", title="purge, with nothing due"),
        ),
        ways=tuple(
            Way(
                name=f"{OURS}, {rows:,} row{'' if rows == 1 else 's'}{'' if analyzed else ', never analyzed'}",
                target="tables:rows",
                options={"rows": rows, "analyzed": analyzed},
            )
            for rows, analyzed in SIZES
        ),
        servers=("postgres-nofsync",),
        rounds=5,
    ),
    Scenario(
        name="batch",
        title="Batches: redis, prefork, Postgres without fsync",
        figures=(
            Figure(name="items_1000", title="1,000 items", runs=1),
            Figure(name="items_10000", title="10,000 items", runs=1),
            Figure(name="items_100000", title="100,000 items", runs=1, full=True),
            Figure(name="worker_peak", title="largest process of the worker, peak", unit="MB", runs=1),
        ),
        ways=(
            Way(name=OURS, target="batches:batch"),
            Way(name="plain chord", target="batches:plain_chord"),
        ),
        servers=("redis", "postgres-nofsync"),
        rounds=3,
    ),
)
