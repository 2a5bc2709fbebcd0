"""`configure(app)`: the settings of a whole app that long or durable runs need, each only where the user set none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from celery import Celery

from docket_celery.task import app_settings

_WEEK_S: Final = 7 * 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One setting that `configure` put in force.

    Attributes:
        effect: What it means for the app's other tasks.
    """

    key: str
    value: Any
    effect: str


_WANTED: Final = (
    Change(
        key="worker_prefetch_multiplier",
        value=1,
        effect="a worker reserves no more messages than it has processes, so that long runs do not hold up others",
    ),
    Change(
        key="worker_soft_shutdown_timeout",
        value=30.0,
        effect="a worker told to stop at once gives its tasks 30 s first",
    ),
    Change(
        key="result_chord_expires",
        value=_WEEK_S,
        effect="Redis keeps the counter of an unfinished chord for a week",
    ),
)
_REDIS: Final = {
    "visibility_timeout": 4 * 3600,
    "unacked_restore_interval": 10,
    "unacked_restore_throttle": 1,
}
_REDIS_SCHEMES: Final = ("redis://", "rediss://", "redis+socket://", "unix://", "sentinel://")
_REDIS_EFFECT: Final = (
    "Redis delivers a message again when its worker was silent for 4 hours, and looks for such messages every 10 s; "
    "tasks and countdowns longer than that need more"
)


def configure(app: Celery) -> tuple[Change, ...]:
    """Set what has no per-task form, through ``app.add_defaults``: whatever the user set wins.

    Acknowledgement, retry on a lost worker and the like are attributes of GraphTask and touch no other task.

    Args:
        app: The app to configure; call this once, after its own settings.

    Returns:
        What was changed, and what each change means for other tasks.

    Raises:
        InvalidSettings: A ``docket_*`` setting of the app cannot be used.
    """
    app_settings.check_settings(app)
    conf: Any = app.conf
    changes = [change for change in _WANTED if not conf.value_set_for(change.key)]
    options = dict(app.conf.broker_transport_options or {})
    missing = {key: value for key, value in _REDIS.items() if key not in options}
    if missing and _uses_redis(app):
        # One setting holds all transport options, so the user's are kept beside ours.
        app.conf.broker_transport_options = {**missing, **options}
        changes.append(Change(key="broker_transport_options", value=missing, effect=_REDIS_EFFECT))
    defaults = {change.key: change.value for change in changes if change.key != "broker_transport_options"}
    app.add_defaults(lambda: defaults)
    return tuple(changes)


def _uses_redis(app: Celery) -> bool:
    given: Any = app.conf.broker_url or ""
    urls: list[Any] = given.split(";") if isinstance(given, str) else list(given)
    return any(str(url).startswith(_REDIS_SCHEMES) for url in urls)
