"""The scenario as it is printed: the plan, the run as it happens, what was measured."""

from __future__ import annotations

from examples.parallel.graph import enrichment
from examples.parallel.parallel_pb2 import EnrichedUser, UserID
from examples.parallel.timeline import Timeline


def show_parallel() -> tuple[EnrichedUser, Timeline]:
    """Run the graph once, print it, and return the user and the figures."""
    print("Execution plan:")
    for number, step in enumerate(enrichment.plan(EnrichedUser, UserID), 1):
        print(f"   {number}. {step}")

    timeline = Timeline()
    enrichment.listeners.append(timeline)
    print("\nExecuting:")
    try:
        user = enrichment.execute(EnrichedUser, UserID(id="user-123"))
    finally:
        enrichment.listeners.remove(timeline)

    print("\nMeasured:")
    print(f"   Total time:      {timeline.total_s * 1000:.0f} ms")
    print(f"   Max concurrent:  {timeline.most_running}")
    print(f"   If sequential:   {timeline.sequential_s * 1000:.0f} ms (the steps' own times, added up)")
    print(f"   Speed-up:        {timeline.sequential_s / timeline.total_s:.1f}x")
    return user, timeline
