"""Graphs of no-op steps in process, against the same work written by hand."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Annotated, cast

from google.protobuf import wrappers_pb2 as w
from google.protobuf.message import Message

from benchmarks.measure import Figure, compare
from docket_celery import Graph, Named
from docket_celery.engine.process.settings import default_threads
from examples.parallel.parallel_pb2 import EnrichedUser, UserActivity, UserID, UserPreferences, UserProfile

CHAIN: tuple[type[Message], ...] = (
    w.BoolValue,
    w.BytesValue,
    w.DoubleValue,
    w.FloatValue,
    w.Int32Value,
    w.Int64Value,
    w.StringValue,
    w.UInt32Value,
    w.UInt64Value,
)
"""Types of a chain: the first is given, each step makes the next."""


def fetch_profile(user: UserID) -> UserProfile:
    """Return a profile at once."""
    return UserProfile(id=user.id)


def fetch_preferences(user: UserID) -> UserPreferences:
    """Return preferences at once."""
    return UserPreferences(user_id=user.id)


def fetch_activity(user: UserID) -> UserActivity:
    """Return activity at once."""
    return UserActivity(user_id=user.id)


def enrich_user(profile: UserProfile, preferences: UserPreferences, activity: UserActivity) -> EnrichedUser:
    """Join the three."""
    return EnrichedUser(profile=profile, preferences=preferences, activity=activity)


def fan_and_join() -> Figure:
    """Three fetches and a join: docket_celery against a ThreadPoolExecutor used by hand."""
    graph = Graph("bench-enrichment")
    for step in (fetch_profile, fetch_preferences, fetch_activity, enrich_user):
        graph.register(step)
    user = UserID(id="u")
    with ThreadPoolExecutor(default_threads()) as pool:

        def by_hand() -> EnrichedUser:
            profile, preferences = pool.submit(fetch_profile, user), pool.submit(fetch_preferences, user)
            activity = pool.submit(fetch_activity, user)
            joined = pool.submit(enrich_user, profile.result(), preferences.result(), activity.result())
            return joined.result()

        return compare(
            "enrichment, 4 no-op steps",
            lambda: graph.execute(EnrichedUser, user),
            "ThreadPoolExecutor",
            by_hand,
            calls=1000,
            rounds=9,
        )


def chain() -> tuple[Figure, float]:
    """A chain of no-op steps against direct calls; also the µs that each step costs over them."""
    graph = Graph("bench-chain")
    steps = list(_links())
    for number, step in enumerate(steps):
        graph.register(step, name=f"link{number}")
    first = CHAIN[0]()

    def direct() -> Message:
        value: Message = first
        for step in steps:
            value = step(value)
        return value

    figure = compare(
        f"chain of {len(steps)} no-op steps",
        lambda: graph.execute(CHAIN[-1], first),
        "direct calls",
        direct,
        calls=1000,
        rounds=9,
    )
    return figure, (figure.ours_s - figure.theirs_s) / len(steps) * 1e6


def _links() -> Iterator[Callable[[Message], Message]]:
    for source, target in pairwise(CHAIN):

        def link(value: Message, make: type[Message] = target) -> Message:  # noqa: ARG001 -- only its type counts
            return make()

        link.__annotations__ = {"value": source, "return": target}
        yield cast("Callable[[Message], Message]", link)


def validate(steps: int) -> float:
    """Return the seconds that reading and checking a graph of *steps* steps takes, each of three inputs."""
    graph = Graph("bench-validate")
    for number in range(steps):

        def body(*values: w.Int64Value) -> w.Int64Value:
            return values[0]

        sources = [f"v{source}" for source in range(max(0, number - 3), number)]
        body.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in sources]
        )
        kinds = {name: Annotated[w.Int64Value, Named(name)] for name in sources}
        body.__annotations__ = {**kinds, "return": Annotated[w.Int64Value, Named(f"v{number}")]}
        graph.register(body, name=f"v{number}")
    began = time.perf_counter()
    graph.validate()
    return time.perf_counter() - began


def main() -> None:
    """Print the figures."""
    print(fan_and_join())
    figure, over_us = chain()
    print(figure)
    print(f"{'':<38} {over_us:>21.1f} µs a step over direct calls")
    print(f"{'validate 10,000 steps, 30,000 edges':<38} {validate(10_000):>23.2f} s   (budget: 1 s)")
