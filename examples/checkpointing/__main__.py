"""``python -m examples.checkpointing``: the same crash with checkpoints and without, and what each costs.

Runs on a temporary Postgres of its own, or on the one that DOCKET_CELERY_DATABASE_URL names.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from docket_celery.devserver import dev_servers
from docket_celery.store import SQLStore
from examples.checkpointing.graph import MINUTE_S
from examples.checkpointing.pipeline import CHECKPOINTS, PLAIN
from examples.checkpointing.watch import Seen, execute

LEASE_S = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Three executions of one kind: undisturbed, killed, and the one after the kill."""

    first: Seen
    killed: Seen
    second: Seen


def measure(mode: str, environment: Mapping[str, str]) -> Costs:
    """Run the pipeline undisturbed, then run it, kill it after extract_frames, and run it again."""
    whole, crashed = (f"{mode}-{uuid.uuid4()}" for _ in range(2))
    print("   undisturbed:")
    first = execute(mode, whole, environment)
    print("   killed:")
    killed = execute(mode, crashed, environment, kill_after="extract_frames")
    print("   second execution, under the same execution id:")
    return Costs(first=first, killed=killed, second=execute(mode, crashed, environment))


def show_table(plain: Costs, kept: Costs) -> None:
    """Print what was measured, seconds of work and seconds of waiting apart."""
    print(f"\nMeasured; a minute of the pipeline is {MINUTE_S:g} s here:\n")
    show_row("Execution", ["Without caching", "With checkpointing"])
    both = (plain, kept)
    show_row("First run", [f"{costs.first.worked_s:.2f} s" for costs in both])
    show_row("Killed after", [f"{costs.killed.worked_s:.2f} s" for costs in both])
    totals_s = [costs.killed.worked_s + costs.second.worked_s for costs in both]
    again = [
        f"{verb}: {costs.second.worked_s:.2f} s (total {total_s:.2f} s)"
        for verb, costs, total_s in zip(("Restart", "Resume"), both, totals_s, strict=True)
    ]
    show_row("After the crash", again)
    show_row("Waited for the lease", [f"{costs.second.waited_s:.2f} s" for costs in both])
    print(
        f"\nThe wait is the rest of the dead process's lease of {LEASE_S:g} s (30 s unless set), however long the\n"
        "work. A GraphTask has no such wait when a pool process dies: Celery sees the death and hands the run on."
    )


def show_row(label: str, cells: Sequence[str]) -> None:
    """Print one line of the table."""
    print(f"   {label:<22}" + "".join(f"{cell:<34}" for cell in cells).rstrip())


def main() -> None:
    """Find or start a Postgres, and compare."""
    with dev_servers(redis=False) as servers:
        store = SQLStore(servers.database_url)
        try:
            store.migrate()
        finally:
            store.close()
        environment = {
            "DOCKET_CELERY_DATABASE_URL": servers.database_url,
            "DOCKET_CELERY_LEASE_SECONDS": f"{LEASE_S:g}",
        }
        print("Without caching:")
        plain = measure(PLAIN, environment)
        print("With checkpointing:")
        kept = measure(CHECKPOINTS, environment)
    show_table(plain, kept)


if __name__ == "__main__":
    main()
