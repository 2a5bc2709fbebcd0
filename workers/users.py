"""Users: three services asked at once, their answers put together. Nothing is kept: no database call."""

from __future__ import annotations

from docket_celery import Graph, RetryPolicy, graph_task
from workers.celery import app
from workers.providers import Users
from workers.users_pb2 import EnrichedUser, UserActivity, UserID, UserPreferences, UserProfile

users = Users()

enrichment = Graph("users")


@enrichment.step(retry=RetryPolicy(max_attempts=3))
def fetch_profile(user: UserID) -> UserProfile:
    """Ask who the user is."""
    profile = users.profile(user.id)
    return UserProfile(id=user.id, name=profile.name, email=profile.email)


@enrichment.step(retry=RetryPolicy(max_attempts=3))
def fetch_preferences(user: UserID) -> UserPreferences:
    """Ask what the user chose."""
    preferences = users.preferences(user.id)
    return UserPreferences(user_id=user.id, theme=preferences.theme, language=preferences.language)


@enrichment.step(retry=RetryPolicy(max_attempts=3))
def fetch_activity(user: UserID) -> UserActivity:
    """Ask what the user did."""
    return UserActivity(user_id=user.id, login_count=users.logins(user.id))


@enrichment.step
def combine(profile: UserProfile, preferences: UserPreferences, activity: UserActivity) -> EnrichedUser:
    """Put the answers together."""
    return EnrichedUser(profile=profile, preferences=preferences, activity=activity)


@graph_task(app, enrichment)
def enrich_user(user: UserID) -> EnrichedUser:
    """Collect all there is to know of a user."""
    raise NotImplementedError
