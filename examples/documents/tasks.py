"""The documents as tasks: each page is an item of its own, spread over all workers of the queue."""

from __future__ import annotations

from celery import Celery

from docket_celery import configure, graph_task
from examples.documents.documents_pb2 import Document, DocumentSummary
from examples.documents.graph import document_graph

app = Celery("examples.documents.tasks")
configure(app)


@graph_task(app, document_graph, chunk_size=1)
def summarize(document: Document) -> DocumentSummary:
    """One document: split in mid-graph, each page a task, merged by the chord's body."""
    raise NotImplementedError


@graph_task(app, document_graph)
def summarize_all(documents: list[Document]) -> list[DocumentSummary]:
    """A batch of documents: each is split, worked on and merged within its own chunk."""
    raise NotImplementedError
