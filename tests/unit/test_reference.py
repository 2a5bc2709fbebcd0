"""docs/reference.md is generated from the public API of today."""

from __future__ import annotations

import re

import docket_celery
from tools import reference


def test_the_reference_is_up_to_date() -> None:
    """Signatures and docstrings of the page are those of the code."""
    assert reference.PAGE.read_text(encoding="utf-8") == reference.render(), "run: make docs"


def test_the_reference_has_every_public_name() -> None:
    """In the order of ``__all__``, with the methods of what people call most."""
    page = reference.PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == docket_celery.__all__
    assert {"### Graph.step", "### Graph.execute", "### RunHandle.cancel"} <= set(page.splitlines())
