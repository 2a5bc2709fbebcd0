"""The pytest plugin, in a pytest run of its own, as its user has it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import psutil
import pytest

from tests import readme

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

MARK = "PLUGIN_TEST_FOLDER"
HEAD = """
import os
import signal
import pytest
from docket_celery import RunState, SQLStore
from docket_celery.testing import FakeClock
from shop import app, checkout, process_order
from shop_pb2 import Order, Shipment

ORDER = Order(order_id="17", amount_cents=1000)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's shop with its generated messages."""
    folder = tmp_path_factory.mktemp("shop")
    readme.make_project(folder)
    return folder


def run_pytest(
    project: Path,
    folder: Path,
    tests: str,
    *options: str,
    ini: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run *tests* with the plugin, all warnings being errors, and nothing else of this environment.

    Nothing that the run started may be there after it.
    """
    (folder / "test_user.py").write_text(HEAD + dedent(tests), encoding="utf-8")
    lines = "".join(f"{name} = {value}\n" for name, value in (ini or {}).items())
    (folder / "pytest.ini").write_text(f"[pytest]\nfilterwarnings = error\n{lines}", encoding="utf-8")
    hidden = ("DOCKET_", "CELERY_", "PYTEST_")
    given = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    given |= {
        "PYTHONPATH": os.pathsep.join([str(project), str(readme.ROOT)]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        MARK: os.fspath(folder),
        **(env or {}),
    }
    plugin = ("-p", "docket_celery.testing.plugin")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugin, "-p", "no:cacheprovider", *options],
        cwd=folder,
        env=given,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert [process for process in psutil.process_iter() if started_in(process) == os.fspath(folder)] == []
    return done


def started_in(process: psutil.Process) -> str | None:
    """Return the folder of the run that *process* belongs to: servers' supervisors and workers inherit it."""
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):  # ended meanwhile, or somebody else's
        return None


def assert_passed(done: subprocess.CompletedProcess[str], count: int) -> None:
    """Fail with what the run printed unless so many tests passed."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^{count} passed", done.stdout, re.MULTILINE), done.stdout


STORES = """
def test_one(docket_store):
    checkout.execute(Shipment, ORDER, execution_id="same", store=docket_store)
    assert docket_store.find_run("checkout", "same").state is RunState.SUCCEEDED
    assert docket_store.engine.dialect.name == "postgresql"

def test_another_has_a_database_of_its_own(docket_store, docket_database_url):
    assert docket_store.find_run("checkout", "same") is None
    assert "docket_test_" in docket_database_url

def test_small_ones(docket_inline, docket_events):
    checkout.execute(Shipment, ORDER)
    docket_events.assert_order("charge_card", "reserve_inventory", "ship")
    assert isinstance(docket_inline.clock, FakeClock)
"""


def test_each_test_has_a_store_of_its_own_and_nothing_stays(project: Path, tmp_path: Path) -> None:
    """Real Postgres, though the environment names another one; started once, stopped at the end."""
    env = {"DOCKET_CELERY_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/production"}
    assert_passed(run_pytest(project, tmp_path, STORES, env=env), 3)


WORKERS = """
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_job_runs_in_a_worker(docket_worker, docket_store, pool):
    worker = docket_worker(app, pool=pool)
    assert process_order.delay(ORDER).get(timeout=60).tracking_number.endswith("res-17")
    assert docket_store.find_run("checkout", "order-17").state is RunState.SUCCEEDED
    assert worker.running and worker.pid != os.getpid()
    assert "Task shop.process_order" in worker.read_log()

def test_a_worker_that_was_killed_comes_back(docket_worker, docket_store):
    worker = docket_worker("shop:app", concurrency=1, env={"DOCKET_CELERY_LEASE_SECONDS": "5"})
    worker.kill()
    assert not worker.running
    result = process_order.delay(ORDER)
    worker.restart()
    assert result.get(timeout=60).tracking_number.endswith("res-17")

def test_the_check_of_inputs_is_a_workers_too(docket_worker):
    from docket_celery import InputMutated
    from spoiling import app as spoiling, spoil
    docket_worker(spoiling, pool="solo", env={"DOCKET_CELERY_CHECK_MUTATION": "1"})
    with pytest.raises(InputMutated, match="'spoil_order' changed its input shop.Order"):
        spoil.delay(ORDER).get(timeout=60)

def test_the_app_is_as_it_was_afterwards():
    assert app.conf.broker_url == "redis://127.0.0.1:1/7"
    assert app.conf.docket_database_url is None
    assert os.environ["CELERY_BROKER_URL"] == "redis://127.0.0.1:1/7"
"""
SPOILING = """
from celery import Celery
from docket_celery import Graph, graph_task
from shop_pb2 import Order, Reservation

app = Celery("spoiling")
graph = Graph("spoiling")

@graph.step
def spoil_order(order: Order) -> Reservation:
    order.amount_cents = 0
    return Reservation()

@graph_task(app, graph)
def spoil(order: Order) -> Reservation:
    raise NotImplementedError
"""


@pytest.mark.slow
def test_workers_are_real_and_the_environments_broker_is_left_alone(project: Path, tmp_path: Path) -> None:
    """Whatever pool; the app of the test's own process talks to the same servers, and to its own afterwards."""
    (tmp_path / "spoiling.py").write_text(SPOILING, encoding="utf-8")
    env = {"CELERY_BROKER_URL": "redis://127.0.0.1:1/7", "CELERY_RESULT_BACKEND": "redis://127.0.0.1:1/8"}
    code = WORKERS.replace(
        "app.conf.docket_database_url is None", 'app.conf.get("docket_database_url") is None'
    )
    assert_passed(run_pytest(project, tmp_path, code, env=env), 6)


CRASHES = """
from docket_celery.testing import CrashMatrixFailed

def test_an_order_survives_in_a_worker(docket_crash_matrix, docket_store):
    report = docket_crash_matrix(process_order, ORDER, effects=["charge_card"], execution_id="order-17")
    assert len(report.boundaries) == 10
    assert "after the run's end is written, before the ack" in report.boundaries
    assert docket_store.find_run("checkout", "order-17") is None

def test_an_effect_that_is_not_kept_is_found(docket_crash_matrix):
    with pytest.raises(CrashMatrixFailed) as caught:
        docket_crash_matrix(process_order, ORDER, effects=["reserve_inventory"])
    assert "killed before the body of 'ship':\\n  - step 'reserve_inventory' has effects" in str(caught.value)
    assert "next delivery: reserve_inventory body" in str(caught.value)
"""


@pytest.mark.slow
def test_a_task_is_killed_at_every_boundary_in_a_real_worker(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The child dies, Celery delivers the job again, and what is broken is found."""
    project, folder = tmp_path_factory.mktemp("shop"), tmp_path_factory.mktemp("run")
    readme.make_project(project)
    shop = project / "shop.py"
    first, *others = shop.read_text(encoding="utf-8").split("persist=Scope.WORKFLOW, ")
    # Only the charge is kept here, so that a step with an effect is called again.
    shop.write_text(f"{first}persist=Scope.WORKFLOW, {''.join(others)}", encoding="utf-8")
    assert len(others) == 3
    assert_passed(run_pytest(project, folder, CRASHES), 2)


@pytest.mark.slow
def test_a_failed_test_shows_its_workers_log(project: Path, tmp_path: Path) -> None:
    """And a worker that cannot start says why."""
    done = run_pytest(
        project,
        tmp_path,
        """
        def test_fails(docket_worker):
            docket_worker(app, pool="solo")
            assert False

        def test_does_not_start(docket_worker):
            docket_worker("shop:nothing")

        def test_is_no_apps_path(docket_worker):
            from celery import Celery
            docket_worker(Celery("hidden", set_as_current=False))
        """,
    )
    assert re.search(r"^3 failed", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert re.search(r"- worker log docket-test-\d+-1\.log -", done.stdout)
    assert "ready." in done.stdout
    assert "has no attribute 'nothing'" in done.stdout
    assert "pass its path, as for celery -A: 'shop:app'" in done.stdout


def test_given_servers_are_used(project: Path, tmp_path: Path, database_url: str, broker_url: str) -> None:
    """Pytest's configuration names them; databases are made there and dropped."""
    ini = {"docket_database_url": database_url.replace("%", "%%"), "docket_broker_url": broker_url}
    tests = """
    def test_store(docket_store, docket_servers):
        assert docket_servers.broker_url == os.environ["GIVEN_BROKER"]
        assert docket_servers.database_url.startswith(os.environ["GIVEN_SERVER"])
        with docket_store.engine.connect() as connection:
            names = connection.exec_driver_sql("SELECT datname FROM pg_database").scalars().all()
        assert sum(name.startswith(f"docket_test_{os.getpid()}_") for name in names) == 2
    """
    env = {"GIVEN_BROKER": broker_url, "GIVEN_SERVER": database_url.rpartition("/")[0]}
    assert_passed(run_pytest(project, tmp_path, tests, ini=ini, env=env), 1)


def test_without_a_server_the_error_says_what_to_do(project: Path, tmp_path: Path) -> None:
    """Nothing is skipped."""
    # Python runs this at the start of each process, so also where the servers' programs are looked for.
    hide = """
    from pathlib import Path
    from docket_celery.devserver import binaries
    binaries._wheel_folder = lambda name: None
    binaries._DEBIAN_POSTGRES = Path("/nonexistent")
    """
    (tmp_path / "sitecustomize.py").write_text(dedent(hide), encoding="utf-8")
    path = os.pathsep.join(map(str, (tmp_path, project, readme.ROOT)))
    env = {"PATH": "/nonexistent", "PYTHONPATH": path}
    done = run_pytest(project, tmp_path, "def test_store(docket_store):\n    pass\n", env=env)
    assert re.search(r"^1 error", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert "install 'docket-celery[dev]', or set docket_database_url in pytest's configuration" in " ".join(
        done.stdout.split()
    )


def test_pytest_is_not_slowed_down_by_a_plugin_that_nobody_uses() -> None:
    """It is imported in every environment: neither Celery nor SQL nor protobuf nor the engine comes with it."""
    code = "import json, sys, docket_celery.testing.plugin; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=readme.ROOT,
        env={**os.environ, "PYTHONPATH": str(readme.ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded: set[str] = set(json.loads(done.stdout))
    assert {name.partition(".")[0] for name in loaded} & {
        "celery",
        "kombu",
        "sqlalchemy",
        "psycopg",
        "redis",
    } == set()
    assert "google.protobuf" not in loaded
    assert "docket_celery.graph" not in loaded


def test_the_package_declares_the_plugin() -> None:
    """Pytest finds it by its entry point."""
    project = tomllib.loads((readme.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (path,) = project["entry-points"]["pytest11"].values()
    assert import_module(path).docket_worker is not None


def test_every_name_of_the_kit_is_there() -> None:
    """What is imported when it is first used can be imported."""
    testing = import_module("docket_celery.testing")
    assert [name for name in testing.__all__ if getattr(testing, name) is None] == []
    assert set(testing.__all__) <= set(dir(testing))
    with pytest.raises(AttributeError, match="no attribute 'in_line'"):
        _ = testing.in_line
