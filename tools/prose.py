"""Find words that the project's documentation and docstrings do not use.

Usage: prose.py [PATH ...]

Without paths, `SCOPE` is checked. Add a path to `SCOPE` when its prose is plain.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCOPE = ("README.md", "CHANGELOG.md", "docs", "docket_celery/__main__.py", "docket_celery/devserver")
#: Pages whose text quotes the words, or that are generated from messages of the package.
LEFT_OUT = ("docs/contributing/adr", "docs/contributing/map.md", "docs/errors.md", "docs/reference.md")
WORDS = {
    r"whoever": "name who it is",
    r"so many": "give the number, or say what it depends on",
    r"shall": "must, or the plain verb",
    r"anew": "again",
    r"(?:it|run|row|task|file|code|data|job|batch|stage|value|step)s? (?:lies?|stands?|goes on|go on)": "is, runs",
    r"what has become of": "the state of",
    r"have somebody": "say who does what",
}
_PATTERNS = [(re.compile(rf"\b{word}\b", re.IGNORECASE), advice) for word, advice in WORDS.items()]


def find(path: Path) -> list[str]:
    """Return a line for each word of `WORDS` in the file *path*, with what to write instead."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for pattern, advice in _PATTERNS:
            found += [f"{path}:{number}: {match[0]!r}: {advice}" for match in pattern.finditer(line)]
    return found


def files(paths: Sequence[str]) -> list[Path]:
    """List the Markdown and Python files of *paths*, relative to the repository's root."""
    left_out = tuple(ROOT / path for path in LEFT_OUT)
    listed: list[Path] = []
    for name in paths:
        path = ROOT / name
        inside = [path] if path.is_file() else sorted([*path.rglob("*.md"), *path.rglob("*.py")])
        listed += [file for file in inside if not any(file.is_relative_to(out) for out in left_out)]
    return listed


def main(argv: Sequence[str]) -> int:
    """Check the paths in *argv*, or `SCOPE`; return the exit status."""
    found = [line for path in files(argv or SCOPE) for line in find(path)]
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
