"""Draws the plots of docs/performance.md: ``python -m benchmarks.plots``, in the peers' environment.

Colours are Okabe and Ito's, which people with any colour vision tell apart; text is a grey that can be read on white
and on black, and stays text in the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from benchmarks.measure import spread
from benchmarks.table import text_of
from benchmarks.ways.peers import load

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "reference.json"
FOLDER = ROOT / "docs" / "performance"
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#808080"
BY_HAND = {
    "by hand on a pool",
    "direct calls",
    "seven statements",
    "INSERT and commit",
    "SELECT by key",
    "no-op task",
}
PLOTS: Mapping[str, Sequence[str]] = {
    "process": ("process_fan", "process_chain_10", "process_chain_100", "process_sleeps"),
    "persisted": ("persisted_chain", "persisted_fan", "persisted_threads_8", "persisted_again"),
    "tasks": ("task_redis_prefork_throughput", "task_redis_prefork_latency"),
    "tables": ("tables_chain", "tables_again", "tables_find_lost", "tables_purge"),
}


def colour(way: str) -> str:
    """Return the colour of a way: ours, by hand, a peer."""
    if way.startswith("docket_celery"):
        return BLUE
    return GREY if way in BY_HAND else ORANGE


def draw_bars(axes: Any, figure: Mapping[str, Any]) -> None:
    """Draw one bar for each way, as long as its median, with its quartiles."""
    unit, ways = figure["unit"], {way: each for way, each in figure["ways"].items() if "seconds" in each}
    rate = unit == "runs/s"
    for at, (way, found) in enumerate(reversed(ways.items())):
        seen = spread([1 / value if rate else value for value in found["seconds"]])
        axes.barh(at, seen.median, color=colour(way), height=0.7)
        axes.plot([seen.low, seen.high], [at, at], color=GREY, linewidth=2)
        text = text_of(1 / seen.median if rate else seen.median, unit)
        axes.text(max(seen.median, seen.high), at, f" {text}", va="center", color=GREY, fontsize=8)
    axes.set_yticks(
        range(len(ways)),
        [way.removeprefix("docket_celery, ") for way in reversed(ways)],
        color=GREY,
        fontsize=8,
    )
    title = f"{figure['title']} ({'more' if rate else 'less'} is better)"
    axes.set_title("\n".join(wrap(title, 36)), color=GREY, fontsize=9, loc="left")
    axes.set_xticks([])
    # Room for the figures at the ends of the bars.
    axes.set_xlim(0, 1.5 * axes.dataLim.x1)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def draw(name: str, figures: Sequence[Mapping[str, Any]]) -> None:
    """Draw a panel for each of *figures* into one file, two beside one another."""
    pyplot = load("matplotlib.pyplot")
    rows = (len(figures) + 1) // 2
    most = max(len(figure["ways"]) for figure in figures)
    sheet, panels = pyplot.subplots(rows, 2, figsize=(9, rows * (0.5 + 0.24 * most)), squeeze=False)
    for axes, figure in zip(panels.flat, figures, strict=False):
        draw_bars(axes, figure)
    for axes in list(panels.flat)[len(figures) :]:
        axes.set_visible(False)
    sheet.tight_layout()
    FOLDER.mkdir(parents=True, exist_ok=True)
    sheet.savefig(
        FOLDER / f"{name}.svg",
        transparent=True,
        bbox_inches="tight",
        metadata={"Date": None, "Creator": None},
    )
    pyplot.close(sheet)


def main() -> None:
    """Draw all plots whose figures are committed."""
    matplotlib = load("matplotlib")
    matplotlib.use("svg")
    # The same results give the same bytes.
    matplotlib.rcParams.update(
        {"svg.hashsalt": "docket_celery", "svg.fonttype": "none", "font.family": "sans-serif"}
    )
    figures = json.loads(COMMITTED.read_text())["figures"]
    for name, wanted in PLOTS.items():
        if found := [figures[each] for each in wanted if each in figures]:
            draw(name, found)


if __name__ == "__main__":
    main()
