"""What a crash matrix checks, whichever way the processes are made."""

from __future__ import annotations

import base64
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from docket_celery.errors import InvalidArguments
from docket_celery.graph import Graph
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.messages import brief, from_bytes, to_bytes
from docket_celery.plan.plan import Plan
from docket_celery.plan.step import Step
from docket_celery.store.contract import Store
from docket_celery.store.records import Checkpoint, Lease
from docket_celery.testing.forking import Ended
from docket_celery.testing.watching import (
    BODY,
    CLAIM,
    RAISED,
    RETURNED,
    SAVED,
    Boundary,
    Entry,
    Journal,
)

NAME = "crash-matrix"


class CrashMatrixFailed(AssertionError):
    """A crash broke a promise; the text names each boundary and shows what the processes did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashReport:
    """What was tried and held.

    Attributes:
        boundaries: Where the job was killed, once each, in the order of the undisturbed run.
        result: The target's message, the same every time.
    """

    boundaries: tuple[str, ...]
    result: Message

    def __str__(self) -> str:
        lines = [f"killed {boundary}: the same result" for boundary in self.boundaries]
        return "\n".join(lines)


def run_matrix(job: Job) -> CrashReport:
    """Play *job* undisturbed, then once for each boundary, and check every time.

    Raises:
        CrashMatrixFailed: With every boundary at which something was wrong.
    """
    calm = job.play(None)
    if calm.first.error or calm.second.error:
        raise CrashMatrixFailed(f"the undisturbed run failed:\n{calm.first.error or calm.second.error}")
    boundaries = [e.boundary for e in calm.journal if e.process == 1 and e.kind not in (CLAIM, RAISED)]
    problems = [text for text in [_describe(None, calm, _check(job, calm, calm))] if text]
    for boundary in boundaries:
        scene = job.play(boundary)
        if text := _describe(boundary, scene, _check(job, scene, calm)):
            problems.append(text)
    if problems:
        head = f"{len(problems)} of {len(boundaries)} crashes broke a promise of graph {job.graph.name!r}"
        raise CrashMatrixFailed("\n\n".join([head, *problems]))
    result = from_bytes(job.target.kind, base64.b64decode(calm.first.value["result"]))
    return CrashReport(boundaries=tuple(map(str, boundaries)), result=result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One playing of the job.

    Attributes:
        first: How the process ended that began the job.
        second: The one that went on, or submitted it again.
    """

    deadly: Boundary | None
    first: Ended
    second: Ended
    journal: list[Entry] = field(default_factory=list[Entry])


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(ABC):
    """What is played again and again.

    Attributes:
        target: What it makes.
        effects: Names of the steps that touch the outside world.
        folder: For the journals.
        timeout_s: Seconds for each process.
    """

    graph: Graph
    target: ValueKey
    inputs: Sequence[Message]
    plan: Plan
    execution_id: str
    effects: frozenset[str]
    folder: Path
    timeout_s: float

    def __post_init__(self) -> None:
        if self.plan.stages:
            problem = f"{self.plan!r} has items; only runs of single messages can be played"
            raise InvalidArguments("crash_matrix", problem)

    @abstractmethod
    def play(self, deadly: Boundary | None) -> Scene:
        """Begin the job in one process, which dies at *deadly*, and bring it to its end in another."""

    @property
    def steps(self) -> dict[str, Step]:
        """The steps of the plan by name."""
        return {planned.step.name: planned.step for planned in self.plan.steps}

    def journal(self) -> Journal:
        """Return a new journal."""
        return Journal(self.folder / f"journal-{uuid.uuid4()}")

    def count(self, store: Store, journal: Journal) -> dict[str, int]:
        """Return how many checkpoints each step has."""
        lease = Lease(
            graph=self.graph.name,
            execution_id=self.execution_id,
            target=str(self.target),
            owner="",
            epoch=0,
            lease_s=1.0,
        )
        counts = Counter(checkpoint.step_name for checkpoint in store.restore(lease, []))
        for entry in {e.key: e for e in journal.read() if e.kind == SAVED and e.key}.values():
            found = store.lookup(bytes.fromhex(entry.key), NAME, 1.0)
            counts[entry.step] += isinstance(found, Checkpoint)
        return dict(counts)


def delete_job(store: Any, job: Job, keys: Sequence[str]) -> None:
    """Delete what the job left in the user's database, the shared results that it made included."""
    from sqlalchemy import delete

    from docket_celery.store.sql import schema

    raw = [bytes.fromhex(key) for key in keys]
    with store.engine.begin() as connection:
        for table in schema.metadata.tables.values():
            columns = table.c
            if "graph" in columns and "execution_id" in columns:
                of_run = (columns.graph == job.graph.name) & (columns.execution_id == job.execution_id)
                connection.execute(delete(table).where(of_run))
            if "cache_key" in columns and raw:
                connection.execute(delete(table).where(columns.cache_key.in_(raw)))


def _check(job: Job, scene: Scene, calm: Scene) -> Iterator[str]:
    """Yield what is wrong with *scene*."""
    if scene.first.error:
        yield f"the first process failed: {scene.first.error}"
    if scene.deadly is not None and not scene.first.killed:
        yield "this boundary was not reached again: the run took another way; make it repeatable"
        return
    if scene.second.error:
        yield f"the run could not be brought to its end:\n{scene.second.error}"
        return
    yield from _check_results(job, scene, calm)
    yield from _check_calls(job, scene)
    counts: dict[str, int] = scene.second.value.get("checkpoints", {})
    for name in dict.fromkeys([*(e.step for e in scene.journal if e.kind == SAVED), *counts]):
        if counts.get(name, 0) != 1:
            yield f"step {name!r} has {counts.get(name, 0)} checkpoints"


def _check_results(job: Job, scene: Scene, calm: Scene) -> Iterator[str]:
    expected = calm.first.value["result"]
    told = {
        "the resumed run": scene.second.value.get("result"),
        "a second submission": scene.second.value.get("again"),
    }
    for what, found in told.items():
        if found is not None and found != expected:
            shown = [brief(from_bytes(job.target.kind, base64.b64decode(text))) for text in (found, expected)]
            yield f"{what} ended with {shown[0]}, undisturbed with {shown[1]}"


def _check_calls(job: Job, scene: Scene) -> Iterator[str]:
    saved: set[str] = set()
    returned = {entry.step for entry in scene.journal if (entry.process, entry.kind) == (1, RETURNED)}
    for entry in scene.journal:
        if entry.kind == SAVED:
            saved.add(entry.step)
        if entry.kind != BODY:
            continue
        if entry.process == 3:
            yield f"step {entry.step!r} ran for a second submission of an ended run"
        elif entry.step in saved:
            yield f"step {entry.step!r} started again after its checkpoint was saved"
        elif entry.process == 2 and entry.step in returned & job.effects:
            just_died = scene.deadly is not None and (scene.deadly.kind, scene.deadly.step) == (
                RETURNED,
                entry.step,
            )
            if job.steps[entry.step].persist is None and not just_died:
                yield (
                    f"step {entry.step!r} has effects and ran again though it had returned; persist it "
                    "(persist=Scope.WORKFLOW), or let the other side honour ctx.idempotency_key and leave it out"
                )


def _describe(boundary: Boundary | None, scene: Scene, problems: Iterator[str]) -> str:
    found = list(problems)
    if not found:
        return ""
    head = "undisturbed:" if boundary is None else f"killed {boundary}:"
    shown = [f"  - {problem}" for problem in found]
    names = {1: "first process", 2: "next delivery", 3: "second submission"}
    for number, name in names.items():
        acts = [
            f"{e.step} {e.kind}".strip() for e in scene.journal if e.process == number and e.kind != CLAIM
        ]
        killed = ["killed"] if number == 1 and scene.first.killed else []
        if acts or killed:
            shown.append(f"  {name}: {', '.join([*acts, *killed])}")
    return "\n".join([head, *shown])


def to_text(message: Message) -> str:
    """Return the bytes of *message* in base64."""
    return base64.b64encode(to_bytes(message)).decode("ascii")
