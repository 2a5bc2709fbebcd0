from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from docket_celery.store import SQLStore
from docket_celery.store.records import Lease
from docket_celery.store.rows import SCHEMA_VERSION
from tests.conformance.samples import ending, execution, output, request

ROOT = Path(__file__).resolve().parents[2]
PERSISTS = "tests.integration.apps.faulty"
KEEPS_NOTHING = "tests.integration.apps.declared"
DATABASE = "DOCKET_CELERY_DATABASE_URL"
COMMAND = """
import atexit, sys
from celery.__main__ import main
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
main()
"""
SECRET = "postgresql+psycopg://ann:s3cret@127.0.0.1:1/shop"


def run(
    *words: str, env: Mapping[str, str] | None = None, python: tuple[str, ...] = ("-m", "celery")
) -> subprocess.CompletedProcess[str]:
    """Run ``celery WORDS`` as a user does."""
    hidden = {key: value for key, value in os.environ.items() if not key.startswith("DOCKET_CELERY_")}
    return subprocess.run(
        [sys.executable, *python, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**hidden, "COLUMNS": "200", **(env or {})},
        check=False,
        timeout=60,
    )


def loaded_by(*words: str) -> tuple[set[str], str]:
    """Run ``celery WORDS``; return the modules that are loaded at its end, and what it printed."""
    done = run(*words, python=("-c", COMMAND))
    assert done.returncode == 0, done.stdout
    return set(done.stderr.splitlines()[-1].split()), done.stdout


@pytest.fixture
def sqlite(tmp_path: Path) -> dict[str, str]:
    """The environment with a SQLite file that does not exist yet."""
    return {DATABASE: f"sqlite:///{tmp_path}/shop.db"}


def test_celery_lists_the_group_and_the_group_its_commands() -> None:
    """Installed through Celery's entry point."""
    assert "docket" in run("--help").stdout
    text = run("-A", PERSISTS, "docket", "--help").stdout
    for command in ("check", "migrate", "plan", "purge"):
        assert command in text


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("-A", KEEPS_NOTHING, "docket", "plan", "declared.by_decorator"),
        ("-A", KEEPS_NOTHING, "docket", "check"),
    ],
    ids=["help", "plan", "check"],
)
def test_without_a_database_no_sql_is_loaded(words: tuple[str, ...]) -> None:
    """Nothing is read from one or kept in one."""
    modules, text = loaded_by(*words)
    assert "docket" in text
    assert "docket_celery.cli" in modules
    assert not modules & {"sqlalchemy", "psycopg"}


@pytest.mark.parametrize("words", [("--version",), ("worker", "--help")], ids=" ".join)
def test_a_celery_command_loads_of_this_library_the_entry_point_alone(words: tuple[str, ...]) -> None:
    """Celery loads it before every command, in every environment that has the library."""
    modules, _ = loaded_by(*words)
    assert {name for name in modules if name.partition(".")[0] == "docket_celery"} == {
        "docket_celery",
        "docket_celery.cli",
    }
    assert not modules & {"google.protobuf", "sqlalchemy", "psycopg"}


def test_check_and_migrate_tell_what_to_do_and_what_was_done(sqlite: dict[str, str]) -> None:
    """From an empty database to a checked app; migrating again changes nothing."""
    before = run("-A", PERSISTS, "docket", "check", env=sqlite)
    assert before.returncode == 1
    assert "the database has no docket tables" in before.stderr
    assert "docket migrate" in before.stderr
    assert "1 fault" in before.stderr
    for _ in range(2):
        migrated = run("-A", PERSISTS, "docket", "migrate", env=sqlite)
        assert migrated.returncode == 0, migrated.stderr
        assert f"docket tables of version {SCHEMA_VERSION}" in migrated.stdout
    after = run("-A", PERSISTS, "docket", "check", env=sqlite)
    assert after.returncode == 0, after.stderr
    assert "faulty.ship" in after.stdout
    assert "1 GraphTask checked" in after.stdout


def test_check_needs_no_database_for_the_wiring() -> None:
    """As in CI: without a URL, and with one that nobody answers."""
    for env in ({}, {DATABASE: SECRET}):
        done = run("-A", PERSISTS, "docket", "check", "--no-database", env=env)
        assert done.returncode == 0, done.stderr
        assert "1 GraphTask checked" in done.stdout
    done = run("-A", PERSISTS, "docket", "check", "--no-database", env={"FAULT": "wiring"})
    assert done.returncode == 1
    assert "faulty.reserve" in done.stderr


def test_check_warns_of_steps_in_no_plan(tmp_path: Path) -> None:
    """They never run; it is no fault, since a graph may have more targets than tasks."""
    (tmp_path / "spare.py").write_text(
        "from celery import Celery\n"
        "from docket_celery import Graph, graph_task\n"
        "from tests.unit.protos.shop_pb2 import Charge, Label, Order\n"
        "app, shop = Celery('spare', broker='memory://'), Graph('spare')\n"
        "@shop.step\ndef charge(order: Order) -> Charge: return Charge()\n"
        "@shop.step\ndef label(order: Order) -> Label: return Label()\n"
        "@graph_task(app, shop)\ndef pay(order: Order) -> Charge: ...\n"
    )
    done = run("-A", "spare", "docket", "check", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert "step 'label' (" in warning
    assert "spare.py:7) of graph 'spare' is in no task's plan" in warning


def test_migrate_takes_a_url(tmp_path: Path) -> None:
    """For a database that the app does not name."""
    url = f"sqlite:///{tmp_path}/other.db"
    done = run("-A", PERSISTS, "docket", "migrate", "--url", url)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "other.db").exists()


def test_migrate_without_a_database_names_the_setting() -> None:
    """Exit status 1 and the fix."""
    done = run("-A", PERSISTS, "docket", "migrate")
    assert done.returncode == 1
    assert "set docket_database_url (or DOCKET_CELERY_DATABASE_URL), or pass --url" in done.stderr


def test_purge_deletes_what_is_due_and_says_so(sqlite: dict[str, str], tmp_path: Path) -> None:
    """With an app or without one, in batches of any size; there is nothing left to purge afterwards."""
    store = SQLStore(sqlite[DATABASE])
    store.migrate()
    for number in range(3):
        lease = store.acquire(request(execution_id=f"order-{number}"))
        assert isinstance(lease, Lease)
        saved = output(execution_id=f"order-{number}")
        store.save(lease, saved, execution(execution_id=f"order-{number}"))
        store.end(lease, ending(retention_s=0.0 if number else 3600.0))
    store.close()
    named = f"SQLStore('sqlite+pysqlite:///{tmp_path}/shop.db')"
    words = ("docket", "purge", "--url", sqlite[DATABASE], "--batch", "1")
    assert run(*words).stdout == f"{named}: purged 2 runs, 2 checkpoints, 2 step executions\n"
    again = run("-A", PERSISTS, "docket", "purge", env=sqlite)
    assert (again.returncode, again.stdout) == (0, f"{named}: nothing to purge\n")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--batch", "0"), "0 is not in the range 1<=x<=10000"),
        (("--batch", "10001"), "10001 is not in the range 1<=x<=10000"),
        (("--url", "sqlite://"), "the database has no docket tables"),
        ((), "set docket_database_url (or DOCKET_CELERY_DATABASE_URL), or pass --url"),
    ],
)
def test_purge_refuses_what_cannot_work(words: tuple[str, ...], text: str) -> None:
    """Exit status and text say so; nothing is deleted."""
    done = run("-A", PERSISTS, "docket", "purge", *words)
    assert done.returncode != 0
    assert text in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["check", "migrate", "purge"])
def test_no_password_is_printed(command: str) -> None:
    """A database that does not answer is named without its secret."""
    done = run("-A", PERSISTS, "docket", command, env={DATABASE: SECRET})
    assert "s3cret" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if command == "migrate":
        assert done.returncode == 1
        assert "DC401" in done.stderr


@pytest.mark.parametrize("command", ["check", "migrate"])
def test_a_url_that_cannot_be_used_is_an_error_without_traceback(command: str) -> None:
    """The setting is named, its value is not."""
    done = run("-A", PERSISTS, "docket", command, env={DATABASE: "nowhere://ann:s3cret@host"})
    assert done.returncode == 1
    assert "docket_database_url" in done.stderr
    assert "s3cret" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("setting", "did you mean docket_lease_seconds?"),
        ("value", "docket_threads"),
        ("wiring", "faulty.reserve"),
    ],
)
def test_check_reports_faults(fault: str, said: str) -> None:
    """Exit status 1 for CI."""
    done = run("-A", PERSISTS, "docket", "check", env={"FAULT": fault})
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_shows_the_levels() -> None:
    """In order, by the task's name or by its last part."""
    for name in ("declared.labelled", "labelled"):
        done = run("-A", KEEPS_NOTHING, "docket", "plan", name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            "declared.labelled: docket.tests.unit.Order, docket.tests.unit.Shipment -> docket.tests.unit.Label",
            "  1. write_label",
        ]
    done = run("-A", KEEPS_NOTHING, "docket", "plan", "declared.named")
    assert done.stdout.splitlines()[1:] == ["  1. charge", "  2. ship"]


def test_plan_draws_mermaid() -> None:
    """Text that GitHub renders."""
    done = run("-A", KEEPS_NOTHING, "docket", "plan", "--mermaid", "declared.named")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("flowchart ")
    assert "charge" in done.stdout


def test_an_unknown_task_lists_the_known_ones() -> None:
    """Exit status 1, and what could have been meant."""
    done = run("-A", KEEPS_NOTHING, "docket", "plan", "declared.nothing")
    assert done.returncode == 1
    assert "no GraphTask is called 'declared.nothing'" in done.stderr
    for name in ("declared.by_class", "declared.by_shared_base", "declared.labelled"):
        assert name in done.stderr


def test_a_broken_plan_is_an_error_without_traceback() -> None:
    """The faults of the wiring, as text."""
    done = run("-A", PERSISTS, "docket", "plan", "faulty.reserve", env={"FAULT": "wiring"})
    assert done.returncode == 1
    assert "docket.tests.unit.Money" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_an_app_nothing_is_checked() -> None:
    """An app of no GraphTask is no fault, but says so."""
    done = run("docket", "check")
    assert done.returncode == 0, done.stderr
    assert "0 GraphTasks checked" in done.stdout
