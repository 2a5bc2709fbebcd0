"""docs/batches.md as its reader would use it: its snippets run one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from celery import _state

PAGE = Path(__file__).resolve().parents[2] / "docs" / "batches.md"


def test_the_snippets_of_the_page_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each assertion of the page is made."""
    # The page makes an app; neither it nor its tasks are other tests' business.
    state: Any = _state
    monkeypatch.setattr(state._tls, "current_app", None)
    monkeypatch.setattr(state, "_on_app_finalizers", set(state._on_app_finalizers))
    snippets = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(snippets) == 7
    # Of a module: annotations are read by their names.
    names: dict[str, object] = {"__name__": "batches_page"}
    exec(compile("\n".join(snippets), str(PAGE), "exec"), names)  # noqa: S102 -- our own page
    assert names["calls"]
