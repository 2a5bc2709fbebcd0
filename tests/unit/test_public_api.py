from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
from celery import Celery

import docket_celery
from docket_celery import DocketError, StepFailed, StepTimedOut, WrongResult
from docket_celery.errors import from_record, to_record

SURFACE = """
AbortError BatchFailed BatchResult CacheMismatch Codec CodecFailed CorruptCheckpoint DecodeFailed DocketError
ExponentialBackoff FixedBackoff Graph GraphChanged GraphError GraphResult GraphTask IncompatibleCelery InputMutated
InputsChanged InvalidArguments InvalidDeclaration InvalidSettings LeaseLost MemoryStore Named PayloadTooLarge
PayloadUnavailable Plan Progress RetryPolicy RunCancelled RunConflict RunHandle RunNotFound RunQuarantined
RunState RunTimedOut SQLStore SchemaMismatch Scope ServersUnavailable StartedRun StepContext StepFailed StepOptions
StepTimedOut StoreMissing StoreRefused StoreUnavailable StoredResult TooManyAbandoned UnknownMessageType WrongResult
configure current_context graph_task settings shared_graph_task
""".split()  # noqa: SIM905 -- a page of names reads better than a column

# One of each class, with values that JSON must carry.
ERRORS: list[DocketError] = [
    docket_celery.AbortError("out of stock", "ValueError: none left"),
    docket_celery.AbortError("out of stock"),
    docket_celery.CacheMismatch("shop", "charge", "rates", "shop.Rate", "shop.Charge"),
    docket_celery.CacheMismatch("shop", "charge", None, "shop.Rate", "shop.Charge"),
    docket_celery.CodecFailed("the job of run 'order-1'", "decode of Keys raised KeyError"),
    docket_celery.CorruptCheckpoint("docket_cache", "ab12", "checksum differs"),
    docket_celery.DecodeFailed("shop.Order", "truncated"),
    docket_celery.DocketError("plain", 1),
    docket_celery.GraphChanged("shop", "order-1", ["charge", "ship"]),
    docket_celery.GraphError("shop", ["DC110 one", "DC111 two"]),
    docket_celery.IncompatibleCelery(
        "6.0", "celery.backends.base.Backend.always_retry", "results would be lost"
    ),
    docket_celery.InputMutated("ship", 1, ["shop.Order"], ["reserve: no"]),
    docket_celery.InputsChanged("order-1", "ship"),
    docket_celery.InvalidArguments("shop.pay(order: Order)", "missing"),
    docket_celery.InvalidDeclaration("shop.pay", "no types"),
    docket_celery.InvalidSettings("docket_threads", "must be a number"),
    docket_celery.LeaseLost("shop", "order-1", 3),
    docket_celery.PayloadTooLarge("shop.Order", 2000, 1000),
    docket_celery.PayloadTooLarge("shop.Order", 2000, 1000, "docket_max_stored_bytes"),
    docket_celery.PayloadUnavailable("the job of run 'order-1'", "its row is gone"),
    docket_celery.RunCancelled("order-1", "by ann"),
    docket_celery.RunConflict("shop", "order-1", "job"),
    docket_celery.RunNotFound("shop", "order-1"),
    docket_celery.RunQuarantined("shop", "order-1", 10),
    docket_celery.RunTimedOut("order-1", 2.5),
    docket_celery.SchemaMismatch(None, 1),
    docket_celery.SchemaMismatch(7, 1),
    docket_celery.ServersUnavailable("Postgres", "no binaries"),
    StepFailed("ship", 3, True, ["app.BusyError", "builtins.Exception"], "busy ✓", ["reserve: no"]),
    StepTimedOut("ship", 2, 1.5, True, ["reserve: no"]),
    docket_celery.BatchFailed(3, 100, 2, ["[DC201] step 'charge' of item 7 failed"]),
    docket_celery.StoreMissing("shop", "charge"),
    docket_celery.StoreRefused("the database", "permission denied"),
    docket_celery.StoreUnavailable("save", "connection refused"),
    docket_celery.TooManyAbandoned(9, 8, ["ship"]),
    docket_celery.UnknownMessageType("shop.Order"),
    WrongResult("ship", 1, "shop.Shipment", "None", []),
]

IDS = [f"{type(error).__name__}-{number}" for number, error in enumerate(ERRORS)]


def classes() -> set[type[DocketError]]:
    """Return the public error classes."""
    named = (getattr(docket_celery, name) for name in docket_celery.__all__)
    return {found for found in named if inspect.isclass(found) and issubclass(found, DocketError)}


def fields(error: DocketError) -> dict[str, Any]:
    """Return what an error tells beside its text."""
    return {key: value for key, value in vars(error).items() if not key.startswith("_")}


def assert_same(found: Any, error: DocketError) -> None:
    """Compare type, fields and text."""
    assert type(found) is type(error)
    assert fields(found) == fields(error)
    assert str(found) == str(error)


def test_the_surface_is_what_was_agreed() -> None:
    """Adding or removing a public name is a decision, made here."""
    assert sorted(docket_celery.__all__) == SURFACE
    for name in docket_celery.__all__:
        assert getattr(docket_celery, name) is not None
        assert name in dir(docket_celery)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The lazy imports answer like any module."""
    with pytest.raises(AttributeError, match="no attribute 'GraphTsk'"):
        _ = docket_celery.GraphTsk


def test_importing_it_loads_neither_celery_nor_sqlalchemy() -> None:
    """A script that runs a graph in process pays for what it uses; a graph without a store likewise."""
    code = """
import sys, docket_celery
from docket_celery import Graph, RetryPolicy
heavy = ("celery", "kombu", "sqlalchemy", "psycopg", "redis")
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & set(heavy), loaded & set(heavy)
from tests.unit.protos.shop_pb2 import Order, Shipment
graph = Graph("lean")
@graph.step
def ship(order: Order) -> Shipment:
    return Shipment(tracking_id=order.order_id)
assert graph.execute(Shipment, Order(order_id="7")).tracking_id == "7"
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & set(heavy), loaded & set(heavy)
from docket_celery import graph_task, configure, settings
loaded = {name.partition(".")[0] for name in sys.modules}
assert "celery" in loaded and not loaded & {"sqlalchemy", "psycopg"}, loaded
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_error_class_is_tried() -> None:
    """A class that is added must show that it survives transport."""
    assert {type(error) for error in ERRORS} == classes()


@pytest.mark.parametrize("error", ERRORS, ids=IDS)
def test_an_error_survives_celerys_result_backend(error: DocketError) -> None:
    """Type, fields and text come back from a real backend's JSON."""
    app = Celery("errors", backend="cache+memory://", set_as_current=False)
    backend: Any = app.backend
    backend.mark_as_failure("task-1", error)
    meta = backend.get_task_meta("task-1")
    assert meta["status"] == "FAILURE"
    assert_same(meta["result"], error)
    with pytest.raises(type(error)) as caught:
        app.AsyncResult("task-1").get(timeout=1)
    assert_same(caught.value, error)


@pytest.mark.parametrize("error", ERRORS, ids=IDS)
def test_an_error_survives_pickle_and_the_runs_row(error: DocketError) -> None:
    """A prefork child sends it to its parent; the row keeps it as JSON."""
    assert_same(pickle.loads(pickle.dumps(error)), error)  # noqa: S301 -- our own bytes
    assert_same(from_record(json.loads(json.dumps(to_record(error)))), error)


def test_a_cause_is_matched_after_transport() -> None:
    """caused_by knows the class by its importable name, bases included."""
    error = StepFailed.from_cause("ship", 1, True, BrokenPipeError("gone"))
    found = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    assert found.caused_by(OSError)
    assert found.caused_by(BrokenPipeError)
    assert not found.caused_by(ValueError)


def test_every_error_text_begins_with_its_code() -> None:
    """Codes are stable and no two classes share one."""
    codes = {kind.code for kind in classes()}
    assert len(codes) == len(classes())
    for error in ERRORS:
        assert str(error).startswith(f"[{error.code}] ")
