"""``python -m examples.struct_step``: the same step with its real client and with a test double."""

from __future__ import annotations

from examples.struct_step.graph import FixedScores, RemoteScores, ScoreClient, WordScorer, scoring_graph
from examples.struct_step.struct_step_pb2 import InputString, LetterCount


def score(client: ScoreClient, prefix: str, word: str) -> LetterCount:
    """Run the graph with *client* injected."""
    graph = scoring_graph(WordScorer(client=client, prefix=prefix))
    return graph.execute(LetterCount, InputString(value=word))


def main() -> None:
    """Print what each client gives for a word."""
    remote = score(RemoteScores(base_url="https://scores.example"), "scored: ", "graph theory")
    print(f"remote client: {remote.original_string} -> {remote.count}")
    double = score(FixedScores(scores={"test": 42}), "test: ", "test")
    print(f"test double:   {double.original_string} -> {double.count}")


if __name__ == "__main__":
    main()
