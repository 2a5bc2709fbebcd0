from __future__ import annotations

import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state

from docket_celery import (
    Graph,
    InvalidSettings,
    MemoryStore,
    Scope,
    SQLStore,
    StoreMissing,
    graph_task,
    settings,
)
from docket_celery.engine.process.state import Process, process
from docket_celery.task import app_settings, checks, envelope
from tests.unit.protos.shop_pb2 import Charge, Order, Shipment

THREADS = "DOCKET_CELERY_THREADS"


@pytest.fixture(autouse=True)
def _own_values() -> Generator[None]:
    """Hide the tasks of other tests' apps, which Celery shares, and take back what a test set for the process."""
    state: Any = _state
    limits, shared = set(envelope.types.limits), set(state._on_app_finalizers)
    state._on_app_finalizers.intersection_update(
        {one for one in shared if one.__module__ == "celery.app.builtins"}
    )
    yield
    state._on_app_finalizers.clear()
    state._on_app_finalizers.update(shared)
    settings(**dict.fromkeys(app_settings._KEYS))
    envelope.types.limits = limits
    process.close_stores()


def make_app(**conf: Any) -> Celery:
    """Return an app of its own with these settings."""
    app = Celery("lifecycle", set_as_current=False)
    app.conf.update(conf)
    return app


def declare(app: Celery, graph: Graph, persist: Scope | None = Scope.WORKFLOW, **options: Any) -> Any:
    """Declare a task whose step persists."""

    @graph.step(persist=persist)
    def ship(order: Order) -> Shipment:
        return Shipment(tracking_id=order.order_id)

    @graph_task(app, graph, name="lifecycle.ship", shared=False, **options)
    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    app.finalize()
    return app.tasks["lifecycle.ship"]


class Namespaced:
    """As Django projects write settings."""

    CELERY_DOCKET_THREADS = 5


class UpperCase:
    """Without a namespace."""

    DOCKET_THREADS = 6


class LowerCase:
    """As Celery writes settings."""

    docket_threads = 7


@pytest.mark.parametrize(
    ("source", "namespace", "threads"),
    [(Namespaced, "CELERY", 5), (UpperCase, None, 6), (LowerCase, None, 7)],
)
def test_settings_are_found_in_a_configuration_object(
    source: type, namespace: str | None, threads: int
) -> None:
    """Under a namespace, in upper case, and in lower case."""
    app = Celery("lifecycle", set_as_current=False)
    app.config_from_object(source, namespace=namespace)
    assert app_settings.check_settings(app).threads == threads


@pytest.mark.parametrize("namespace", ["CELERY", None])
def test_an_unknown_setting_is_refused_with_the_nearest(namespace: str | None) -> None:
    """A misspelt key would be silently without effect."""
    wrong: Any = type("Wrong", (), {"CELERY_DOCKET_TREADS" if namespace else "docket_treads": 3})
    app = Celery("lifecycle", set_as_current=False)
    app.config_from_object(wrong, namespace=namespace)
    with pytest.raises(InvalidSettings, match="docket_treads: unknown setting; did you mean docket_threads"):
        app_settings.check_settings(app)
    assert checks.find_faults(app) == [
        "[DC102] setting docket_treads: unknown setting; did you mean docket_threads?"
    ]


def test_an_unknown_variable_is_refused_where_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's start, ``celery docket check`` and a plain call; the call looks once for each process."""
    monkeypatch.setenv("DOCKET_CELERY_TREADS", "3")
    app = make_app()
    said = "setting DOCKET_CELERY_TREADS: unknown setting; did you mean DOCKET_CELERY_THREADS?"
    assert checks.find_faults(app) == [f"[DC102] {said}"]
    fresh = Process()
    for _ in range(2):
        with pytest.raises(InvalidSettings, match="did you mean DOCKET_CELERY_THREADS"):
            fresh.settings()
    monkeypatch.delenv("DOCKET_CELERY_TREADS")
    fresh.settings()
    monkeypatch.setenv("DOCKET_CELERY_TREADS", "3")
    fresh.settings()


def test_the_app_wins_over_the_environment_and_the_process_over_the_app(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """settings() is the last word."""
    monkeypatch.setenv(THREADS, "2")
    assert app_settings.app_settings(make_app()).threads == 2
    app = make_app(docket_threads=3)
    assert app_settings.app_settings(app).threads == 3
    assert settings(threads=4).threads == 4
    assert app_settings.app_settings(app).threads == 4
    settings(threads=None)
    assert app_settings.app_settings(app).threads == 3


def test_settings_of_the_process_are_checked_before_they_hold() -> None:
    """Nothing changes when one of them is wrong; either spelling of a key does."""
    settings(docket_threads=3)
    with pytest.raises(InvalidSettings, match="docket_lease_seconds"):
        settings(threads=9, lease_seconds=0)
    with pytest.raises(InvalidSettings, match="did you mean docket_threads"):
        settings(thread=9)
    assert settings().threads == 3


def test_the_decoder_takes_what_the_most_generous_app_takes() -> None:
    """It is called without an app: reading another app's settings must not refuse this one's messages."""
    most = 2 * max(envelope.types.limits)
    apps = [make_app(docket_max_message_bytes=limit) for limit in (4321, most, 8642)]
    for app in apps:
        app_settings.app_settings(app)
    assert max(envelope.types.limits) == most
    apps[1].conf.docket_max_message_bytes = 2 * most
    app_settings.app_settings(apps[1])
    assert max(envelope.types.limits) == 2 * most


def test_a_task_without_a_store_is_a_fault_and_a_typed_error() -> None:
    """Before a worker starts, and where somebody runs it all the same."""
    app = make_app()
    task = declare(app, Graph("without"))
    (fault,) = checks.find_faults(app)
    assert fault.startswith("task lifecycle.ship: [DC400]")
    assert "set docket_database_url" in fault
    with pytest.raises(StoreMissing):
        task(Order(order_id="1"))


@pytest.mark.parametrize(
    ("pool", "faults"), [("prefork", 1), ("threads", 1), ("gevent", 1), ("solo", 0), (None, 0)]
)
def test_a_memory_store_is_for_one_process(pool: str | None, faults: int) -> None:
    """Other pools, and other workers, could not see it."""
    app = make_app()
    declare(app, Graph("memory", store=MemoryStore()))
    found = checks.find_faults(app, pool)
    assert len(found) == faults
    assert all("MemoryStore" in fault for fault in found)


def test_tables_are_checked_and_no_connection_is_kept(tmp_path: Path) -> None:
    """A child must not inherit one."""
    url = f"sqlite:///{tmp_path}/shop.db"
    app = make_app(docket_database_url=url)
    declare(app, Graph("tables"))
    (fault,) = checks.find_faults(app, "prefork")
    assert "docket migrate" in fault
    store = SQLStore(url)
    store.migrate()
    store.close()
    assert checks.find_faults(app, "prefork") == []


def test_a_database_that_does_not_answer_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """A worker starts degraded and its deliveries wait; the log says so, without the password."""
    app = make_app(docket_database_url="postgresql+psycopg://ann:s3cret@127.0.0.1:1/shop")
    declare(app, Graph("silent"))
    assert checks.find_faults(app, "prefork") == []
    assert "the schema could not be checked" in caplog.text
    assert "s3cret" not in caplog.text


def test_a_check_without_a_worker_needs_the_database() -> None:
    """`celery docket check` may not pass what it could not look at."""
    app = make_app(docket_database_url="postgresql+psycopg://ann:s3cret@127.0.0.1:1/shop")
    declare(app, Graph("silent_check"))
    (fault,) = checks.find_faults(app)
    assert "DC401" in fault
    assert "s3cret" not in fault


def test_a_url_that_cannot_be_used_is_a_fault() -> None:
    """And not an error that Celery's signals would swallow."""
    app = make_app(docket_database_url="nowhere://ann:s3cret@host")
    declare(app, Graph("nowhere"))
    (fault,) = checks.find_faults(app, "prefork")
    assert "docket_database_url" in fault
    assert "s3cret" not in fault


def test_faults_of_all_tasks_come_in_one_report() -> None:
    """One start tells everything."""
    app = make_app()
    graph = Graph("broken")

    @graph_task(app, graph, name="lifecycle.charge")
    def charge_order(order: Order) -> Charge:
        raise NotImplementedError

    declare(app, Graph("without"))
    found = checks.find_faults(app)
    assert [fault.partition(":")[0] for fault in found] == ["task lifecycle.charge", "task lifecycle.ship"]


def test_the_row_bounds_the_retries_of_a_task_that_persists() -> None:
    """Celery sees no bound there; the declared number is kept."""
    kept = declare(make_app(), Graph("kept", store=MemoryStore()), max_retries=5)
    assert (kept.max_retries, kept.declared_max_retries) == (None, 5)
    plain = declare(make_app(), Graph("plain"), persist=None, max_retries=5)
    assert (plain.max_retries, plain.declared_max_retries) == (5, 5)


def test_declaring_changes_no_setting_of_the_app() -> None:
    """Delivery semantics are the task's."""
    bare, app = make_app(), make_app()
    declare(app, Graph("unchanged"), queue="orders", acks_late=True)
    assert dict(app.conf) == dict(bare.conf)


def test_a_fault_is_logged_when_the_app_is_complete(caplog: pytest.LogCaptureFixture) -> None:
    """Wiring is looked at once all modules are there, without stopping the import."""
    app = make_app()

    @graph_task(app, Graph("empty"), name="lifecycle.charge")
    def charge_order(order: Order) -> Charge:
        raise NotImplementedError

    app.finalize()
    assert "task lifecycle.charge cannot run" in caplog.text


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_worker_without_step_threads_does_not_start(pool: str) -> None:
    """Its own thread would be busy with steps; in process and eagerly the same app is fine."""
    app = make_app(docket_threads=0)
    declare(app, Graph("inline"), persist=None)
    (fault,) = checks.find_faults(app, pool)
    assert "docket_threads" in fault
    assert "set at least 1" in fault
    assert checks.find_faults(app) == []


def test_an_eager_task_without_step_threads_runs_on_the_calling_thread() -> None:
    """Nothing of the task leaves the thread that calls it."""
    app = make_app(docket_threads=0, task_always_eager=True)
    graph, seen = Graph("eager"), list[int]()

    @graph.step(timeout=30)
    def ship(order: Order) -> Shipment:
        seen.append(threading.get_ident())
        return Shipment(tracking_id=order.order_id)

    @graph_task(app, graph, name="inline.ship_order")
    def ship_order(order: Order) -> Shipment:
        raise NotImplementedError

    assert ship_order.delay(Order(order_id="8")).get() == Shipment(tracking_id="8")
    assert seen == [threading.get_ident()]
