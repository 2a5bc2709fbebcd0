"""``python -m examples.documents``: one document by its pages, then a batch of documents, each by its pages."""

from __future__ import annotations

from examples.documents.documents_pb2 import DocumentSummary
from examples.documents.graph import LIBRARY, document_graph


def show(summary: DocumentSummary) -> None:
    """Print one line."""
    longest = f", longest {summary.longest_word!r}" if summary.longest_word else ""
    print(f"{summary.title}: {summary.pages} pages, {summary.words} words{longest}")


def main() -> None:
    """Print the plan and the summaries."""
    print("plan:", " -> ".join(document_graph.plan(DocumentSummary)))
    show(document_graph.execute(DocumentSummary, LIBRARY[0]))
    print("all three:")
    for summary in document_graph.execute_batch(DocumentSummary, LIBRARY):
        show(summary)


if __name__ == "__main__":
    main()
