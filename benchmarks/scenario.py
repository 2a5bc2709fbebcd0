"""What is measured: a scenario has ways of doing the same work, and figures that each way is measured by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["s", "runs/s", "MB", "KB"]

OURS = "docket_celery"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of doing a scenario's work, in a process of its own.

    Attributes:
        name: In tables.
        target: ``module:function`` below ``benchmarks.ways``; the function returns a context manager of figures.
        options: What the function gets beside the addresses of the servers.
        peer: Whether it needs the packages of requirements/bench.txt.
        why: Why it takes less than this library where it does, for the page.
    """

    name: str
    target: str
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    peer: bool = False
    why: str = ""

    @property
    def ours(self) -> bool:
        """Whether this library is measured, which can be done at two commits."""
        return self.name.startswith(OURS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One row of the tables.

    Attributes:
        name: Unique, with the scenario's.
        title: What one run is.
        unit: What is shown; all times are kept in seconds a run.
        runs: How many runs make a round; None: as many as take the scenario's `round_s`.
        full: Measured only when everything is asked for: it takes minutes.
    """

    name: str
    title: str
    unit: Unit = "s"
    runs: int | None = None
    full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Work that several ways do, in turns.

    Attributes:
        name: Beginning of its figures' names.
        title: A heading.
        figures: What is measured.
        ways: Who does it.
        servers: What is started: "postgres" (fsync on), "postgres-nofsync", "redis", "rabbitmq".
        rounds: How often each way is measured, after one round of warm-up.
        round_s: About how long a round of a way lasts.
    """

    name: str
    title: str
    figures: tuple[Figure, ...]
    ways: tuple[Way, ...]
    servers: tuple[str, ...] = ()
    rounds: int = 7
    round_s: float = 0.25

    def full_name(self, figure: Figure) -> str:
        """Return what ``ONLY=`` and the results call *figure*."""
        return f"{self.name}_{figure.name}"
