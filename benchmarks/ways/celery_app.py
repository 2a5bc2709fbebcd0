"""Tasks that keep nothing: the addresses of the servers come from the environment.

The plain tasks have the options that a GraphTask has of its own.
"""

from __future__ import annotations

import time
from typing import Any

from celery import Celery, chord, group
from google.protobuf.wrappers_pb2 import Int64Value

from benchmarks.ways import celery_ready, ours
from docket_celery import Graph, configure, graph_task
from examples.parallel.parallel_pb2 import EnrichedUser, UserID

app = Celery("benchmarks.ways.celery_app")
configure(app)
celery_ready.prepare(app)
one_graph = Graph("one")


@one_graph.step
def stamp(user: UserID) -> Int64Value:
    """Return the time at which it ran, in nanoseconds."""
    del user
    return Int64Value(value=time.time_ns())


four_graph = ours.enrichment("four")


@graph_task(app, one_graph)
def one(user: UserID) -> Int64Value:
    """One step that does nothing."""
    raise NotImplementedError


@graph_task(app, four_graph)
def four(user: UserID) -> EnrichedUser:
    """Three steps and a join that do nothing."""
    raise NotImplementedError


@app.task(acks_late=True, reject_on_worker_lost=True, track_started=True)
def no_op(user: str) -> int:
    """Return the time at which it ran, in nanoseconds."""
    del user
    return time.time_ns()


@app.task(acks_late=True, reject_on_worker_lost=True, track_started=True)
def fetch(user: str) -> str:
    """A step of the canvas."""
    return user


@app.task(acks_late=True, reject_on_worker_lost=True, track_started=True)
def join(found: list[str]) -> int:
    """The body of the canvas's chord."""
    del found
    return time.time_ns()


def send_canvas(user: str) -> Any:
    """Send three tasks and a join as Celery's docs do it: a chord of a group."""
    header: Any = group(fetch.s(user) for _ in range(3))
    return chord(header)(join.s())
