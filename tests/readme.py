"""The README as data: its fenced blocks, and the project that they make up."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"\A(?:#|//) ([\w.]+\.\w+)\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snippet:
    """A fenced block.

    Attributes:
        language: Its info string.
        text: Without the fences.
        file: The file that its first line names, or None.
        line: Where it starts in the README, from 1.
    """

    language: str
    text: str
    file: str | None
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command of a console block, without its comment, and the output shown below it."""

    text: str
    output: str
    line: int


def snippets(language: str | None = None) -> list[Snippet]:
    """Return the README's blocks of *language*, or all."""
    text = README.read_text(encoding="utf-8")
    found: list[Snippet] = []
    for match in _BLOCK.finditer(text):
        named = _FILE.match(match[2])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Snippet(language=match[1], text=match[2], file=named[1] if named else None, line=line))
    return [snippet for snippet in found if language in (None, snippet.language)]


def commands() -> Iterator[Command]:
    """Yield the commands of all console blocks."""
    for snippet in snippets("console"):
        for part in re.split(r"^\$ ", snippet.text, flags=re.MULTILINE)[1:]:
            first, _, output = part.partition("\n")
            yield Command(text=first.partition("  #")[0].strip(), output=output, line=snippet.line)


def make_project(folder: Path) -> None:
    """Write the files that the README names into *folder*, and run its protoc command there."""
    for snippet in snippets():
        if snippet.file is not None:
            (folder / snippet.file).write_text(snippet.text, encoding="utf-8")
    (protoc,) = (command.text for command in commands() if " protoc " in command.text)
    program, *arguments = protoc.split()
    assert program == "python"
    # No PATH: the programs of an environment that is not activated are found.
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
