"""Measures scenarios: the ways of each are started together and measured in turns."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis

from benchmarks import results
from benchmarks.process import Measured, Process, WayFailed
from benchmarks.scenario import Figure, Scenario, Way
from benchmarks.servers import Servers, databases

MOST_RUNS = 5000
"""Of one round: more say nothing new of a run that takes microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """A way under the name that it has in the results, with the folder of the docket_celery that it measures."""

    label: str
    way: Way
    package: Path | None = None


@dataclass(slots=True, kw_only=True)
class Track:
    """What one way of a figure has shown."""

    runs: int = 0
    seconds: list[float] = field(default_factory=list[float])
    cpu: list[float] = field(default_factory=list[float])
    error: str = ""

    def as_json(self) -> dict[str, object]:
        """Return it for the results, figures rounded to four digits."""
        if self.error:
            return {"error": self.error}
        return {
            "runs": self.runs,
            "seconds": [float(f"{value:.4g}") for value in self.seconds],
            "cpu": [float(f"{value:.4g}") for value in self.cpu],
        }


def runs_per_round(tried: Measured, round_s: float) -> int:
    """Return how many runs make a round, after a try of one."""
    return max(1, min(MOST_RUNS, round(round_s / max(tried.wall, 1e-9))))


class Runner:
    """Measures scenarios with servers that are started once.

    Args:
        servers: Where addresses come from.
        hurry: One round of few runs, to see that it works.
        tick: Called with seconds that were planned for what is done now.
    """

    def __init__(
        self, servers: Servers, *, hurry: bool = False, tick: Callable[[float], None] = lambda _: None
    ) -> None:
        self._servers, self._hurry, self._tick = servers, hurry, tick

    def measure(
        self,
        scenario: Scenario,
        figures: Sequence[Figure],
        entrants: Sequence[Entrant],
        done: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        """Measure *figures*; *done* gets each one's full name and result when it is finished."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="docket-bench-")))
            options = self._open(scenario, entrants, stack)
            running: dict[str, Process] = {}
            failed: dict[str, str] = {}
            for entrant in entrants:
                log = folder / f"{re.sub('[^a-z0-9]+', '-', entrant.label.lower())}.log"
                try:
                    process = Process(entrant.way, options[entrant.label], log, entrant.package)
                except WayFailed as error:
                    failed[entrant.label] = str(error)
                else:
                    running[entrant.label] = stack.enter_context(process)
            for figure in figures:
                result = self._measure_figure(scenario, figure, list(options), running, failed)
                done(scenario.full_name(figure), result)

    def planned_s(self, scenario: Scenario, ways: int) -> float:
        """Return about how many seconds a figure takes."""
        return ways * (self._rounds(scenario) + 1) * self._round_s(scenario)

    def _open(
        self, scenario: Scenario, entrants: Sequence[Entrant], stack: ExitStack
    ) -> dict[str, dict[str, object]]:
        """Start the servers; give each way a database of its own on each."""
        options: dict[str, dict[str, object]] = {entrant.label: {} for entrant in entrants}
        for server in scenario.servers:
            url = self._servers.url(server)
            if server.startswith("postgres"):
                made = stack.enter_context(databases(url, options))
                for label, found in options.items():
                    found["database"] = made[label]
            elif server == "redis":
                clients: Any = redis.Redis
                with clients.from_url(url) as client:
                    client.flushall()
                for number, found in enumerate(options.values()):
                    found["redis"] = f"{url.rpartition('/')[0]}/{number}"
            else:
                for found in options.values():
                    found["rabbitmq"] = url
        return options

    def _measure_figure(
        self,
        scenario: Scenario,
        figure: Figure,
        labels: Sequence[str],
        running: Mapping[str, Process],
        failed: Mapping[str, str],
    ) -> dict[str, object]:
        before, tracks = results.load_average(), {label: Track(error=text) for label, text in failed.items()}
        entered = {label: each for label, each in running.items() if figure.name in each.figures}
        tracks.update({label: Track() for label in entered})
        for turn in range(self._rounds(scenario) + 1):
            for label, process in _turned(list(entered.items()), turn):
                if not tracks[label].error:
                    self._take_turn(scenario, figure, process, tracks[label], warm_up=turn == 0)
                self._tick(self._round_s(scenario))
        return {
            **results.describe(scenario, figure),
            "taken": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "load": [before, results.load_average()],
            "ways": {label: tracks[label].as_json() for label in labels if label in tracks},
        }

    def _take_turn(
        self, scenario: Scenario, figure: Figure, process: Process, track: Track, *, warm_up: bool
    ) -> None:
        try:
            if warm_up:
                track.runs = figure.runs or self._find_runs(scenario, figure, process)
            measured = process.measure(figure.name, track.runs)
        except WayFailed as error:
            track.error = str(error)
            return
        if not warm_up:
            track.seconds.append(measured.seconds)
            track.cpu.append(measured.cpu)

    def _find_runs(self, scenario: Scenario, figure: Figure, process: Process) -> int:
        """Try one run until it is warm: the first one opens connections and compiles what it can keep."""
        for _ in range(2):
            process.measure(figure.name, 1)
        return runs_per_round(process.measure(figure.name, 1), self._round_s(scenario))

    def _rounds(self, scenario: Scenario) -> int:
        return 1 if self._hurry else scenario.rounds

    def _round_s(self, scenario: Scenario) -> float:
        return 0.05 if self._hurry else scenario.round_s


def _turned(ways: list[tuple[str, Process]], turn: int) -> list[tuple[str, Process]]:
    """Begin with another way in each round: who comes after whom must not matter."""
    at = turn % len(ways) if ways else 0
    return ways[at:] + ways[:at]
