"""Figures as text: in units that a person reads, with their budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.budgets import Budget, Verdict, judge
from benchmarks.measure import Spread, ratios, spread
from benchmarks.scenario import OURS

Results = Mapping[str, Mapping[str, Any]]


def text_of(value: float, unit: str) -> str:
    """Return a measured value as text: seconds in their best unit, rates, sizes.

    Args:
        value: Seconds of one run, also for a rate; megabytes, kilobytes.
        unit: "s", "runs/s", "MB" or "KB".
    """
    if unit in {"MB", "KB"}:
        return f"{_digits(value)} {unit}"
    if unit == "runs/s":
        return f"{1 / value:,.0f}/s"
    for factor, name in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1:
            return f"{_digits(value * factor)} {name}"
    return f"{_digits(value * 1e6)} us"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def quartiles(found: Spread, unit: str) -> str:
    """Return first and third quartile as text, the smaller number first."""
    low, high = (found.high, found.low) if unit == "runs/s" else (found.low, found.high)
    return f"{text_of(low, unit)} - {text_of(high, unit)}"


def reference(figure: Mapping[str, Any]) -> tuple[str, Sequence[float]]:
    """Return the way that others are held against, the first one of this library, and its rounds, if it has any."""
    for way, found in figure["ways"].items():
        if way.startswith(OURS):
            return way, found.get("seconds", ())
    return "", ()


def rows(figures: Results) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Yield figure, way, median, quartiles, CPU and "ours / it" for each way of each figure."""
    for figure in figures.values():
        first, ours = reference(figure)
        for number, (way, found) in enumerate(figure["ways"].items()):
            title = "" if number else figure["title"]
            if "error" in found:
                yield title, way, "failed", "", "", ""
                continue
            seen = spread(found["seconds"])
            against = ratios(ours, found["seconds"]) if ours and way != first else None
            yield (
                title,
                way,
                text_of(seen.median, figure["unit"]),
                quartiles(seen, figure["unit"]),
                "" if figure["unit"] in {"MB", "KB"} else text_of(spread(found["cpu"]).median, "s"),
                "" if against is None else f"{against.median:.2f} x",
            )


def failures(figures: Results) -> list[str]:
    """Return a line for each way that failed, however many figures it failed in for the same reason."""
    lines = [
        f"{figure['heading']}: {way} failed: {found['error'].strip().splitlines()[-1]}"
        for figure in figures.values()
        for way, found in figure["ways"].items()
        if "error" in found
    ]
    return list(dict.fromkeys(lines))


def verdicts(budgets: Sequence[Budget], figures: Results) -> list[Verdict]:
    """Return those of *budgets* whose figures were measured."""
    return [found for budget in budgets if (found := judge(budget, figures)) is not None]


def verdict_text(verdict: Verdict, unit: str) -> str:
    """Return one line for a verdict."""
    budget = verdict.budget
    return (
        f"{budget.figure}: {text_of(verdict.measured.median, unit)}; limit {budget.text} = "
        f"{text_of(verdict.limit_s, unit)}: {outcome(verdict)}"
    )


def outcome(verdict: Verdict) -> str:
    """Return whether it is reached, and how far it is if not."""
    return "reached" if verdict.reached else f"not reached, {verdict.used:.2f} x the limit"
