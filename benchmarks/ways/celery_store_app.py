"""Tasks whose steps persist; a worker of this app needs a database."""

from __future__ import annotations

from celery import Celery
from google.protobuf.wrappers_pb2 import Int64Value

from benchmarks.ways import celery_ready, ours, steps
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
