from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import results, table
from benchmarks.budgets import Budget, judge
from benchmarks.measure import Spread, ratios, spread
from benchmarks.process import Measured, Process, WayFailed
from benchmarks.results import Kept
from benchmarks.runner import Entrant, Runner, runs_per_round
from benchmarks.scenario import OURS, Figure, Scenario, Way
from benchmarks.scenarios import BUDGETS, SCENARIOS
from benchmarks.servers import Servers

DIRECT = Way(name=OURS, target="by_hand:direct")
SCENARIO = Scenario(
    name="toy",
    title="Direct calls",
    figures=(Figure(name="chain_10", title="ten calls"), Figure(name="missing", title="what no way has")),
    ways=(DIRECT, Way(name="gone", target="by_hand:no_such_function")),
    rounds=2,
    round_s=0.001,
)


def figure(**ways: list[float]) -> dict[str, Any]:
    """Return a measured figure."""
    return {
        "title": "t",
        "unit": "s",
        "ways": {name: {"seconds": seconds, "cpu": seconds} for name, seconds in ways.items()},
    }


def test_the_spread_is_the_quartiles() -> None:
    """A single slow round moves neither of the three."""
    assert spread([1.0, 2.0, 3.0, 4.0, 500.0]) == Spread(median=3.0, low=2.0, high=4.0)


def test_the_spread_of_few_rounds_is_all_of_them() -> None:
    """Quartiles of three numbers say nothing."""
    assert spread([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0)


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that is ten times slower in the second round changes no ratio."""
    assert ratios([1.0, 10.0], [2.0, 20.0]) == Spread(median=0.5, low=0.5, high=0.5)


@pytest.mark.parametrize(
    ("budget", "limit_s", "reached"),
    [
        (Budget(figure="f", text="", against="peer", times=0.5), 2.0, True),
        (Budget(figure="f", text="", against="peer", times=0.25), 1.0, False),
        (Budget(figure="f", text="", plus_s=2.0), 2.0, True),
        (Budget(figure="f", text="", against="peer", of="g", plus_s=1.0), 1.5, False),
        (Budget(figure="f", text="", way="peer", plus_s=3.0), 3.0, False),
    ],
)
def test_a_budget_is_a_share_of_another_way_and_a_constant(
    budget: Budget, limit_s: float, *, reached: bool
) -> None:
    """Ours takes 2 s, the peer 4 s, and 0.5 s for the other figure."""
    figures = {"f": figure(**{OURS: [2.0]}, peer=[4.0]), "g": figure(peer=[0.5])}
    verdict = judge(budget, figures)
    assert verdict is not None
    assert (verdict.limit_s, verdict.reached) == (limit_s, reached)


@pytest.mark.parametrize(
    "figures",
    [
        {},
        {"f": figure(peer=[1.0])},
        {"f": figure(**{OURS: [1.0]})},
        {"f": {"ways": {OURS: {"error": "no"}, "peer": {"seconds": [1.0]}}}},
    ],
)
def test_without_a_measurement_there_is_no_verdict(figures: dict[str, Any]) -> None:
    """A way that was not measured, or failed, reaches nothing and misses nothing."""
    assert judge(Budget(figure="f", text="", against="peer"), figures) is None


def test_every_budget_names_ways_that_are_measured() -> None:
    """A budget with a misspelt figure or way would never be judged."""
    measured = {
        scenario.full_name(each): figure(**{way.name: [1.0] for way in scenario.ways})
        for scenario in SCENARIOS
        for each in scenario.figures
    }
    assert [budget for budget in BUDGETS if judge(budget, measured) is None] == []


def test_figures_have_names_of_their_own() -> None:
    """Results are kept by name."""
    names = [scenario.full_name(each) for scenario in SCENARIOS for each in scenario.figures]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.5, "s", "2.5 s"),
        (0.0123, "s", "12.3 ms"),
        (0.0001239, "s", "124 us"),
        (4e-7, "s", "0.4 us"),
        (0.002, "runs/s", "500/s"),
        (61.25, "MB", "61.2 MB"),
    ],
)
def test_a_value_is_shown_in_its_best_unit(value: float, unit: str, text: str) -> None:
    """Three digits, which is more than a shared machine tells."""
    assert table.text_of(value, unit) == text


def test_a_figure_is_kept_whole_and_found_again(tmp_path: Path) -> None:
    """An interrupted measurement leaves no half of a result behind."""
    kept = Kept(tmp_path / "code")
    assert not kept.has("f")
    kept.keep("f", {"ways": {}})
    assert kept.has("f")
    assert Kept(tmp_path / "code").read(["g", "f"]) == {"f": {"ways": {}}}
    kept.drop("f")
    assert not kept.has("f")
    assert list((tmp_path / "code").iterdir()) == []


def test_only_chooses_figures_by_the_beginning_of_their_names() -> None:
    """Several words choose several."""
    chosen = command.choose("toy_chain, toy_m", [SCENARIO])
    assert [[each.name for each in figures] for _, figures in chosen] == [["chain_10", "missing"]]
    assert [figures for _, figures in command.choose("toy_chain", [SCENARIO])] == [[SCENARIO.figures[0]]]
    with pytest.raises(SystemExit, match="no figure begins with 'x'; there are: toy_chain_10, toy_missing"):
        command.choose("x", [SCENARIO])


@pytest.mark.parametrize(("wall", "runs"), [(0.01, 20), (9.0, 1), (0.0, 5000)])
def test_a_round_has_as_many_runs_as_fill_it(wall: float, runs: int) -> None:
    """At least one, and not more than say something."""
    assert runs_per_round(Measured(seconds=wall, cpu=wall, wall=wall), 0.2) == runs


def test_a_way_is_measured_in_a_process_that_survives_a_failed_figure(tmp_path: Path) -> None:
    """What one figure raises is told with its traceback, and the next one is measured."""
    with Process(DIRECT, {}, tmp_path / "log") as process:
        assert "chain_10" in process.figures
        with pytest.raises(WayFailed, match="KeyError: 'nothing'"):
            process.measure("nothing", 1)
        measured = process.measure("chain_10", 100)
    assert 0 < measured.seconds < measured.wall


def test_a_way_that_cannot_start_is_a_result_like_any_other() -> None:
    """The others are measured all the same, in as many rounds as were asked for."""
    found: dict[str, Any] = {}
    entrants = [Entrant(label=way.name, way=way) for way in SCENARIO.ways]
    with Servers(Path("unused")) as servers:
        Runner(servers).measure(SCENARIO, SCENARIO.figures, entrants, found.__setitem__)
    ways = json.loads(json.dumps(found["toy_chain_10"]))["ways"]
    assert [len(ways[OURS][key]) for key in ("seconds", "cpu")] == [2, 2]
    assert "no_such_function" in ways["gone"]["error"]
    assert set(found["toy_missing"]["ways"]) == {"gone"}


def test_the_package_of_a_commit_is_removed_afterwards() -> None:
    """Also when what is done with it is interrupted."""
    seen: list[Path] = []

    def look() -> None:
        with command.package_at("HEAD") as package:
            seen.append(package)
            assert (package / "docket_celery" / "__init__.py").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look()
    assert not seen[0].exists()


def test_results_are_written_with_each_list_on_a_line(tmp_path: Path) -> None:
    """A difference between two committed results can be read."""
    path = tmp_path / "reference.json"
    results.write(path, {"f": figure(peer=[1.0, 2.5])}, "abc")
    text = path.read_text()
    assert '"seconds": [1.0, 2.5]' in text
    assert json.loads(text)["figures"] == {"f": figure(peer=[1.0, 2.5])}
