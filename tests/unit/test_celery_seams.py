"""What docs/contributing/seams.md says of the private parts of Celery, kombu, psycopg, asgiref and CPython is so."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from celery import Celery, Task
from celery.app import autoretry, base
from celery.app.task import Context
from celery.backends.base import Backend, KeyValueStoreBackend
from celery.backends.redis import RedisBackend
from celery.signals import worker_init
from celery.worker import WorkController, request
from kombu.utils.json import dumps, loads
from psycopg._connection_base import BaseConnection
from psycopg._preparing import PrepareManager
from psycopg._queries import PostgresRawQuery
from psycopg.adapt import Transformer

from docket_celery import Graph, GraphTask, graph_task
from docket_celery.task.checks import find_faults
from docket_celery.task.envelope import Result
from workers.orders_pb2 import Order, Shipment

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "docket_celery"
PAGE = (ROOT / "docs" / "contributing" / "seams.md").read_text(encoding="utf-8")
LIBRARIES = ("asgiref", "celery", "kombu", "redis", "_thread")


class Seam(NamedTuple):
    """One row of the page."""

    name: str
    owner: str
    files: tuple[str, ...]
    effect: str


def read_rows() -> Iterator[Seam]:
    """Yield the rows of the page's tables."""
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            name, owner, files, _, effect = (cell.strip() for cell in line.strip("|").split("|"))
            yield Seam(name.strip("`"), owner.strip("`"), tuple(re.findall(r"`(.+?)`", files)), effect)


SEAMS = list(read_rows())


def resolve(path: str) -> Any:
    """Return what a dotted *path* names."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"{path} cannot be imported")


def make_task(app: Celery, **options: Any) -> GraphTask[[Order], Shipment]:
    """Return a task of *app* over a graph of one step."""
    graph = Graph("shop")

    @graph.step
    def ship(order: Order) -> Shipment:
        return Shipment(tracking_number=order.order_id)

    @graph_task(app, graph, name="shop.process", shared=False, **options)
    def process(order: Order) -> Shipment:
        raise NotImplementedError

    app.finalize()
    return process


def retries_are_left_alone() -> None:
    """A task that has the attribute is not wrapped, one that lacks it is."""
    left, wrapped = (SimpleNamespace(run=print, autoretry_for=(OSError,), retry_kwargs={}) for _ in range(2))
    left._orig_run = None
    autoretry.add_autoretry_behaviour(left)
    autoretry.add_autoretry_behaviour(wrapped)
    assert left.run is print
    assert wrapped.run is not print


def classes_of_decorated_functions_are_marked() -> None:
    """The class that Celery makes has the mark, and the function as a static method."""
    seen: list[Any] = []

    class Watched(Task[Any, Any]):
        abstract = True

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            seen.append((cls.__dict__.get("_decorated"), cls.__dict__.get("run")))

    app = Celery("marks", set_as_current=False)

    @app.task(base=Watched, name="marked", shared=False)
    def marked() -> None:
        pass

    app.finalize()
    mark, run = seen[-1]
    assert mark is True
    assert isinstance(run, staticmethod)


def backends_have(name: str) -> Callable[[], None]:
    """Return a check of an attribute that a backend's constructor sets."""

    def check() -> None:
        app = Celery("backends", backend="cache+memory://", set_as_current=False)
        assert name in vars(app.backend)
        assert inspect.getsource(Backend).count(f"self.{name}") > 1, "it is set, and never looked at"

    return check


def states_are_kept_as_ours_are() -> None:
    """The same facts under the same key, written and published in one transaction unless a SUCCESS is there."""
    owner: Any = KeyValueStoreBackend
    redis: Any = RedisBackend
    store, put = inspect.getsource(owner._store_result), inspect.getsource(redis._set)
    assert list(inspect.signature(owner._store_result).parameters)[1:6] == [
        "task_id",
        "result",
        "state",
        "traceback",
        "request",
    ]
    for line in (
        "meta = self._get_result_meta(",
        "meta['task_id'] = ",
        "self.encode(meta)",
        "states.SUCCESS",
    ):
        assert line in store
    for line in ("pipe.setex(key, expires, value)", "pipe.set(key, value)", "pipe.publish(key, value)"):
        assert line in put


def failures_are_told_with_their_request() -> None:
    """By keyword, also where storing a result fails."""
    assert "request" in inspect.signature(Backend.mark_as_failure).parameters
    tracer = inspect.getsource(importlib.import_module("celery.app.trace"))
    assert "mark_as_failure(" in tracer


def values_encode_themselves() -> None:
    """An object with ``__json__`` travels in a message, in the form that a registered decoder reads."""
    text = dumps({"order": Result(Order(order_id="17"))})
    assert '"__type__"' in text
    assert '"__value__"' in text
    make_task(Celery("values", set_as_current=False))
    assert loads(text) == {"order": Order(order_id="17")}


def stacks_of_a_bound_task() -> None:
    """A task has its stack of requests once it is bound."""
    task = make_task(Celery("stacks", set_as_current=False))
    task.request_stack.push(Context(id="seen"))
    assert task.request.id == "seen"
    task.request_stack.pop()


def configuration_has(name: str) -> Callable[[], None]:
    """Return a check of an attribute of ``app.conf``."""
    return lambda: getattr(Celery("conf", set_as_current=False).conf, name)


def attribute_of_app(name: str) -> Callable[[], None]:
    """Return a check of an attribute that an app's constructor sets."""

    def check() -> None:
        assert name in vars(Celery("attributes", set_as_current=False))

    return check


def has_parameter(function: Any, name: str) -> Callable[[], None]:
    """Return a check of a parameter's name."""

    def check() -> None:
        assert name in inspect.signature(function).parameters

    return check


def sources_name(owner: Any, name: str) -> Callable[[], None]:
    """Return a check that the code of a module or class has *name*."""

    def check() -> None:
        assert name in inspect.getsource(owner)

    return check


def rejections_say_why() -> None:
    """The reason of a Reject is its attribute."""
    assert resolve("celery.exceptions.Reject")("no broker").reason == "no broker"


def the_environment_has_its_own_dict() -> None:
    """A variable that is set now is in it, under its encoded name; one that is taken back is not."""
    environ: Any = os.environ
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKET_CELERY_THREADS", "3")
        assert environ.encodekey("DOCKET_CELERY_THREADS") in environ._data
        patch.delenv("DOCKET_CELERY_THREADS")
        assert environ.encodekey("DOCKET_CELERY_THREADS") not in environ._data


def names_are_counted_on() -> None:
    """Psycopg names what it prepares by a number, which can be set."""
    manager, query = PrepareManager(), PostgresRawQuery(Transformer())
    query.convert(b"SELECT $1", [1])
    manager._prepared_idx = 77
    assert manager.get(query, prepare=True)[1] == b"_pg3_77"
    assert manager._prepared_idx == 78


CHECKS: dict[str, Callable[[], None]] = {
    "_prepared": sources_name(BaseConnection, "self._prepared: PrepareManager = PrepareManager()"),
    "_prepared_idx": names_are_counted_on,
    "_orig_run": retries_are_left_alone,
    "_decorated": classes_of_decorated_functions_are_marked,
    "always_retry": backends_have("always_retry"),
    "max_sleep_between_retries_ms": backends_have("max_sleep_between_retries_ms"),
    "_store_result": states_are_kept_as_ours_are,
    "expires": sources_name(RedisBackend, "expires = self.expires"),
    "_MAX_STR_VALUE_SIZE": sources_name(RedisBackend, "len(value) > self._MAX_STR_VALUE_SIZE"),
    "_set_with_state": sources_name(RedisBackend, "def _set_with_state(self, key, value, state)"),
    "mark_as_failure": failures_are_told_with_their_request,
    "request_stack": stacks_of_a_bound_task,
    "add_to_parent": has_parameter(Celery.send_task, "add_to_parent"),
    "redelivered": sources_name(request, "'redelivered'"),
    "reason": rejections_say_why,
    "prefix": configuration_has("prefix"),
    "_keys": configuration_has("_keys"),
    "_key": configuration_has("_key"),
    "pool_cls": sources_name(WorkController, "self.pool_cls = "),
    "concurrency": sources_name(WorkController, "self.concurrency = "),
    "_data": the_environment_has_its_own_dict,
    "encodekey": the_environment_has_its_own_dict,
    "__json__": values_encode_themselves,
    "__type__": values_encode_themselves,
    "_backend_cache": attribute_of_app("_backend_cache"),
    "_local": attribute_of_app("_local"),
    "_producer_pool": lambda: getattr(Celery("amqp", set_as_current=False).amqp, "_producer_pool"),  # noqa: B009
}
"""For what no path leads to, or where the behaviour counts; all other rows are looked up."""


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_each_name_is_where_the_page_says(seam: Seam) -> None:
    """A release of Celery that renames it fails here, by its name."""
    check = CHECKS.get(seam.name)
    if check is None:
        resolve(f"{seam.owner}.{seam.name}")
    else:
        check()


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_each_name_is_used_where_the_page_says(seam: Seam) -> None:
    """A row leaves the page with the last use of its name."""
    assert seam.files
    for file in seam.files:
        assert re.search(rf"\b{seam.name}\b", (PACKAGE / file).read_text(encoding="utf-8")), file


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Yield the package's modules, parsed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported() -> set[str]:
    """Return what the package imports of the libraries, as dotted paths."""
    found: set[str] = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.split(".")[0] in LIBRARIES}
    return found


def foreign_privates() -> dict[str, str]:
    """Return private names that the package reads of an object and defines nowhere, with a file of each."""
    read: dict[str, str] = {}
    defined: set[str] = set()
    for file, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*(?<!__)", node.attr):
                own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
                if own and isinstance(node.ctx, ast.Store):
                    defined.add(node.attr)
                else:
                    read[node.attr] = file
    return {name: file for name, file in read.items() if name not in defined}


def test_every_import_is_listed_or_documented() -> None:
    """What the package imports of the libraries has a row, or is among the documented names."""
    documented = set(re.findall(r"`(\S+?)`", PAGE.partition("## Documented names")[2]))
    listed = {f"{seam.owner}.{seam.name}" for seam in SEAMS}
    found = imported() - {"celery"}
    assert sorted(found - documented - listed) == []
    assert sorted(documented - found) == []


def test_every_private_name_of_others_is_listed() -> None:
    """An underscore that the package reads and defines nowhere is another library's; SQLAlchemy documents one."""
    listed = {"_mapping", *(seam.name for seam in SEAMS)}
    assert {name: file for name, file in foreign_privates().items() if name not in listed} == {}


# --- at the start of a worker --------------------------------------------------------------------------------------


def faults_of(app: Celery) -> str:
    """Return what keeps a worker of *app* from starting."""
    return "\n".join(find_faults(app, "solo", database=False))


def test_a_celery_as_it_should_be_starts() -> None:
    """With autoretry_for, too."""
    app = Celery("right", broker="memory://", backend="cache+memory://", set_as_current=False)
    make_task(app, autoretry_for=(OSError,))
    assert faults_of(app) == ""


def test_a_worker_refuses_a_celery_that_wraps_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attribute renamed, a failed run would be delivered for ever."""

    def add_autoretry_behaviour(task: Any, **_: Any) -> None:
        if getattr(task, "autoretry_for", ()) and not hasattr(task, "_plain_run"):
            task._plain_run, task.run = task.run, functools.partial(task.run)

    monkeypatch.setattr(base, "add_autoretry_behaviour", add_autoretry_behaviour)
    app = Celery("wraps", broker="memory://", backend="cache+memory://", set_as_current=False)
    make_task(app, autoretry_for=(OSError,))
    assert "[DC104] Celery 5." in faults_of(app)
    assert "_orig_run: autoretry_for of task shop.process would deliver a failed run again" in faults_of(app)


@pytest.mark.parametrize("name", ["always_retry", "max_sleep_between_retries_ms"])
def test_a_worker_refuses_a_celery_whose_backends_wait_by_another_name(name: str) -> None:
    """Set on a backend that does not look at it, our value would do nothing."""
    app = Celery("waits", broker="memory://", backend="cache+memory://", set_as_current=False)
    make_task(app)
    delattr(app.backend, name)
    assert f"has changed celery.backends.base.Backend.{name}" in faults_of(app)


def test_a_worker_refuses_a_celery_that_tells_failures_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that Celery no longer calls would not keep a wrong end from callers."""
    app = Celery("tells", broker="memory://", backend="cache+memory://", set_as_current=False)
    make_task(app)
    monkeypatch.setattr(Backend, "mark_as_failure", lambda self, task_id, exc: None)  # noqa: ARG005
    assert "mark_as_failure: callers of a run that succeeded would be told FAILURE" in faults_of(app)


class Starting:
    """A worker of a Celery that calls the class of its pool otherwise."""

    def __init__(self, app: Celery) -> None:
        self.app = app


def test_a_worker_without_a_known_pool_does_not_start() -> None:
    """Else the deadlines that Celery does not enforce outside prefork would not be enforced by anything."""
    app = Celery("pools", broker="memory://", set_as_current=False)
    make_task(app)
    with pytest.raises(SystemExit, match=r"the checks themselves failed: AttributeError: .*'pool_cls'"):
        worker_init.send(sender=Starting(app))
