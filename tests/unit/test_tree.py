from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Made by tools or servers inside the checkout, and ignored by git.
MADE = re.compile(
    r"(^|/)(\.git|\.venv|\.docket|\.[a-z_]+_cache|\.hypothesis|__pycache__|dist|build|htmlcov)(/|$)"
)

RULES = {
    "a package index's address": re.compile(
        r"https?://[^\s'\"]*(?:pypi|pythonhosted|npmjs|/simple/\w)", re.IGNORECASE
    ),
    "an installer's index option": re.compile(
        r"--(?:default-|extra-)?index(?:-url)?[ =]\S|--find-links[ =]\S"
    ),
    "a path of one machine": re.compile(r"(?<![\w.~-])/(?:root|work|home/[\w.-]+|Users/[\w.-]+)/"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
#: Answers to the option pattern, but carries no address: it keeps addresses out.
HARMLESS = re.compile(r"--no-emit-(?:index-url|find-links)")


def tracked_files() -> list[Path]:
    """List what git tracks, or, in a tree without git, whatever tools did not make."""
    # The checkout may belong to another user than the one who runs the tests.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\0"
        )
    except (OSError, subprocess.CalledProcessError):
        paths = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*"))
        listed = [path for path in paths if MADE.search(path) is None]
    return sorted(ROOT / name for name in listed if name and (ROOT / name).is_file())


def findings(text: str) -> Iterator[str]:
    """Yield what *text* says that no tracked file may say, with its line."""
    for number, line in enumerate(HARMLESS.sub("", text).splitlines(), 1):
        yield from (
            f"line {number} holds {what}" for what, rule in RULES.items() if rule.search(line) is not None
        )


def test_tracked_files_name_no_index_and_no_machine() -> None:
    """The tree means the same behind any mirror, on any machine."""
    files = tracked_files()
    assert ROOT / "pyproject.toml" in files
    found = [
        f"{path.relative_to(ROOT)}: {finding}"
        for path in files
        for finding in findings(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "https://mirror.example/api/py~~pi/simple/",
        "http://files.python~~hosted.org/x.whl",
        "--index~~-url mirror",
        "--find~~-links=wheels",
        "see /roo~~t/.cache/x",
        "'/ho~~me/ann/shop/app.py'",
        "-----BEGIN RSA PRI~~VATE KEY-----",
    ],
)
def test_a_line_that_names_a_place_is_found(line: str) -> None:
    """Each rule can fail; the samples are cut in two, or this file would break the rules itself."""
    whole = line.replace("~~", "")
    assert len(list(findings(f"fine\n{whole}\n"))) >= 1
    assert list(findings(line)) == []


@pytest.mark.parametrize(
    "line",
    [
        "postgresql+psycopg://localhost/shop",
        "https://semver.org/",
        "uv pip compile --no-emit-index-url --no-emit-find-links",
        "./work/queue and network/home/page and /var/lib/postgresql",
    ],
)
def test_an_ordinary_line_is_left_alone(line: str) -> None:
    """Addresses of servers and documents, relative paths and the system's own folders are no findings."""
    assert list(findings(line)) == []
