"""Tasks whose costs on each server are measured; all steps do nothing."""

from __future__ import annotations

from celery import Celery
from google.protobuf.wrappers_pb2 import Int64Value

from benchmarks.ways import celery_ready, ours, steps
from docket_celery import Graph, Scope, configure, graph_task

app = Celery("benchmarks.ways.scaling_app")
configure(app)
celery_ready.prepare(app)

plain_graph = ours.numbered("plain", steps.chain(4))
persisted_graphs = {
    n: ours.numbered(f"persisted-{n}", steps.chain(n), persist=Scope.WORKFLOW) for n in (1, 4, 8)
}
hits_graph = ours.numbered("hits", steps.chain(4), persist=Scope.GLOBAL)
items_graph = Graph("items")


@items_graph.step
def look_at(value: Int64Value) -> ours.Made:
    """Do nothing with an item."""
    return ours.Made(value=value.value)


@graph_task(app, plain_graph)
def plain(value: Int64Value) -> ours.Made:
    """Four steps of which nothing is kept."""
    raise NotImplementedError


@graph_task(app, persisted_graphs[1])
def persisted_1(value: Int64Value) -> ours.Made:
    """One step that persists."""
    raise NotImplementedError


@graph_task(app, persisted_graphs[4])
def persisted_4(value: Int64Value) -> ours.Made:
    """Four steps that persist, one after the other."""
    raise NotImplementedError


@graph_task(app, persisted_graphs[8])
def persisted_8(value: Int64Value) -> ours.Made:
    """Eight steps that persist, one after the other."""
    raise NotImplementedError


@graph_task(app, hits_graph)
def hits_4(value: Int64Value) -> ours.Made:
    """Four steps that are all found in the shared cache."""
    raise NotImplementedError


@graph_task(app, items_graph)
def items(values: list[Int64Value]) -> list[ours.Made]:
    """A batch: one step an item, whose outputs are kept until the end of the run."""
    raise NotImplementedError
