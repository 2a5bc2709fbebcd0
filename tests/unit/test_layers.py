"""The layering of the package: import-linter's contracts, and what importing it really loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(120)

LOADED = """
import json, sys
print(json.dumps(sorted(set(sys.modules) & set(sys.argv[1].split(",")))))
"""
RUN = """
from docket_celery import Graph
from tests.unit.protos.shop_pb2 import Charge, Label, Money, Order

graph = Graph("plain")

@graph.step
def charge(order: Order) -> Charge:
    return Charge(charge_id=order.order_id)

@graph.step(timeout=30)
def label(charge: Charge) -> Label:
    return Label(text=charge.charge_id)
"""
TASK = """
from celery import Celery
from docket_celery import graph_task

app = Celery("plain")
app.conf.task_always_eager = True

@graph_task(app, graph)
def make_label(order: Order) -> Label:
    raise NotImplementedError

assert make_label.delay(Order(order_id="1")).get().text == "1"
"""
DECLARED = """
from celery import Celery
from docket_celery import Scope, configure, graph_task

app = Celery("keeping", broker="redis://127.0.0.1:1", backend="redis://127.0.0.1:1")
app.conf.docket_database_url = "postgresql+psycopg://127.0.0.1:1/docket"
configure(app)

@graph.step(persist=Scope.WORKFLOW)
def kept(label: Label) -> Money:
    return Money(cents=len(label.text))

@graph_task(app, graph)
def keep(order: Order) -> Money:
    raise NotImplementedError

app.finalize()
"""
HEAVY = "celery,kombu,sqlalchemy,psycopg,redis,flower,gevent,asyncio,docket_celery.store.memory"


def lint_imports(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run import-linter over the package in *root*."""
    program = Path(sys.executable).with_name("lint-imports")
    argv = [str(program), "--no-cache", "--no-logo", *arguments]
    return subprocess.run(
        argv,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


def loaded_after(code: str) -> str:
    """Run *code* in a new interpreter; return what it has loaded of the heavy modules, as JSON."""
    program = dedent(code) + LOADED
    done = subprocess.run(
        [sys.executable, "-c", program, HEAVY],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_import_contract_is_kept() -> None:
    """Modules import downward only; Celery, kombu and SQL are known where pyproject.toml permits it."""
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout)


def test_a_broken_contract_would_be_noticed(tmp_path: Path) -> None:
    """The same contracts refuse a copy of the package in which a leaf imports Celery and the graph."""
    package = tmp_path / "docket_celery"
    for path in sorted((ROOT / "docket_celery").rglob("*.py")):
        copy = package / path.relative_to(ROOT / "docket_celery")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    assert lint_imports(tmp_path).returncode == 0
    with (package / "observe/events.py").open("a") as leaf:
        leaf.write("\n\ndef lazily() -> None:\n    import celery\n    import docket_celery.graph\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert "docket_celery.observe.events -> celery" in done.stdout
    assert "docket_celery.observe.events -> docket_celery.graph" in done.stdout


def test_a_graph_in_process_loads_neither_celery_nor_sql() -> None:
    """A script that runs a graph which persists nothing pays for protobuf alone."""
    assert loaded_after(RUN + '\nassert graph.execute(Label, Order(order_id="1")).text == "1"\n') == "[]"


def test_a_task_whose_graph_persists_nothing_loads_neither_sql_nor_redis() -> None:
    """On Celery, which itself loads the client of a broker or result backend when it connects."""
    assert loaded_after(RUN + TASK) == '["celery", "kombu"]'


def test_a_process_that_declares_a_task_loads_neither_sql_nor_redis() -> None:
    """Though the graph persists, and Redis carries jobs and results: a process may never submit one."""
    assert loaded_after(RUN + DECLARED) == '["celery", "kombu"]'


def test_a_store_in_memory_loads_no_sql_and_a_database_does() -> None:
    """SQLAlchemy comes with the first SQLStore; so the tests above would notice it."""
    memory = "from docket_celery import MemoryStore\nMemoryStore()\n"
    assert loaded_after(memory) == '["docket_celery.store.memory"]'
    sql = "from docket_celery import SQLStore\nSQLStore('sqlite://').close()\n"
    assert "sqlalchemy" in loaded_after(sql)
