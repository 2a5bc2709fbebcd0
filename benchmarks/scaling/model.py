"""A model of runs on nodes with one Postgres and a broker: events in simulated time, from a seed, in plain Python.

A run is a generator. It yields seconds to wait, or a `Server` or the `Log`, which resumes it when it is its turn.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from benchmarks.scaling import loads
from benchmarks.scaling.loads import Demand, Site

CONNECTIONS = 8
"""Of a process to Postgres."""
_WARM_UP = 0.25
"""Share of the jobs that are not looked at: the queues fill meanwhile."""


class Joined(Protocol):
    """What a run can wait for."""

    def join(self, process: Process) -> None:
        """Resume *process* when it is its turn."""
        ...


Process = Generator["float | Joined", "Child | None", None]


class Clock:
    """Simulated time, and what happens next in it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = 0
        self._due: list[tuple[float, int, Process, Child | None]] = []

    def resume(self, process: Process, *, after_s: float = 0.0, with_: Child | None = None) -> None:
        """Let *process* continue later."""
        self._order += 1
        heapq.heappush(self._due, (self.now + after_s, self._order, process, with_))

    def run(self) -> None:
        """Do all that is due, until nothing is."""
        while self._due:
            self.now, _, process, sent = heapq.heappop(self._due)
            try:
                wanted = process.send(sent)
            except StopIteration:
                continue
            if isinstance(wanted, (int, float)):
                self.resume(process, after_s=wanted)
            else:
                wanted.join(process)


class Server:
    """A number of equal servers with one queue, first come, first served.

    Attributes:
        servers: How many.
        worked_s: Seconds that they have worked, added up; a server that waits for another one does not work.
    """

    def __init__(self, clock: Clock, servers: int) -> None:
        self.servers = servers
        self.worked_s = 0.0
        self._clock, self._busy = clock, 0
        self._waiting: deque[Process] = deque()

    def join(self, process: Process) -> None:
        """Give *process* a server, now or when one is free; it calls `leave`."""
        if self._busy < self.servers:
            self._busy += 1
            self._clock.resume(process)
        else:
            self._waiting.append(process)

    def leave(self, worked_s: float = 0.0) -> None:
        """Give the server to the next one."""
        self.worked_s += worked_s
        if self._waiting:
            self._clock.resume(self._waiting.popleft())
        else:
            self._busy -= 1


class Log:
    """Postgres's log: one flush at a time, which carries all commits that have come before it began.

    Attributes:
        bytes_s: Seconds in which bytes were written. A flush itself carries any number of commits: it is no limit.
        flushes: Flushes so far.
    """

    def __init__(self, clock: Clock, flush_s: float, rate: float) -> None:
        self.bytes_s = 0.0
        self.flushes = 0
        self._clock, self._flush_s, self._rate = clock, flush_s, rate
        self._waiting: list[Process] = []
        self._bytes = 0.0
        self._flushing = False

    def write(self, size: float) -> None:
        """Add to what the next flush carries; its run joins right after that."""
        self._bytes += size

    def join(self, process: Process) -> None:
        """Resume *process* when its commit is on disk."""
        self._waiting.append(process)
        if not self._flushing:
            self._flushing = True
            self._clock.resume(self._flush())

    def _flush(self) -> Process:
        while self._waiting:
            carried, self._waiting = self._waiting, []
            writes_s, self._bytes = self._bytes / self._rate, 0.0
            self.flushes += 1
            self.bytes_s += writes_s
            yield self._flush_s + writes_s
            for process in carried:
                self._clock.resume(process)
        self._flushing = False


@dataclass(slots=True)
class Node:
    """The parent process of a worker, and the cores of its machine."""

    parent: Server
    cores: Server


@dataclass(slots=True)
class Child:
    """What works on one run at a time; *python* is what a process has one of, *connections* are the process's."""

    node: Node
    python: Server
    connections: Server


class Children:
    """The free children of all nodes: Celery gives the oldest job to a node that has one."""

    def __init__(self, clock: Clock, children: list[Child]) -> None:
        self.busy_s = 0.0
        self._clock, self._free, self._since = clock, deque(children), 0.0
        self._all = len(children)
        self._waiting: deque[Process] = deque()

    def join(self, process: Process) -> None:
        """Resume *process* with a free child."""
        self._count()
        if self._free:
            self._clock.resume(process, with_=self._free.popleft())
        else:
            self._waiting.append(process)

    def give_back(self, child: Child) -> None:
        """Give *child* to the next one."""
        self._count()
        if self._waiting:
            self._clock.resume(self._waiting.popleft(), with_=child)
        else:
            self._free.append(child)

    def used_s(self) -> float:
        """Return `busy_s` until now."""
        self._count()
        return self.busy_s

    def _count(self) -> None:
        self.busy_s += (self._all - len(self._free)) * (self._clock.now - self._since)
        self._since = self._clock.now


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came out.

    Attributes:
        jobs: Jobs that went in.
        done: Jobs that came out.
        took_s: Seconds until the last of them came out.
        rate: Runs a second after the warm-up and before the last job was sent: what drains then has it easier.
        p50_s: Median seconds from sending to the result.
        p99_s: The 99th percentile of them.
        used: Of each resource, the share of its time in use.
        flushes: Flushes of the log.
    """

    jobs: int
    done: int
    took_s: float
    rate: float
    p50_s: float
    p99_s: float
    used: dict[str, float]
    flushes: int

    @property
    def wall(self) -> str:
        """The resource that was used most."""
        return max(self.used, key=self.used.__getitem__)


def _rate(ended: list[tuple[float, float]], before: int) -> float:
    """Return runs a second from the end of job *before* to the last sending; over all if there is no such time."""
    last_sent = max(sent for sent, _ in ended)
    since = ended[before - 1][1] if before else 0.0
    counted = sum(since < end <= last_sent for _, end in ended)
    return counted / (last_sent - since) if counted else len(ended) / ended[-1][1]


def _children(clock: Clock, site: Site, shared: Server | None) -> list[Child]:
    """Return all children, one of each node after the other: no node is full before the others have work."""
    made: list[list[Child]] = []
    for _ in range(site.nodes):
        node = Node(Server(clock, 1), shared or Server(clock, site.cores))
        if site.threads:
            made.append([Child(node, node.parent, Server(clock, CONNECTIONS))] * site.children)
        else:
            made.append(
                [Child(node, Server(clock, 1), Server(clock, CONNECTIONS)) for _ in range(site.children)]
            )
    return [child for round_ in zip(*made, strict=True) for child in round_]


class Model:
    """A site at work on jobs of one kind; for one call of `offer` or `burst`.

    Args:
        asked: What a run uses.
        site: What there is.
    """

    def __init__(self, asked: Demand, site: Site) -> None:
        self._asked, self._site = asked, site
        self._clock = clock = Clock()
        shared = None if site.shared_cores is None else Server(clock, site.shared_cores)
        self._client, self._client_cores = Server(clock, 1), shared or Server(clock, 1)
        self._broker, self._broker_cores = Server(clock, site.brokers), shared or Server(clock, site.brokers)
        self._postgres = shared or Server(clock, site.postgres_cores)
        self._log = Log(clock, site.flush_s, site.flush_bytes_s)
        children = _children(clock, site, shared)
        self._nodes = {id(child.node): child.node for child in children}.values()
        self._children = Children(clock, children)
        self._times: list[tuple[float, float]] = []

    def offer(self, rate: float, jobs: int, seed: int = 1) -> Outcome:
        """Send *jobs* at random moments, *rate* of them a second; senders cost the site nothing."""
        chance, moment = random.Random(seed), 0.0
        for _ in range(jobs):
            moment += chance.expovariate(rate)
            self._clock.resume(self._run(), after_s=moment)
        return self._outcome(jobs)

    def saturate(self, jobs: int) -> Outcome:
        """Have jobs wait at any time: twice as many are under way as there are children, until *jobs* were sent."""
        together = min(jobs, 2 * self._site.nodes * self._site.children)
        left = iter(range(jobs - together))

        def sender() -> Process:
            yield from self._run()
            for _ in left:
                yield from self._run()

        for _ in range(together):
            self._clock.resume(sender())
        return self._outcome(jobs)

    def burst(self, jobs: int) -> Outcome:
        """Send *jobs* at once, one after the other, as one process does; it reads all results."""
        for _ in range(jobs):
            self._clock.resume(self._run(sent_here=True))
        return self._outcome(jobs)

    def _outcome(self, jobs: int) -> Outcome:
        self._clock.run()
        ended = sorted(self._times, key=lambda each: each[1])
        before = int(len(ended) * _WARM_UP)
        waits = sorted(end - sent for sent, end in ended[before:])
        return Outcome(
            jobs=jobs,
            done=len(ended),
            took_s=self._clock.now,
            rate=_rate(ended, before),
            p50_s=waits[len(waits) // 2],
            p99_s=waits[int(len(waits) * 0.99)],
            used=self._used(),
            flushes=self._log.flushes,
        )

    def _used(self) -> dict[str, float]:
        """Return the shares of all the time until the last job ended."""
        site, whole_s = self._site, self._clock.now
        cores = {id(node.cores): node.cores for node in self._nodes}.values()
        return {
            loads.CHILDREN: self._children.used_s() / (site.nodes * site.children) / whole_s,
            loads.PARENTS: sum(node.parent.worked_s for node in self._nodes) / site.nodes / whole_s,
            loads.NODE_CORES: sum(each.worked_s / each.servers for each in cores) / len(cores) / whole_s,
            loads.POSTGRES_CORES: self._postgres.worked_s / self._postgres.servers / whole_s,
            loads.POSTGRES_LOG: self._log.bytes_s / whole_s,
            loads.BROKER: self._broker.worked_s / site.brokers / whole_s,
        }

    def _run(self, *, sent_here: bool = False) -> Process:
        """One job, from being sent to its result."""
        asked, broker_s = self._asked, self._asked.broker_s / 3
        if sent_here:
            yield from self._compute(self._client, self._client_cores, asked.client_s / 2)
        sent = self._clock.now
        yield from self._compute(self._broker, self._broker_cores, broker_s)
        child = yield self._children
        assert child is not None
        node = child.node
        yield from self._compute(self._broker, self._broker_cores, broker_s)
        yield from self._compute(node.parent, node.cores, asked.parent_s / 2)
        yield from self._work(child)
        yield from self._compute(self._broker, self._broker_cores, broker_s)
        yield from self._compute(node.parent, node.cores, asked.parent_s / 2)
        self._children.give_back(child)
        if sent_here:
            yield from self._compute(self._client, self._client_cores, asked.client_s / 2)
        self._times.append((sent, self._clock.now))

    def _work(self, child: Child) -> Process:
        """What the child does: its CPU in equal parts around the statements, its steps between them."""
        asked = self._asked
        part_s = asked.child_s / (asked.statements + 1)
        waits_s = asked.step_s / max(1, asked.statements)
        yield from self._compute(child.python, child.node.cores, part_s)
        for _ in range(asked.statements):
            yield from self._statement(child)
            yield waits_s
            yield from self._compute(child.python, child.node.cores, part_s)
        if not asked.statements:
            yield waits_s

    def _statement(self, child: Child) -> Process:
        """A round trip whose transaction commits."""
        yield child.connections
        yield self._site.round_trip_s
        yield self._postgres
        works_s = self._asked.postgres_s / self._asked.statements / self._site.speed
        yield works_s
        self._postgres.leave(works_s)
        self._log.write(self._asked.wal_bytes / self._asked.statements)
        yield self._log
        child.connections.leave()

    def _compute(self, one: Server, cores: Server, seconds: float) -> Process:
        """Use what there is one of (a process's Python, a broker's thread) and one of the cores."""
        yield one
        yield cores
        works_s = seconds / self._site.speed
        yield works_s
        cores.leave(works_s)
        one.leave(works_s)
