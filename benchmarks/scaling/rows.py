"""What is simulated and computed from measured costs, as plain values: they are kept beside the measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.scaling.loads import (
    CHILDREN,
    NODE_CORES,
    PARENTS,
    Demand,
    Site,
    at_work,
    limit,
    persisted,
    seconds_of,
    with_log,
)
from benchmarks.scaling.meters import Reading, others_cpu_s
from benchmarks.scaling.model import Model

NODES = (1, 4, 16, 100)
JOBS = 4000
ROUNDS = 40
"""Jobs of each child: what comes of all beginning together is little among them."""
CALM = 0.7
"""Share of the limit that is offered where nothing is to be full."""
RATE = 10_000.0
STEP_S = 0.05
PERSISTED = "4 persisted steps"
KINDS = {
    "plain": "4 steps, nothing persisted",
    "hits_4": "4 `GLOBAL` hits",
    "persisted_1": "1 persisted step",
    "persisted_4": PERSISTED,
    "persisted_8": "8 persisted steps",
    "items": "1 item of a batch",
}
DAY_S = 86_400

Found = Mapping[str, Any]


def loads(found: Found) -> dict[str, Demand]:
    """Return the kinds of runs that are simulated, by their names."""
    costs = found["costs"]
    return {
        KINDS["plain"]: at_work(costs, "plain"),
        KINDS["hits_4"]: at_work(costs, "hits_4"),
        PERSISTED: at_work(costs, "persisted_4"),
        f"{PERSISTED} of {STEP_S * 1000:g} ms": at_work(costs, "persisted_4", step_s=4 * STEP_S),
    }


def simulated(found: Found) -> list[dict[str, Any]]:
    """Simulate each kind of run on 1 to 100 nodes, at a calm load and at a full one."""
    return [
        {"work": name, **row(asked, with_log(Site(nodes=nodes), found))}
        for name, asked in loads(found).items()
        for nodes in NODES
    ]


def row(asked: Demand, site: Site, jobs: int = JOBS) -> dict[str, Any]:
    """Return limit and wall as computed, and what the model shows when jobs always wait, and at a calm load."""
    most, wall = limit(asked, site)
    calm = Model(asked, site).offer(most * CALM, jobs)
    full = Model(asked, site).saturate(max(jobs, ROUNDS * site.nodes * site.children))
    return {
        "nodes": site.nodes,
        "limit": most,
        "wall": wall,
        "simulated": full.rate,
        "used_most": full.wall,
        "p50_s": calm.p50_s,
        "p99_s": calm.p99_s,
    }


def validation(found: Found) -> dict[str, float]:
    """Return runs a second of 4 persisted steps as measured, and as modelled from runs of one and of eight.

    All servers, the worker and the caller share the cores of this machine with other work, whose part is taken off.
    One job at a time mostly finds a core: there nothing is taken off.
    """
    modelled, site = persisted(found["costs"], 4), here(found, found["costs"]["persisted_4"])
    idle = replace(site, speed=1.0)
    return {
        "free": site.speed,
        "measured_rate": 1 / found["costs"]["persisted_4"]["wall_s"],
        "modelled_rate": found["jobs"] / Model(modelled, site).burst(found["jobs"]).took_s,
        "measured_alone_s": found["alone"]["wall_s"],
        "modelled_alone_s": Model(modelled, idle).burst(1).took_s,
    }


def here(found: Found, reading: Reading) -> Site:
    """Return the machine on which *reading* was taken, slower by what other work took of it."""
    cores = found["machine"]["cores"]
    site = Site(
        nodes=1,
        children=2,
        shared_cores=cores,
        speed=1 - others_cpu_s(reading) / (reading["wall_s"] * cores),
        round_trip_s=0.0,
    )
    return with_log(site, found)


def needs(found: Found, kind: str, rate: float = RATE) -> dict[str, float]:
    """Return what *rate* runs a second of *kind* need when nothing is used beyond `CALM`."""
    costs = found["costs"][kind]
    asked = at_work(found["costs"], kind)
    one = with_log(Site(nodes=1), found)
    each = seconds_of(asked, one)
    nodes = math.ceil(rate * max(each[CHILDREN], each[PARENTS], each[NODE_CORES]) / CALM)
    size = sum(costs.get(f"docket_{table}_bytes", 0.0) for table in ("runs", "cache", "executions"))
    return {
        "nodes": nodes,
        "postgres_cores": math.ceil(rate * asked.postgres_s / CALM),
        "commits": rate * asked.commits,
        "wal_bytes_s": rate * asked.wal_bytes,
        "redis": math.ceil(rate * asked.broker_s / CALM),
        "connections": nodes * one.children * found["connections"] / 2 if asked.commits else 0,
        "bytes_day": rate * size * DAY_S,
    }


def site_text(found: Found) -> str:
    """Return the site of the simulated rows, for the page."""
    site = with_log(Site(nodes=1), found)
    return (
        f"Each node has {site.cores} cores and {site.children} children of prefork. There are one Postgres with "
        f"{site.postgres_cores} cores and one Redis.\nA flush takes {site.flush_s * 1e3:.2f} ms as measured, the "
        f"network {site.round_trip_s * 1e3:g} ms a statement, which is assumed."
    )
