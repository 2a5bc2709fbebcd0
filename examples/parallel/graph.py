"""The graph: three fetches that need a UserID, and a join that needs all three.

Nobody says what runs in parallel. `enrich_user` names what it needs, and each of those can be made from the
UserID alone.
"""

from __future__ import annotations

import time

from docket_celery import Graph
from examples.parallel.parallel_pb2 import EnrichedUser, UserActivity, UserID, UserPreferences, UserProfile

LATENCY_S = 0.1

enrichment = Graph("examples.parallel")


def call_service() -> None:
    """Take as long as a call of a remote service would; the waiting is real, the service is not."""
    time.sleep(LATENCY_S)


@enrichment.step
def fetch_profile(user: UserID) -> UserProfile:
    """Ask the profile service."""
    call_service()
    return UserProfile(id=user.id, name="Alice Example", email="alice@shop.example")


@enrichment.step
def fetch_preferences(user: UserID) -> UserPreferences:
    """Ask the preferences service."""
    call_service()
    return UserPreferences(user_id=user.id, theme="dark", language="en")


@enrichment.step
def fetch_activity(user: UserID) -> UserActivity:
    """Ask the activity service."""
    call_service()
    return UserActivity(user_id=user.id, login_count=42)


@enrichment.step
def enrich_user(profile: UserProfile, preferences: UserPreferences, activity: UserActivity) -> EnrichedUser:
    """Put the three answers together; no service is asked."""
    return EnrichedUser(profile=profile, preferences=preferences, activity=activity)
