"""Values that the suite stores, and what it asks of a store beside the contract."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, text

from docket_celery.store import SQLStore
from docket_celery.store.contract import Store
from docket_celery.store.identity import global_key, workflow_key
from docket_celery.store.records import Checkpoint, Lease, RunEnd, RunRequest, RunRow, RunState, StepExecution

GRAPH = "checkout"
RUN = "order-17"


class Bench:
    """A store and the levers that its tests pull."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def pass_time(self, seconds: float) -> None:
        """Let that much time pass for leases, claims and dates."""
        raise NotImplementedError

    def executions(self) -> list[tuple[str, int]]:
        """Return step name and delivery of each execution written, oldest first."""
        raise NotImplementedError

    def take(self, **changes: Any) -> Lease:
        """Acquire a run that must be free."""
        lease = self.store.acquire(request(**changes))
        assert isinstance(lease, Lease)
        return lease

    def refused(self, **changes: Any) -> RunRow:
        """Ask for a run that must not be given."""
        row = self.store.acquire(request(**changes))
        assert isinstance(row, RunRow)
        return row

    def state(self) -> RunState:
        """Return the state of the sample run."""
        row = self.store.find_run(GRAPH, RUN)
        assert row is not None
        return row.state


_TIMES = [
    ("docket_runs", "lease_until"),
    ("docket_runs", "expires_at"),
    ("docket_runs", "updated_at"),
    ("docket_runs", "wake_at"),
    ("docket_runs", "ended_at"),
    ("docket_cache", "expires_at"),
    ("docket_cache", "claimed_at"),
    ("docket_claims", "lease_until"),
    ("docket_claims", "claimed_at"),
    ("docket_chunks", "lease_until"),
]


class SQLBench(Bench):
    """A store whose rows can be looked at and changed with SQL."""

    def __init__(self, store: SQLStore) -> None:
        super().__init__(store)
        self._sql = store

    def pass_time(self, seconds: float) -> None:
        """Move what is stored into the past: the clock is the database's."""
        for table, column in _TIMES:
            self.sql(f"UPDATE {table} SET {column} = {self.earlier(column, seconds)}")  # noqa: S608 -- names from above

    def earlier(self, column: str, seconds: float) -> str:
        """Return the SQL for that many seconds before the time in *column*."""
        if self._sql.engine.dialect.name == "postgresql":
            return f"{column} - interval '{seconds} seconds'"
        return f"strftime('%Y-%m-%d %H:%M:%f', {column}, '-{seconds} seconds') || '000'"

    @property
    def engine(self) -> Engine:
        """The engine of the store."""
        return self._sql.engine

    @property
    def dialect(self) -> str:
        """SQLAlchemy's name of the database."""
        return self._sql.engine.dialect.name

    def executions(self) -> list[tuple[str, int]]:
        rows = self.sql("SELECT step_name, delivery FROM docket_executions ORDER BY id")
        return [(row[0], row[1]) for row in rows]

    def sql(self, statement: str, **values: Any) -> list[Any]:
        with self._sql.engine.connect() as connection:
            result = connection.execute(text(statement), values)
            return list(result) if result.returns_rows else []


def request(owner: str = "first", **changes: Any) -> RunRequest:
    """Return a request for the sample run."""
    values: dict[str, Any] = {
        "graph": GRAPH,
        "execution_id": RUN,
        "target": "shop.Shipment",
        "job": b"job",
        "job_digest": b"d" * 32,
        "lease_s": 30.0,
        "max_deliveries": 10,
    }
    return RunRequest(owner=owner, **(values | changes))


def output(step: str = "charge", data: bytes = b"\x08\x01", **changes: Any) -> Checkpoint:
    """Return a WORKFLOW checkpoint of the sample run."""
    values: dict[str, Any] = {
        "graph": GRAPH,
        "execution_id": RUN,
        "step_version": "2",
        "input_hash": "ab" * 32,
        "output_type": "shop.ChargeResult",
        "output_json": '{"id": "ch_1"}',
    }
    values |= changes
    key = workflow_key(values["graph"], values["execution_id"], step, values.get("item", ""))
    return Checkpoint(**({"key": key, "step_name": step, "output_data": data} | values))


def shared(name: str = "infer", data: bytes = b"\x08\x02", **changes: Any) -> Checkpoint:
    """Return a GLOBAL checkpoint."""
    values: dict[str, Any] = {
        "key": global_key(GRAPH, name, "", [("shop.Order", b"17")]),
        "graph": GRAPH,
        "execution_id": None,
        "input_hash": "cd" * 32,
        "output_type": "shop.Inference",
    }
    return Checkpoint(step_name=name, output_data=data, **(values | changes))


def execution(step: str = "charge", **changes: Any) -> StepExecution:
    """Return a step execution of the sample run."""
    values: dict[str, Any] = {
        "graph": GRAPH,
        "execution_id": RUN,
        "delivery": 1,
        "attempts": 1,
        "cached": False,
        "status": "SUCCEEDED",
        "started_at": datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC),
        "duration_ms": 1.5,
    }
    return StepExecution(step_name=step, **(values | changes))


def ending(state: RunState = RunState.SUCCEEDED, **changes: Any) -> RunEnd:
    """Return an end of the sample run, with a result if it succeeded."""
    result = b"\x0a\x01x" if state is RunState.SUCCEEDED else None
    return RunEnd(**({"state": state, "result": result} | changes))
