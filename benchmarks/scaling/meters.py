"""Readings of what processes and servers have used so far: CPU, log, commands. Other work bends these least."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import psycopg
import redis
from sqlalchemy.engine import make_url

Reading = dict[str, float]


def cpu_s(processes: Iterable[psutil.Process]) -> float:
    """Return the CPU seconds of *processes* and of children that they have reaped."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


class Meters:
    """Reads a worker, its Postgres and its Redis.

    Args:
        database: SQLAlchemy's address of the database.
        redis_url: Broker and result backend.
    """

    def __init__(self, database: str, redis_url: str) -> None:
        address = make_url(database).set(drivername="postgresql")
        self.sql = psycopg.connect(address.render_as_string(hide_password=False), autocommit=True)
        client: Any = redis.Redis
        self._redis = client.from_url(redis_url)
        backend = psutil.Process(self.sql.info.backend_pid)
        parent = backend.parent()
        assert parent is not None
        self._postmaster = parent

    def close(self) -> None:
        """Close both connections."""
        self.sql.close()
        self._redis.close()

    def read(self, worker: int | None = None) -> Reading:
        """Return all readings now, those of the worker of that process id with its children among them."""
        info: Mapping[str, Any] = self._redis.info("all")
        row = self.sql.execute(
            "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn, "
            "pg_snapshot_xmax(pg_current_snapshot())::text::bigint, wal_fpi FROM pg_stat_wal"
        ).fetchone()
        assert row is not None
        servers = [self._postmaster, *self._postmaster.children(recursive=True)]
        found = {
            "postgres_cpu_s": cpu_s(servers),
            "wal_bytes": float(row[0]),
            "commits": float(row[1]),
            "full_pages": float(row[2]),
            "redis_cpu_s": info["used_cpu_user"] + info["used_cpu_sys"],
            "redis_commands": float(sum(each["calls"] for each in _commands(info))),
            "redis_bytes": float(info["total_net_input_bytes"] + info["total_net_output_bytes"]),
            "client_cpu_s": time.process_time(),
            "wall_s": time.perf_counter(),
            "machine_cpu_s": _busy_s(),
        }
        if worker is not None:
            main = psutil.Process(worker)
            found["parent_cpu_s"] = cpu_s([main])
            found["child_cpu_s"] = cpu_s(main.children(recursive=True))
        return found

    def connections(self) -> int:
        """Return how many connections this library holds."""
        asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'docket_celery'"
        return int(self._one(asked))

    def connection_bytes(self) -> float:
        """Return the median of what the memory of a connection of this library has for itself."""
        asked = "SELECT pid FROM pg_stat_activity WHERE application_name = 'docket_celery'"
        pids = [pid for (pid,) in self.sql.execute(asked).fetchall()]
        return statistics.median(_private_bytes(pid) for pid in pids)

    def sizes(self) -> Reading:
        """Return the bytes of the tables with their indexes and TOAST, by table."""
        tables = ("docket_runs", "docket_cache", "docket_executions")
        return {table: self._one(f"SELECT pg_total_relation_size('{table}')") for table in tables}

    def _one(self, asked: str) -> float:
        row = self.sql.execute(asked.encode()).fetchone()
        assert row is not None
        return float(row[0])


def _commands(info: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return (value for name, value in info.items() if name.startswith("cmdstat_") and name != "cmdstat_info")


def _busy_s() -> float:
    """Return the CPU seconds that all processes of the machine have used, and those that its host has taken."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def difference(before: Reading, after: Reading, jobs: int) -> Reading:
    """Return what one of *jobs* has used."""
    return {name: (after[name] - before[name]) / jobs for name in after}


OWN = ("postgres_cpu_s", "redis_cpu_s", "client_cpu_s", "parent_cpu_s", "child_cpu_s")


def others_cpu_s(reading: Reading) -> float:
    """Return the CPU seconds that other work of the machine has used beside a job."""
    return max(0.0, reading["machine_cpu_s"] - sum(reading[name] for name in OWN))


def quietest(rounds: list[Reading]) -> Reading:
    """Return that of *rounds* beside which other work has used the least of the machine."""
    return min(rounds, key=lambda each: others_cpu_s(each) / each["wall_s"])


def flush_times(folder: Path, times: int = 200) -> Reading:
    """Return the median seconds of an fdatasync after 8 KiB and after 1 MiB were written to a file in *folder*."""
    file = folder / "flush"
    found: Reading = {}
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.truncate(descriptor, 16 << 20)
        for name, size in (("flush_8k_s", 8 << 10), ("flush_1m_s", 1 << 20)):
            took: list[float] = []
            for number in range(times):
                os.pwrite(descriptor, os.urandom(size), number * size % (16 << 20))
                began = time.perf_counter()
                os.fdatasync(descriptor)
                took.append(time.perf_counter() - began)
            found[name] = statistics.median(took)
    finally:
        os.close(descriptor)
        file.unlink()
    return found
