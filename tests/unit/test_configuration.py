from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from docket_celery.engine.process.heartbeat import Heartbeat
from docket_celery.engine.process.settings import Settings, check_environment, default_threads
from docket_celery.engine.process.state import Process
from docket_celery.errors import InvalidSettings
from docket_celery.store import MemoryStore
from docket_celery.testing.clocks import FakeClock


def test_defaults_are_the_documented_ones() -> None:
    """Nothing set gives the table of the design."""
    found = Settings.read({}, {})
    assert found == Settings(
        database_url=None,
        threads=default_threads(),
        lease_seconds=30.0,
        max_deliveries=10,
        max_message_bytes=1024 * 1024,
        retention=30 * 86400.0,
    )
    assert found.trust_margin_s == 5.0


def test_values_win_over_the_environment() -> None:
    """`app.conf`, then ``DOCKET_CELERY_*``, then the default; None counts as not set."""
    environ = {
        "DOCKET_CELERY_THREADS": "3",
        "DOCKET_CELERY_LEASE_SECONDS": "12.5",
        "DOCKET_CELERY_MAX_DELIVERIES": "4",
    }
    found = Settings.read(
        {"docket_threads": 5, "docket_lease_seconds": None, "broker_url": "redis://"}, environ
    )
    assert (found.threads, found.lease_seconds, found.max_deliveries) == (5, 12.5, 4)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("docket_databse_url", "did you mean docket_database_url"),
        ("docket_zzz", "known: docket_database_url"),
    ],
)
def test_unknown_settings_are_refused_with_the_nearest(key: str, text: str) -> None:
    """A slip of the keyboard must not switch persistence off."""
    with pytest.raises(InvalidSettings, match=text):
        Settings.read({key: "x"}, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("docket_threads", -1),
        ("docket_threads", 2.5),
        ("docket_threads", "many"),
        ("docket_threads", True),
        ("docket_threads", float("inf")),
        ("docket_lease_seconds", 0.5),
        ("docket_lease_seconds", float("nan")),
        ("docket_lease_seconds", float("inf")),
        ("docket_max_deliveries", -1),
        ("docket_max_message_bytes", [1]),
        ("docket_retention", 10**400),
        ("docket_retention", 1e13),
        ("docket_lease_seconds", 1e13),
        ("docket_database_url", ""),
        ("docket_database_url", 5),
    ],
)
def test_values_that_cannot_be_used_are_refused(key: str, value: Any) -> None:
    """The error names the setting."""
    with pytest.raises(InvalidSettings, match=f"setting {key}: must be"):
        Settings.read({key: value}, {})


def test_a_bad_environment_names_the_variable() -> None:
    """Whoever reads the error knows where the value came from."""
    with pytest.raises(InvalidSettings, match="setting DOCKET_CELERY_THREADS: must be a whole number"):
        Settings.read({}, {"DOCKET_CELERY_THREADS": "four"})


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("DOCKET_CELERY_DATABSE_URL", "did you mean DOCKET_CELERY_DATABASE_URL"),
        ("DOCKET_CELERY_HEARTBEAT", "known: DOCKET_CELERY_DATABASE_URL"),
    ],
)
def test_unknown_variables_are_refused_with_the_nearest(key: str, text: str) -> None:
    """A misspelt twin would leave the setting unset without a word; other programs' variables are theirs."""
    check_environment({"DOCKET_CELERY_THREADS": "3", "DOCKET_HOST": "x", "PATH": "/bin"})
    with pytest.raises(InvalidSettings, match=f"setting {key}: unknown setting; {text}"):
        check_environment({"PATH": "/bin", key: "x"})


def test_a_lease_is_extended_every_quarter_of_it() -> None:
    """30 seconds every 7.5; of several leases and claims the shortest decides."""
    store = MemoryStore()
    beats = Heartbeat(store, FakeClock())
    assert beats.beat_if_due() is None
    beats.watch_claim(b"key", "owner", 30.0)
    assert beats.beat_if_due() == 7.5
    beats.watch_claim(b"other", "owner", 2.0)
    assert beats.beat_if_due() == 0.5


@pytest.mark.parametrize(("lease", "margin"), [(30, 5.0), (60, 5.0), (6, 1.0), (1, 1 / 6)])
def test_a_holder_stops_before_its_lease_ends(lease: float, margin: float) -> None:
    """5 seconds early, or a sixth of a short lease, so that there is always time left to work."""
    assert Settings(lease_seconds=lease).trust_margin_s == pytest.approx(margin)


def test_settings_do_not_show_the_password_of_their_url() -> None:
    """They end up in logs and in the frames that error trackers keep."""
    shown = Settings.read({"docket_database_url": "postgresql://shop:s3cret-word@host/name"})
    assert "s3cret-word" not in repr(shown)
    assert "threads=" in repr(shown)


def test_settings_are_read_again_where_one_has_changed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is set, changed or removed between two runs counts for the next; else nothing is read."""
    process, reads, read = Process(), list[Settings](), Settings.read

    def note(values: Mapping[str, Any]) -> Settings:
        reads.append(read(values))
        return reads[-1]

    monkeypatch.setattr(Settings, "read", note)
    monkeypatch.delenv("DOCKET_CELERY_THREADS", raising=False)
    first = process.settings()
    assert process.settings() is first
    for value in ("3", "4"):
        monkeypatch.setenv("DOCKET_CELERY_THREADS", value)
        assert [process.settings().threads, process.settings().threads] == [int(value)] * 2
    monkeypatch.delenv("DOCKET_CELERY_THREADS")
    assert process.settings() == first
    process.set({"docket_lease_seconds": 7})
    assert [process.settings().lease_seconds, process.settings().lease_seconds] == [7, 7]
    # One of them to check what is set.
    assert len(reads) == 6


def test_a_list_that_was_set_is_kept_as_it_was() -> None:
    """Hooks that are added to the list later were never checked."""
    process, hooks = Process(), ["package.module:hook"]
    process.set({"docket_step_hooks": hooks})
    hooks.append("package.module:other")
    assert process.settings().step_hooks == ("package.module:hook",)
