"""docs/errors.md shows faults and errors as they really are."""

from __future__ import annotations

import re

import pytest

from tests import error_page


@pytest.mark.parametrize("shown", error_page.EXAMPLES, ids=lambda shown: f"{shown.code} {shown.title}")
def test_each_example_has_its_fault_and_no_other(shown: error_page.Example) -> None:
    """All lines of the report have the example's code, a place in the example, and say what to do."""
    head, *faults = error_page.report(shown).splitlines()
    assert head.startswith("[DC100] graph 'shop' has ")
    assert faults
    for fault in faults:
        assert fault.startswith(f"  - {shown.code} ")
        assert re.search(r"\bshop\.py:\d+|override: |no result: ", fault)
        assert "; " in fault or "but the step returns" in fault or "= is " in fault


def test_every_kind_of_fault_has_an_example() -> None:
    """The table and the examples name the same codes."""
    page = error_page.PAGE.read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| (DC1[1-9]\d) \|", page, re.MULTILINE))
    assert listed == {shown.code for shown in error_page.EXAMPLES}


def test_an_example_without_a_fault_is_noticed() -> None:
    """The page cannot show the report of a graph that is right."""
    right = error_page.example("DC111", "Right", "shop.validate()")
    with pytest.raises(AssertionError, match="has no fault"):
        error_page.report(right)


def test_a_page_without_its_marks_is_noticed() -> None:
    """Else the examples could silently go."""
    with pytest.raises(ValueError, match="needs one <!-- faults"):
        error_page.render("# Errors\n")
