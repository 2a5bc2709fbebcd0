"""Timing two ways of doing the same thing in turns, so that a drifting machine does not favour one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What was measured.

    Attributes:
        ours_s: Median seconds for one call of ours.
        theirs_s: Median seconds for one call of the yardstick.
        ratio: Median over the rounds of theirs / ours: above 1 we are faster.
    """

    name: str
    yardstick: str
    ours_s: float
    theirs_s: float
    ratio: float

    def __str__(self) -> str:
        return (
            f"{self.name:<38} {1 / self.ours_s:>9,.0f}/s {self.ours_s * 1e6:>9,.1f} µs   "
            f"{self.ratio:>5.2f} x {self.yardstick} ({self.theirs_s * 1e6:,.1f} µs)"
        )


def compare(
    name: str,
    ours: Callable[[], object],
    yardstick: str,
    theirs: Callable[[], object],
    *,
    calls: int,
    rounds: int,
) -> Figure:
    """Call both *calls* times in each of *rounds* rounds, in turns, after one round of warm-up."""
    pairs: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        pair = (_per_call_s(ours, calls), _per_call_s(theirs, calls))
        if number:
            pairs.append(pair)
    return Figure(
        name=name,
        yardstick=yardstick,
        ours_s=statistics.median(pair[0] for pair in pairs),
        theirs_s=statistics.median(pair[1] for pair in pairs),
        ratio=statistics.median(theirs_s / ours_s for ours_s, theirs_s in pairs),
    )


def _per_call_s(call: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls
