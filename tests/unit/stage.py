"""Where scripted graphs are run.

Every call is written down, deadlines pass when a script says so, and the store stops answering at a chosen moment, as
it does for a process that dies there.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from google.protobuf.message import Message
from sqlalchemy import text

from docket_celery.engine.process.settings import Settings
from docket_celery.engine.process.state import process
from docket_celery.engine.process.timer import Alarm, Clock, Timer, system_clock
from docket_celery.engine.run_context import RunOutcome, Submission
from docket_celery.errors import AbortError, StoreUnavailable
from docket_celery.graph import Graph
from docket_celery.observe.events import Event
from docket_celery.plan.context import StepContext
from docket_celery.plan.options import FixedBackoff, RetryPolicy
from docket_celery.store import MemoryStore, SQLStore
from docket_celery.store.contract import Store
from docket_celery.store.records import RunRow, RunState, StepExecution
from tests.unit.graphs import WAIT_S, within
from tests.unit.protos.shop_pb2 import Label, Order
from tests.unit.scripted import LATE_VALUE, Fault, Script

GRAPH = "scripted"
_LONG_S = 3600.0
_SHORT_S = 0.001


def poll(done: Callable[[], bool]) -> None:
    """Wait until *done*; fail if that takes longer than `WAIT_S`."""
    until = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < until, "a body or its thread is stuck"
        time.sleep(0.0002)


class Deadlines:
    """The alarms of the attempts in progress, by their delay: each step has one of its own.

    They ring when a script says so, never by themselves; all other waits are cut short.
    """

    def __init__(self) -> None:
        self._alarms: dict[float, tuple[Timer, Alarm]] = {}

    def timer(self) -> Timer:
        """Return a timer that tells of its alarms here."""
        return _timer_of(self)

    def inline_timer(self, clock: Clock, *, threaded: bool) -> Timer:
        """Return such a timer for runs without threads."""
        return _timer_of(self, clock, threaded=threaded)

    def note(self, timer: Timer, delay_s: float, alarm: Alarm) -> None:
        """Remember the alarm of an attempt."""
        self._alarms[delay_s] = (timer, alarm)

    def ring(self, delay_s: float) -> None:
        """Let the attempt's deadline pass now; whatever cancels the alarm before it rings still does."""
        timer, alarm = self._alarms[delay_s]

        def ring() -> None:
            self._take(timer, alarm)()

        timer.after(0, ring)

    def take(self, delay_s: float) -> Callable[[], None]:
        """Take the attempt's alarm as its timer does when it is due; the test makes the call, however late."""
        return self._take(*self._alarms[delay_s])

    def _take(self, timer: Timer, alarm: Alarm) -> Callable[[], None]:
        with timer._condition:
            call, alarm.call = alarm.call, None
        return call if call is not None else lambda: None


def _timer_of(deadlines: Deadlines, clock: Clock = system_clock, *, threaded: bool = True) -> Timer:
    class ScriptedTimer(Timer):
        def after(self, delay_s: float, call: Callable[[], None]) -> Alarm:
            if delay_s < _LONG_S:
                return super().after(min(delay_s, _SHORT_S), call)
            alarm = super().after(delay_s, call)
            deadlines.note(self, delay_s, alarm)
            return alarm

    return ScriptedTimer(clock, threaded=threaded)


@dataclass(slots=True, kw_only=True)
class Call:
    """One start of a step's body.

    Attributes:
        end: What it did: a `Fault`, 'value', or '' while it runs or if it was cancelled.
    """

    run: str
    step: int
    delivery: int
    attempt: int
    inputs: tuple[int, ...]
    end: str = ""


@dataclass(slots=True)
class Cast:
    """The steps of one graph, and what they did.

    Attributes:
        calls: In the order in which they began.
        events: Of all deliveries, in the order in which listeners heard of them.
        on_event: Told of each event too.
    """

    scripts: Sequence[Script]
    deadlines: Deadlines
    calls: list[Call] = field(default_factory=list[Call])
    events: list[Event] = field(default_factory=list[Event])
    on_event: Callable[[Event], object] = lambda _: None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _inside: int = 0

    def graph(self) -> Graph:
        """Return the graph of all steps."""
        graph = Graph(GRAPH)
        for script in self.scripts:
            retry = RetryPolicy(max_attempts=script.attempts, backoff=FixedBackoff(0))
            graph.register(
                self._function(script),
                name=script.name,
                persist=script.persist,
                retry=retry if script.attempts > 1 else None,
                retriable=ValueError,
                timeout=_timeout_s(script),
            )
        graph.listeners.append(self._hear)
        return graph

    def deliver(
        self, graph: Graph, run: str, threads: int, limit: int | None, store: Store | None = None
    ) -> RunOutcome:
        """Run one delivery to its end; never hangs a test."""
        if threads and type(process.runtime(threads).timer) is Timer:
            process.runtime(threads).timer = self.deadlines.timer()
            # The model knows no such limit, and on a busy machine bodies that were let go take their time to leave.
            process.runtime(threads).pool._most_abandoned = sys.maxsize
        submission = Submission(
            execution_id=run, max_concurrency=limit, listeners=graph.listeners, may_help=threads != 2
        )
        settings = Settings(threads=threads)
        plan = graph.plan_for(self.scripts[-1].key, [Order()])
        outcome = within(lambda: graph.deliver(plan, [Order()], submission, settings, store=store))
        self.settle(threads)
        return outcome

    def settle(self, threads: int) -> None:
        """Wait until nothing of a run goes on: work of the pool, coroutines, abandoned threads."""
        runtime = process.runtime(threads)
        poll(lambda: not threads or runtime.pool._outstanding == 0)
        if runtime._loop is not None:
            # The loop begins what it was handed in that order: behind this nothing is left to begin.
            runtime._loop.submit(asyncio.sleep(0)).result(WAIT_S)
        poll(lambda: not self._inside and runtime.pool.abandoned() == [])

    def _hear(self, event: Event) -> None:
        with self._lock:
            self.events.append(event)
        self.on_event(event)

    def _function(self, script: Script) -> Any:
        names = [f"p{place}" for place in range(len(script.sources))]
        prefix, wait = ("async ", "await ") if script.is_async else ("", "")
        # Every other step takes what the caller hands in too: slots of steps then begin behind those of given values.
        given = {} if script.index % 2 else {"order": Order}
        parameters = ", ".join([*given, *names, "ctx"])
        source = f"{prefix}def step({parameters}): return {wait}body(ctx, [{', '.join(names)}])"
        space: dict[str, Any] = {
            "body": lambda ctx, inputs: (self._play_async if script.is_async else self._play)(
                script, ctx, inputs
            )
        }
        exec(source, space)  # noqa: S102 -- a function of a wanted number of parameters
        sources = [self.scripts[index].annotation for index in script.sources]
        space["step"].__annotations__ = {
            **given,
            **dict(zip(names, sources, strict=True)),
            "ctx": StepContext,
            "return": script.annotation,
        }
        return space["step"]

    @contextmanager
    def _called(self, script: Script, ctx: StepContext, inputs: Sequence[Any]) -> Generator[Call]:
        call = Call(
            run=ctx.execution_id,
            step=script.index,
            delivery=ctx.delivery,
            attempt=ctx.attempt,
            inputs=tuple(value.cents for value in inputs),
        )
        with self._lock:
            self.calls.append(call)
            self._inside += 1
        try:
            yield call
        finally:
            with self._lock:
                self._inside -= 1

    def _play(self, script: Script, ctx: StepContext, inputs: Sequence[Any]) -> Message:
        with self._called(script, ctx, inputs) as call:
            if script.fault(ctx.delivery, ctx.attempt) is Fault.LATE:
                self.deadlines.ring(_timeout_s(script))
                assert ctx.cancelled.wait(WAIT_S)
            return _act(script, ctx, call)

    async def _play_async(self, script: Script, ctx: StepContext, inputs: Sequence[Any]) -> Message:
        with self._called(script, ctx, inputs) as call:
            if script.fault(ctx.delivery, ctx.attempt) is Fault.LATE:
                self.deadlines.ring(_timeout_s(script))
                await asyncio.sleep(WAIT_S)
            return _act(script, ctx, call)


def _timeout_s(script: Script) -> float:
    return _LONG_S + script.index


def _act(script: Script, ctx: StepContext, call: Call) -> Message:
    fault = script.fault(ctx.delivery, ctx.attempt)
    call.end = "value" if fault is None else fault
    match fault:
        case None:
            return script.message(script.value(call.inputs, ctx.delivery, ctx.attempt))
        case Fault.FAIL:
            raise ValueError(script.name)
        case Fault.FATAL:
            raise KeyError(script.name)
        case Fault.ABORT:
            raise AbortError(script.name)
        case Fault.WRONG:
            return Label(text=script.name)
        case Fault.LATE:
            return script.message(LATE_VALUE)


class Shelf(Protocol):
    """What a test sees of a store behind its back."""

    @property
    def store(self) -> Store:
        """The store."""
        ...

    def saved(self, run: str) -> Mapping[str, tuple[str, bytes]]:
        """Return type and bytes of the run's WORKFLOW checkpoints, by step."""
        ...

    def shared(self) -> Sequence[tuple[str, bytes]]:
        """Return step and bytes of all GLOBAL checkpoints."""
        ...

    def rows(self) -> Sequence[StepExecution]:
        """Return all step executions."""
        ...

    def expire(self) -> None:
        """Let every lease and claim expire."""
        ...


class MemoryShelf:
    """A `MemoryStore` with a clock of its own."""

    def __init__(self) -> None:
        self._now = 1000.0
        self.store = MemoryStore(lambda: self._now)

    def saved(self, run: str) -> Mapping[str, tuple[str, bytes]]:
        found = [kept.checkpoint for kept in self.store._cache.values()]
        return {c.step_name: (c.output_type, c.output_data) for c in found if c.execution_id == run}

    def shared(self) -> Sequence[tuple[str, bytes]]:
        found = [kept.checkpoint for kept in self.store._cache.values()]
        return [(c.step_name, c.output_data) for c in found if c.execution_id is None]

    def rows(self) -> Sequence[StepExecution]:
        return self.store.executions

    def expire(self) -> None:
        self._now += 1000


class SQLiteShelf:
    """A SQLite file."""

    def __init__(self, url: str) -> None:
        self.store = SQLStore(url)
        self.store.migrate()

    def _query(self, query: str, **values: object) -> Sequence[Any]:
        with self.store.engine.connect() as connection:
            return connection.execute(text(query), values).mappings().all()

    def saved(self, run: str) -> Mapping[str, tuple[str, bytes]]:
        found = self._query("SELECT * FROM docket_cache WHERE execution_id = :run", run=run)
        return {row["step_name"]: (row["output_type"], row["output_data"]) for row in found}

    def shared(self) -> Sequence[tuple[str, bytes]]:
        found = self._query("SELECT * FROM docket_cache WHERE execution_id IS NULL")
        return [(row["step_name"], row["output_data"]) for row in found]

    def rows(self) -> Sequence[StepExecution]:
        names = StepExecution.__dataclass_fields__
        found = self._query("SELECT * FROM docket_executions ORDER BY 1")
        return [StepExecution(**{name: row[name] for name in names}) for row in found]

    def expire(self) -> None:
        past = "2000-01-01 00:00:00.000000"
        with self.store.engine.connect() as connection:
            connection.execute(
                text("UPDATE docket_runs SET lease_until = :past WHERE state = 'RUNNING'"), {"past": past}
            )
            connection.execute(text("UPDATE docket_claims SET lease_until = :past"), {"past": past})


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """When a process dies, as its store sees it: at its *at*-th statement (from 1) or event.

    Attributes:
        answered: The statement took effect, but nobody heard of it.
    """

    at: int
    on_event: bool = False
    answered: bool = False


class MortalStore:
    """One process's view of a store: it gets no answers any more once it has died."""

    persistent = True

    def __init__(self, inner: Store, crash: Crash | None) -> None:
        self._inner, self._crash = inner, crash or Crash(at=0)
        self._statements = self._events = 0
        self._lock = threading.Lock()
        self.dead = False

    def hear(self, _: Event) -> None:
        """Count an event."""
        with self._lock:
            self._events += 1
            self.dead |= self._crash.on_event and self._events == self._crash.at

    def clone(self) -> MortalStore:
        return self

    def find_run(self, graph: str, execution_id: str) -> RunRow | None:
        return self._inner.find_run(graph, execution_id)

    def __getattr__(self, name: str) -> Any:
        def answer(*args: Any, **options: Any) -> Any:
            with self._lock:
                dies = self._dies() if name != "extend" else False
            if self.dead and not (dies and self._crash.answered):
                raise StoreUnavailable(name, "the process is dead")
            found = getattr(self._inner, name)(*args, **options)
            if dies:
                raise StoreUnavailable(name, "the process is dead")
            return found

        return answer

    def _dies(self) -> bool:
        if self.dead:
            return False
        self._statements += 1
        self.dead = not self._crash.on_event and self._statements == self._crash.at
        return self.dead


def state_of(store: Store, run: str) -> tuple[RunState | None, int]:
    """Return the run's state and epoch."""
    row = store.find_run(GRAPH, run)
    return (None, 0) if row is None else (row.state, row.epoch)
