"""docs/batches.md as its reader would use it: its snippets run one after the other."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "batches.md"


def test_the_snippets_of_the_page_hold() -> None:
    """Each assertion of the page is made."""
    snippets = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(snippets) == 5
    # Of a module: annotations are read by their names.
    names: dict[str, object] = {"__name__": "batches_page"}
    exec(compile("\n".join(snippets), str(PAGE), "exec"), names)  # noqa: S102 -- our own page
    assert names["calls"]
