"""Three lifetimes: the scorer lives as long as the graph, the context as long as a run, the messages flow.

An object with a ``compute`` method is a step. What it needs for longer than one run comes in through its
constructor, so that a test hands in something else and changes nothing in the step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from docket_celery import Graph, StepContext
from examples.struct_step.struct_step_pb2 import InputString, LetterCount


class ScoreClient(Protocol):
    """What the step needs of a scoring service."""

    def lookup(self, word: str) -> int:
        """Return the score of *word*."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteScores:
    """Stands for a client of a remote service; it pretends the network and counts letters.

    Args:
        base_url: Where the service would be.
        latency_s: How long one call takes.
    """

    base_url: str
    latency_s: float = 0.1

    def lookup(self, word: str) -> int:
        """Return the number of letters in *word*, after a network's time."""
        time.sleep(self.latency_s)
        return sum(character.isalpha() for character in word)


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedScores:
    """The test double: answers from a table, at once."""

    scores: Mapping[str, int]

    def lookup(self, word: str) -> int:
        """Return the score written down for *word*."""
        return self.scores[word]


@dataclass(frozen=True, slots=True, kw_only=True)
class WordScorer:
    """Scores one word.

    Args:
        client: Shared by all runs of the process.
        prefix: Put before the word in the result.
    """

    client: ScoreClient
    prefix: str

    def compute(self, word: InputString, ctx: StepContext) -> LetterCount:
        """Look the word up."""
        ctx.logger.info("scoring %d characters", len(word.value))
        return LetterCount(original_string=self.prefix + word.value, count=self.client.lookup(word.value))


def scoring_graph(scorer: WordScorer) -> Graph:
    """Return a graph whose one step is *scorer*."""
    graph = Graph("examples.struct_step")
    graph.register(scorer, name="score_word")
    graph.validate(InputString)
    return graph
