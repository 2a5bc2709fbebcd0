"""What the reference pages list is what the code has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import docket_celery
from docket_celery.engine.process.settings import ENV_PREFIX, PREFIX, Settings
from docket_celery.errors import DocketError, InvalidSettings
from docket_celery.store.records import RunState
from docket_celery.task import app_defaults
from tests import error_page
from tests.unit.test_errors import family
from tools import draw_map

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def rows(page: str) -> list[list[str]]:
    """Return the cells of all table rows of a page, heads and rules left out."""
    lines = [line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {n for n, row in enumerate(cells) if set("".join(row)) <= {"-"}}
    return [row for n, row in enumerate(cells) if n not in rules and n + 1 not in rules]


def sources() -> str:
    """Return the text of all modules of the package."""
    return "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "docket_celery").rglob("*.py"))
    )


def test_errors_page_has_every_class_with_its_code() -> None:
    """Each error has one row with its code and class name, and no row tells of another one."""
    listed = {row[0]: row[1] for row in rows("errors.md") if len(row) == 4}
    assert listed == {kind.code: f"`{kind.__name__}`" for kind in family(DocketError)}


def test_errors_page_has_every_fault_of_a_graph() -> None:
    """Each code from DC110 on that a report can hold is explained."""
    used = set(re.findall(r"[\"']DC1[1-9]\d", sources()))
    listed = [row[0] for row in rows("errors.md") if len(row) == 3]
    assert listed == sorted({code[-5:] for code in used})


def test_errors_page_shows_the_reports_and_texts_of_today() -> None:
    """Each example is run, each error printed; ``make docs`` brings the page up to date."""
    page = error_page.PAGE.read_text(encoding="utf-8")
    assert page == error_page.render(page), "run: python -m tests.error_page"


def test_every_error_is_public() -> None:
    """What is explained can be imported and caught."""
    assert {kind.__name__ for kind in family(DocketError)} <= set(docket_celery.__all__)


def test_settings_page_has_every_key_with_its_default() -> None:
    """Key, environment twin and default of each setting, in the order of the code."""
    listed = [[cell.strip("`") for cell in row[:3]] for row in rows("settings.md") if len(row) == 5]
    assert [row[:2] for row in listed] == [
        [PREFIX + field.name, ENV_PREFIX + field.name.upper()] for field in fields(Settings)
    ]
    plain = Settings.read({}, {})
    for key, _, default in listed:
        value = getattr(plain, key.removeprefix(PREFIX))
        if key == "docket_threads":
            assert default == "min(32, 4 x cores)"
        elif value is None or value == ():
            assert default == "none"
        elif isinstance(value, bool):
            assert default == str(value).lower()
        else:
            assert default == (f"{value:g}" if value < 1e6 else f"{value:.0f}")


def test_settings_page_has_the_least_values() -> None:
    """The least value is accepted, and what lies below it is refused."""
    for row in rows("settings.md"):
        if len(row) == 5 and row[3]:
            key, least = row[0].strip("`"), int(row[3])
            assert getattr(Settings.read({key: least}, {}), key.removeprefix(PREFIX)) == least
            try:
                Settings.read({key: least - 1}, {})
            except InvalidSettings:
                continue
            raise AssertionError(f"{key} = {least - 1} was accepted")


def test_settings_page_has_what_configure_changes() -> None:
    """Each setting that `configure` may touch is named with its value."""
    listed = {row[0].strip("`"): row[1] for row in rows("settings.md") if len(row) == 2}
    assert {key: value for key, value in listed.items() if "Redis" not in key} == {
        change.key: f"{change.value:g}" if not isinstance(change.value, bool) else str(change.value).lower()
        for change in app_defaults._WANTED
    }
    redis = next(value for key, value in listed.items() if "Redis" in key)
    assert redis == ", ".join(f"`{key}` {value}" for key, value in app_defaults._REDIS.items())


def test_glossary_has_each_word_once_and_every_state() -> None:
    """One word, one meaning; and the states are those of the code."""
    words = [row[0] for row in rows("glossary.md")]
    assert len(words) == len(set(words)) > 20
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    assert [state for state in RunState if not re.search(rf"\b{state.value}\b", text)] == []


def test_guarantees_say_first_what_holds_without_a_database() -> None:
    """The reader who sets none must not have to look for it; and each promise is stated or denied."""
    text = (DOCS / "guarantees.md").read_text(encoding="utf-8")
    assert text.partition("\n\n")[2].startswith("Without a database")
    for promise in ("G1", "G2", "G3", "G4", "G5", "G6"):
        assert promise in text


def test_decisions_are_numbered_without_gaps_and_titled_alike() -> None:
    """A number names one decision."""
    files = sorted((DOCS / "contributing" / "adr").glob("*.md"))
    assert [int(file.name[:4]) for file in files] == list(range(1, len(files) + 1))
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert re.match(rf"# {int(file.name[:4])}\. .+\n\nStatus: \w+", text), file.name
        assert re.search(r"^## Context$", text, re.MULTILINE), file.name
        assert re.search(r"^## Consequences$", text, re.MULTILINE), file.name


def test_links_between_pages_lead_somewhere() -> None:
    """A link to a file has one at its end."""
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_parity_page_proves_each_row_or_says_that_it_does_not() -> None:
    """Each claim of the guide has a test, or the plain words "not yet" or "no, because"."""
    listed = rows("contributing/guide-parity.md")
    assert len(listed) > 60
    for row in listed:
        assert len(row) == 3, row
        assert "::" in row[2] or re.match(r"not yet$|no, because ", row[2]), row
        assert not ("::" in row[2] and row[2].startswith("not yet")), row


def test_parity_page_names_what_exists() -> None:
    """Each file, test and example that is named can be found."""
    text = (DOCS / "contributing" / "guide-parity.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) == text.count("::test_")
    missing = [
        f"{file}::{test}"
        for file, test in sorted(set(named))
        if not re.search(
            rf"^ *(?:async )?def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE
        )
    ]
    assert missing == []
    examples = set(re.findall(r"python -m examples\.(\w+)", text))
    assert [
        name for name in sorted(examples) if not (ROOT / "examples" / name / "__main__.py").exists()
    ] == []
    assert len(examples) >= 6


def test_the_map_shows_the_rooms_of_today() -> None:
    """The picture is drawn from the code; ``make docs`` brings it up to date."""
    page = draw_map.PAGE.read_text(encoding="utf-8")
    assert page == draw_map.render(page), "run: make docs"
