"""The tests' own servers, workers and nodes: real, readable, killable, and gone afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
from celery import Celery, chord
from pytest_celery import CeleryTestSetup
from pytest_celery.vendors.worker.tasks import add, xsum

from docket_celery.store.sql.schema import VERSION
from tests.conftest import StartFlower, StartWorker
from tests.infra import leaks, servers, wire
from tests.infra.nodes import NodeDatabase, PostgresNode
from tests.infra.process_docker import uses_docker
from tests.infra.processes import ROOT, GuardedProcess, wait_until
from tests.infra.workers import WorkerSpec
from tests.integration.app import app, ping

pytestmark = pytest.mark.integration

WITHIN_S = 30.0
ConnectApp = Callable[[Celery], Celery]

# A run that starts a server, a worker and its children, tells who they are, and never ends by itself.
LASTING_TEST = """
import os, time, json, psutil

def test_lasts(start_worker, server_urls):
    worker = start_worker()
    pids = [child.pid for child in psutil.Process().children(recursive=True)]
    place = os.environ["DOCKET_TEST_TELL"]
    with open(place + ".part", "w") as out:
        json.dump({"pids": pids, "worker": worker.pid}, out)
    os.rename(place + ".part", place)
    time.sleep(300)
"""
LEAKING_TESTS = """
import subprocess, sys, threading
import pytest, sqlalchemy

kept = []

def test_thread():
    threading.Thread(target=threading.Event().wait, name="docket-left", daemon=True).start()

def test_process():
    kept.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))

def test_session(database_url):
    kept.append(sqlalchemy.create_engine(database_url).connect())

def lease(url):
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(
            "INSERT INTO docket_runs (graph, execution_id, retries, target, job, job_digest, state, stage, epoch,"
            " owner, lease_until, lost, failures, created_at, updated_at)"
            " VALUES ('shop', 'order-17', 0, 'shop.Shipment', '', sha256(''), 'RUNNING', 0, 1,"
            " 'me', now() + interval '1 hour', 0, 0, now(), now())"
        ))
    engine.dispose()

def test_lease(database_url):
    lease(database_url)

@pytest.mark.leaves_lease
def test_lease_on_purpose(database_url):
    lease(database_url)

def test_nothing(database_url):
    pass
"""


def run_pytest(directory: Path, body: str, *options: str) -> tuple[list[str], dict[str, str]]:
    """Write *body* as a test file beside copies of our conftests' fixtures; return its command and environment."""
    (directory / "conftest.py").write_text(
        "from tests.conftest import *\nfrom tests.conftest import _no_leftovers\n"
        "from tests.conftest import _redis_urls, _celery_connections\n"
        "import tests.conftest\ntests.conftest.SETTLE_S = 0.5\n"
    )
    file = directory / "test_inner.py"
    file.write_text(body)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-c", str(ROOT / "pyproject.toml")]
    argv += [
        f"--rootdir={directory}",
        f"--basetemp={directory / 'tmp'}",
        f"--confcutdir={directory}",
        *options,
        str(file),
    ]
    return argv, {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_a_worker_of_each_pool_answers_a_task(
    pool: str, start_worker: StartWorker, connect_app: ConnectApp
) -> None:
    """The light form: ready when returned, with children under prefork alone, a log, and an orderly end."""
    connect_app(app)

    with start_worker(pool) as worker:
        assert ping.delay("here").get(timeout=WITHIN_S) == "here"
        # Under gevent the worker listens for commands a moment after it is ready for tasks.
        pong = [{worker.node_name: {"ok": "pong"}}]
        wait_until(lambda: app.control.ping([worker.node_name]) == pong, within_s=WITHIN_S, what="a pong")
        assert len(worker.children()) == (2 if pool == "prefork" else 0)

    assert worker.status == 0
    assert "Warm shutdown" in worker.read_log()


def test_a_workers_options_reach_it(start_worker: StartWorker, connect_app: ConnectApp) -> None:
    """Concurrency, variables and arguments are those of the call."""
    connect_app(app)
    worker = start_worker(
        "threads",
        concurrency=3,
        env={"DOCKET_CELERY_THREADS": "5"},
        args=["-Q", "orders", "--loglevel=DEBUG"],
    )

    assert ping.apply_async(("orders",), queue="orders").get(timeout=WITHIN_S) == "orders"
    stats = app.control.inspect([worker.node_name], timeout=5.0).stats()
    assert stats is not None
    assert stats[worker.node_name]["pool"]["max-concurrency"] == 3
    assert psutil.Process(worker.pid).environ()["DOCKET_CELERY_THREADS"] == "5"
    assert "DEBUG/MainProcess" in worker.read_log()


def test_a_killed_child_is_replaced_and_a_killed_worker_starts_again(
    start_worker: StartWorker, connect_app: ConnectApp
) -> None:
    """After kill -9 of a child, of the main process and of all at once, a worker can go on."""
    connect_app(app)
    worker = start_worker()

    gone = worker.kill_child()
    wait_until(lambda: len(worker.children()) == 2, within_s=WITHIN_S, what="a new child")
    assert gone not in {child.pid for child in worker.children()}

    worker.kill_main()
    assert worker.status == -signal.SIGKILL
    first = worker.pid
    worker.restart()
    assert worker.pid != first
    worker.kill()
    assert worker.children() == []
    worker.restart()
    assert ping.delay("again").get(timeout=WITHIN_S) == "again"


def test_a_worker_that_cannot_start_says_why(start_worker: StartWorker) -> None:
    """An app that does not import fails at once, with the worker's own words."""
    with pytest.raises(RuntimeError, match=r"module tests\.integration\.no_such_app was not found"):
        start_worker(app="tests.integration.no_such_app")


def test_flower_sees_the_worker(
    start_worker: StartWorker, start_flower: StartFlower, connect_app: ConnectApp
) -> None:
    """Flower's API names the worker, and the task that it ran."""
    connect_app(app)
    flower = start_flower()
    worker = start_worker("threads", args=["-E"])
    wait_until(
        lambda: worker.node_name in flower.get("/api/workers?refresh=1"), within_s=WITHIN_S, what="the worker"
    )

    sent = ping.delay("seen")
    assert sent.get(timeout=WITHIN_S) == "seen"

    wait_until(lambda: sent.id in flower.get("/api/tasks"), within_s=WITHIN_S, what="the task in Flower")
    assert flower.get(f"/api/task/info/{sent.id}")["name"] == "tests.integration.app.ping"


def test_nodes_are_ready_by_task_control_and_container(celery_setup: CeleryTestSetup) -> None:
    """pytest-celery's stock setup runs, a chord comes back over Redis, and logs and processes can be read."""
    assert celery_setup.ready(ping=True, control=True, docker=True)

    header = [add.s(i, i).set(queue=celery_setup.worker.worker_queue) for i in range(5)]
    joined = chord(header, xsum.s().set(queue=celery_setup.worker.worker_queue), app=celery_setup.app)
    assert joined.delay().get(timeout=WITHIN_S) == 20

    celery_setup.worker.assert_log_exists("succeeded")
    celery_setup.broker.assert_log_exists("Ready to accept connections")
    assert celery_setup.worker.hostname() in celery_setup.worker.logs()
    # The main process and its two children, and nothing else of the machine.
    processes = celery_setup.worker.get_running_processes_info(["pid", "cmdline"])
    assert len([found for found in processes if "worker" in found["cmdline"]]) == 3


def test_a_killed_worker_node_and_a_restarted_broker_node_come_back(celery_setup: CeleryTestSetup) -> None:
    """SIGKILL and restart of the worker, then a restart of the broker under a living worker."""
    celery_setup.worker.kill()
    assert celery_setup.worker.container.status == "exited"
    celery_setup.worker.restart()
    assert celery_setup.ready(ping=True, control=False, docker=True)

    celery_setup.broker.restart()
    assert celery_setup.ready(ping=True, control=False, docker=True)


@pytest.mark.parametrize("worker_spec", [WorkerSpec(pool="threads", app="tests.integration.app")])
def test_a_node_runs_our_app_as_its_spec_says(celery_setup: CeleryTestSetup, worker_spec: WorkerSpec) -> None:
    """A worker node takes another app and pool; the stock tasks are there too."""
    assert celery_setup.ready(ping=True, control=True, docker=True)

    sent = celery_setup.app.send_task("tests.integration.app.ping", ["node"])

    assert sent.get(timeout=WITHIN_S) == "node"
    assert "concurrency: 2 (thread)" in celery_setup.worker.logs()


def test_a_postgres_node_keeps_its_data_over_a_restart(celery_postgres: PostgresNode) -> None:
    """A component of our own: the image's role and database, tables that survive."""
    assert celery_postgres.ready()
    servers.migrate(celery_postgres.config()["host_url"])

    celery_postgres.restart()

    with servers.connect(celery_postgres.config()["host_url"]) as connection:
        assert connection.execute("SELECT version FROM docket_schema").fetchall() == [(VERSION,)]
        assert connection.execute("SELECT current_user, current_database()").fetchone() == ("nodes", "nodes")


def test_nodes_have_a_database_with_tables(node_database: NodeDatabase) -> None:
    """Worker nodes and the test reach the same migrated database."""
    assert uses_docker() == (node_database.url != node_database.host_url)
    with servers.connect(node_database.host_url) as connection:
        assert connection.execute("SELECT count(*) FROM docket_runs").fetchone() == (0,)


def test_databases_and_brokers_are_empty_at_the_start(
    database_url: str, empty_database_url: str, broker_url: str, result_url: str
) -> None:
    """What one test wrote, the next does not find; the schema's version stays."""
    assert broker_url != result_url
    with servers.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM docket_schema").fetchone() == (1,)
        connection.execute(
            "INSERT INTO docket_claims (cache_key, owner, lease_until) VALUES (sha256('x'), 'me', now())"
        )
    servers.truncate(database_url)
    with servers.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM docket_claims").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM docket_schema").fetchone() == (1,)
    with servers.connect(empty_database_url) as connection:
        assert connection.execute("SELECT to_regclass('docket_runs')").fetchone() == (None,)


@pytest.mark.slow
def test_a_test_that_leaves_something_fails(tmp_path: Path) -> None:
    """A thread, a process, a database session and a live lease each fail the test that left them, and no other."""
    argv, env = run_pytest(tmp_path, LEAKING_TESTS, "-W", "ignore::ResourceWarning")

    done = subprocess.run(
        argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False
    )

    assert "6 passed, 4 errors" in done.stdout, done.stdout
    for words in (
        "left behind: {'threads': ['docket-left']",
        "left behind: {'processes': [",
        "left behind: {'database sessions': [",
        "left behind: {'live leases': ['shop order-17, by me']}",
    ):
        assert words in done.stdout


def test_pytest_killed_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    """After kill -9 of a test run its servers, its worker and the worker's children end, and their data goes."""
    told = tmp_path / "told"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    argv, env = run_pytest(tmp_path, LASTING_TEST)
    run = GuardedProcess(
        argv,
        log=tmp_path / "log",
        env={**env, "DOCKET_TEST_TELL": str(told), "TMPDIR": str(temporary)},
        cwd=tmp_path,
    )
    try:
        wait_until(lambda: told.exists() or not run.running, within_s=60.0, what="the inner run's worker")
        assert run.running, run.log_tail()
        pids = json.loads(told.read_text())["pids"]
        # Supervisor, Postgres and Redis; guard, worker and its two children.
        assert len(pids) >= 7

        os.kill(run.pid, signal.SIGKILL)

        wait_until(
            lambda: not any(is_alive(pid) for pid in pids),
            within_s=WITHIN_S,
            what=f"the end of all of {pids}",
        )
        wait_until(lambda: not list(temporary.iterdir()), within_s=WITHIN_S, what=f"an empty {temporary}")
    finally:
        run.close()


def test_a_guard_ends_the_whole_group_and_removes_its_directory(tmp_path: Path) -> None:
    """Closing kills grandchildren that outlived the program; the directory goes unless it is to stay."""
    data = tmp_path / "data"
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    for keep in (True, False):
        data.mkdir(exist_ok=True)
        log = tmp_path / f"log-{keep}"
        process = GuardedProcess([sys.executable, "-c", script], log=log, env=dict(os.environ), remove=data)
        assert process.wait(WITHIN_S) == 0
        grandchild = int(process.read_log())
        assert is_alive(grandchild)

        process.close(keep_directory=keep)

        wait_until(partial(is_gone, grandchild), within_s=5.0, what="the grandchild's end")
        assert data.exists() == keep


def test_leftovers_are_named_and_what_was_there_before_is_not(tmp_path: Path) -> None:
    """A child counts from when the test began; one that ends in time does not count."""
    code = "print('up', flush=True); input()"
    lasting = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        # Until it runs, the kernel may still show no command line for it.
        assert lasting.stdout is not None
        assert lasting.stdout.readline() == "up\n"
        assert leaks.children_left(leaks.child_pids(), 0.0) == []
        before = leaks.child_pids() - {lasting.pid}
        (found,) = leaks.children_left(before, 0.0)
        assert found.startswith(f"{lasting.pid} ")
        assert found.endswith("input()")
        lasting.kill()
        wait_until(
            lambda: "nobody waited" in "".join(leaks.children_left(before, 0.0)),
            within_s=5.0,
            what="a zombie",
        )
    finally:
        lasting.kill()
        lasting.communicate()
    assert leaks.children_left(before, 0.0) == []


def is_gone(pid: int) -> bool:
    """Tell whether *pid* does not run."""
    return not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Tell whether *pid* runs; one that ended and was not waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_the_wire_counts_what_a_client_waits_for(database_url: str) -> None:
    """However many statements go together; neither a log-in nor the preparation of a statement."""
    with wire.Wire(database_url) as proxy, proxy.counted() as trips, servers.connect(proxy.url) as connection:
        assert trips == []
        for number in range(7):  # psycopg has a statement prepared at its sixth use
            connection.execute("SELECT %s::int", (number,))
        assert trips == ["SELECT $1::int"] * 7
        trips.clear()
        with connection.pipeline():
            for number in range(3):
                connection.execute("SELECT %s::int + 1", (number,))
        assert trips == ["; ".join(["SELECT $1::int + 1"] * 3)]
        trips.clear()
        with connection.transaction():
            connection.execute("SELECT 2")
        assert trips == ["BEGIN", "SELECT 2", "COMMIT"]
        trips.clear()
        rows = connection.execute("SELECT repeat('x', 200000)").fetchall()
        assert len(str(rows[0][0])) == 200_000
        assert len(trips) == 1
