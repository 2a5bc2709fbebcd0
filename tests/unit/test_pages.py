"""The users' pages whose code runs alone: each is run from top to bottom."""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery import Celery
from celery.bin.worker import worker

from docket_celery import configure

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Seconds in which runs give their leases back at a stop.
LEAVE_S = 5.0


@pytest.mark.parametrize("page", ["beat", "deploying", "fastapi", "logging", "retries", "scaling"])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    """All blocks of a page are one program, whose own assertions hold."""
    blocks = BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    (tmp_path / f"{page}_page.py").write_text("\n".join(blocks), encoding="utf-8")
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import {page}_page"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def blocks(page: str, language: str) -> list[str]:
    """Return a page's blocks in *language*."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_loggers_are_those_of_the_package() -> None:
    """The table names each logger that a module makes, and no other."""
    page = (ROOT / "docs" / "logging.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(docket_celery\.\w+)` \|", page, re.MULTILINE)
    modules = (ROOT / "docket_celery").rglob("*.py")
    made = {name for path in modules for name in re.findall(r'getLogger\("(.+?)"\)', path.read_text("utf-8"))}
    assert sorted(told) == sorted(made)


def test_the_command_lines_of_workers_are_accepted() -> None:
    """Celery knows each option."""
    known = {option for parameter in worker.params for option in parameter.opts}
    lines = [line for block in blocks("deploying", "sh") for line in block.splitlines() if " worker " in line]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line.partition(" worker ")[2])
        assert {word for word in words if word.startswith("-")} <= known


def test_stops_leave_more_time_than_the_soft_shutdown_takes() -> None:
    """In each of the examples, which all have TERM remapped."""
    app = Celery("stops", broker="redis://", set_as_current=False)
    needed_s = dict((c.key, c.value) for c in configure(app))["worker_soft_shutdown_timeout"] + LEAVE_S  # noqa: C402
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment, method-assign] # names as they are written
    (text,) = blocks("deploying", "ini")
    unit.read_string(text)
    pod, compose = (yaml.safe_load(block) for block in blocks("deploying", "yaml"))
    service: dict[str, Any] = compose["services"]["worker"]
    times = [
        unit["Service"]["TimeoutStopSec"],
        pod["spec"]["terminationGracePeriodSeconds"],
        service["stop_grace_period"].rstrip("s"),
    ]
    assert min(map(float, times)) > needed_s
    assert unit["Service"]["Environment"] == "REMAP_SIGTERM=SIGQUIT"
    assert pod["spec"]["containers"][0]["env"] == [{"name": "REMAP_SIGTERM", "value": "SIGQUIT"}]
    assert service["environment"] == {"REMAP_SIGTERM": "SIGQUIT"}
