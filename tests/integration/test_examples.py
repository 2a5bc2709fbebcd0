"""Each example is run as its reader runs it, and what it prints is checked for facts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

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
        timeout=100,
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


@pytest.mark.slow
def test_movies_stand_beside_the_figures_of_all() -> None:
    """The aggregate is made once over five movies; each is compared with it, in order; then all of it on a worker."""
    assert run_example("movies") == [
        "plan: compute_stats -> enrich_movie",
        "count:          5 movies",
        "average rating: 9.10",
        "total runtime:  767 min (12.8 hours)",
        "+ The Shawshank Redemption (9.3 rating, percentile: 100%)",
        "+ The Godfather (9.2 rating, percentile: 67%)",
        "  The Dark Knight (9.0 rating, percentile: 0%)",
        "  The Godfather Part II (9.0 rating, percentile: 0%)",
        "  12 Angry Men (9.0 rating, percentile: 0%)",
        "on a worker:    the same",
        "catalogue:      2000 movies, the best is Movie 57 (9.9)",
    ]


@pytest.mark.slow
def test_documents_are_split_and_merged() -> None:
    """Pages come together in their order; a document without pages has a summary too."""
    assert run_example("documents") == [
        "plan: split_pages -> summarize_page -> merge_pages",
        "Tides: 2 pages, 10 words, longest 'rises'",
        "all three:",
        "Tides: 2 pages, 10 words, longest 'rises'",
        "Blank: 0 pages, 0 words",
        "Winds: 3 pages, 10 words, longest 'elsewhere'",
        "on a worker: one the same, all the same",
    ]


@pytest.mark.slow
def test_an_example_leaves_the_readers_servers_alone(
    broker_url: str, result_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker would take the messages of somebody else's app and drop them as unknown."""
    monkeypatch.setenv("CELERY_BROKER_URL", broker_url)
    monkeypatch.setenv("CELERY_RESULT_BACKEND", result_url)
    monkeypatch.setenv("DOCKET_CELERY_DATABASE_URL", database_url)
    with redis.Redis.from_url(broker_url) as client:
        client.rpush("celery", "somebody's")
        assert run_example("documents")[-1] == "on a worker: one the same, all the same"
        assert client.lrange("celery", 0, -1) == [b"somebody's"]
    with redis.Redis.from_url(result_url) as client:
        assert client.dbsize() == 0
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        assert connection.execute("SELECT count(*) FROM docket_runs").fetchone() == (0,)


def end_example(end: Callable[[psutil.Process], None]) -> tuple[int, str]:
    """Run an example until its worker works, call *end* with its process, and return its status and errors.

    All that it started must be gone then.
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "examples.movies"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("on a worker:"):
                break
        itself = psutil.Process(process.pid)
        family = itself.children(recursive=True)
        assert {"postgres"} < {each.name() for each in family}
        end(itself)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert psutil.wait_procs(family, timeout=30)[1] == []
    return process.returncode, errors


@pytest.mark.slow
def test_an_interrupted_example_leaves_nothing_behind() -> None:
    """Ctrl-C while its servers and its worker run: the status says so, and all of them are gone."""
    ended = end_example(lambda process: process.send_signal(signal.SIGINT))
    assert ended == (130, "\nInterrupted; everything is stopped.\n")


def test_an_interruption_in_a_finalizer_is_not_lost() -> None:
    """Python drops what is raised there, and Celery's results have one."""
    script = """
import os, signal, time
from examples import local

class Result:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)

def main():
    Result()
    time.sleep(60)
    return True

raise SystemExit(local.run(main))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (130, "\nInterrupted; everything is stopped.\n")


@pytest.mark.slow
def test_an_example_whose_worker_dies_says_so() -> None:
    """At once: nobody else would answer it."""

    def kill_worker(process: psutil.Process) -> None:
        workers = [one for one in process.children() if "worker" in one.cmdline()]
        assert len(workers) == 1
        workers[0].kill()

    status, errors = end_example(kill_worker)
    assert status == 1
    assert "WorkerEnded: the worker ended with status -9" in errors


def test_the_struct_step_is_tested_without_the_service() -> None:
    """A reader's own test: the double goes in through the constructor, nothing is patched."""
    graph = scoring_graph(WordScorer(client=FixedScores(scores={"test": 42}), prefix=""))
    assert graph.execute(LetterCount, InputString(value="test")).count == 42


def test_an_order_that_failed_after_paying_is_not_charged_again() -> None:
    """Second submission: charge and reservation are restored, only shipping runs. Third: nothing runs."""
    lines = [line.strip() for line in run_example("order")]
    failed, shipped, again = [i for i, line in enumerate(lines) if re.match(r"[123]\.", line)]
    assert lines[failed + 1 : failed + 3] == [
        "failed:  step ship after 3 attempts",
        "card: 1 call, 1 charge; inventory: 1 call; carrier: 3 calls",
    ]
    assert lines[shipped + 1 : shipped + 3] == [
        "shipped: track-res-1",
        "card: 1 call, 1 charge; inventory: 1 call; carrier: 4 calls",
    ]
    assert lines[again + 1 : again + 3] == lines[shipped + 1 : shipped + 3]


def test_tracing_prints_one_trace_of_spans_in_steps() -> None:
    """The users' spans lie below those of the hook, and these below the request's, for each attempt."""
    offer, count, *lines = run_example("tracing")
    assert (offer, count) == ("Offer: 870 cents", "8 spans in 1 trace:")
    assert all(re.search(r", \d+ ms(  failed: .*)?$", line) for line in lines)
    tree = [re.sub(r", \d+ ms.*", "", line)[2:] for line in lines]
    assert tree[0] == "POST /offers"
    assert tree[-1] == "  make_offer (attempt 1)"
    pairs = list(batched_by_two(tree[1:-1]))
    assert sorted(pairs) == [
        ("  assess_duty (attempt 1)", "    GET customs /duties"),
        ("  look_up_rate (attempt 1)", "    GET carrier /rates"),
        ("  look_up_rate (attempt 2)", "    GET carrier /rates"),
    ]
    failed = [line.partition(",")[0].strip() for line in lines if "failed: TimeoutError" in line]
    assert failed == ["look_up_rate (attempt 1)", "GET carrier /rates"]


def batched_by_two(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the lines two by two."""
    return zip(lines[::2], lines[1::2], strict=True)


def sections(lines: list[str], head: str) -> list[list[str]]:
    """Return the stripped lines below each line that matches *head*, up to the next one."""
    at = [n for n, line in enumerate(lines) if re.match(head, line)]
    return [[line.strip() for line in lines[a + 1 : b]] for a, b in pairwise([*at, len(lines)])]


def test_errors_have_four_outcomes() -> None:
    """A result; a failure after one attempt; one after all attempts, with waits between them; an abort."""
    valid, invalid, network, critical = sections(run_example("error_handling"), "===")
    assert valid[:2] == ["attempt 1", "result: count=11"]
    assert invalid[:3] == [
        "attempt 1",
        "failed, caused by ValidationError",
        (
            "[DC201] step 'fetch_data' failed after 1 attempt (not retriable): ValidationError: "
            "validation failed on value: cannot be empty"
        ),
    ]
    waits = [re.fullmatch(r"attempt \d after a wait of (\d+) ms", line) for line in network[1:3]]
    assert network[0] == "attempt 1"
    # No shorter than what the backoff asked for; a busy machine may make them longer.
    first, second = (int(match[1]) if match is not None else 0 for match in waits)
    assert (first >= 100, second >= 200) == (True, True)
    assert network[3] == "failed, caused by NetworkError"
    assert "failed after 3 attempts (attempts used up): NetworkError" in network[4]
    assert network[5] == "3 attempts, 2 waits: one fewer than attempts"
    assert critical == [
        "attempt 1",
        "aborted; the cause is at hand: PoolExhausted('connection pool exhausted')",
        "[DC200] database unavailable (PoolExhausted: connection pool exhausted)",
    ]


def test_shared_results_are_found_until_they_expire(
    monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """Miss, hit, another input, expired; and the guide's query shows the rows behind the first three."""
    monkeypatch.setenv("DOCKET_CELERY_DATABASE_URL", database_url)
    lines = run_example("persistence_postgres")
    runs = [re.fullmatch(r"   '(.+)' -> (\w+), ([\d.]+) ms \((\w+): .+\)", line) for line in lines]
    told = [(match[1], match[2], match[4]) for match in runs if match is not None]
    assert told == [
        ("hello world", "friendly", "miss"),
        ("hello world", "friendly", "hit"),
        ("goodbye world", "neutral", "miss"),
        ("hello world", "friendly", "miss"),
    ]
    took = [float(match[3]) for match in runs if match is not None]
    assert min(took[0], took[2], took[3]) >= 500
    assert lines[-1] == "3 calls of the model for 4 executions."
    guide, readable = sections(lines, r"      \| (step_name|input) ")
    hashes = [re.fullmatch(r"\| MLInference  ([0-9a-f]{64})  b'.+' +\d{4}-.+", line) for line in guide[:2]]
    shown = [re.match(r"\| ([0-9a-f]{8})  \S+\.Sentiment  \{.*\} +0:00:0", line) for line in readable[:2]]
    assert [match and match[1][:8] for match in hashes] == [match and match[1] for match in shown]
    assert None not in hashes
    assert hashes[0] != hashes[1]
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        kept = connection.execute("SELECT count(*) FROM docket_cache WHERE step_name = 'MLInference'")
        # The fourth execution replaced the row that had expired.
        assert kept.fetchall() == [(2,)]


def test_a_killed_pipeline_goes_on_from_its_checkpoints(
    monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """Without checkpoints all five steps are called again; with them what is missing, and the cheap fetch."""
    monkeypatch.setenv("DOCKET_CELERY_DATABASE_URL", database_url)
    lines = run_example("checkpointing")
    steps = ["fetch_raw", "transcode", "extract_frames", "ml_inference", "upload"]
    executions = sections(lines, r"   (undisturbed|killed|second execution)")
    called = [[line.split()[0] for line in part if line.endswith(" called")] for part in executions]
    restored = [[line.split()[0] for line in part if "restored" in line] for part in executions]
    killed = [line.endswith("was killed by SIGKILL") for part in executions for line in part[-1:]]
    assert called[:5] == [steps, steps[:3], steps, steps, steps[:3]]
    assert sorted(called[5]) == ["fetch_raw", "ml_inference", "upload"]
    assert restored == [[], [], [], [], [], ["extract_frames"]]
    assert killed == [False, True, False, False, True, False]
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        runs = connection.execute("SELECT state, epoch, lost FROM docket_runs ORDER BY created_at").fetchall()
    assert runs == [("SUCCEEDED", 1, 0), ("SUCCEEDED", 2, 1)]
    check_table(lines)


def check_table(lines: list[str]) -> None:
    """Each cell of the pipeline's table is at least the sleeps behind it, and totals are sums."""
    table = {
        line.strip().partition("  ")[0]: [float(figure) for figure in re.findall(r"(\d+\.\d\d) s", line)]
        for line in lines[lines.index(next(line for line in lines if line.startswith("Measured"))) :]
    }
    assert min(table["First run"]) >= 2.0
    killed, after = table["Killed after"], table["After the crash"]
    assert min(killed) >= 1.4
    assert after[0] >= 2.0
    assert after[2] >= 0.6
    assert after[1] == pytest.approx(killed[0] + after[0], abs=0.02)
    assert after[3] == pytest.approx(killed[1] + after[2], abs=0.02)


@pytest.mark.slow
def test_a_users_tests_of_the_order_example_pass() -> None:
    """Those of the example's test file, all of them, one after the other."""
    lines = run_example("testing")
    passed = [match[1] for line in lines if (match := re.search(r"::(test_\w+) PASSED", line))]
    written = re.findall(
        r"^def (test_\w+)", (ROOT / "examples/testing/test_order.py").read_text(), re.MULTILINE
    )
    assert sorted(passed) == sorted(written)
    assert len(written) == 7
