"""What a run and an item hold, by tracemalloc: exact, and the same on every machine."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from google.protobuf.wrappers_pb2 import Int64Value, UInt64Value

from benchmarks.host import Run
from docket_celery import Graph

RUNS, ITEMS = 500, 5000


class Gate:
    """Where coroutines wait together; tells when all are there."""

    def __init__(self) -> None:
        self._open, self._full, self._expected = asyncio.Event(), asyncio.Event(), 0

    async def wait(self) -> None:
        """Come here, and wait until the gate is opened."""
        self._expected -= 1
        if not self._expected:
            self._full.set()
        await self._open.wait()

    async def await_all(self, expected: int) -> None:
        """Wait until that many are here; called before any of them runs."""
        self._expected = expected
        await self._full.wait()

    def open(self) -> None:
        """Let all go on."""
        self._open.set()


async def held_kb(start: Callable[[Gate], Awaitable[object]]) -> float:
    """Return what each of `RUNS` waiting runs holds, in kilobytes."""

    async def measure(count: int) -> int:
        gate = Gate()
        before = tracemalloc.get_traced_memory()[0]
        waiting = [asyncio.ensure_future(start(gate)) for _ in range(count)]
        await gate.await_all(count)
        held = tracemalloc.get_traced_memory()[0] - before
        gate.open()
        await asyncio.gather(*waiting)
        return held

    await measure(10)
    return await measure(RUNS) / RUNS / 1000


def peak_kb(call: Callable[[list[Int64Value]], object]) -> float:
    """Return the peak of memory for each of `ITEMS` items, in kilobytes."""
    items = [Int64Value(value=number) for number in range(ITEMS)]
    call(items[:10])
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    call(items)
    return (tracemalloc.get_traced_memory()[1] - before) / ITEMS / 1000


@contextmanager
def ours(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Runs of one coroutine step, and a batch of no-op items."""
    gates: list[Gate] = []
    waits, items = Graph("waits"), Graph("items")

    async def wait(value: Int64Value) -> UInt64Value:
        await gates[-1].wait()
        return UInt64Value(value=value.value)

    def look(value: Int64Value) -> UInt64Value:
        return UInt64Value(value=value.value)

    waits.register(wait)
    items.register(look)

    def start(gate: Gate) -> Awaitable[object]:
        gates.append(gate)
        return waits.aexecute(UInt64Value, Int64Value(value=1))

    yield from figures(start, lambda given: items.execute_batch(UInt64Value, given))


@contextmanager
def by_hand(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Coroutines that wait, and a list of results."""

    async def start(gate: Gate) -> object:
        await gate.wait()
        return UInt64Value()

    yield from figures(start, lambda given: [UInt64Value(value=each.value) for each in given])


def figures(
    start: Callable[[Gate], Awaitable[object]], batch: Callable[[list[Int64Value]], object]
) -> Generator[Mapping[str, Run]]:
    """Yield both figures of a way."""
    tracemalloc.start()
    with asyncio.Runner() as loop:
        yield {
            "run": lambda _count: loop.run(held_kb(start)),
            "item": lambda _count: peak_kb(batch),
        }
