"""dask.delayed on its threaded scheduler (docs.dask.org, delayed; the default scheduler of delayed values)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from google.protobuf.wrappers_pb2 import Int64Value

from benchmarks.host import Run, repeat
from benchmarks.ways import steps
from benchmarks.ways.peers import load
from examples.parallel.parallel_pb2 import UserID


@contextmanager
def threads(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """A graph of delayed calls that is made once and computed; with a pool of its own, as its docs advise."""
    dask = load("dask")
    user = UserID(id="u")
    with ThreadPoolExecutor(8) as pool, dask.config.set(pool=pool):

        def fan(fetches: tuple[Callable[[UserID], Any], ...]) -> Callable[[], object]:
            made: Any = dask.delayed(steps.enrich_user)(*(dask.delayed(fetch)(user) for fetch in fetches))
            compute: Callable[[], object] = made.compute
            return compute

        def chain(length: int) -> Callable[[], object]:
            made: Any = Int64Value()
            for _ in range(length):
                made = dask.delayed(steps.pass_on)(made)
            compute: Callable[[], object] = made.compute
            return compute

        yield {
            "fan": repeat(fan(steps.FETCHES)),
            "sleeps": repeat(fan(steps.SLOW_FETCHES)),
            "chain_10": repeat(chain(10)),
            "chain_100": repeat(chain(100)),
        }
