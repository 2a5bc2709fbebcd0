"""pydantic-graph: steps, a broadcast and a join (ai.pydantic.dev, graph/beta/parallel and graph/beta/joins).

Its steps are coroutines. What blocks goes to a thread, as asyncio's own docs advise.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from google.protobuf.wrappers_pb2 import Int64Value

from benchmarks.host import Run
from benchmarks.ways import steps
from benchmarks.ways.peers import load
from examples.parallel.parallel_pb2 import EnrichedUser, UserID


def fan(fetches: tuple[Callable[[UserID], Any], ...], *, aside: bool) -> Any:
    """Return three steps that get the same input, a join that collects their outputs, and a step behind it."""
    library = load("pydantic_graph")
    builder = library.GraphBuilder(input_type=UserID, output_type=EnrichedUser)
    made = [builder.step(_fetch(fetch, aside=aside), node_id=fetch.__name__) for fetch in fetches]
    collect = builder.join(library.reduce_list_append, initial_factory=list)

    async def enrich(context: Any) -> EnrichedUser:
        found = {type(each).__name__: each for each in context.inputs}
        return steps.enrich_user(found["UserProfile"], found["UserPreferences"], found["UserActivity"])

    join = builder.step(enrich, node_id="enrich")
    builder.add(
        builder.edge_from(builder.start_node).to(*made),
        builder.edge_from(*made).to(collect),
        builder.edge_from(collect).to(join),
        builder.edge_from(join).to(builder.end_node),
    )
    return builder.build()


def _fetch(fetch: Callable[[UserID], Any], *, aside: bool) -> Any:
    async def step(context: Any) -> Any:
        if aside:
            return await asyncio.to_thread(fetch, context.inputs)
        return fetch(context.inputs)

    return step


def chain(length: int) -> Any:
    """Return a chain of steps."""
    library = load("pydantic_graph")
    builder = library.GraphBuilder(input_type=Int64Value, output_type=Int64Value)

    async def pass_on(context: Any) -> Int64Value:
        return steps.pass_on(context.inputs)

    nodes = [builder.start_node]
    nodes += [builder.step(pass_on, node_id=f"v{number}") for number in range(length)]
    nodes.append(builder.end_node)
    builder.add(*(builder.edge_from(source).to(target) for source, target in itertools.pairwise(nodes)))
    return builder.build()


@contextmanager
def graphs(_options: Mapping[str, Any]) -> Generator[Mapping[str, Run]]:
    """Graphs that are built once, run on one event loop."""
    with asyncio.Runner() as loop:

        def runs(graph: Any, inputs: object) -> Run:
            async def run(count: int) -> None:
                for _ in range(count):
                    await graph.run(inputs=inputs)

            return lambda count: loop.run(run(count))

        user, value = UserID(id="u"), Int64Value()
        yield {
            "fan": runs(fan(steps.FETCHES, aside=False), user),
            "sleeps": runs(fan(steps.SLOW_FETCHES, aside=True), user),
            "chain_10": runs(chain(10), value),
            "chain_100": runs(chain(100), value),
        }
