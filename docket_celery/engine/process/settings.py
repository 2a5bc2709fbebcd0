"""The ``docket_*`` settings, their environment twins and their limits."""

from __future__ import annotations

import difflib
import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, cast

from docket_celery.engine.process.hooks import MakeContext, read_hooks
from docket_celery.errors import InvalidSettings
from docket_celery.plan.options import MAX_SECONDS
from docket_celery.store.codec import Codec, find_fault, import_codec

PREFIX: Final = "docket_"
ENV_PREFIX: Final = "DOCKET_CELERY_"
TRUST_MARGIN_S: Final = 5.0
"""A holder stops trusting its lease this long before it expires; described in docs/guarantees.md."""


@functools.cache
def default_threads() -> int:
    """Return min(32, 4 x cores)."""
    return min(32, 4 * (os.cpu_count() or 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Checked values; `Settings.read` builds them.

    Attributes:
        database_url: SQLAlchemy URL of the checkpoint database, or None.
        threads: Most step threads in a process; 0: none, everything on the calling thread.
        lease_seconds: Seconds until another worker may take over a silent run.
        max_deliveries: Crashes after which a run is quarantined.
        max_message_bytes: Largest message accepted, checked before decoding.
        max_stored_bytes: Largest job or result that is stored.
        retention: Seconds an ended run is kept.
        step_hooks: Callables that return a context manager, or their import paths; entered around each step call.
        codec: Encodes what is stored in the database, or None.
        check_mutation: Fail steps that change their inputs; for tests, as it copies every input.
    """

    # Not shown: the password in it.
    database_url: str | None = field(default=None, repr=False)
    threads: int = 0
    lease_seconds: float = 30.0
    max_deliveries: int = 10
    max_message_bytes: int = 1024 * 1024
    max_stored_bytes: int = 64 * 1024 * 1024
    retention: float = 30 * 86400.0
    step_hooks: tuple[MakeContext | str, ...] = ()
    # Not shown: whatever a codec's own repr says.
    codec: Codec | None = field(default=None, repr=False)
    check_mutation: bool = False

    @property
    def max_list_bytes(self) -> int:
        """Most bytes of a list in a Celery message: a quarter of a message, since each item is decoded by itself."""
        return self.max_message_bytes // 4

    @property
    def trust_margin_s(self) -> float:
        """Seconds before expiry at which the holder stops: 5 s, or a sixth of a short lease."""
        return min(TRUST_MARGIN_S, self.lease_seconds / 6)

    @classmethod
    def read(cls, values: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
        """Build settings from ``docket_*`` *values*, then ``DOCKET_CELERY_*`` twins, then the defaults.

        Keys without the prefix are not looked at; None counts as not set. Raises `InvalidSettings` where a
        ``docket_*`` key is unknown, or a value is of the wrong kind or out of range.
        """
        environ = os.environ if environ is None else environ
        for key in values:
            if key.startswith(PREFIX) and key not in _TWINS:
                raise InvalidSettings(key, _unknown(key, PREFIX, [name for name, _ in _TWINS.values()]))
        found: dict[str, Any] = {}
        for key, (name, twin) in _TWINS.items():
            value, label = values.get(key), key
            if value is None and (value := environ.get(twin)) is not None:
                label = twin
            if value is not None:
                found[name] = _CHECKS[name](label, value)
        found.setdefault("threads", default_threads())
        return cls(**found)


def check_environment(environ: Mapping[str, str] | None = None) -> None:
    """Raise `InvalidSettings` for a ``DOCKET_CELERY_*`` variable that no setting reads: it must not go unnoticed."""
    known = [twin.removeprefix(ENV_PREFIX) for _, twin in _TWINS.values()]
    for key in os.environ if environ is None else environ:
        if key.startswith(ENV_PREFIX) and key.removeprefix(ENV_PREFIX).upper() not in known:
            raise InvalidSettings(key, _unknown(key, ENV_PREFIX, known))


def _unknown(key: str, prefix: str, known: list[str]) -> str:
    # Without the prefix, which would make any two look alike.
    close = difflib.get_close_matches(key[len(prefix) :], known, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(prefix + n for n in known)}"
    return f"unknown setting; {hint}"


# Settings are read for each run: what can be known before is.
_TWINS: Final = {
    PREFIX + field.name: (field.name, ENV_PREFIX + field.name.upper()) for field in fields(Settings)
}
_environ: Any = os.environ
ENVIRONMENT: Final[Mapping[Any, Any]] = _environ._data
"""The environment now, encoded; `os.environ` itself raises and catches an error for each variable that is not set."""
VARIABLES: Final = tuple(_environ.encodekey(twin) for _, twin in _TWINS.values())
"""The variables that settings are read from, encoded."""


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidSettings(key, "must be a non-empty string")
    return value


def _codec(key: str, value: Any) -> Codec:
    try:
        found = import_codec(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InvalidSettings(key, str(error)) from error
    if (fault := find_fault(found)) is not None:
        raise InvalidSettings(key, fault)
    return cast("Codec", found)


def _number(least: float, most: float = math.inf, *, whole: bool) -> Callable[[str, Any], Any]:
    def check(key: str, value: Any) -> Any:
        kind = f"{'whole ' if whole else ''}number"
        try:
            number = int(value) if whole else float(value)
            exact = math.isfinite(number) and number == float(value)
        except (TypeError, ValueError, OverflowError):
            raise InvalidSettings(key, f"must be a {kind}, got {value!r}") from None
        if isinstance(value, bool) or not exact or not number >= least:
            raise InvalidSettings(key, f"must be a {kind} of at least {least:g}, got {value!r}")
        if number > most:
            raise InvalidSettings(key, f"must be a {kind} of at most {most:.0f}, got {value!r}")
        return number

    return check


def _switch(key: str, value: Any) -> bool:
    known = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    found = value if isinstance(value, bool) else known.get(str(value).lower())
    if found is None:
        raise InvalidSettings(key, f"must be true or false, got {value!r}")
    return found


_CHECKS: Final[dict[str, Callable[[str, Any], Any]]] = {
    "database_url": _text,
    "threads": _number(0, whole=True),
    "lease_seconds": _number(1, MAX_SECONDS, whole=False),
    "max_deliveries": _number(1, whole=True),
    "max_message_bytes": _number(1, whole=True),
    "max_stored_bytes": _number(1, whole=True),
    "retention": _number(0, MAX_SECONDS, whole=False),
    "step_hooks": read_hooks,
    "codec": _codec,
    "check_mutation": _switch,
}
