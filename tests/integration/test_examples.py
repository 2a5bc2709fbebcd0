"""Each example is run as its reader runs it, and what it prints is checked for facts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.struct_step.graph import FixedScores, WordScorer, scoring_graph
from examples.struct_step.struct_step_pb2 import InputString, LetterCount

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


def run_example(name: str) -> list[str]:
    """Return the lines that ``python -m examples.NAME`` prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"examples.{name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def figure(lines: list[str], label: str) -> float:
    """Return the number after *label* in the one line that has it."""
    (found,) = [match[1] for line in lines if (match := re.match(rf"\s*{label}:\s+([\d.]+)", line))]
    return float(found)


def test_hello_greets() -> None:
    """The smallest graph prints its one result."""
    assert run_example("hello") == ["Hello, World!"]


def test_parallel_prints_the_plan_and_overlapping_steps() -> None:
    """Three fetches start before any of them finishes; the join starts after the last."""
    lines = [line.strip() for line in run_example("parallel")]
    at = lines.index("Execution plan:")
    assert lines[at + 1 : at + 5] == [
        "1. fetch_profile",
        "2. fetch_preferences",
        "3. fetch_activity",
        "4. enrich_user",
    ]
    steps = [line for line in lines if line.startswith(("->", "<-"))]
    fetches = {"fetch_profile", "fetch_preferences", "fetch_activity"}
    assert [line.rpartition("(")[2] for line in steps[:3]] == [f"concurrent: {n})" for n in (1, 2, 3)]
    assert {line.split()[1] for line in steps[:3]} == fetches
    assert {line.removeprefix("<- ").removesuffix(" finished") for line in steps[3:6]} == fetches
    assert steps[6:] == ["-> enrich_user started (concurrent: 1)", "<- enrich_user finished"]


def test_parallel_prints_what_it_measured() -> None:
    """The figures agree with each other, and none is better than three real waits allow."""
    lines = run_example("parallel")
    total, sequential = figure(lines, "Total time"), figure(lines, "If sequential")
    assert figure(lines, "Max concurrent") == 3
    assert 100 <= total < sequential
    assert sequential >= 300
    assert figure(lines, "Speed-up") == pytest.approx(sequential / total, abs=0.1)


def test_struct_step_injects_either_client() -> None:
    """One step class answers with the remote client and with the test double."""
    assert run_example("struct_step") == [
        "remote client: scored: graph theory -> 11",
        "test double:   test: test -> 42",
    ]


def test_the_struct_step_is_tested_without_the_service() -> None:
    """A reader's own test: the double goes in through the constructor, nothing is patched."""
    graph = scoring_graph(WordScorer(client=FixedScores(scores={"test": 42}), prefix=""))
    assert graph.execute(LetterCount, InputString(value="test")).count == 42


def test_an_order_that_failed_after_paying_is_not_charged_again() -> None:
    """Second submission: the charge is restored, the rest runs. Third: nothing runs."""
    lines = [line.strip() for line in run_example("order")]
    failed, shipped, again = [i for i, line in enumerate(lines) if re.match(r"[123]\.", line)]
    assert lines[failed + 1 : failed + 3] == [
        "failed:  step ship after 3 attempts",
        "card: 1 call, 1 charge; reservations: 1; carrier: 3 calls",
    ]
    assert lines[shipped + 1 : shipped + 3] == [
        "shipped: track-res-2",
        "card: 1 call, 1 charge; reservations: 2; carrier: 4 calls",
    ]
    assert lines[again + 1 : again + 3] == lines[shipped + 1 : shipped + 3]
