"""The three scenes: a graph in parallel, a killed worker process, the database's view."""

from __future__ import annotations

import os
import signal
import time

from examples.demo.claims import claim, wait_for
from examples.demo.database import Database
from examples.demo.worker import CONCURRENCY, Worker
from examples.parallel.show import show_parallel
from workers import app
from workers.orders import process_order
from workers.orders_pb2 import Order
from workers.settings import PROVIDER_LATENCY_S
from workers.users import enrich_user
from workers.users_pb2 import UserID

ROUNDS = 5


def wait_until_ready(worker: Worker) -> None:
    """Wait until the worker answers and its pool is complete."""

    def answered() -> bool | None:
        worker.check()
        return len(pool_pids()) == CONCURRENCY or None

    wait_for("the worker starts", answered)


def pool_pids() -> set[int]:
    """Return the process ids of the worker's children, as the worker itself names them."""
    answers = app.control.inspect(timeout=5.0, limit=1).stats() or {}
    return {int(pid) for stats in answers.values() for pid in stats["pool"]["processes"]}


def play_parallel() -> None:
    """(a) Three fetches overlap: in this process, then in the worker."""
    print("\n--- (a) Three services asked at once ---\n")
    user, timeline = show_parallel()
    print()
    claim("the three answers are in the result", user.profile.id == user.activity.user_id == "user-123")
    claim("three steps ran at once", timeline.most_running == 3)
    claim("together they took less time than one after another", timeline.total_s < timeline.sequential_s)

    print(f"\nThe same kind of graph as a Celery task, {ROUNDS} times: enrich_user.delay(UserID(...)).get()")
    taken_s: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        enriched = enrich_user.delay(UserID(id="user-123")).get(timeout=60)
        taken_s.append(time.perf_counter() - began)
        claim(
            f"the worker's answer came after {taken_s[-1] * 1000:.0f} ms", enriched.profile.id == "user-123"
        )
    claim(
        f"the fastest, queue and result included, beat the fetches' {3 * PROVIDER_LATENCY_S * 1000:.0f} ms",
        min(taken_s) < 3 * PROVIDER_LATENCY_S,
    )


def play_kill(worker: Worker, database: Database) -> None:
    """(b) The process that charged the card is killed before it ships; the run goes on in another one."""
    print("\n--- (b) kill -9 between charging and shipping ---\n")
    worker.gate.touch()  # the warehouse ships nothing, so the order cannot get past paying
    order = Order(order_id="17", amount_cents=1000, skus=["mug", "tea"])
    result = process_order.delay(order)
    print("process_order.delay(Order(order_id='17', amount_cents=1000, ...)); the warehouse is closed")

    def charged_by() -> int | None:
        worker.check()
        # Once the reservation is kept too, shipping is all that is left, and that waits for the warehouse.
        rows = database.rows(
            "SELECT caller_pid FROM demo_payment_ledger JOIN docket_cache ON step_name = 'reserve_inventory'"
            " AND docket_cache.execution_id = 'order-17' WHERE order_id = '17'"
        )
        return int(rows[0][0]) if rows else None

    victim = wait_for("the card is charged, the goods are reserved, and both are kept", charged_by)
    before = pool_pids()
    claim(
        f"pool process {victim} charged the card, and charge and reservation are in docket_cache",
        victim in before,
    )
    claim("the order has not shipped", not result.ready())

    os.kill(victim, signal.SIGKILL)
    killed = time.perf_counter()
    wait_for("the killed process disappears", lambda: None if _exists(victim) else True)
    worker.gate.unlink()
    print(f"kill -9 {victim}; the process is gone, the warehouse opens")

    shipment = result.get(timeout=60)
    seconds = time.perf_counter() - killed
    claim(
        f"the shipment came back {seconds:.1f} s after the kill: {shipment}".rstrip(),
        bool(shipment.tracking_number),
    )
    claim("the worker lives, and has replaced the killed process", victim not in pool_pids())
    calls, charges = database.rows(
        "SELECT count(*), count(*) FILTER (WHERE charged) FROM demo_payment_ledger WHERE order_id = '17'"
    )[0]
    claim(f"the payment provider got {calls} call and made {charges} charge", (calls, charges) == (1, 1))


def play_sql(database: Database) -> None:
    """(c) What the tables tell about the order."""
    print("\n--- (c) The same, seen with SQL ---\n")
    runs = database.show("""
        SELECT execution_id, state, epoch AS deliveries, lost, ended_at - created_at AS took
        FROM docket_runs WHERE execution_id = 'order-17';
    """)
    claim(
        "the run SUCCEEDED in delivery 2, after losing 1 worker process", runs[0][1:4] == ("SUCCEEDED", 2, 1)
    )
    print()
    steps = database.show("""
        SELECT delivery, step_name, status, attempts, cached, duration_ms, worker
        FROM docket_executions WHERE execution_id = 'order-17' ORDER BY started_at;
    """)
    told = [(row[0], row[1], row[4]) for row in steps]
    claim(
        "delivery 1 charged and reserved; delivery 2 restored both results and shipped",
        told[:2] == [(1, "charge_card", False), (1, "reserve_inventory", False)]
        and sorted(told[2:])
        == [(2, "charge_card", True), (2, "reserve_inventory", True), (2, "ship", False)],
    )
    claim("another process did that", steps[0][6] not in {row[6] for row in steps[2:]})
    print()
    kept = database.show("""
        SELECT step_name, output_json, created_at
        FROM docket_cache WHERE execution_id = 'order-17' ORDER BY created_at;
    """)
    claim(
        "what was kept can be read without our code",
        [row[0] for row in kept] == ["charge_card", "reserve_inventory", "ship"],
    )
    print()
    hits = database.show("""
        SELECT count(*) AS total_executions,
               count(CASE WHEN cached THEN 1 END) AS cache_hits,
               count(CASE WHEN cached THEN 1 END)::float / nullif(count(*), 0) * 100 AS hit_rate
        FROM docket_executions WHERE step_name = 'charge_card';
    """)
    claim("one of two executions of charge_card was answered from the table", hits == [(2, 1, 50.0)])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
