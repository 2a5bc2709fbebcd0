"""``python -m benchmarks``: measures, resumes, compares two commits, writes the page."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import report, results, table
from benchmarks.measure import ratios, spread
from benchmarks.process import PEERS_PYTHON, ROOT
from benchmarks.runner import Entrant, Runner
from benchmarks.scenario import Figure, Scenario
from benchmarks.scenarios import BUDGETS, SCENARIOS
from benchmarks.servers import Servers, has_rabbitmq

Chosen = list[tuple[Scenario, list[Figure]]]
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def choose(only: str, scenarios: Sequence[Scenario] = SCENARIOS, *, full: bool = False) -> Chosen:
    """Return the figures whose full name begins with one of the words of *only*; "" stands for all.

    Args:
        only: Words between blanks or commas.
        scenarios: What there is.
        full: Also figures that take minutes.

    Raises:
        SystemExit: There is none.
    """
    words = tuple(only.replace(",", " ").split()) or ("",)

    def is_chosen(scenario: Scenario, figure: Figure) -> bool:
        return scenario.full_name(figure).startswith(words) and (full or not figure.full)

    chosen = [
        (scenario, found)
        for scenario in scenarios
        if (found := [each for each in scenario.figures if is_chosen(scenario, each)])
    ]
    if not chosen:
        names = ", ".join(scenario.full_name(each) for scenario in scenarios for each in scenario.figures)
        raise SystemExit(f"no figure begins with {only!r}; there are: {names}")
    return chosen


@contextmanager
def progress_bar(planned_s: float) -> Generator[Progress]:
    """Show a bar with the time that is left."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        bar.add_task("measuring", total=planned_s)
        yield bar


def measure(
    chosen: Chosen, entrants: Mapping[str, list[Entrant]], kept: results.Kept, *, hurry: bool
) -> None:
    """Measure what *kept* does not have yet."""
    rabbitmq = has_rabbitmq()
    todo = [
        (scenario, [each for each in figures if not kept.has(scenario.full_name(each))])
        for scenario, figures in chosen
        if rabbitmq or "rabbitmq" not in scenario.servers
    ]
    plain = Runner(Servers(results.KEPT), hurry=hurry)
    planned_s = sum(plain.planned_s(each, len(entrants[each.name])) * len(figures) for each, figures in todo)
    results.KEPT.mkdir(parents=True, exist_ok=True)
    with Servers(results.KEPT) as servers, progress_bar(planned_s) as bar:
        task = bar.task_ids[0]
        runner = Runner(servers, hurry=hurry, tick=lambda seconds: bar.advance(task, seconds))

        def done(name: str, result: Mapping[str, object]) -> None:
            kept.keep(name, result)
            if bar.disable:
                print(f"-- {name}", file=sys.stderr, flush=True)

        for scenario, figures in todo:
            if figures:
                bar.update(task, description=scenario.title)
                runner.measure(scenario, figures, entrants[scenario.name], done)


def show(figures: table.Results) -> None:
    """Print what was measured and what was to reach."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    shown = Table("work", "way", "median", "quartiles", "CPU", "ours / it", box=None)
    for row in table.rows(figures):
        shown.add_row(*row)
    console.print(shown)
    for line in table.failures(figures):
        print(line)
    for verdict in table.verdicts(BUDGETS, figures):
        print(table.verdict_text(verdict, figures[verdict.budget.figure]["unit"]))
    print(f"{os.cpu_count()} cores, load average {results.load_average()}")


def bench(only: str, *, fresh: bool, full: bool, hurry: bool) -> None:
    """Measure all ways, resuming what an interrupted call for the same code has measured."""
    chosen = choose(only, full=full)
    kept = results.Kept(results.KEPT / f"{results.state_of_code()}{'-hurry' if hurry else ''}")
    names = [scenario.full_name(figure) for scenario, figures in chosen for figure in figures]
    for name in names if fresh else ():
        kept.drop(name)
    peers = PEERS_PYTHON.exists()
    entrants = {
        scenario.name: [Entrant(label=way.name, way=way) for way in scenario.ways if peers or not way.peer]
        for scenario, _ in chosen
    }
    measure(chosen, entrants, kept, hurry=hurry)
    show(kept.read(names))


@contextmanager
def package_at(commit: str) -> Generator[Path]:
    """Yield a folder with docket_celery as of *commit*; it is removed afterwards.

    Raises:
        SystemExit: There is no such commit.
    """
    archive = ["git", "archive", commit, "docket_celery"]
    done = subprocess.run(archive, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.decode().strip())
    results.KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=results.KEPT, prefix="package-") as folder:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder)


def compare(commit: str, only: str, *, hurry: bool) -> None:
    """Measure our ways as of *commit* and as they are, in turns, and print the ratios."""
    chosen = [(each, figures) for each, figures in choose(only) if any(way.ours for way in each.ways)]
    peers = PEERS_PYTHON.exists()
    with package_at(commit) as package:
        entrants: dict[str, list[Entrant]] = {}
        for scenario, _ in chosen:
            entrants[scenario.name] = [
                Entrant(label=f"{way.name} {side}", way=way, package=folder)
                for way in scenario.ways
                if way.ours and (peers or not way.peer)
                for side, folder in (("then", package), ("now", None))
            ]
        with tempfile.TemporaryDirectory() as folder:
            kept = results.Kept(Path(folder))
            measure(chosen, entrants, kept, hurry=hurry)
            names = [scenario.full_name(figure) for scenario, figures in chosen for figure in figures]
            found = kept.read(names)
            show_ratios(found)
            for line in table.failures(found):
                print(line)


def show_ratios(figures: table.Results) -> None:
    """Print how long a run takes now against then: below 1 it is faster now."""
    shown = Table("work", "way", "then", "now", "now / then", "quartiles", "CPU now / then", box=None)
    for figure in figures.values():
        for label, then in figure["ways"].items():
            now = figure["ways"].get(label.removesuffix(" then") + " now", {})
            if not label.endswith(" then") or "seconds" not in then or "seconds" not in now:
                continue
            ratio = ratios(now["seconds"], then["seconds"])
            cpu = spread(now["cpu"]).median / max(spread(then["cpu"]).median, 1e-9)
            medians = [table.text_of(spread(each["seconds"]).median, figure["unit"]) for each in (then, now)]
            shown.add_row(
                figure["title"],
                label.removesuffix(" then"),
                *medians,
                f"{ratio.median:.2f}",
                f"{ratio.low:.2f} - {ratio.high:.2f}",
                f"{cpu:.2f}",
            )
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


def keep() -> None:
    """Make the finished figures of this code the committed ones."""
    state = results.state_of_code()
    names = [scenario.full_name(figure) for scenario in SCENARIOS for figure in scenario.figures]
    figures = results.Kept(results.KEPT / state).read(names)
    if not figures:
        raise SystemExit(f"nothing is measured at {state}: run make bench")
    results.write(results.COMMITTED, figures, state)
    print(f"{results.COMMITTED.relative_to(ROOT)}: {len(figures)} of {len(names)} figures, of {state}")


def main() -> None:
    """Run a command; Ctrl-C and SIGTERM leave in order."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "compare"):
        command = commands.add_parser(name)
        command.add_argument("--only", default="", help="beginnings of figures' names")
        command.add_argument("--hurry", action="store_true", help="one short round: to see that it works")
        if name == "run":
            command.add_argument("--fresh", action="store_true", help="measure again what is finished")
            command.add_argument("--full", action="store_true", help="also what takes minutes")
        else:
            command.add_argument("commit", help="what the checkout is compared with")
    commands.add_parser("keep")
    commands.add_parser("report")
    options = parser.parse_args()
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        if options.command == "run":
            bench(options.only, fresh=options.fresh, full=options.full, hurry=options.hurry)
        elif options.command == "compare":
            compare(options.commit, options.only, hurry=options.hurry)
        elif options.command == "keep":
            keep()
        else:
            report.write(results.COMMITTED, SCENARIOS, BUDGETS)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
