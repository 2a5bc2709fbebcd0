"""Tasks on real workers: two children or threads, Redis or RabbitMQ, results in Redis."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.budgets import Budget
from benchmarks.scenario import OURS, Figure, Scenario, Way

NO_OP, CANVAS = "no-op task", "canvas group and chord"
ONE, FOUR = f"{OURS}, 1 step", f"{OURS}, 3 steps and a join"
CHAIN, FAN = f"{OURS}, chain", f"{OURS}, 3 steps and a join"
JOBS = 200


SEVEN = "plain task with seven statements"

WHY = {
    SEVEN: "rows of one or two columns on a connection of the child's: no lease, no fence, no history, no checksum",
    NO_OP: "a function that returns: no message type is checked, no graph runs",
}


def _ways(pool: str, tasks: dict[str, str]) -> tuple[Way, ...]:
    return tuple(
        Way(
            name=name,
            target="celery_worker:task",
            options={"task": task, "pool": pool},
            why=WHY.get(name, ""),
        )
        for name, task in tasks.items()
    )


THROUGHPUT = Figure(name="throughput", title=f"{JOBS} jobs sent at once", unit="runs/s", runs=JOBS)
LATENCY = Figure(name="latency", title="one job at a time, .delay to the result of .get")
NOT_PERSISTED = (
    THROUGHPUT,
    LATENCY,
    Figure(name="delay", title=".delay"),
    Figure(name="wake_up", title="from the end of the last step to the result of .get"),
)


def _not_persisted() -> Iterator[Scenario]:
    tasks = {ONE: "one", FOUR: "four", NO_OP: "no_op", CANVAS: "canvas"}
    for broker in ("redis", "rabbitmq"):
        for pool in ("prefork", "threads"):
            yield Scenario(
                name=f"task_{broker}_{pool}",
                title=f"GraphTask, nothing persisted: {broker}, {pool}",
                figures=NOT_PERSISTED,
                ways=_ways(pool, tasks),
                servers=("redis",) if broker == "redis" else ("redis", broker),
                # What limits are set for is a matter of a few per cent.
                rounds=9 if (broker, pool) == ("redis", "prefork") else 5,
            )


def _persisted() -> Iterator[Scenario]:
    for name, server, title in (
        ("task_persisted", "postgres", "with fsync"),
        ("task_nofsync", "postgres-nofsync", "without fsync"),
    ):
        yield Scenario(
            name=name,
            title=f"GraphTask, 4 persisted steps, Postgres {title}: redis, prefork",
            figures=(THROUGHPUT, LATENCY),
            ways=_ways(
                "prefork", {CHAIN: "persisted_chain", FAN: "persisted_fan", SEVEN: "seven_statements"}
            ),
            servers=("redis", server),
            rounds=5,
        )


SCENARIOS = (*_not_persisted(), *_persisted())

BUDGETS = tuple(
    budget
    for way in (ONE, FOUR)
    for budget in (
        Budget(
            figure="task_redis_prefork_throughput",
            text="90 % of the no-op task",
            way=way,
            against=NO_OP,
            times=1 / 0.9,
        ),
        Budget(
            figure="task_redis_prefork_throughput", text="5 x canvas", way=way, against=CANVAS, times=1 / 5
        ),
        Budget(
            figure="task_redis_prefork_latency",
            text="the no-op task + 1 ms",
            way=way,
            against=NO_OP,
            plus_s=1e-3,
        ),
        Budget(figure="task_redis_prefork_latency", text="canvas / 3", way=way, against=CANVAS, times=1 / 3),
        Budget(
            figure="task_redis_prefork_delay",
            text="the no-op task + 10 %",
            way=way,
            against=NO_OP,
            times=1.1,
        ),
    )
) + tuple(
    Budget(figure="task_persisted_throughput", text="350/s", way=way, plus_s=1 / 350) for way in (CHAIN, FAN)
)
