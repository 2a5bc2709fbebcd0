"""The word list of the prose check."""

from __future__ import annotations

from pathlib import Path

from tools import prose


def test_the_pages_in_scope_use_plain_words() -> None:
    """Each path of the scope exists and is clean."""
    assert [name for name in prose.SCOPE if not (prose.ROOT / name).exists()] == []
    assert [line for path in prose.files(prose.SCOPE) for line in prose.find(path)] == []


def test_a_listed_word_is_found_with_its_line(tmp_path: Path) -> None:
    """In any case, as a whole word, with what to write instead."""
    page = tmp_path / "page.md"
    page.write_text(
        "Marshalling is fine, so many words that it is long.\nWhoever reads it shall know where the row lies.\n",
        encoding="utf-8",
    )
    assert [line.removeprefix(f"{page}:") for line in prose.find(page)] == [
        "2: 'Whoever': name who it is",
        "2: 'shall': must, or the plain verb",
        "2: 'lies': is",
    ]


def test_a_phrase_is_found_across_lines_of_text_comments_and_literals(tmp_path: Path) -> None:
    """Messages and comments of the package are broken over lines."""
    module = tmp_path / "module.py"
    module.write_text(
        '"""Let it be.\n\n    The run goes\n    on.\n    """\n# it goes\n# on\ntext = ("the run goes "\n    f"on")\n',
        encoding="utf-8",
    )
    assert [line.removeprefix(f"{module}:").partition(": ")[0] for line in prose.find(module)] == [
        *("1", "3", "6", "8")
    ]
