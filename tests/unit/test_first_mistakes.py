"""Each mistake of docs/first-mistakes.md is made, and the error that Python prints is the one that is shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import readme

PAGE = readme.ROOT / "docs" / "first-mistakes.md"
_MISTAKE = re.compile(
    r"^## (\d+)\. (.+?)$(?:(?!^## ).)*?^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """One section of the page.

    Attributes:
        script: What is run.
        shown: What the end of its traceback is said to be.
    """

    number: int
    title: str
    script: str
    shown: str


def mistakes() -> list[Mistake]:
    """Return the sections of the page, in their order."""
    found = _MISTAKE.findall(PAGE.read_text(encoding="utf-8"))
    return [
        Mistake(number=int(n), title=title, script=script, shown=text) for n, title, script, text in found
    ]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's shop with its generated messages."""
    folder = tmp_path_factory.mktemp("shop")
    readme.make_project(folder)
    return folder


def make(mistake: Mistake, project: Path, folder: Path) -> str:
    """Run the script as its author would; return the error below its traceback."""
    (folder / "mistake.py").write_text(mistake.script, encoding="utf-8")
    hidden = ("DOCKET_", "CELERY_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    env |= {"PYTHONPATH": os.pathsep.join([str(project), str(readme.ROOT)])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "mistake.py"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    # Of chained errors the last one counts; its text begins at the first line that is not indented.
    last = done.stderr.rpartition("Traceback (most recent call last):\n")[2]
    start = re.search(r"^\S", last, re.MULTILINE)
    assert start is not None, done.stderr
    return last[start.start() :].replace(f"{folder}{os.sep}", "")


def test_there_are_ten_in_order() -> None:
    """Every section has a script and an error."""
    assert [mistake.number for mistake in mistakes()] == list(range(1, 11))
    assert len(re.findall(r"^## ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == 10


@pytest.mark.parametrize("mistake", mistakes(), ids=lambda mistake: str(mistake.number))
def test_the_error_is_the_one_shown(mistake: Mistake, project: Path, tmp_path: Path) -> None:
    """Python prints these words; a changed message changes the page."""
    assert make(mistake, project, tmp_path) == mistake.shown
