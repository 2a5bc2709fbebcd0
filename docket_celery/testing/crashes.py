"""The crash matrix: a job is killed at every boundary, and each time another process brings it to its end."""

from __future__ import annotations

import base64
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from docket_celery.ambient import surrounded
from docket_celery.annotation import ValueKey
from docket_celery.checkpoint import Checkpoint, Lease, Store, check_execution_id
from docket_celery.errors import InvalidArguments
from docket_celery.graph import Graph
from docket_celery.messages import brief, from_bytes, to_bytes
from docket_celery.outcome import Submission
from docket_celery.overriding import Overriding
from docket_celery.plan import Plan
from docket_celery.registry import value_key
from docket_celery.step import Step
from docket_celery.testing.forking import Ended, in_child
from docket_celery.testing.watching import (
    BODY,
    CLAIM,
    RAISED,
    RETURNED,
    SAVED,
    Boundary,
    Entry,
    Journal,
    Watch,
)
from docket_celery.waiting import read_value

if TYPE_CHECKING:
    from docket_celery.store import SQLStore

_TASK = "crash-matrix"
_MOST_DELIVERIES = 10


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


def crash_matrix(
    graph: Graph,
    target: type[Message],
    /,
    *inputs: Message,
    effects: Sequence[Any] = (),
    store: SQLStore | Callable[[], Store] | None = None,
    execution_id: str | None = None,
    context: Mapping[str, Any] | None = None,
    timeout_s: float = 60.0,
) -> CrashReport:
    """Kill a job at every boundary, let another process go on each time, and check what that must not change.

    The job runs once undisturbed, in a child of this process. Then, for each boundary that it crossed (before and
    after each step's body, before and after each save, before and after the run's end is written), it runs again, its
    process is killed there by SIGKILL, and another process resumes the run at once, as a worker does to which Celery
    has delivered the task again. Each time the result must be the same; no persisted step may start once its
    checkpoint is saved; each has one checkpoint; and submitting the job again runs nothing.

    The children are forked: the graph and what its steps use need not be importable, and what they keep in memory is
    gone with them. The bodies really run, once for each boundary before them at least.

    Args:
        graph: The graph; steps replaced by `Graph.override` are the ones that run.
        target: The message type to make.
        *inputs: The job.
        effects: Steps (by name, output type or function) that touch the outside world: such a step must not run again
            once it has returned, unless the process died before its result could be saved. Fails for one that does
            not persist, if there is any step after it.
        store: An `SQLStore` whose tables are there; the job's rows are deleted after each run. Or a function that
            returns a new empty store. Default: SQLite files in a temporary directory.
        execution_id: Names the run; default: a new name.
        context: Values for ``ctx.values``.
        timeout_s: Seconds for each process.

    Raises:
        CrashMatrixFailed: A promise was broken, or a boundary was not reached again.
        InvalidArguments: The inputs do not fit, or other processes cannot see the store.
    """
    given = tuple(value_key(type(message), "crash_matrix") for message in inputs)
    key = value_key(target, "crash_matrix")
    with tempfile.TemporaryDirectory(prefix="docket-crash-") as folder:
        job = _Job(
            graph=graph,
            target=key,
            given=given,
            inputs=inputs,
            plan=graph.compiled(key, given),
            execution_id=check_execution_id(execution_id or f"{_TASK}-{uuid.uuid4()}"),
            context=context or {},
            effects=frozenset(graph.find_step(step).name for step in effects),
            stores=_Stores(store, Path(folder)),
            folder=Path(folder),
            timeout_s=timeout_s,
        )
        return _run_all(job)


def _run_all(job: _Job) -> CrashReport:
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
class _Scene:
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
class _Job:
    graph: Graph
    target: ValueKey
    given: tuple[ValueKey, ...]
    inputs: Sequence[Message]
    plan: Plan
    execution_id: str
    context: Mapping[str, Any]
    effects: frozenset[str]
    stores: _Stores
    folder: Path
    timeout_s: float

    @property
    def steps(self) -> dict[str, Step]:
        """The steps of the plan by name."""
        return {planned.step.name: planned.step for planned in self.plan.steps}

    def play(self, deadly: Boundary | None) -> _Scene:
        """Begin the job in one process, which dies at *deadly*, and bring it to its end in another."""
        journal = Journal(self.folder / f"journal-{uuid.uuid4()}")
        with self.stores.fresh(self, journal) as store:
            first = in_child(lambda: self._begin(store, journal, deadly), within_s=self.timeout_s)
            died = first.killed
            second = in_child(lambda: self._go_on(store, journal, resume=died), within_s=self.timeout_s)
            return _Scene(deadly=deadly, first=first, second=second, journal=journal.read())

    def _begin(self, store: Store | None, journal: Journal, deadly: Boundary | None) -> dict[str, Any]:
        result = self._deliver(store, Watch(journal, 1, deadly), task_id=_TASK, retries=0)
        return {"result": _text(result)}

    def _go_on(self, store: Store | None, journal: Journal, *, resume: bool) -> dict[str, Any]:
        """Resume the job as Celery's next delivery does, then submit it once more as another task."""
        told: dict[str, Any] = {}
        if store is not None:
            for claim in (entry for entry in journal.read(1) if entry.kind == CLAIM):
                # As if its lease had run out: nobody waits for that.
                store.disclaim(bytes.fromhex(claim.key), claim.owner)
        if resume:
            told["result"] = _text(self._deliver(store, Watch(journal, 2), task_id=_TASK, retries=1))
        if store is not None:
            again = self._deliver(store, Watch(journal, 3), task_id=f"{_TASK}-again", retries=0)
            told["again"] = _text(again)
            told["checkpoints"] = self._count(store, journal)
        return told

    def _deliver(self, store: Store | None, watch: Watch, *, task_id: str, retries: int) -> Message:
        submission = Submission(
            execution_id=self.execution_id,
            values=self.context,
            task_id=task_id,
            retries=retries,
            may_help=False,
            listeners=self.graph.listeners,
        )
        steps = watch.steps([planned.step for planned in self.plan.steps])
        with surrounded(
            replaced={self.graph: Overriding(steps)},
            settings={"max_deliveries": _MOST_DELIVERIES},
            listeners=() if store is not None else (watch,),
        ):
            outcome = self.graph.deliver(
                self.target,
                self.inputs,
                submission,
                given=self.given,
                store=None if store is None else watch.store(store),
            )
        return read_value(outcome, self.target.kind)

    def _count(self, store: Store, journal: Journal) -> dict[str, int]:
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
            found = store.lookup(bytes.fromhex(entry.key), _TASK, 1.0)
            counts[entry.step] += isinstance(found, Checkpoint)
        return dict(counts)


class _Stores:
    """Gives each playing of the job a store that knows nothing of the others."""

    def __init__(self, given: SQLStore | Callable[[], Store] | None, folder: Path) -> None:
        self._given, self._folder = given, folder

    @contextmanager
    def fresh(self, job: _Job, journal: Journal) -> Generator[Store | None]:
        """Open a store, and leave nothing of the job in it."""
        if not job.plan.persists:
            yield None
            return
        store, ours = self._open()
        if not store.persistent:
            problem = "other processes cannot see a store in memory; pass an SQLStore, or leave store= out"
            raise InvalidArguments("crash_matrix", problem)
        try:
            yield store
        finally:
            if not ours:
                _delete(store, job, [e.key for e in journal.read() if e.key])
            store.close()

    def _open(self) -> tuple[Store, bool]:
        from docket_celery.store import SQLStore

        given = self._given
        if given is None:
            # Copied: to make the tables takes longer than a whole run.
            template, path = self._folder / "template.db", self._folder / f"{uuid.uuid4()}.db"
            if not template.exists():
                empty = SQLStore(f"sqlite:///{template}")
                empty.migrate()
                empty.close()
            shutil.copyfile(template, path)
            return SQLStore(f"sqlite:///{path}"), True
        if isinstance(given, SQLStore):
            return given, False
        if callable(given):
            return given(), True
        raise InvalidArguments("crash_matrix", f"store= is an SQLStore or a function, not {given!r}")


def _delete(store: Any, job: _Job, keys: Sequence[str]) -> None:
    """Delete what the job left in the user's database, the shared results that it made included."""
    from sqlalchemy import delete

    from docket_celery.store import schema

    raw = [bytes.fromhex(key) for key in keys]
    with store.engine.begin() as connection:
        for table in schema.metadata.tables.values():
            columns = table.c
            if "graph" in columns and "execution_id" in columns:
                of_run = (columns.graph == job.graph.name) & (columns.execution_id == job.execution_id)
                connection.execute(delete(table).where(of_run))
            if "cache_key" in columns and raw:
                connection.execute(delete(table).where(columns.cache_key.in_(raw)))


def _check(job: _Job, scene: _Scene, calm: _Scene) -> Iterator[str]:
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


def _check_results(job: _Job, scene: _Scene, calm: _Scene) -> Iterator[str]:
    expected = calm.first.value["result"]
    told = {
        "the resumed run": scene.second.value.get("result"),
        "a second submission": scene.second.value.get("again"),
    }
    for what, found in told.items():
        if found is not None and found != expected:
            shown = [brief(from_bytes(job.target.kind, base64.b64decode(text))) for text in (found, expected)]
            yield f"{what} ended with {shown[0]}, undisturbed with {shown[1]}"


def _check_calls(job: _Job, scene: _Scene) -> Iterator[str]:
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


def _describe(boundary: Boundary | None, scene: _Scene, problems: Iterator[str]) -> str:
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


def _text(message: Message) -> str:
    return base64.b64encode(to_bytes(message)).decode("ascii")
