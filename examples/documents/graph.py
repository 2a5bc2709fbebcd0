"""Split, per page, merge: pages are retried and saved one by one, and come together in their order."""

from __future__ import annotations

from collections.abc import Iterable

from docket_celery import Graph, RetryPolicy
from examples.documents.documents_pb2 import Document, DocumentSummary, Page, PageSummary

document_graph = Graph("documents")


@document_graph.step
def split_pages(document: Document) -> list[Page]:
    """Returns a list, and so opens a fan-out: each page is an item from here on."""
    pages = document.text.split("\f") if document.text else []
    return [Page(number=number, text=text) for number, text in enumerate(pages, 1)]


@document_graph.step(retry=RetryPolicy(max_attempts=3))
def summarize_page(page: Page) -> PageSummary:
    """Runs for each page, beside the others."""
    words = page.text.split()
    return PageSummary(number=page.number, words=len(words), longest_word=max(words, key=len, default=""))


@document_graph.aggregate
def merge_pages(document: Document, pages: Iterable[PageSummary]) -> DocumentSummary:
    """Closes the fan-out: the pages come in their order; of ``Iterable`` it looks at one after the other."""
    merged = DocumentSummary(title=document.title)
    for page in pages:
        merged.pages += 1
        merged.words += page.words
        merged.longest_word = max(merged.longest_word, page.longest_word, key=len)
    return merged


LIBRARY = [
    Document(title="Tides", text="The sea rises twice a day\fand falls as often"),
    Document(title="Blank", text=""),
    Document(title="Winds", text="Trade winds blow\fwestward near the equator\fand eastward elsewhere"),
]
