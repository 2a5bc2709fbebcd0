"""Raw results: one JSON object a figure, kept until the code changes, and one file of all that is committed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.process import PEERS_PYTHON, ROOT
from benchmarks.scenario import Figure, Scenario

KEPT = ROOT / ".venv" / ".bench"
COMMITTED = ROOT / "benchmarks" / "results" / "reference.json"
PACKAGES = (
    "celery",
    "kombu",
    "redis",
    "sqlalchemy",
    "psycopg",
    "protobuf",
    "apache-hamilton",
    "dask",
    "dbos",
    "langgraph",
    "langgraph-checkpoint-postgres",
    "prefect",
    "pydantic-graph",
)

Result = dict[str, Any]
"""One figure: its words, and for each way the rounds or the error."""


class Kept:
    """The finished figures of one state of the code, a file for each.

    Args:
        folder: Where; made when the first figure is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, name: str) -> bool:
        """Tell whether the figure *name* is finished."""
        return (self._folder / f"{name}.json").exists()

    def keep(self, name: str, result: Mapping[str, Any]) -> None:
        """Keep a finished figure, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f".{name}.part"
        part.write_text(json.dumps(result))
        part.replace(self._folder / f"{name}.json")

    def read(self, names: Iterable[str]) -> dict[str, Result]:
        """Return the finished ones of *names*, in their order."""
        return {
            name: json.loads((self._folder / f"{name}.json").read_text()) for name in names if self.has(name)
        }

    def drop(self, name: str) -> None:
        """Forget the figure *name*."""
        (self._folder / f"{name}.json").unlink(missing_ok=True)


def state_of_code(root: Path = ROOT) -> str:
    """Return the commit, and a digest of what differs from it in the measured and the measuring code."""
    commit = _git(root, "rev-parse", "--short=12", "HEAD").strip()
    changed = _git(root, "diff", "HEAD", "--", "docket_celery", "benchmarks", ":!benchmarks/results")
    return f"{commit}-{hashlib.sha256(changed.encode()).hexdigest()[:8]}" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return done.stdout


def describe(scenario: Scenario, figure: Figure) -> Result:
    """Return what is kept of a figure beside its measurements."""
    return {
        "scenario": scenario.name,
        "heading": scenario.title,
        "title": figure.title,
        "unit": figure.unit,
    }


def load_average() -> float:
    """Return the load of the last minute."""
    return round(os.getloadavg()[0], 2)


def machine() -> dict[str, Any]:
    """Return what the figures depend on: cores, system, Python, versions of packages."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _versions() -> dict[str, str]:
    folders = list(PEERS_PYTHON.parents[1].glob("lib/python*/site-packages"))
    found = {
        (each.metadata["Name"] or "").lower().replace("_", "-"): each.version
        for each in [
            *metadata.distributions(path=[str(folder) for folder in folders]),
            *metadata.distributions(),
        ]
    }
    return {name: found[name] for name in PACKAGES if name in found}


def write(path: Path, figures: Mapping[str, Result], state: str) -> None:
    """Write *figures* as one file, each list on a line, so that a difference can be read."""
    figures = {
        name: {**figure, "ways": _without_tracebacks(figure["ways"])} for name, figure in figures.items()
    }
    about = {"commit": state, "machine": machine(), "figures": {}}
    text = json.dumps({**about, "figures": figures}, indent=1, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_joined(text) + "\n")


def _without_tracebacks(ways: Mapping[str, Any]) -> dict[str, Any]:
    """Leave of each error its last line: the others name folders of the machine."""
    return {
        way: {"error": found["error"].strip().splitlines()[-1]} if "error" in found else found
        for way, found in ways.items()
    }


def _joined(text: str) -> str:
    """Put each list of numbers on one line."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if inside:
            lines[-1] += line.strip() if line.strip().startswith("]") else line.strip() + " "
            inside = not line.strip().startswith("]")
        else:
            lines.append(line)
            inside = line.endswith("[")
    return "\n".join(line.replace(", ]", "]").replace(" ]", "]") for line in lines)
