"""Hamilton: functions of a module, a driver that is built once (hamilton.apache.org, concepts/driver)."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from google.protobuf.wrappers_pb2 import Int64Value

from benchmarks.host import Run, repeat
from benchmarks.ways import steps
from benchmarks.ways.peers import load
from examples.parallel.parallel_pb2 import UserID

USER, VALUE = UserID(id="u"), Int64Value()
NAMES = itertools.count()


def module_of(source: str) -> ModuleType:
    """Return a module with what *source* defines: Hamilton reads names and annotations of a module's functions."""
    module = ModuleType(f"hamilton_steps_{next(NAMES)}")
    module.__dict__.update(steps.__dict__, __name__=module.__name__)
    sys.modules[module.__name__] = module
    exec(source, module.__dict__)  # noqa: S102 -- made a few lines above its calls, of numbers alone
    return module


def fan_source(prefix: str) -> str:
    """Return three fetches and a join: a function is named as what it makes, a parameter as what it takes."""
    fetches = {"profile": "UserProfile", "preferences": "UserPreferences", "activity": "UserActivity"}
    defined = [
        f"def {name}(user: UserID) -> {kind}:\n    return {prefix}_{name}(user)\n"
        for name, kind in fetches.items()
    ]
    taken = ", ".join(f"{name}: {kind}" for name, kind in fetches.items())
    joined = f"def enriched({taken}) -> EnrichedUser:\n    return enrich_user({', '.join(fetches)})\n"
    return "\n".join([*defined, joined])


def numbered_source(graph: Sequence[Sequence[int]]) -> str:
    """Return the source of the steps of *graph*."""
    return "\n".join(
        f"def v{number}({', '.join(f'v{source}: Int64Value' for source in sources)}) -> Int64Value:\n"
        f"    return v{sources[0]}\n"
        for number, sources in enumerate(graph, start=1)
    )


def build(source: str, *adapters: Any) -> Any:
    """Return a driver over the functions of *source* that returns a dict of what is asked for."""
    driver, base = load("hamilton.driver"), load("hamilton.base")
    builder = driver.Builder().with_modules(module_of(source))
    return builder.with_adapters(*(adapters or (base.DictResult(),))).build()


def execution(driver: Any, target: str, **inputs: object) -> Callable[[], object]:
    """Return a call that makes *target*."""
    return lambda: driver.execute([target], inputs=inputs)


@contextmanager
def sequential(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """The default: one step after the other on the calling thread."""
    figures = {
        "fan": repeat(execution(build(fan_source("fetch")), "enriched", user=USER)),
        "sleeps": repeat(execution(build(fan_source("slow")), "enriched", user=USER)),
    }
    for length in (10, 100):
        driver = build(numbered_source(steps.chain(length)))
        figures[f"chain_{length}"] = repeat(execution(driver, f"v{length}", v0=VALUE))
    yield figures


@contextmanager
def threads(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """FutureAdapter, which its docstring advises for I/O: each step on a pool's thread, results as a dict."""
    adapter = load("hamilton.plugins.h_threadpool").FutureAdapter
    dict_result = load("hamilton.base").DictResult
    yield {
        name: repeat(
            execution(
                build(fan_source(prefix), adapter(max_workers=8, result_builder=dict_result())),
                "enriched",
                user=USER,
            )
        )
        for name, prefix in (("fan", "fetch"), ("sleeps", "slow"))
    }


@contextmanager
def random_graphs(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Large graphs: the driver is built, and run. Python's depth of calls is raised for the walk over the graph."""
    sys.setrecursionlimit(100_000)
    figures: dict[str, Run] = {}
    for size in (1000, 10_000):
        source = numbered_source(steps.random_graph(size))
        figures[f"compile_{size}"] = repeat(_building(source))
        figures[f"run_{size}"] = _running(source, size)
    yield figures


def _building(source: str) -> Callable[[], object]:
    module = module_of(source)
    driver, base = load("hamilton.driver"), load("hamilton.base")
    return lambda: driver.Builder().with_modules(module).with_adapters(base.DictResult()).build()


def _running(source: str, size: int) -> Run:
    built: list[Callable[[], object]] = []

    def run(count: int) -> None:
        if not built:
            built.append(execution(build(source), f"v{size}", v0=VALUE))
        repeat(built[0])(count)

    return run
