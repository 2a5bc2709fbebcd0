"""A Django project on real Postgres with a real worker: connections, commits, and its own test suite."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from google.protobuf import json_format

from docket_celery import GraphResult
from docket_celery.task import envelope
from tests.conftest import StartWorker
from tests.infra.processes import ROOT, wait_until
from tests.infra.servers import connect
from tests.unit.protos.shop_pb2 import Label, Order, Shipment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

PROJECT = "tests.integration.django_shop"
APP = f"{PROJECT}.celery_app"
THREADS = 4
WITHIN_S = 60.0


class Project:
    """The project's environment, and what can be asked of its database."""

    def __init__(self, url: str, worker_env: dict[str, str]) -> None:
        self.url = url
        self.env = {"DJANGO_SETTINGS_MODULE": f"{PROJECT}.settings", "DJANGO_SHOP_DATABASE_URL": url}
        self._env = {**worker_env, **self.env}

    def run(self, *argv: str, **env: str) -> str:
        """Run a module of the project and return what it prints; it must succeed."""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", *argv],
            cwd=ROOT,
            env={**self._env, **env},
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return the rows of *query*."""
        with connect(self.url) as connection:
            return connection.execute(query).fetchall()

    def sessions(self) -> int:
        """Return how many sessions the project's processes hold."""
        (row,) = self.rows("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'django-shop'")
        return int(row[0])


@pytest.fixture
def project(empty_database_url: str, worker_env: dict[str, str]) -> Project:
    """The project with its table, in a database of its own."""
    made = Project(empty_database_url, worker_env)
    made.run("django", "migrate", "--run-syncdb", "--verbosity=0")
    return made


@pytest.fixture
def submit(connect_app: Callable[[Celery], Celery]) -> Callable[[str, Order], GraphResult[Any]]:
    """A function that submits an order to one of the project's tasks, by name, from outside of Django."""
    for kind in (Label, Shipment):
        envelope.types.allow(kind)
    app = connect_app(Celery("outside", set_as_current=False))

    def send(name: str, order: Order) -> GraphResult[Any]:
        sent = app.send_task(name, (json_format.MessageToDict(order),))
        return GraphResult(str(sent.id), app=app)

    return send


def wait_until_none(project: Project) -> None:
    """Wait until the project's processes hold no session."""
    wait_until(lambda: project.sessions() == 0, within_s=15.0, what="the end of all Django sessions")


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "concurrency"), [("prefork", 1), ("threads", 3)])
def test_a_thousand_orm_steps_hold_a_session_a_thread_and_none_once_idle(
    start_worker: StartWorker,
    project: Project,
    submit: Callable[[str, Order], GraphResult[Any]],
    pool: str,
    concurrency: int,
) -> None:
    """Where Django is told to keep sessions for ever: as many as there are step threads, until those end."""
    start_worker(
        pool,
        concurrency,
        app=APP,
        env={
            **project.env,
            "DJANGO_SHOP_THREADS": str(THREADS),
            "DJANGO_SHOP_CONN_MAX_AGE": "none",
            "DJANGO_SHOP_IDLE_S": "3",
        },
    )
    most, jobs = 0, [submit("shop.process", Order(order_id=str(number))) for number in range(200)]
    for job in jobs:
        assert job.get(timeout=WITHIN_S).tracking_id == "4"
        most = max(most, project.sessions())
    assert 1 <= most <= THREADS
    ((lines, sessions, threads, sites),) = project.rows(
        "SELECT count(*), count(DISTINCT session), count(DISTINCT thread), min(site) FROM django_shop_line"
    )
    # The fifth step of each job counts the lines of the others.
    assert lines == 800
    assert 1 <= sessions == threads <= THREADS, "a thread's session was not reused"
    assert sites == "main", "the hook named in Django's settings surrounds each step"
    wait_until_none(project)
    assert submit("shop.process", Order(order_id="again")).get(timeout=WITHIN_S).tracking_id == "4"


def test_sessions_end_with_their_step_where_django_keeps_none(
    start_worker: StartWorker, project: Project, submit: Callable[[str, Order], GraphResult[Any]]
) -> None:
    """With Django's default CONN_MAX_AGE, of synchronous and of async steps, long before threads are idle."""
    start_worker("prefork", 1, app=APP, env=project.env)
    for number in range(5):
        submit("shop.process", Order(order_id=str(number))).get(timeout=WITHIN_S)
        submit("shop.process_waiting", Order(order_id=str(number))).get(timeout=WITHIN_S)
    wait_until_none(project)
    ((lines,),) = project.rows("SELECT count(*) FROM django_shop_line")
    assert lines == 25


def test_async_steps_leave_no_session_even_where_django_keeps_them(
    start_worker: StartWorker, project: Project, submit: Callable[[str, Order], GraphResult[Any]]
) -> None:
    """Each has a thread for its queries, as a request has under ASGI, and the session ends with it."""
    start_worker("prefork", 1, app=APP, env={**project.env, "DJANGO_SHOP_CONN_MAX_AGE": "none"})
    jobs = [submit("shop.process_waiting", Order(order_id="w")) for _ in range(50)]
    for job in jobs:
        job.get(timeout=WITHIN_S)
    wait_until_none(project)
    assert project.rows("SELECT count(*), min(site) FROM django_shop_line") == [(50, "main")]


def test_a_session_that_the_server_ended_costs_one_attempt(
    start_worker: StartWorker, project: Project, submit: Callable[[str, Order], GraphResult[Any]]
) -> None:
    """Django would use the broken connection for ever: it is let go after the step that found it broken."""
    env = {**project.env, "DJANGO_SHOP_CONN_MAX_AGE": "none", "DJANGO_SHOP_THREADS": "1"}
    start_worker("prefork", 1, app=APP, env=env)
    assert submit("shop.look_up", Order()).get(timeout=WITHIN_S).text == "attempt 1: 0"
    project.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'django-shop'"
    )
    wait_until_none(project)
    assert submit("shop.look_up", Order()).get(timeout=WITHIN_S).text == "attempt 2: 0"
    assert submit("shop.look_up", Order()).get(timeout=WITHIN_S).text == "attempt 1: 0"


def test_tasks_are_sent_when_the_transaction_commits(start_worker: StartWorker, project: Project) -> None:
    """Nothing inside the transaction, one message at its commit, none where it is rolled back; checked at once."""
    start_worker("prefork", 1, app=APP, env=project.env)
    told = json.loads(project.run(f"{PROJECT}.commits"))
    for kind, name in {
        "typed": "shop.process",
        "class": "shop.process_by_class",
        "options": "shop.process",
        "plain": "shop.plain",
    }.items():
        assert told[kind] == {"inside": [], "committed": [name], "rolled back": []}, kind
    # The view's own line is counted: its transaction was over. Name and context of the run went along.
    assert told["results"] == {"counted": "5", "sites": ["shop"]}
    assert "argument 'order'" in told["refused"]


def test_the_projects_own_tests_pass_without_threads(project: Project) -> None:
    """Django's TestCase with eager tasks and ``docket_threads`` of 0: steps are inside of the test's transaction."""
    told = project.run(
        *("django", "test", f"{PROJECT}.cases", "--noinput"), DJANGO_SHOP_THREADS="0", DJANGO_SHOP_EAGER="1"
    )
    assert "Ran 6 tests" in told
    assert told.rstrip().endswith("Destroying test database for alias 'default'...")
