"""Writes docs/performance.md from the committed results and a template that is written by hand.

A line ``<!-- budgets -->``, ``<!-- table NAME -->`` (of a scenario), ``<!-- slower -->`` or ``<!-- machine -->`` of
the template becomes what the results say; everything else is copied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.budgets import Budget
from benchmarks.measure import ratios
from benchmarks.process import ROOT
from benchmarks.scenario import OURS, Scenario

TEMPLATE = ROOT / "benchmarks" / "performance.md.in"
PAGE = ROOT / "docs" / "performance.md"
MARK = re.compile(r"<!-- ([a-z]+)(?: ([a-z_]+))? -->")
NOT_WORTH_A_LINE = 1.05
"""Ours / its, below which two ways are as fast as one another on a shared machine."""


def page(
    found: Mapping[str, Any], template: str, scenarios: Sequence[Scenario], budgets: Sequence[Budget]
) -> str:
    """Return the page that *found*, a committed file of results, and *template* give.

    Raises:
        ValueError: The template has a mark that nothing stands for.
    """
    figures: Mapping[str, Any] = found["figures"]
    parts: dict[str, Callable[[str], Iterator[str]]] = {
        "budgets": lambda _: budget_table(figures, budgets),
        "table": lambda name: scenario_table(figures, name),
        "slower": lambda _: slower_table(figures, scenarios),
        "machine": lambda _: machine_lines(found),
    }
    lines: list[str] = []
    for line in template.splitlines():
        mark = MARK.fullmatch(line)
        if mark is None:
            lines.append(line)
        elif mark[1] in parts:
            lines += parts[mark[1]](mark[2] or "")
        else:
            raise ValueError(f"the template has {line!r}; it may have {', '.join(parts)}")
    return "\n".join(lines) + "\n"


def budget_table(figures: table.Results, budgets: Sequence[Budget]) -> Iterator[str]:
    """Yield a row for each budget that was measured."""
    verdicts = table.verdicts(budgets, figures)
    yield f"{sum(each.reached for each in verdicts)} of {len(verdicts)} are reached."
    yield ""
    yield "| work | measured | limit | | |"
    yield "|---|---|---|---|---|"
    for verdict in verdicts:
        budget = verdict.budget
        figure = figures[budget.figure]
        whose = "" if budget.way == OURS else f" ({budget.way})"
        limit = table.text_of(verdict.limit_s, figure["unit"])
        name = budget.text if limit == budget.text else f"{budget.text} = {limit}"
        measured = table.text_of(verdict.measured.median, figure["unit"])
        yield (
            f"| {figure['heading']}: {figure['title']}{whose} | {measured} | {name} | "
            f"{verdict.used:.2f} x | {'reached' if verdict.reached else '**not reached**'} |"
        )


def scenario_table(figures: table.Results, scenario: str) -> Iterator[str]:
    """Yield a row for each way of each figure of *scenario*."""
    yield "| work | way | median | quartiles | CPU | ours / it |"
    yield "|---|---|---|---|---|---|"
    chosen = {name: figure for name, figure in figures.items() if figure["scenario"] == scenario}
    for row in table.rows(chosen):
        yield f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |")
    for line in table.failures(chosen):
        yield ""
        yield line


def slower_table(figures: table.Results, scenarios: Sequence[Scenario]) -> Iterator[str]:
    """Yield a row for each way that takes less than ours, with the reason."""
    why = {(each.name, way.name): way.why for each in scenarios for way in each.ways}
    yield "| work | way | ours / it | because |"
    yield "|---|---|---|---|"
    for figure in figures.values():
        _, ours = table.reference(figure)
        for way, found in figure["ways"].items():
            if not ours or way.startswith(OURS) or "error" in found:
                continue
            ratio = ratios(ours, found["seconds"]).median
            if ratio > NOT_WORTH_A_LINE:
                reason = why.get((figure["scenario"], way), "")
                yield f"| {figure['heading']}: {figure['title']} | {way} | {ratio:.2f} x | {reason} |"


def machine_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the figures were measured on."""
    machine, figures = found["machine"], found["figures"].values()
    loads = [load for figure in figures for load in figure["load"]]
    times = sorted(figure["taken"] for figure in figures)
    yield (
        f"{machine['cores']} cores ({machine['processor']}), {machine['system']}, Python {machine['python']}; "
        f"commit {found['commit']}; from {times[0]} to {times[-1]}; load average of the last minute "
        f"{min(loads):.1f} to {max(loads):.1f}, that of the measurement included."
    )
    yield ""
    yield ", ".join(f"{name} {version}" for name, version in machine["versions"].items()) + "."


def write(committed: Path, scenarios: Sequence[Scenario], budgets: Sequence[Budget]) -> None:
    """Write the page."""
    text = page(json.loads(committed.read_text()), TEMPLATE.read_text(), scenarios, budgets)
    PAGE.write_text(text)
