"""The steps that all ways run, and the graphs that are made of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from google.protobuf.wrappers_pb2 import Int64Value

from examples.parallel.parallel_pb2 import EnrichedUser, UserActivity, UserID, UserPreferences, UserProfile

SLEEP_S = 0.05


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


FETCHES = (fetch_profile, fetch_preferences, fetch_activity)


def slow_profile(user: UserID) -> UserProfile:
    """Return a profile after a while."""
    time.sleep(SLEEP_S)
    return fetch_profile(user)


def slow_preferences(user: UserID) -> UserPreferences:
    """Return preferences after a while."""
    time.sleep(SLEEP_S)
    return fetch_preferences(user)


def slow_activity(user: UserID) -> UserActivity:
    """Return activity after a while."""
    time.sleep(SLEEP_S)
    return fetch_activity(user)


SLOW_FETCHES = (slow_profile, slow_preferences, slow_activity)

Body = Callable[..., Int64Value]


def pass_on(value: Int64Value) -> Int64Value:
    """Return what came: a step of a chain."""
    return value


def first_of(*values: Int64Value) -> Int64Value:
    """Return the first: a step with several inputs."""
    return values[0]


def random_graph(steps: int) -> list[list[int]]:
    """Return each step's inputs as numbers of values: 0 is given, step n makes value n.

    Each step takes up to three of the 100 values before its own; the last one takes all that nobody else does, so
    that it needs every step.
    """
    chance = random.Random(steps)
    sources: list[list[int]] = []
    unread = {0}
    for made in range(1, steps):
        window = range(max(0, made - 100), made)
        taken = sorted(chance.sample(window, min(len(window), chance.randint(1, 3))))
        unread.difference_update(taken)
        unread.add(made)
        sources.append(taken)
    return [*sources, sorted(unread)]


def chain(length: int) -> list[list[int]]:
    """Return the inputs of a chain of that many steps, as `random_graph` does."""
    return [[made] for made in range(length)]


def run_in_order(graph: Sequence[Sequence[int]], given: Int64Value) -> Int64Value:
    """Call each step of *graph* once, by hand."""
    values = [given]
    for sources in graph:
        values.append(first_of(*(values[source] for source in sources)))
    return values[-1]
