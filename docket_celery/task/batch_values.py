"""What a batch task's stored result stands for: its messages, those that lie in the database included."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from celery import Celery
from google.protobuf.message import Message

from docket_celery.engine.process.state import process
from docket_celery.engine.stored_items import PAGE, ItemPlace, StoredBatch, StoredItems
from docket_celery.engine.waiting import run_on_pool
from docket_celery.errors import InvalidArguments, InvalidSettings
from docket_celery.plan.batch import BatchResult
from docket_celery.store.contract import BatchStore
from docket_celery.task import app_settings, checks, envelope


def read_batch(app: Celery, value: Any) -> Any:
    """Return what *value* stands for if it is a batch's result; anything else as it is.

    Raises:
        UnknownMessageType, DecodeFailed, PayloadTooLarge: It cannot be read.
        InvalidSettings: It lies in the store, and this process has no ``docket_database_url``.
    """
    if isinstance(value, envelope.Results):
        return value.value
    if isinstance(value, envelope.Reference):
        return load_batch(app, value)
    held: Any = value.results if isinstance(value, BatchResult) else value  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    for each in held if isinstance(held, (list, tuple)) else ():  # pyright: ignore[reportUnknownVariableType]
        if isinstance(each, envelope.Undecodable):
            raise each.error
    return value  # pyright: ignore[reportUnknownVariableType]


def load_batch(app: Celery, reference: envelope.Reference) -> Any:
    """Read a batch's result that did not travel.

    Raises:
        InvalidSettings: This process has no database.
    """
    batch = find_batch(app, reference)
    return run_on_pool(batch.load, app_settings.app_settings(app).threads)


def stream_batch(app: Celery, value: Any) -> Iterator[Message | None]:
    """Yield the results of a batch one after the other, a page of them in memory; None for each that failed.

    Raises:
        InvalidArguments: It is no batch's result.
        InvalidSettings: It lies in the store, and this process has no ``docket_database_url``.
    """
    if isinstance(value, envelope.Reference):
        batch, threads = find_batch(app, value), app_settings.app_settings(app).threads
        for lo in range(0, batch.items.place.total, PAGE):
            yield from run_on_pool(functools.partial(batch.page, lo), threads)
        return
    found = read_batch(app, value)
    held: Any = found.results if isinstance(found, BatchResult) else found  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if not isinstance(held, (list, tuple)):
        raise InvalidArguments("stream", "the task returns one message, not the results of a batch; use get")
    yield from held  # pyright: ignore[reportUnknownVariableType]


def find_batch(app: Celery, reference: envelope.Reference) -> StoredBatch:
    """Return a batch's result that did not travel, not read yet.

    Raises:
        InvalidSettings: This process has no database.
    """
    settings = app_settings.app_settings(app)
    graphs = [task.graph for task in checks.graph_tasks(app) if task.graph.name == reference.graph]
    own = next((graph.store for graph in graphs if graph.store is not None), None)
    store = own if own is not None else process.store(settings.database_url, settings.codec)
    if not isinstance(store, BatchStore):
        problem = (
            f"the result of batch {reference.execution_id!r} is too big to travel and lies in the database; "
            f"set docket_database_url where it is asked for"
        )
        raise InvalidSettings("docket_database_url", problem)
    place = ItemPlace(
        graph=reference.graph,
        execution_id=reference.execution_id,
        names=reference.names,
        kind=envelope.types.find(reference.type),
        total=reference.total,
        failed=reference.errors.keys(),
        job_digest=reference.job_digest,
    )
    items = StoredItems(store, place)
    return StoredBatch(items=items, collects=reference.collects, errors=reference.errors)
