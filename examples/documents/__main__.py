"""``python -m examples.documents``: a document by its pages, then several; in process and on a worker."""

from __future__ import annotations

import sys

from examples import local
from examples.documents.documents_pb2 import DocumentSummary
from examples.documents.graph import LIBRARY, document_graph


def show(summary: DocumentSummary) -> None:
    """Print one line."""
    longest = f", longest {summary.longest_word!r}" if summary.longest_word else ""
    print(f"{summary.title}: {summary.pages} pages, {summary.words} words{longest}")


def show_in_process() -> list[DocumentSummary]:
    """Print the plan and the summaries."""
    print("plan:", " -> ".join(document_graph.plan(DocumentSummary)))
    show(document_graph.execute(DocumentSummary, LIBRARY[0]))
    print("all three:")
    summaries = document_graph.execute_batch(DocumentSummary, LIBRARY)
    for summary in summaries:
        show(summary)
    return summaries


def main() -> bool:
    """Summarize here, then on a worker, and compare."""
    expected = show_in_process()
    with local.local_worker("examples.documents.tasks"):
        from examples.documents.tasks import summarize, summarize_all

        one = summarize.delay(LIBRARY[0]).get(timeout=60) == expected[0]
        every = summarize_all.delay(LIBRARY).get(timeout=60) == expected
    print(f"on a worker: one {'the same' if one else 'differs'}, all {'the same' if every else 'differ'}")
    return one and every


if __name__ == "__main__":
    sys.exit(local.run(main))
