"""Graphs whose steps follow a script, and a plain sequential model of what becomes of them.

The model knows nothing of threads, leases or statements: it walks the steps in their order with a dictionary. What
parallelism leaves open (which of several failures comes first) it answers with sets.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

from docket_celery.plan.annotation import Named, ValueKey
from docket_celery.plan.options import Scope
from tests.unit.protos.shop_pb2 import Money

MOST_STEPS = 320
LATE_VALUE = -1
"""What an attempt returns that has passed its deadline; no step and no row may ever hold it."""
_WORTH = 2**52


class Fault(enum.StrEnum):
    """What an attempt does instead of returning its value."""

    FAIL = "fail"
    """Raises what another attempt may cure."""
    FATAL = "fatal"
    """Raises what the step's classifier refuses to retry."""
    WRONG = "wrong"
    """Returns a message of another type."""
    LATE = "late"
    """Returns after its deadline."""
    ABORT = "abort"
    """Raises AbortError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One step: its policy and what its attempts do.

    Attributes:
        index: Its place in the order of registration.
        sources: The earlier steps whose values it takes.
        faults: Of its first attempts, one each; later ones succeed.
        heals_at: The delivery from which on no attempt has a fault.
        own_type: It makes a message type of its own; else a named Money.
    """

    index: int
    sources: tuple[int, ...] = ()
    persist: Scope | None = None
    is_async: bool = False
    attempts: int = 1
    faults: tuple[Fault, ...] = ()
    heals_at: int = 99
    own_type: bool = False

    @property
    def name(self) -> str:
        return f"s{self.index}"

    @property
    def key(self) -> ValueKey:
        """What identifies the step's value."""
        return ValueKey(own_types()[self.index]) if self.own_type else ValueKey(Money, self.name)

    @property
    def annotation(self) -> Any:
        """The annotation that stands for the step's value."""
        from typing import Annotated

        return self.key.kind if self.own_type else Annotated[Money, Named(self.name)]

    def fault(self, delivery: int, attempt: int) -> Fault | None:
        """Return what attempt number *attempt* of *delivery* does, or None: it succeeds."""
        known = delivery < self.heals_at and attempt <= len(self.faults)
        return self.faults[attempt - 1] if known else None

    def value(self, inputs: Sequence[int], delivery: int, attempt: int) -> int:
        """Return what a successful attempt makes: another value for other inputs, deliveries and attempts."""
        mixed = sum((place + 2) * value for place, value in enumerate(inputs))
        return (31 * mixed + 1_000_003 * self.index + 10_007 * delivery + attempt) % _WORTH

    def message(self, value: int) -> Message:
        """Return *value* as the step's message type."""
        kind: Any = self.key.kind
        made: Message = kind(cents=value)
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What becomes of a step that is reached: how often it is called, and how it ends (None: with a value)."""

    calls: int
    end: Fault | None
    value: int | None = None


@dataclass(slots=True, kw_only=True)
class Forecast:
    """What a sequential run of one delivery comes to.

    Attributes:
        needed: The steps to resolve, from the target down to what is saved.
        used: The saved steps whose values are used.
        fates: Of the needed steps that are reached and not found in the shared cache.
        shared: The needed steps that are found there.
        values: By step, of all that get one.
        inputs: By reached step, the values it is called with.
    """

    needed: set[int] = field(default_factory=set[int])
    used: set[int] = field(default_factory=set[int])
    fates: dict[int, Fate] = field(default_factory=dict[int, Fate])
    shared: set[int] = field(default_factory=set[int])
    values: dict[int, int] = field(default_factory=dict[int, int])
    inputs: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])

    @property
    def broken(self) -> dict[int, Fate]:
        """The reached steps that fail for good."""
        return {index: fate for index, fate in self.fates.items() if fate.end is not None}


def fate(script: Script, inputs: Sequence[int], delivery: int) -> Fate:
    """Call a step as often as its policy allows, one attempt after the other."""
    attempt = 0
    while True:
        attempt += 1
        fault = script.fault(delivery, attempt)
        if fault is None:
            return Fate(calls=attempt, end=None, value=script.value(inputs, delivery, attempt))
        if fault in {Fault.FATAL, Fault.WRONG, Fault.ABORT} or attempt == script.attempts:
            return Fate(calls=attempt, end=fault)


def forecast(
    scripts: Sequence[Script],
    delivery: int,
    saved: Mapping[int, int],
    shared: Mapping[tuple[int, tuple[int, ...]], int],
) -> Forecast:
    """Run the steps one after the other, in the order of registration; the last one is the target.

    Args:
        scripts: All steps.
        delivery: Its number.
        saved: WORKFLOW values of earlier deliveries of the run.
        shared: GLOBAL values of all runs, by step and inputs.
    """
    found = Forecast()
    todo = [len(scripts) - 1]
    while todo:
        index = todo.pop()
        if index in found.needed or index in found.used:
            continue
        if index in saved:
            found.used.add(index)
            found.values[index] = saved[index]
            continue
        found.needed.add(index)
        todo += scripts[index].sources
    for script in scripts:
        index = script.index
        if index not in found.needed or any(source not in found.values for source in script.sources):
            continue
        inputs = found.inputs[index] = tuple(found.values[source] for source in script.sources)
        if script.persist is Scope.GLOBAL and (index, inputs) in shared:
            found.shared.add(index)
            found.values[index] = shared[index, inputs]
            continue
        found.fates[index] = met = fate(script, inputs, delivery)
        if met.value is not None:
            found.values[index] = met.value
    return found


def draw_scripts(random: Random, count: int, *, persists: bool = True, faults: float = 0.2) -> list[Script]:
    """Draw a graph of *count* steps, of which about the share *faults* have some."""
    scopes = [None, Scope.WORKFLOW, Scope.GLOBAL] if persists else [None]
    return [_draw_script(random, index, scopes, faults) for index in range(count)]


def _draw_script(random: Random, index: int, scopes: Sequence[Scope | None], share: float) -> Script:
    near = range(max(0, index - 6), index)
    faulty = random.random() < share
    return Script(
        index=index,
        sources=tuple(random.sample(near, min(len(near), random.choice((0, 1, 1, 2, 2, 3, 4))))),
        persist=random.choice(scopes),
        is_async=random.random() < 0.3,
        attempts=random.randint(1, 4),
        faults=tuple(random.choice(_FAULTS) for _ in range(random.randint(1, 4))) if faulty else (),
        heals_at=random.randint(2, 4),
        own_type=random.random() < 0.5,
    )


# An abort ends everything, so it is drawn least.
_FAULTS = [*(3 * [Fault.FAIL]), *(2 * [Fault.LATE]), Fault.FATAL, Fault.WRONG, Fault.ABORT]


@functools.cache
def own_types() -> Sequence[type[Message]]:
    """Return `MOST_STEPS` message types made here, each with ``int64 cents``."""
    file = descriptor_pb2.FileDescriptorProto(
        name="docket/scripted.proto", package="docket.scripted", syntax="proto3"
    )
    number = descriptor_pb2.FieldDescriptorProto
    for index in range(MOST_STEPS):
        made = file.message_type.add(name=f"Value{index}")
        made.field.add(name="cents", number=1, type=number.TYPE_INT64, label=number.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = [f"docket.scripted.Value{index}" for index in range(MOST_STEPS)]
    return [message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names]
