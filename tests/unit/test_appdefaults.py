from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from docket_celery import InvalidSettings, configure
from docket_celery.task.app_defaults import Change

WANTED = {
    "worker_prefetch_multiplier": 1,
    "worker_soft_shutdown_timeout": 30.0,
    "result_chord_expires": 604800,
}
REDIS = {"visibility_timeout": 14400, "unacked_restore_interval": 10, "unacked_restore_throttle": 1}


def make_app(**conf: Any) -> Celery:
    """Return an app of its own with these settings."""
    app = Celery("appdefaults", set_as_current=False)
    app.conf.update(conf)
    return app


def values(changes: tuple[Change, ...]) -> dict[str, Any]:
    """Return the changed keys and their values."""
    return {change.key: change.value for change in changes}


def test_it_returns_what_it_changed_and_what_that_means() -> None:
    """On an app that set nothing: all of it, each with its effect on other tasks."""
    app = make_app(broker_url="redis://localhost")
    changes = configure(app)
    assert values(changes) == WANTED | {"broker_transport_options": REDIS}
    assert {key: app.conf[key] for key in WANTED} == WANTED
    assert app.conf.broker_transport_options == REDIS
    assert all(change.effect for change in changes)


def test_it_changes_nothing_twice() -> None:
    """A second call finds everything in force."""
    app = make_app(broker_url="redis://localhost")
    configure(app)
    assert configure(app) == ()


def test_acknowledgement_of_other_tasks_is_not_its_business() -> None:
    """No other key of the app differs."""
    app, bare = make_app(broker_url="redis://localhost"), make_app(broker_url="redis://localhost")
    changed = values(configure(app))
    assert {key for key in bare.conf if app.conf[key] != bare.conf[key]} == set(changed)


def test_the_users_values_win() -> None:
    """Those set before, and those set after."""
    app = make_app(worker_prefetch_multiplier=8, worker_soft_shutdown_timeout=0)
    assert not {"worker_prefetch_multiplier", "worker_soft_shutdown_timeout"} & values(configure(app)).keys()
    assert (app.conf.worker_prefetch_multiplier, app.conf.worker_soft_shutdown_timeout) == (8, 0)
    app.conf.result_chord_expires = 60
    assert app.conf.result_chord_expires == 60


class Django:
    """A project's settings, one of them Celery's own default, said on purpose."""

    CELERY_WORKER_PREFETCH_MULTIPLIER = 4
    CELERY_BROKER_URL = "redis://localhost"
    CELERY_BROKER_TRANSPORT_OPTIONS = {"visibility_timeout": 60, "global_keyprefix": "x"}  # noqa: RUF012


class OldNames:
    """Settings by the names of Celery 3."""

    CELERYD_PREFETCH_MULTIPLIER = 4


@pytest.mark.parametrize(("source", "namespace"), [(Django, "CELERY"), (OldNames, None)])
def test_a_value_equal_to_celerys_default_is_the_users_too(source: type, namespace: str | None) -> None:
    """Whether somebody set a key is asked, not whether its value differs."""
    app = Celery("appdefaults", set_as_current=False)
    app.config_from_object(source, namespace=namespace)
    assert "worker_prefetch_multiplier" not in values(configure(app))
    assert app.conf.worker_prefetch_multiplier == 4


def test_the_users_transport_options_are_kept_beside_ours() -> None:
    """Only the missing ones are added, and only those are reported."""
    app = Celery("appdefaults", set_as_current=False)
    app.config_from_object(Django, namespace="CELERY")
    added = values(configure(app))["broker_transport_options"]
    assert added == {"unacked_restore_interval": 10, "unacked_restore_throttle": 1}
    assert app.conf.broker_transport_options == {**REDIS, "visibility_timeout": 60, "global_keyprefix": "x"}


@pytest.mark.parametrize(
    ("url", "redis"),
    [
        ("redis://h/0", True),
        ("rediss://h/0", True),
        ("sentinel://h:26379", True),
        ("redis://a;redis://b", True),
        (["redis://a", "redis://b"], True),
        ("amqp://h", False),
        ("memory://", False),
        (None, False),
    ],
)
def test_redis_options_are_for_redis(url: Any, redis: bool) -> None:
    """Another broker would refuse or ignore them."""
    assert ("broker_transport_options" in values(configure(make_app(broker_url=url)))) == redis


def test_a_setting_that_cannot_be_used_is_refused_before_anything_changes() -> None:
    """The app stays as it was."""
    app = make_app(docket_thread=3)
    with pytest.raises(InvalidSettings, match="did you mean docket_threads"):
        configure(app)
    assert app.conf.worker_prefetch_multiplier == 4
