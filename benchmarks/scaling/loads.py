"""What a run asks of each resource, what a site has of it, and which one is used up first: plain division."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

CHILDREN = "children"
PARENTS = "Celery's parent processes"
NODE_CORES = "cores of the nodes"
POSTGRES_CORES = "Postgres, CPU"
POSTGRES_LOG = "Postgres, log"
BROKER = "broker"

FLUSHES_WAITED = 2
"""Flushes that a commit waits for at most: the one under way, then its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one run uses.

    Attributes:
        parent_s: CPU seconds of the worker's parent process.
        child_s: CPU seconds of the child.
        postgres_s: CPU seconds of all processes of Postgres.
        broker_s: CPU seconds of the Redis that is broker and result backend.
        client_s: CPU seconds of who sends the job and reads its result.
        wal_bytes: Bytes of Postgres's log.
        commits: Transactions that write; each is one round trip.
        step_s: Seconds in which the steps wait for something else, one after the other.
    """

    parent_s: float
    child_s: float
    postgres_s: float
    broker_s: float
    client_s: float = 0.0
    wal_bytes: float = 0.0
    commits: float = 0.0
    step_s: float = 0.0

    @property
    def statements(self) -> int:
        """Round trips to Postgres, as a whole number."""
        return round(self.commits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What there is.

    Attributes:
        nodes: Workers; each has a machine of its own.
        children: Runs that a node works on at once: children of prefork, or threads.
        threads: The children are threads of the parent: one runs Python at a time.
        cores: Cores of a node.
        postgres_cores: Cores of the one Postgres.
        flush_s: Seconds of an fdatasync.
        flush_bytes_s: Bytes of log that can be written in a second, beside that.
        round_trip_s: Network time of a statement and its answer.
        brokers: Redis servers, each with its share of the queues; one runs one command at a time.
        speed: Of a core; below 1 where other work takes a part.
        shared_cores: If set, the cores on which everything runs, instead of cores of each one's own.
    """

    nodes: int
    children: int = 4
    threads: bool = False
    cores: int = 4
    postgres_cores: int = 16
    flush_s: float = 0.001
    flush_bytes_s: float = 4e8
    round_trip_s: float = 0.0003
    brokers: int = 1
    speed: float = 1.0
    shared_cores: int | None = None


def demand(costs: Mapping[str, float], *, step_s: float = 0.0) -> Demand:
    """Return what was measured of one kind of run."""
    return Demand(
        parent_s=costs["parent_cpu_s"],
        child_s=costs["child_cpu_s"],
        postgres_s=costs["postgres_cpu_s"],
        broker_s=costs["redis_cpu_s"],
        client_s=costs["client_cpu_s"],
        wal_bytes=costs["wal_bytes"],
        commits=costs["commits"],
        step_s=step_s,
    )


def at_work(costs: Mapping[str, Mapping[str, float]], kind: str, *, step_s: float = 0.0) -> Demand:
    """Return what a run of *kind* uses on a site that has much to do.

    Sender, parent and broker do the same for each task, and less often woken they take longer for it: what they
    take is read from the kind that was measured with the most tasks a second.
    """
    asked = demand(costs[kind], step_s=step_s)
    if kind == "items":
        return asked
    busy = demand(costs["plain"])
    return replace(asked, parent_s=busy.parent_s, broker_s=busy.broker_s, client_s=busy.client_s)


def persisted(costs: Mapping[str, Mapping[str, float]], steps: int, *, step_s: float = 0.0) -> Demand:
    """Return a run of *steps* persisted steps, on the straight line through what runs of one and of eight cost."""
    one, eight = costs["persisted_1"], costs["persisted_8"]
    line = {name: one[name] + (eight[name] - one[name]) * (steps - 1) / 7 for name in one}
    return demand(line, step_s=step_s)


def held_s(asked: Demand, site: Site) -> float:
    """Return how long a run keeps its child when nothing is waited for but flushes of the log."""
    cpu_s = asked.parent_s + asked.child_s + asked.postgres_s
    waits_s = asked.statements * (site.round_trip_s + FLUSHES_WAITED * site.flush_s)
    return cpu_s / site.speed + waits_s + asked.step_s


def seconds_of(asked: Demand, site: Site) -> dict[str, float]:
    """Return, of each resource, how many of its seconds one run takes, divided by how many servers it has."""
    if site.threads:
        asked = replace(asked, parent_s=asked.parent_s + asked.child_s, child_s=0.0)
    return {
        CHILDREN: held_s(asked, site) / (site.nodes * site.children),
        PARENTS: asked.parent_s / site.speed / site.nodes,
        NODE_CORES: (asked.parent_s + asked.child_s) / site.speed / (site.nodes * site.cores),
        POSTGRES_CORES: asked.postgres_s / site.speed / site.postgres_cores,
        POSTGRES_LOG: asked.wal_bytes / site.flush_bytes_s,
        BROKER: asked.broker_s / site.speed / site.brokers,
    }


def limit(asked: Demand, site: Site) -> tuple[float, str]:
    """Return the most runs a second, and the resource that is used up by them."""
    seconds = seconds_of(asked, site)
    wall = max(seconds, key=seconds.__getitem__)
    return 1 / seconds[wall], wall


def with_log(site: Site, found: Mapping[str, Any]) -> Site:
    """Return *site* with the log that was measured: seconds of a flush, and bytes a second beside it."""
    small, large = found["flush"]["flush_8k_s"], found["flush"]["flush_1m_s"]
    rate = ((1 << 20) - (8 << 10)) / max(large - small, 1e-6)
    return replace(site, flush_s=small, flush_bytes_s=rate)
