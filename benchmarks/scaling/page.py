"""Writes docs/scaling.md from the committed measurements and a template: ``<!-- NAME -->`` becomes what they say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from benchmarks.process import ROOT
from benchmarks.scaling import rows
from benchmarks.scaling.loads import BROKER, POSTGRES_CORES, POSTGRES_LOG, Site, at_work, seconds_of, with_log
from benchmarks.scaling.rows import Found

TEMPLATE = ROOT / "benchmarks" / "scaling.md.in"
PAGE = ROOT / "docs" / "scaling.md"
COMMITTED = ROOT / "benchmarks" / "results" / "scaling.json"
MARK = re.compile(r"<!-- (\w+) -->")


def page(found: Found, template: str) -> str:
    """Return the page.

    Raises:
        ValueError: The template has a mark that nothing stands for.
    """
    parts: dict[str, Callable[[Found], Iterable[str]]] = {
        "costs": costs,
        "nodes": nodes,
        "needs": needs,
        "servers": servers,
        "upkeep": upkeep,
        "validation": validation,
        "site": lambda found: [rows.site_text(found)],
        "machine": machine,
    }
    words = values(found)

    def filled(mark: re.Match[str]) -> str:
        if mark[1] in parts:
            return "\n".join(parts[mark[1]](found))
        if mark[1] in words:
            return words[mark[1]]
        raise ValueError(f"the template has {mark[0]!r}; it may have {', '.join([*parts, *words])}")

    return MARK.sub(filled, template)


def values(found: Found) -> dict[str, str]:
    """Return the numbers within sentences."""
    plain, four = (at_work(found["costs"], kind) for kind in ("plain", "persisted_4"))
    log = with_log(Site(nodes=1), found)
    costs = found["costs"]["persisted_4"]
    size = sum(costs[f"docket_{table}_bytes"] for table in ("runs", "cache", "executions"))
    purge, beat = found["upkeep"]["purge"], found["upkeep"]["heartbeat"]
    beats = 100 * 4 / (30 / 4)  # a second: 100 nodes of 4 children, a lease of 30 s
    return {
        "jobs": str(found["jobs"]),
        "parent_rate": f"{1 / plain.parent_s:,.0f}",
        "broker_rate": f"{1 / plain.broker_s:,.0f}",
        "core_rate": f"{1 / four.postgres_s:,.0f}",
        "flush_ms": f"{log.flush_s * 1e3:.2f}",
        "flushes_alone": f"{1 / log.flush_s:,.0f}",
        "log_mb_s": f"{log.flush_bytes_s / 1e6:,.0f}",
        "log_rate": f"{log.flush_bytes_s / four.wal_bytes:,.0f}",
        "connections": f"{found['connections'] / 2:g}",
        "connection_mb": f"{found['connection_bytes'] / 1e6:.1f}",
        "run_kb": f"{size / 1e3:.1f}",
        "million_gb": f"{size * 1e6 / 1e9:.1f}",
        "purge_rate": f"{1 / purge['wall_s']:,.0f}",
        "beats": f"{beats:.0f}",
        "beats_share": f"{beats * beat['postgres_cpu_s']:.0%}",
        "redis_commands": f"{found['costs']['plain']['redis_commands']:.0f}",
        "redis_kb": f"{found['costs']['plain']['redis_bytes'] / 1e3:.1f}",
    }


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}" if seconds * 1e6 >= 10 else f"{seconds * 1e6:.1f}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def costs(found: Found) -> Iterator[str]:
    """Yield what one of each kind costs."""
    yield "| one | sender | parent | child | Postgres | Redis | log, bytes | commits | Redis commands |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for kind, name in rows.KINDS.items():
        each = found["costs"][kind]
        cpu = [_us(each[f"{who}_cpu_s"]) for who in ("client", "parent", "child", "postgres", "redis")]
        counts = [_count(each[name]) for name in ("wal_bytes", "commits", "redis_commands")]
        yield f"| {name} | {' | '.join([*cpu, *counts])} |"


def upkeep(found: Found) -> Iterator[str]:
    """Yield what is asked beside the runs."""
    names = {
        "heartbeat": "a heartbeat of one lease; for each process with a run, every quarter of a lease",
        "sweep": "a look for lost runs with nothing due; for each worker, every half of a lease",
        "purge": f"purging a run of {rows.PERSISTED}",
    }
    yield "| what | Postgres, us of CPU | log, bytes |"
    yield "|---|---|---|"
    for name, text in names.items():
        each = found["upkeep"][name]
        yield f"| {text} | {_us(each['postgres_cpu_s'])} | {_count(each['wal_bytes'])} |"


def nodes(found: Found) -> Iterator[str]:
    """Yield the simulated sites."""
    heads = "runs of", "nodes", "most runs/s, computed", "first wall", "simulated, jobs always waiting"
    yield f"| {' | '.join(heads)} | p50, p99 at 70 % |"
    yield "|---|---|---|---|---|---|"
    shown = ""
    for row in found["simulated"]:
        name = "" if row["work"] == shown else row["work"]
        shown = row["work"]
        times = f"{row['p50_s'] * 1e3:,.1f}, {row['p99_s'] * 1e3:,.1f} ms"
        cells = [name, row["nodes"], f"{row['limit']:,.0f}", row["wall"], f"{row['simulated']:,.0f}", times]
        yield f"| {' | '.join(map(str, cells))} |".replace("|  |", "| |")


def servers(found: Found) -> Iterator[str]:
    """Yield the most runs a second of each kind that one server carries."""
    yield "| runs of | Postgres, a core | Postgres, 16 cores | Postgres, log | one Redis |"
    yield "|---|---|---|---|---|"
    site = with_log(Site(nodes=1, postgres_cores=1), found)
    for kind, name in rows.KINDS.items():
        seconds = seconds_of(at_work(found["costs"], kind), site)
        core_s, log_s, broker_s = (seconds[each] for each in (POSTGRES_CORES, POSTGRES_LOG, BROKER))
        cells = [f"{1 / each:,.0f}" if each else "-" for each in (core_s, core_s / 16, log_s, broker_s)]
        yield f"| {name} | {' | '.join(cells)} |"


def needs(found: Found) -> Iterator[str]:
    """Yield what 10,000 runs (or items) a second need."""
    yield "| 10,000/s of | nodes | connections | Postgres cores | commits/s | log, MB/s | Redis | tables, GB a day |"
    yield "|---|---|---|---|---|---|---|---|"
    for kind, name in rows.KINDS.items():
        need = rows.needs(found, kind)
        size = f"{need['bytes_day'] / 1e9:,.0f}" if "docket_runs_bytes" in found["costs"][kind] else "-"
        cells = [
            name,
            *(f"{need[each]:,.0f}" for each in ("nodes", "connections", "postgres_cores", "commits")),
            f"{need['wal_bytes_s'] / 1e6:,.0f}",
            f"{need['redis']:,.0f}",
            size,
        ]
        yield f"| {' | '.join(cells)} |"


def validation(found: Found) -> Iterator[str]:
    """Yield model beside measured."""
    both = found["validation"]
    yield f"| {rows.PERSISTED}, two children, all on one machine | measured | modelled |"
    yield "|---|---|---|"
    yield f"| {found['jobs']} jobs sent at once, runs/s | {both['measured_rate']:.1f} | {both['modelled_rate']:.1f} |"
    alone = [f"{both[f'{side}_alone_s'] * 1e3:.1f}" for side in ("measured", "modelled")]
    yield f"| one job at a time, ms; modelled on idle cores | {alone[0]} | {alone[1]} |"


def machine(found: Found) -> Iterator[str]:
    """Yield what was measured on."""
    about = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    free = found["validation"]["free"]
    yield (
        f"{about['cores']} cores ({about['processor']}), load average {found['load']:.1f} before it began; other "
        f"work left {free:.0%} of the cores. {versions}; commit {found['commit']}."
    )
