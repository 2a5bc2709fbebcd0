"""Children are killed at random moments while a batch is spread over them; no item is lost, doubled or misplaced."""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import redis
from celery import Celery

from docket_celery.task.result import GraphResult
from tests.conftest import StartWorker
from tests.infra.workers import WorkerProcess
from tests.integration.apps.billing import Receiver, app, ship_all
from tests.integration.apps.book import Book
from tests.integration.apps.serving import unique
from tests.unit.protos.shop_pb2 import Order, Shipment

BATCHES = int(os.environ.get("KILL_BATCHES", "2"))
ITEMS = 2000
KILLS = 20
CHILDREN = 4
WITHIN_S = 180.0
"""For one batch: far longer than one takes, lost joins that the sweep finds after a lease included."""
BETWEEN_S, BETWEEN = 0.4, 300
"""So long after the first stage, and again after the aggregate began, counts as so many items each; hardly a kill
would fall between the stages otherwise."""
WHOLE = 2 * ITEMS + 2 * BETWEEN
LAST = 100
"""So many items before the end no kill of the twenty falls, as the batch could end before it; one more aims there."""
ENV = {
    "DOCKET_CELERY_LEASE_SECONDS": "10",
    "DOCKET_CELERY_MAX_DELIVERIES": "1000",
    # Items of a chunk one after the other for the most part: a child spends its time in steps.
    "DOCKET_CELERY_THREADS": "2",
}

pytestmark = [
    pytest.mark.integration,
    pytest.mark.faults,
    pytest.mark.timeout(120 + int((WITHIN_S + 20) * BATCHES)),
]


@pytest.fixture
def book(connect_app: Callable[[Celery], Celery], database_url: str) -> Book:
    """The tables; the app is connected to the test's servers."""
    connect_app(app)
    return Book(database_url)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one batch took.

    Attributes:
        kills: Children killed before the result was there.
        billing: How many of them had the aggregate.
        ending: Whether the kill aimed at the last join came in time.
        calls: Calls of the receiver by step.
        overlaps: Effects that were asked for more than once, by step.
        revived: How often the sweep found that nobody advanced the batch, as retries had not brought it on within
            a lease.
        seconds: From the submission to the result.
    """

    kills: int
    billing: int
    ending: bool
    calls: dict[str, int]
    overlaps: dict[str, int]
    revived: int
    seconds: float


class Assault:
    """The kills during one batch, at random marks of its progress.

    Args:
        worker: Whose children die.
        receiver: Tells the progress.
        result: Of the batch.
        chosen: Draws moments and victims.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        receiver: Receiver,
        result: GraphResult[Any],
        run: str,
        chosen: random.Random,
    ) -> None:
        self.kills, self.billing = 0, 0
        self._worker, self._receiver, self._result = worker, receiver, result
        self._run, self._random = run, chosen
        self._charged_at: float | None = None
        self._billed_at: float | None = None
        self._deadline = time.monotonic() + WITHIN_S

    def go_on(self) -> bool:
        """Kill children until the twentieth is dead, and perhaps one at the end; tell whether that came in time."""
        marks = sorted(self._random.uniform(1, WHOLE - LAST) for _ in range(KILLS))
        for mark in marks:
            self._await(mark)
            self._kill()
        self._await(WHOLE)
        time.sleep(self._random.uniform(0.0, 0.15))  # the moment itself is what is being tested
        before = self.kills
        self._kill()
        return self.kills > before

    def _await(self, mark: float) -> None:
        while self._progress() < mark and not self._result.ready():
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"the batch stands at {self._progress():g} of {WHOLE}")
            time.sleep(0.005)

    def _progress(self) -> float:
        """Return how far the batch is, in items."""
        shipped = self._receiver.effects(self._run, "ship")
        if shipped:
            return ITEMS + 2 * BETWEEN + shipped
        charged = self._receiver.effects(self._run, "charge")
        if charged < ITEMS:
            return charged
        now = time.monotonic()
        self._charged_at = now if self._charged_at is None else self._charged_at
        if self._receiver.biller(self._run) is None:
            return ITEMS + min(1.0, (now - self._charged_at) / BETWEEN_S) * BETWEEN
        self._billed_at = now if self._billed_at is None else self._billed_at
        return ITEMS + BETWEEN + min(1.0, (now - self._billed_at) / BETWEEN_S) * BETWEEN

    def _kill(self) -> None:
        """Kill a child: between the stages preferably the one that bills."""
        children = {child.pid: child for child in self._worker.children()}
        while not children:
            assert time.monotonic() < self._deadline, "the worker has no children any more"
            children = {child.pid: child for child in self._worker.children()}
        between = self._charged_at is not None and not self._receiver.effects(self._run, "ship")
        biller = self._receiver.biller(self._run) if between else None
        victim = children.get(biller or 0) or children[self._random.choice(sorted(children))]
        try:
            victim.suspend()  # so that what is true now is still true when the signal arrives
            if self._result.ready():
                victim.resume()
                return
            victim.kill()
        except psutil.NoSuchProcess:
            self._kill()
        else:
            self.kills += 1
            self.billing += victim.pid == biller


def repeat(book: Book, run: str, worker: WorkerProcess, receiver: Receiver, chosen: random.Random) -> Figures:
    """Run one batch under fire and check every promise about it."""
    began = time.monotonic()
    orders = [Order(order_id=str(index), amount_cents=index) for index in range(ITEMS)]
    result = ship_all.apply_async((orders,), execution_id=run)
    assault = Assault(worker, receiver, result, run, chosen)
    ending = assault.go_on()
    found = result.get(timeout=max(1.0, WITHIN_S - (time.monotonic() - began)))
    seconds = time.monotonic() - began
    check_values(found)
    check_rows(book, run)
    calls = {step: receiver.calls(run, step) for step in ("charge", "bill", "ship")}
    check_effects(calls)
    assert assault.kills - ending == KILLS, "not all kills came in time; pace them"
    return Figures(
        kills=assault.kills,
        billing=assault.billing,
        ending=ending,
        calls={step: sum(counts.values()) for step, counts in calls.items()},
        overlaps={step: sum(count > 1 for count in counts.values()) for step, counts in calls.items()},
        revived=worker.read_log().count(f"run {run!r} of graph 'billing' is not advanced by any worker"),
        seconds=seconds,
    )


def check_values(found: Sequence[Shipment]) -> None:
    """Check that each item's result is right, in its place, and made with the right bill."""
    total = sum(2 * index for index in range(ITEMS))
    assert [each.tracking_id for each in found] == [f"{i} {2 * i} of {total}" for i in range(ITEMS)]


def check_rows(book: Book, run: str) -> None:
    """Check that everything is saved once and nothing is left to do."""
    saved = book.rows(
        "SELECT step_name, count(*), count(DISTINCT cache_key), count(DISTINCT item),"
        " min(item_index), max(item_index) FROM docket_cache"
        " WHERE execution_id = %s AND step_name IN ('charge', 'bill', 'ship') GROUP BY 1 ORDER BY 1",
        run,
    )
    assert saved == [
        ("bill", 1, 1, 1, None, None),
        ("charge", ITEMS, ITEMS, ITEMS, 0, ITEMS - 1),
        ("ship", ITEMS, ITEMS, ITEMS, 0, ITEMS - 1),
    ]
    # An execution is written with its checkpoint, in one statement: so often was one committed.
    committed = book.rows(
        "SELECT step_name, count(*), count(DISTINCT item) FROM docket_executions"
        " WHERE execution_id = %s AND NOT cached AND status = 'SUCCEEDED' GROUP BY 1 ORDER BY 1",
        run,
    )
    assert committed == [("bill", 1, 1), ("charge", ITEMS, ITEMS), ("ship", ITEMS, ITEMS)]
    assert book.rows("SELECT state FROM docket_runs WHERE execution_id = %s", run) == [("SUCCEEDED",)]
    chunks = book.rows(
        "SELECT stage, state, sum(hi - lo)::bigint FROM docket_chunks WHERE execution_id = %s GROUP BY 1, 2"
        " ORDER BY 1",
        run,
    )
    assert chunks == [(1, "SUCCEEDED", ITEMS), (3, "SUCCEEDED", ITEMS)]


def check_effects(calls: dict[str, dict[tuple[str, str], int]]) -> None:
    """Check that each item asked for one effect, however often it asked, and the aggregate too."""
    items = Counter(str(index) for index in range(ITEMS))
    asked = {step: Counter(item for item, _ in counts) for step, counts in calls.items()}
    assert asked == {"charge": items, "bill": Counter([""]), "ship": items}
    keys = [key for counts in calls.values() for _, key in counts]
    assert len(set(keys)) == 2 * ITEMS + 1


def explain(book: Book, run: str, worker: WorkerProcess, urls: tuple[str, str]) -> str:
    """Return how everything stands: rows, what Redis holds of joins and queues, and the worker's last words."""
    lines = [
        f"run {row}"
        for row in book.rows(
            "SELECT execution_id, state, stage, epoch, lost, failures, retries, owner, task_id,"
            " EXTRACT(EPOCH FROM lease_until - clock_timestamp()), EXTRACT(EPOCH FROM wake_at - clock_timestamp()),"
            " error FROM docket_runs WHERE execution_id = %s",
            run,
        )
    ]
    lines += [
        f"{count} chunks of stage {stage}: {state}"
        for stage, state, count in book.rows(
            "SELECT stage, state, count(*) FROM docket_chunks WHERE execution_id = %s GROUP BY 1, 2 ORDER BY 1, 2",
            run,
        )
    ]
    lines += [
        f"chunk {row}"
        for row in book.rows(
            "SELECT stage, lo, hi, state, epoch, lost, retries, owner, task_id,"
            " EXTRACT(EPOCH FROM lease_until - clock_timestamp()), errors FROM docket_chunks"
            " WHERE execution_id = %s AND state <> 'SUCCEEDED' ORDER BY stage, lo LIMIT 20",
            run,
        )
    ]
    for url in urls:
        with redis.Redis.from_url(url, decode_responses=True) as client:
            lines += [f"redis {line}" for line in _redis_state(client)]
    lines += [
        f"children {[child.pid for child in worker.children()]}",
        *worker.read_log().splitlines()[-120:],
    ]
    return "\n".join(lines)


def _redis_state(client: Any) -> list[str]:
    lines: list[str] = []
    reads: dict[str, Callable[[str], object]] = {
        "string": client.get,
        "list": client.llen,
        "set": client.scard,
        "zset": client.zcard,
        "hash": client.hlen,
    }
    for key in sorted(client.scan_iter(count=1000)):
        kind = client.type(key)
        if "task-meta" not in key:
            lines.append(f"{key} ({kind}, expires in {client.ttl(key)} s): {reads[kind](key)!r:.200}")
    return lines


def test_twenty_kills_during_a_batch_lose_and_repeat_nothing(
    start_worker: StartWorker, book: Book, broker_url: str, result_url: str
) -> None:
    """Again and again: results in order, each item and the aggregate saved once, each keyed effect once."""
    seed = int(os.environ.get("DOCKET_TEST_SEED", random.SystemRandom().randrange(10**6)))
    sys.stdout.write(f"seed {seed}, {BATCHES} batches\n")
    chosen, figures = random.Random(seed), list[Figures]()
    worker = start_worker("prefork", CHILDREN, app=app.main or "", env=ENV)
    for number in range(BATCHES):
        run = unique("batch")
        try:
            figures.append(repeat(book, run, worker, Receiver(result_url), chosen))
        except BaseException as error:
            told = explain(book, run, worker, (broker_url, result_url))
            error.add_note(f"batch {number + 1} of {BATCHES}, seed {seed}\n{told}")
            raise
        sys.stdout.write(f"{figures[-1]}\n")
    seconds = sorted(each.seconds for each in figures)
    summary = {
        "seed": seed,
        "repetitions": len(figures),
        "items": ITEMS * len(figures),
        "kills": sum(each.kills for each in figures),
        "kills_while_billing": sum(each.billing for each in figures),
        "kills_at_the_end": sum(each.ending for each in figures),
        "calls": dict(sum((Counter(each.calls) for each in figures), Counter[str]())),
        "overlaps": dict(sum((Counter(each.overlaps) for each in figures), Counter[str]())),
        "revived": sum(each.revived for each in figures),
        "p50_s": round(statistics.median(seconds), 2),
        "max_s": round(seconds[-1], 2),
        "load": round(os.getloadavg()[0], 1),
    }
    sys.stdout.write(f"{summary}\n")
