"""What imports and the start of a worker take, and what an idle worker holds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.host import Run, repeat
from benchmarks.ways.celery_worker import environment, worker

ROOT = Path(__file__).resolve().parents[2]
OURS = "from celery import Celery; from docket_celery import Graph, GraphTask, graph_task; Celery('a').Task"
CELERY = "from celery import Celery; Celery('a').Task"
SQL = "import sqlalchemy, psycopg"
SOURCES = {"ours": OURS, "celery": CELERY, "sql": SQL, "nothing": ""}


@contextmanager
def imports(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """A Python that imports ``options["what"]`` and ends."""
    command = [sys.executable, "-P", "-c", SOURCES[options["what"]]]
    yield {"import": repeat(lambda: subprocess.run(command, check=True))}


@contextmanager
def workers(options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """A worker of ``options["app"]`` in the peers' environment, in which this library is not installed.

    With ``options["plugin"]`` it is, as far as Celery's command looks: the metadata with its entry point is there.
    """
    os.environ |= environment(options)
    held_mb = [0.0]

    def start(count: int) -> float:
        took_s = 0.0
        for _ in range(count):
            began = time.perf_counter()
            with worker(f"benchmarks.ways.{options['app']}") as process:
                took_s += time.perf_counter() - began
                held_mb[0] = proportional_mb(process.pid)
        return took_s / count

    with tempfile.TemporaryDirectory(prefix="docket-bench-") as folder:
        if options["plugin"]:
            write_metadata(Path(folder))
            os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ["PYTHONPATH"]])
        # What the last start has measured.
        yield {"worker": start, "idle": lambda _count: held_mb[0]}


def write_metadata(folder: Path) -> None:
    """Write what an installation of this library leaves for `importlib.metadata` to find."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = folder / f"docket_celery-{project['version']}.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines: list[str] = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (found / "entry_points.txt").write_text("\n".join(lines) + "\n")


def proportional_mb(pid: int) -> float:
    """Return the proportional set size of a process and all below it: what is shared counts once."""
    parent = psutil.Process(pid)
    return (
        float(sum(each.memory_full_info().pss for each in (parent, *parent.children(recursive=True)))) / 2**20
    )
