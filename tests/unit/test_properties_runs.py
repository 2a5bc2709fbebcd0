"""Random graphs with random policies, failures, timeouts and crashes against a plain sequential model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from docket_celery.engine.process import inline
from docket_celery.engine.run_context import RunOutcome
from docket_celery.errors import AbortError, StepFailed, StepTimedOut, StoreUnavailable, WrongResult
from docket_celery.graph import Graph
from docket_celery.observe.events import Event, EventKind
from docket_celery.plan.options import Scope
from docket_celery.store.records import RunState, StepExecution
from tests.unit.scripted import Fate, Fault, Forecast, Script, draw_scripts, fate, forecast
from tests.unit.stage import (
    Call,
    Cast,
    Crash,
    Deadlines,
    MemoryShelf,
    MortalStore,
    Shelf,
    SQLiteShelf,
    state_of,
)

# Even draws find more than Hypothesis's own, which prefer small graphs; the number of steps still shrinks.
RANDOM = st.builds(Random, st.integers(0, 2**32))
STEPS = st.integers(1, 16)
THREADS = st.sampled_from([0, 1, 2, 8])
LIMITS = st.sampled_from([None, None, 1, 3])
MORE = float(os.environ.get("PROPERTY_EXAMPLES", "1"))
"""How many times as many examples: more for `make test-faults`, fewer for each mutant of `tools/mutants.py`."""
CRASHES = st.builds(Crash, at=st.integers(1, 12), on_event=st.booleans(), answered=st.booleans())


def examples(count: int) -> settings:
    """Return settings for *count* examples, times what the environment asks for."""
    # The fixture holds the alarms of the run in progress and nothing that one example leaves for the next.
    fine = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=max(1, int(count * MORE)), deadline=None, suppress_health_check=fine)


@pytest.fixture
def deadlines(monkeypatch: pytest.MonkeyPatch) -> Deadlines:
    """The deadlines of all runs of a test, with and without threads."""
    made = Deadlines()
    monkeypatch.setattr(inline, "Timer", made.inline_timer)
    return made


class Trial:
    """One graph, delivered again and again under one name, compared with the model each time."""

    def __init__(self, scripts: Sequence[Script], deadlines: Deadlines, shelf: Shelf | None = None) -> None:
        self.scripts, self.shelf = scripts, MemoryShelf() if shelf is None else shelf
        self.cast = Cast(scripts, deadlines)
        self.graph: Graph = self.cast.graph()
        self.shared: dict[tuple[int, tuple[int, ...]], int] = {}

    def deliver(self, run: str, threads: int, limit: int | None, crash: Crash | None = None) -> RunOutcome:
        """Run one delivery and check everything about it."""
        state, epoch = state_of(self.shelf.store, run)
        before, known = self.saved(run), dict(self.shared)
        first_call, first_event, first_row = (
            len(self.cast.calls),
            len(self.cast.events),
            len(self.shelf.rows()),
        )
        # One for each delivery: what a dead process still tries may never reach the store.
        store = MortalStore(self.shelf.store, crash)
        self.cast.on_event = store.hear
        outcome = self.cast.deliver(self.graph, run, threads, limit, store)
        calls, events = self.cast.calls[first_call:], self.cast.events[first_event:]
        if state is RunState.SUCCEEDED:
            assert calls == []
            assert outcome.replayed or isinstance(outcome.error, StoreUnavailable)
            return outcome
        number = epoch + 1 if self.keeps_run else 1
        expected = forecast(self.scripts, number, before, known)
        self.learn_shared(expected, calls)
        check = Check(self.scripts, expected, calls, outcome, number)
        check.calls_follow_the_model()
        check.saves_follow_the_calls(before, self.saved(run))
        if isinstance(outcome.error, StoreUnavailable):
            assert store.dead
        else:
            check.end_follows_the_model(inline=threads == 0)
            check.events_agree(events)
            rows = self.shelf.rows()[first_row:]
            check.rows_agree(rows, events) if self.keeps_run else check.cache_rows_agree(rows)
            if self.keeps_run and not store.dead:
                succeeded = RunState.SUCCEEDED if outcome.error is None else RunState.FAILED
                assert state_of(self.shelf.store, run) == (succeeded, number)
        self.shelf.expire()
        return outcome

    def finish(self, run: str, threads: Sequence[int], limit: int | None = None) -> None:
        """Run as many deliveries as there are thread counts; by then every fault is healed."""
        outcomes = [self.deliver(run, count, limit) for count in threads]
        # Where no run is kept nobody counts deliveries, and faults do not heal.
        assert outcomes[-1].error is None or not self.keeps_run

    @property
    def keeps_run(self) -> bool:
        """Whether the plan has a step that persists for its run."""
        found = forecast(self.scripts, 1, {}, {})
        return any(self.scripts[index].persist is Scope.WORKFLOW for index in found.needed)

    def saved(self, run: str) -> dict[int, int]:
        """Return the values of the run's checkpoints; each is of its step's type."""
        found: dict[int, int] = {}
        for name, (kind, data) in self.shelf.saved(run).items():
            script = self.scripts[int(name[1:])]
            message: Any = script.key.kind.FromString(data)
            assert kind == script.key.kind.DESCRIPTOR.full_name
            found[script.index] = message.cents
        return found

    def learn_shared(self, expected: Forecast, calls: Sequence[Call]) -> None:
        """Take over which GLOBAL values were published: only those of steps that were called to the end."""
        found = Counter[tuple[int, int]]()
        for name, data in self.shelf.shared():
            script = self.scripts[int(name[1:])]
            message: Any = script.key.kind.FromString(data)
            found[script.index, message.cents] += 1
        fresh = found - Counter((index, value) for (index, _), value in self.shared.items())
        for index, value in fresh.elements():
            assert self.scripts[index].persist is Scope.GLOBAL
            assert expected.fates[index].value == value
            assert [call.end for call in calls if call.step == index][-1] == "value"
            self.shared[index, expected.inputs[index]] = value


class Check:
    """What one delivery did, against what the model says."""

    def __init__(
        self,
        scripts: Sequence[Script],
        expected: Forecast,
        calls: Sequence[Call],
        outcome: RunOutcome,
        number: int,
    ) -> None:
        self.scripts, self.expected, self.calls, self.outcome = scripts, expected, calls, outcome
        self.number = number

    def calls_follow_the_model(self) -> None:
        """Only needed steps are called, with the model's inputs, each attempt once and after its inputs' values."""
        made: dict[int, list[Call]] = {}
        done = set(self.expected.used | self.expected.shared)
        for call in self.calls:
            assert call.step in self.expected.fates, "an unneeded, restored or unreachable step was called"
            assert call.delivery == self.number
            assert call.inputs == self.expected.inputs[call.step]
            assert done.issuperset(self.scripts[call.step].sources), "called before its inputs were there"
            made.setdefault(call.step, []).append(call)
            if call.end == "value":
                done.add(call.step)
        for index, found in made.items():
            assert [call.attempt for call in found] == list(range(1, len(found) + 1))
            assert len(found) <= self.expected.fates[index].calls

    def saves_follow_the_calls(self, before: Mapping[int, int], after: Mapping[int, int]) -> None:
        """Nothing saved changes; what is new is the model's value of a step that was called to its end."""
        assert before.items() <= after.items()
        completed = {call.step for call in self.calls if call.end == "value"}
        for index in after.keys() - before.keys():
            assert self.scripts[index].persist is Scope.WORKFLOW
            assert index in completed
            assert after[index] == self.expected.fates[index].value
        if not isinstance(self.outcome.error, AbortError | StoreUnavailable):
            kept = {index for index in completed if self.scripts[index].persist is Scope.WORKFLOW}
            assert after.keys() - before.keys() == kept, "what had run to its end was not saved"

    def end_follows_the_model(self, *, inline: bool) -> None:
        """The target's value, or one of the failures that the model has; without threads the first of them."""
        broken = self.expected.broken
        made = Counter(call.step for call in self.calls)
        if not broken:
            assert self.outcome.error is None
            target = self.scripts[-1]
            assert self.outcome.value == target.message(self.expected.values[target.index])
            assert made == {index: fate.calls for index, fate in self.expected.fates.items()}
            return
        error = self.outcome.error
        assert isinstance(error, AbortError | StepFailed)
        name = error.message if isinstance(error, AbortError) else error.step
        index = int(name[1:])
        assert_is_failure(error, broken[index])
        assert made[index] == broken[index].calls
        if inline:
            first = min(broken)
            assert index == first
            reached = {i: fate.calls for i, fate in self.expected.fates.items() if i <= first}
            assert made == reached

    def events_agree(self, events: Sequence[Event]) -> None:
        """Nothing starts after the end or after its own save; what ended well said so once."""
        # An attempt that passed its deadline is heard of once more when it returns, be it after the end.
        kinds = [event.kind for event in events if event.kind is not EventKind.STEP_LATE]
        assert kinds[0] is EventKind.RUN_STARTED
        if isinstance(self.outcome.error, AbortError):
            return
        assert kinds[-1] is EventKind.RUN_ENDED
        assert kinds.count(EventKind.RUN_ENDED) == 1
        ended: set[str] = set()
        for event in events:
            if event.kind in {EventKind.STEP_SUCCEEDED, EventKind.STEP_RESTORED}:
                assert event.step not in ended
                ended.add(event.step)
            elif event.kind is EventKind.STEP_STARTED:
                assert event.step not in ended
        completed = {call.step for call in self.calls if call.end == "value"} | self.shared_reached(ended)
        assert ended == {self.scripts[index].name for index in completed | self.expected.used}
        started = [(event.step, event.attempt) for event in events if event.kind is EventKind.STEP_STARTED]
        assert sorted(started) == sorted((self.scripts[c.step].name, c.attempt) for c in self.calls)

    def shared_reached(self, ended: set[str]) -> set[int]:
        """Return which of the shared values were used; a run that fails may end before it reaches them."""
        found = {index for index in self.expected.shared if self.scripts[index].name in ended}
        assert self.outcome.error is not None or found == self.expected.shared
        return found

    def cache_rows_agree(self, rows: Sequence[StepExecution]) -> None:
        """Where no run is kept each shared value that was found or made has a row, and nothing else has."""
        made = Counter(call.step for call in self.calls)
        for row in rows:
            index = int(row.step_name[1:])
            assert (self.scripts[index].persist, row.status) == (Scope.GLOBAL, "SUCCEEDED")
            restored = index in self.expected.shared
            assert (row.cached, row.attempts) == (restored, 0 if restored else made[index])

    def rows_agree(self, rows: Sequence[StepExecution], events: Sequence[Event]) -> None:
        """Each step execution has one row, which tells what the calls and the outcome tell."""
        if isinstance(self.outcome.error, AbortError):
            return
        made = Counter(call.step for call in self.calls)
        for row in rows:
            assert row.delivery == self.number
            index = int(row.step_name[1:])
            restored = index in self.expected.used or index in self.expected.shared
            assert (row.cached, row.attempts) == (restored, 0 if restored else made[index])
        names = Counter(row.step_name for row in rows)
        assert set(names.values()) <= {1}
        well = {row.step_name for row in rows if row.status == "SUCCEEDED"}
        completed = {self.scripts[call.step].name for call in self.calls if call.end == "value"}
        assert well >= completed | {self.scripts[index].name for index in self.expected.used}
        failed = {row.step_name for row in rows if row.status in {"FAILED", "TIMED_OUT"}}
        assert well | failed == set(names)
        told = {(row.step_name, row.attempts, row.error_message) for row in rows if row.step_name in failed}
        kind = EventKind.STEP_FAILED
        assert told == {(event.step, event.attempt, event.detail) for event in events if event.kind is kind}
        for row in rows:
            start = f"[{row.error_code}] step {row.step_name!r} "
            assert (
                row.error_code is None
                if row.step_name in well
                else (row.error_message or "").startswith(start)
            )
        named: set[str] = set()
        if isinstance(self.outcome.error, StepFailed):
            named = {self.outcome.error.step, *(other.split("'")[1] for other in self.outcome.error.others)}
        assert failed == named


def assert_is_failure(error: AbortError | StepFailed, fate: Fate) -> None:
    """Fail unless *error* is what a step of that fate ends with."""
    kinds = {Fault.ABORT: AbortError, Fault.WRONG: WrongResult, Fault.LATE: StepTimedOut}
    assert fate.end is not None
    assert type(error) is kinds.get(fate.end, StepFailed)
    if isinstance(error, StepFailed):
        assert error.attempts == fate.calls
        assert error.retriable is (fate.end in {Fault.FAIL, Fault.LATE})
        assert error.caused_by(ValueError) is (fate.end is Fault.FAIL)
        assert error.caused_by(KeyError) is (fate.end is Fault.FATAL)


@examples(200)
@given(random=RANDOM, steps=STEPS, threads=THREADS, limit=LIMITS)
def test_a_run_that_persists_nothing_agrees_with_the_model(
    deadlines: Deadlines, random: Random, steps: int, threads: int, limit: int | None
) -> None:
    """Result or failure, calls, their order and inputs: as if the steps ran one after the other."""
    trial = Trial(draw_scripts(random, steps, persists=False), deadlines)
    trial.deliver("run", threads, limit)


@examples(200)
@given(random=RANDOM, steps=STEPS, threads=st.lists(THREADS, min_size=5, max_size=5), limit=LIMITS)
def test_a_run_that_fails_and_resumes_agrees_with_the_model(
    deadlines: Deadlines, random: Random, steps: int, threads: list[int], limit: int | None
) -> None:
    """Each delivery restores exactly what was completed and persisted, and calls only what is missing."""
    trial = Trial(draw_scripts(random, steps), deadlines)
    trial.finish("run", threads, limit)
    trial.deliver("another run", threads[0], limit)


@examples(200)
@given(
    random=RANDOM,
    steps=STEPS,
    threads=THREADS,
    limit=LIMITS,
    crashes=st.lists(CRASHES, min_size=1, max_size=4),
)
def test_a_run_whose_processes_die_agrees_with_the_model(
    deadlines: Deadlines, random: Random, steps: int, threads: int, limit: int | None, crashes: list[Crash]
) -> None:
    """Wherever a process dies, the next delivery goes on from what is saved and never calls a saved step again."""
    trial = Trial(draw_scripts(random, steps, faults=0.1), deadlines)
    for crash in crashes:
        trial.deliver("run", threads, limit, crash)
    trial.finish("run", 4 * [threads], limit)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("persist", list(Scope))
def test_a_graph_of_one_step_survives_a_crash_at_any_statement(
    deadlines: Deadlines, threads: int, persist: Scope
) -> None:
    """Asked for, made, saved, closed: whichever is the last that a process does."""
    for at in range(1, 6):
        for answered in (False, True):
            trial = Trial([Script(index=0, persist=persist)], deadlines)
            trial.deliver("run", threads, None, Crash(at=at, answered=answered))
            trial.finish("run", [threads])


@examples(80)
@given(random=RANDOM, steps=STEPS, limit=LIMITS)
def test_all_pools_agree_on_a_graph(
    deadlines: Deadlines, random: Random, steps: int, limit: int | None
) -> None:
    """On 0, 1, 2 and 8 threads a graph with at most one broken step ends alike, after the same calls of its own."""
    scripts = draw_scripts(random, steps)
    broken = [script.index for script in scripts if fate(script, (), 1).end is not None]
    for index in broken[1:]:
        scripts[index] = replace(scripts[index], faults=())
    found = [Trial(scripts, deadlines).deliver("run", threads, limit) for threads in (0, 1, 2, 8)]
    first, *others = [(one.value, type(one.error), told(one.error)) for one in found]
    assert all(other == first for other in others)


def told(error: BaseException | None) -> tuple[object, ...]:
    """Return what an error says of its own step, without those that were given up beside it."""
    if isinstance(error, StepFailed):
        return error.step, error.attempts, error.retriable, error.cause_types, error.cause_text
    return () if error is None else error.args


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_graphs_of_hundreds_of_steps_agree_with_the_model(deadlines: Deadlines, threads: int) -> None:
    """The same at size, with crashes between."""
    for seed in range(int(2 * MORE)):
        random = Random(f"{seed}/{threads}")
        trial = Trial(draw_scripts(random, 300, faults=0.05), deadlines)
        crash = Crash(at=random.randint(1, 200), on_event=random.random() < 0.5)
        trial.deliver("run", threads, None)
        trial.deliver("run", threads, None, crash)
        trial.finish("run", 3 * [threads])


def test_the_same_holds_on_sqlite(deadlines: Deadlines, tmp_path: Path) -> None:
    """A sample of the above on a SQLite file."""
    for seed in range(int(6 * MORE)):
        random = Random(seed)
        shelf = SQLiteShelf(f"sqlite:///{tmp_path / f'{seed}.sqlite'}")
        trial = Trial(draw_scripts(random, random.randint(1, 12), faults=0.1), deadlines, shelf)
        threads = random.choice([0, 1, 4])
        crash = Crash(
            at=random.randint(1, 12), on_event=random.random() < 0.5, answered=random.random() < 0.5
        )
        trial.deliver("run", threads, None, crash)
        trial.deliver("run", threads, None)
        trial.deliver("run", threads, None, crash)
        trial.finish("run", 3 * [threads])
        shelf.store.close()
