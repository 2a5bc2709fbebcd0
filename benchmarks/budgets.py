"""What this library is to reach, as data: printed beside each figure, never the exit status of anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Spread, spread
from benchmarks.scenario import OURS


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """An upper limit for the seconds of one run: *times* those of another way, and *plus_s*.

    A limit for a rate is one for the seconds of a run: half of a way's runs a second are twice its seconds.

    Attributes:
        figure: Full name of a figure.
        text: The limit as a person would say it.
        way: Whose figure is held against it.
        against: The other way; None: *plus_s* alone is the limit.
        of: Full name of the other way's figure; "": *figure*.
    """

    figure: str
    text: str
    way: str = OURS
    against: str | None = None
    of: str = ""
    times: float = 1.0
    plus_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a figure stands to its budget.

    Attributes:
        used: Measured / limit, of the medians: 1 or less is reached.
    """

    budget: Budget
    measured: Spread
    limit_s: float

    @property
    def used(self) -> float:
        """Measured / limit."""
        return self.measured.median / self.limit_s

    @property
    def reached(self) -> bool:
        """Whether the limit holds."""
        return self.used <= 1


def judge(budget: Budget, figures: Mapping[str, Mapping[str, Any]]) -> Verdict | None:
    """Return the verdict over measured *figures*, or None where one that it needs is missing."""
    ours = _spread(figures, budget.figure, budget.way)
    if ours is None:
        return None
    limit_s = budget.plus_s
    if budget.against is not None:
        theirs = _spread(figures, budget.of or budget.figure, budget.against)
        if theirs is None:
            return None
        limit_s += budget.times * theirs.median
    return Verdict(budget=budget, measured=ours, limit_s=limit_s)


def _spread(figures: Mapping[str, Mapping[str, Any]], figure: str, way: str) -> Spread | None:
    found = figures.get(figure, {}).get("ways", {}).get(way, {}).get("seconds")
    return spread(found) if found else None
