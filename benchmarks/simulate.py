"""``python -m benchmarks.simulate``: what a site carries, from costs that ``--measure`` has measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from benchmarks.scaling import rows
from benchmarks.scaling.loads import Site, at_work, persisted, with_log
from benchmarks.scaling.page import COMMITTED, PAGE, TEMPLATE, page


def measure() -> None:
    """Measure the costs, simulate from them, and keep both."""
    # What a simulation alone does not need: servers, Celery, the tests' samples.
    from benchmarks.scaling.costs import Effort
    from benchmarks.scaling.costs import measure as measure_costs

    effort = Effort()
    found = measure_costs(effort, lambda what: print(f"-- {what}", file=sys.stderr, flush=True))
    found["jobs"] = effort.jobs
    keep(found)


def keep(found: dict[str, object]) -> None:
    """Write measurements, what is simulated from them, and the page."""
    found["validation"] = rows.validation(found)
    found["simulated"] = rows.simulated(found)
    COMMITTED.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found, TEMPLATE.read_text()))


def show(options: argparse.Namespace) -> None:
    """Print the row of one site."""
    found = json.loads(COMMITTED.read_text())
    step_s = options.steps * options.step_seconds
    if options.steps and options.persisted:
        asked = persisted(found["costs"], options.steps, step_s=step_s)
    else:
        asked = at_work(found["costs"], "plain", step_s=step_s)
    site = Site(
        nodes=options.nodes,
        children=options.children,
        threads=options.threads,
        postgres_cores=options.postgres_cores,
        brokers=options.brokers,
    )
    row = rows.row(asked, with_log(site, found))
    print(f"at most {row['limit']:,.0f} runs/s; first wall: {row['wall']}")
    print(f"simulated, jobs always waiting: {row['simulated']:,.0f} runs/s; used most: {row['used_most']}")
    print(f"at {rows.CALM:.0%}: p50 {row['p50_s'] * 1e3:,.1f} ms, p99 {row['p99_s'] * 1e3:,.1f} ms")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--measure", action="store_true", help="measure the costs; writes docs/scaling.md")
    parser.add_argument("--again", action="store_true", help="simulate all; writes docs/scaling.md")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--children", type=int, default=4, help="of a node")
    parser.add_argument("--threads", action="store_true", help="the children are threads of one process")
    parser.add_argument("--postgres-cores", type=int, default=16)
    parser.add_argument("--brokers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--step-seconds", type=float, default=0.0, help="that a step waits for something else"
    )
    parser.add_argument(
        "--persisted", action=argparse.BooleanOptionalAction, default=True, help="whether the steps persist"
    )
    options = parser.parse_args(argv)
    if options.measure:
        measure()
    elif options.again:
        keep(json.loads(COMMITTED.read_text()))
    else:
        show(options)


if __name__ == "__main__":
    main()
