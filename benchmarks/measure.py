"""Medians with their spread, and ratios of ways that were measured in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What repeated measurements say.

    Attributes:
        median: Their median.
        low: First quartile; the smallest of fewer than four.
        high: Third quartile; the largest of fewer than four.
    """

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles of *values*, of which there is at least one."""
    if len(values) < 4:
        return Spread(median=statistics.median(values), low=min(values), high=max(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=median, low=low, high=high)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return ours / theirs, round by round: what slows the machine in a round slows both."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])
