"""The model of nodes, Postgres and broker: its arithmetic, and the page that it makes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import simulate
from benchmarks.scaling import loads, page, rows
from benchmarks.scaling.loads import Demand, Site, limit, persisted, seconds_of
from benchmarks.scaling.model import Clock, Log, Model, Process, Server

NOTHING = Demand(parent_s=0.0, child_s=0.0, postgres_s=0.0, broker_s=0.0)
PLENTY = Site(nodes=1, children=1, flush_s=0.0, flush_bytes_s=1e12, round_trip_s=0.0)
STORED: dict[str, Any] = json.loads(page.COMMITTED.read_text())


@pytest.mark.parametrize("send", ["offer", "saturate", "burst"])
def test_what_goes_in_comes_out(send: str) -> None:
    """Each job ends once, however they are sent, and all children are free then."""
    asked = replace(NOTHING, parent_s=0.001, child_s=0.004, postgres_s=0.001, broker_s=0.0002, commits=3)
    model = Model(asked, Site(nodes=3))
    outcome = model.offer(1000, 500) if send == "offer" else getattr(model, send)(500)
    assert (outcome.jobs, outcome.done) == (500, 500)
    assert outcome.took_s * 3 * 4 >= 500 * 0.005  # no child works on two runs at once
    assert max(outcome.used.values()) <= 1


def test_one_server_with_constant_times_does_one_in_its_time() -> None:
    """One child whose runs take 10 ms ends 100 a second."""
    outcome = Model(replace(NOTHING, child_s=0.01), PLENTY).saturate(200)
    assert outcome.took_s == pytest.approx(2.0)
    assert outcome.rate == pytest.approx(100, rel=0.02)
    assert outcome.used[loads.CHILDREN] == pytest.approx(1)


def test_an_idle_site_takes_the_sum_of_all_times() -> None:
    """Nobody waits for another: CPU, round trips, flushes with their bytes and the steps themselves are added."""
    asked = Demand(
        parent_s=0.002, child_s=0.003, postgres_s=0.004, broker_s=0.006, wal_bytes=2000, commits=2, step_s=0.1
    )
    site = Site(nodes=1, flush_s=0.005, flush_bytes_s=1e6, round_trip_s=0.0005)
    outcome = Model(asked, site).saturate(1)
    cpu_s, waits_s = 0.002 + 0.003 + 0.004 + 0.006, 2 * (0.0005 + 0.005) + 0.002 + 0.1
    assert outcome.p50_s == pytest.approx(cpu_s + waits_s)
    assert outcome.flushes == 2


@pytest.mark.parametrize(
    ("wall", "asked", "site"),
    [
        (loads.CHILDREN, {"step_s": 0.1}, {}),
        (loads.PARENTS, {"parent_s": 0.01}, {}),
        (loads.NODE_CORES, {"child_s": 0.01}, {"cores": 2}),
        (loads.POSTGRES_CORES, {"postgres_s": 0.01, "commits": 1}, {"postgres_cores": 2}),
        (loads.POSTGRES_LOG, {"wal_bytes": 1e6, "commits": 1}, {"flush_bytes_s": 1e8}),
        (loads.BROKER, {"broker_s": 0.01}, {}),
    ],
)
def test_the_wall_is_named_and_no_run_passes_it(
    wall: str, asked: dict[str, float], site: dict[str, Any]
) -> None:
    """Computed and simulated agree on the resource that is used up, and on the rate at which it is."""
    demand, there = replace(NOTHING, **asked), replace(PLENTY, nodes=2, children=8, **site)
    rate, computed = limit(demand, there)
    outcome = Model(demand, there).saturate(2000)
    assert (computed, outcome.wall) == (wall, wall)
    assert outcome.rate == pytest.approx(rate, rel=0.02)
    assert outcome.used[wall] == pytest.approx(1, rel=0.05)


def test_more_nodes_carry_more_until_a_server_is_full() -> None:
    """Ten times the nodes are ten times the rate, or the rate of the one broker."""
    asked = replace(NOTHING, child_s=0.01, broker_s=0.001)
    rates = [limit(asked, Site(nodes=nodes))[0] for nodes in (1, 2, 20)]
    assert rates == [pytest.approx(400), pytest.approx(800), pytest.approx(1000)]


def test_threads_of_one_process_run_python_one_at_a_time() -> None:
    """Four threads end as many runs as one, unless their steps wait."""
    one_thread = replace(PLENTY, threads=True)
    four_threads = replace(one_thread, children=4)
    busy, waiting = replace(NOTHING, child_s=0.01), replace(NOTHING, child_s=0.001, step_s=0.009)
    assert Model(busy, four_threads).saturate(200).took_s == pytest.approx(2.0)
    assert limit(busy, four_threads)[0] == pytest.approx(100)
    assert Model(waiting, one_thread).saturate(200).took_s == pytest.approx(2.0)
    assert Model(waiting, four_threads).saturate(200).took_s == pytest.approx(0.5, rel=0.1)


def test_a_flush_carries_all_commits_that_wait() -> None:
    """The first commit is flushed alone, the three that come meanwhile together."""
    clock = Clock()
    log, ended = Log(clock, 1.0, 100.0), list[float]()

    def commit(after_s: float) -> Process:
        yield after_s
        log.write(50)
        yield log
        ended.append(clock.now)

    for after_s in (0.0, 0.1, 0.2, 0.3):
        clock.resume(commit(after_s))
    clock.run()
    assert (log.flushes, ended) == (2, [1.5, 4.0, 4.0, 4.0])


def test_a_server_serves_in_order_and_counts_its_time() -> None:
    """Two servers, three that come: the third waits for the first that is free."""
    clock = Clock()
    server, ended = Server(clock, 2), list[tuple[str, float]]()

    def visit(name: str, seconds: float) -> Process:
        yield server
        yield seconds
        server.leave(seconds)
        ended.append((name, clock.now))

    for name, seconds in (("a", 3.0), ("b", 1.0), ("c", 1.0)):
        clock.resume(visit(name, seconds))
    clock.run()
    assert ended == [("b", 1.0), ("c", 2.0), ("a", 3.0)]
    assert server.worked_s == 5.0


def test_the_same_seed_gives_the_same_outcome() -> None:
    """And another one another outcome."""
    asked, site = replace(NOTHING, child_s=0.01), Site(nodes=2)
    first, again, other = (Model(asked, site).offer(500, 300, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_runs_of_other_lengths_are_on_the_line_through_those_measured() -> None:
    """One and eight steps are as measured, and each step between costs the same."""
    costs = STORED["costs"]
    assert persisted(costs, 1) == loads.demand(costs["persisted_1"])
    assert persisted(costs, 8).wal_bytes == pytest.approx(costs["persisted_8"]["wal_bytes"])
    each = [persisted(costs, steps).child_s for steps in (2, 3, 4)]
    assert each[1] - each[0] == pytest.approx(each[2] - each[1])
    assert persisted(costs, 4).statements == 5


def test_what_a_rate_needs_is_used_to_70_percent_at_most() -> None:
    """One node, Redis or core less would be used more."""
    for kind in rows.KINDS:
        need = rows.needs(STORED, kind)
        asked = loads.at_work(STORED["costs"], kind)
        sites = [
            loads.with_log(Site(nodes=int(need["nodes"]) - less, brokers=int(need["redis"]) - less), STORED)
            for less in (0, 1)
            if min(need["nodes"], need["redis"]) > less
        ]
        used = [
            [
                rows.RATE * seconds_of(asked, site)[name]
                for name in (loads.CHILDREN, loads.PARENTS, loads.BROKER)
            ]
            for site in sites
        ]
        assert max(used[0]) <= rows.CALM
        assert all(max(each) > rows.CALM for each in used[1:])


def test_the_page_is_what_the_measurements_give() -> None:
    """Its tables and its numbers; the committed rows are what the model still gives of them."""
    made = page.page(STORED, page.TEMPLATE.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == made, "run python -m benchmarks.simulate --again"
    site = loads.with_log(Site(nodes=1), STORED)
    stored = next(row for row in STORED["simulated"] if row["work"] == rows.PERSISTED)
    assert {"work": rows.PERSISTED, **rows.row(rows.loads(STORED)[rows.PERSISTED], site)} == pytest.approx(
        stored
    )
    assert rows.validation(STORED) == pytest.approx(STORED["validation"])


def test_a_mark_without_meaning_is_refused() -> None:
    """The error names those that there are."""
    with pytest.raises(ValueError, match=r"<!-- nothing -->.*costs, nodes"):
        page.page(STORED, "<!-- nothing -->")


def test_the_command_prints_a_site(capsys: pytest.CaptureFixture[str]) -> None:
    """The computed limit with its wall, the simulated rate, and latencies."""
    simulate.main(["--nodes", "2", "--steps", "2", "--step-seconds", "0.05"])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("first wall: children")
    assert second.startswith("simulated")
    assert "p99" in third
