"""Random graphs of three aggregates in sequence, made from seeds: the same ones in the worker and in the test."""

from __future__ import annotations

from random import Random
from typing import Any

from celery import Celery

from docket_celery import graph_task
from tests.unit.series import Series, build, declare, draw

app = Celery("tests.integration.apps.serial")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1

# A list of items over two raw looks and a chain behind; one message behind lists and iterables, two columns at once;
# a list with an asynchronous last step.
SEEDS = (2, 4, 11)
SERIES: dict[int, Series] = {seed: draw(Random(seed)) for seed in SEEDS}
TASKS: dict[int, Any] = {
    seed: graph_task(app, build(series, f"series-{seed}"), name=f"serial.series_{seed}", chunk_size=50)(
        declare(series)
    )
    for seed, series in SERIES.items()
}
