"""Find words that the project's documentation, docstrings, comments and messages do not use.

Usage: prose.py [PATH ...]

Without paths, `SCOPE` is checked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCOPE = ("README.md", "CHANGELOG.md", "changes", "docs", "docket_celery")
#: Pages whose text quotes the words, or that are generated from messages of the package.
LEFT_OUT = ("docs/contributing/adr", "docs/contributing/map.md", "docs/errors.md", "docs/reference.md")
WORDS = {
    r"whoever": "name who it is",
    r"(?:some|any)body": "name who it is: another delivery, a process, a user",
    r"so (?:many|often)(?! \w+ that\b)": "give the number, or say what it depends on",
    r"shall": "must, or the plain verb",
    r"anew": "again",
    r"lies?": "is",
    r"stands? (?:so|now)|(?:as|where) it stands": "is",
    r"(?:go|goes|gone|going) on": "continues, runs",
    r"what has become of": "the state of",
    r'"""(?:Let|Have)': "begin with the verb that says what is done",
}
# A phrase may be broken over lines, of text, of a comment or of adjacent string literals.
_GAP = r"""[\s#"]+(?:f["'])?"""
_PATTERNS = [
    (re.compile(rf"(?<!\w){words.replace(' ', _GAP)}\b", re.IGNORECASE), advice)
    for words, advice in WORDS.items()
]


def find(path: Path) -> list[str]:
    """Return a line for each word of `WORDS` in the file *path*, with what to write instead, in their order."""
    text = path.read_text(encoding="utf-8")
    found = [(match, advice) for pattern, advice in _PATTERNS for match in pattern.finditer(text)]
    return [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {' '.join(match[0].split())!r}: {advice}"
        for match, advice in sorted(found, key=lambda each: each[0].start())
    ]


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
