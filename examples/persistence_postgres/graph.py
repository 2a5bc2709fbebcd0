"""The graph: one inference that costs time and money, kept in Postgres under a hash of its input."""

from __future__ import annotations

import time
from dataclasses import dataclass

from docket_celery import Graph, Scope
from examples.persistence_postgres.persistence_postgres_pb2 import Document, Sentiment

INFERENCE_S = 0.5
#: Stands for a day: long enough to be hit, short enough to be seen to expire.
TTL_S = 4.0


@dataclass(slots=True, kw_only=True)
class Model:
    """Stands for a paid inference service; its time is real, its answer is not.

    Attributes:
        calls: How often it was asked, so what was paid for.
    """

    calls: int = 0

    def compute(self, document: Document) -> Sentiment:
        """Judge a text."""
        self.calls += 1
        time.sleep(INFERENCE_S)
        words = document.text.split()
        return Sentiment(label="friendly" if "hello" in words else "neutral", words=len(words))


def inference_graph(model: Model, version: str) -> Graph:
    """Return a graph whose one step asks *model*.

    Args:
        model: Asked on a miss.
        version: Part of the key, beside the input: another version of the model shares nothing with this one.
    """
    graph = Graph("examples.persistence_postgres")
    graph.register(model, name="MLInference", persist=Scope.GLOBAL, ttl=TTL_S, version=version)
    graph.validate(Document)
    return graph
