"""Tasks whose steps persist; a worker of this app needs a database."""

from __future__ import annotations

import functools
import os
from typing import Any

from celery import Celery
from google.protobuf.wrappers_pb2 import Int64Value

from benchmarks.ways import by_hand, celery_ready, ours, steps
from docket_celery import Scope, configure, graph_task
from examples.parallel.parallel_pb2 import EnrichedUser, UserID

app = Celery("benchmarks.ways.celery_store_app")
configure(app)
celery_ready.prepare(app)

chain_graph = ours.numbered("persisted-chain", steps.chain(4), persist=Scope.WORKFLOW)
fan_graph = ours.enrichment("persisted-fan", persist=Scope.WORKFLOW)


@graph_task(app, chain_graph)
def persisted_chain(value: Int64Value) -> ours.Made:
    """Four steps that persist, one after the other."""
    raise NotImplementedError


@graph_task(app, fan_graph)
def persisted_fan(user: UserID) -> EnrichedUser:
    """Three steps and a join that persist."""
    raise NotImplementedError


@functools.cache
def _connection() -> Any:
    return by_hand.connect({"database": os.environ["DOCKET_CELERY_DATABASE_URL"]})


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True, track_started=True)
def seven_statements(self: Any, user: str) -> None:
    """A plain task that runs seven statements on a connection that its child keeps."""
    del user
    by_hand.run_seven(_connection(), self.request.id)
