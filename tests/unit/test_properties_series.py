"""Three aggregates in sequence over a thousand items, in random graphs, against plain Python over lists."""

from __future__ import annotations

import os
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from docket_celery.engine.process.settings import Settings
from docket_celery.engine.run_context import Submission
from docket_celery.graph import Graph
from docket_celery.plan.batch import BatchPolicy
from docket_celery.store import MemoryStore
from tests.unit.series import ITEMS, Series, build, draw, in_plain_python, key, money

MORE = float(os.environ.get("PROPERTY_EXAMPLES", "1"))
"""How many times as many examples."""


def run(graph: Graph, series: Series, batch: list[int], threads: int, store: MemoryStore) -> list[int] | int:
    """Run the graph in process and return the numbers it makes."""
    outcome = graph.deliver(
        graph.compiled(key(series.target), (key(ITEMS),), key(ITEMS), collects=not series.single),
        [money(batch)],
        Submission(execution_id="run", policy=BatchPolicy()),
        Settings(threads=threads),
        store=store,
    )
    if outcome.error is not None:
        raise outcome.error
    return outcome.value.cents if series.single else [each.cents for each in outcome.value]


@given(random=st.builds(Random, st.integers(0, 2**32)), threads=st.sampled_from([0, 1, 2, 8]))
@settings(max_examples=max(1, int(10 * MORE)), deadline=None)
def test_three_aggregates_over_a_thousand_items_equal_plain_python(random: Random, threads: int) -> None:
    """Whatever is between them, whatever they look at and on however many threads; and again from what is stored."""
    series, store = draw(random), MemoryStore()
    batch = [random.randrange(1_000_000) for _ in range(1000)]
    graph, expected = build(series), in_plain_python(series, batch)
    assert run(graph, series, batch, threads, store) == expected
    assert run(graph, series, batch, threads, store) == expected
