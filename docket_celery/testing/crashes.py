"""The crash matrix: a job is killed at every boundary, and each time another process brings it to its end."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from docket_celery.engine.overrides import overridden
from docket_celery.engine.run_context import Submission
from docket_celery.engine.waiting import read_value
from docket_celery.errors import InvalidArguments
from docket_celery.graph import Graph
from docket_celery.plan.annotation import ValueKey
from docket_celery.plan.override import overriding
from docket_celery.plan.registry import value_key
from docket_celery.store.contract import Store
from docket_celery.store.identity import check_execution_id
from docket_celery.testing.forking import in_child
from docket_celery.testing.matrix import NAME, CrashReport, Job, Scene, delete_job, run_matrix, to_text
from docket_celery.testing.watching import (
    CLAIM,
    Boundary,
    Journal,
    Watch,
)

if TYPE_CHECKING:
    from docket_celery.store import SQLStore

_MOST_DELIVERIES = 10


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
    """Kill a job at every boundary, let another process continue each time, and check what that must not change.

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
        job = _ForkedJob(
            graph=graph,
            target=key,
            given=given,
            inputs=inputs,
            plan=graph.compiled(key, given),
            execution_id=check_execution_id(execution_id or f"{NAME}-{uuid.uuid4()}"),
            context=context or {},
            effects=frozenset(graph.find_step(step).name for step in effects),
            stores=_Stores(store, Path(folder)),
            folder=Path(folder),
            timeout_s=timeout_s,
        )
        return run_matrix(job)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ForkedJob(Job):
    """A job whose processes are children of this one."""

    given: tuple[ValueKey, ...]
    context: Mapping[str, Any]
    stores: _Stores

    def play(self, deadly: Boundary | None) -> Scene:
        """Begin the job in one process, which dies at *deadly*, and bring it to its end in another."""
        journal = self.journal()
        with self.stores.fresh(self, journal) as store:
            first = in_child(lambda: self._begin(store, journal, deadly), within_s=self.timeout_s)
            died = first.killed
            second = in_child(lambda: self._go_on(store, journal, resume=died), within_s=self.timeout_s)
            return Scene(deadly=deadly, first=first, second=second, journal=journal.read())

    def _begin(self, store: Store | None, journal: Journal, deadly: Boundary | None) -> dict[str, Any]:
        result = self._deliver(store, Watch(journal, 1, deadly), task_id=NAME, retries=0)
        return {"result": to_text(result)}

    def _go_on(self, store: Store | None, journal: Journal, *, resume: bool) -> dict[str, Any]:
        """Resume the job as Celery's next delivery does, then submit it once more as another task."""
        told: dict[str, Any] = {}
        if store is not None:
            for claim in (entry for entry in journal.read(1) if entry.kind == CLAIM):
                # As if its lease had run out: nobody waits for that.
                store.release_claim(bytes.fromhex(claim.key), claim.owner)
        if resume:
            told["result"] = to_text(self._deliver(store, Watch(journal, 2), task_id=NAME, retries=1))
        if store is not None:
            again = self._deliver(store, Watch(journal, 3), task_id=f"{NAME}-again", retries=0)
            told["again"] = to_text(again)
            told["checkpoints"] = self.count(store, journal)
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
        heard = () if store is not None else (watch,)
        with (
            overriding(self.graph, steps),
            overridden(settings={"max_deliveries": _MOST_DELIVERIES}, listeners=heard),
        ):
            plan = self.graph.compiled(self.target, self.given)
            used = None if store is None else watch.store(store)
            outcome = self.graph.deliver(plan, self.inputs, submission, store=used)
        return read_value(outcome, self.target.kind)


class _Stores:
    """Gives each playing of the job a store that knows nothing of the others."""

    def __init__(self, given: SQLStore | Callable[[], Store] | None, folder: Path) -> None:
        self._given, self._folder = given, folder

    @contextmanager
    def fresh(self, job: Job, journal: Journal) -> Generator[Store | None]:
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
                delete_job(store, job, [e.key for e in journal.read() if e.key])
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
