"""What a step asks for: scope, retries, backoff and the other options."""

from __future__ import annotations

import difflib
import enum
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypedDict, cast

if TYPE_CHECKING:
    # Settings use this module's limits, and pytest loads them in every environment: nothing heavy comes with them.
    from google.protobuf.message import Message

Seconds = float | int | timedelta
Uniform = Callable[[float, float], float]
"""Draws a number between two, as `random.uniform` does."""
MAX_SECONDS = 100 * 366 * 86400.0
"""Longer waits are mistakes, and over what the platform's clocks take."""


def to_seconds(value: Seconds, name: str) -> float:
    """Return *value* in seconds; ValueError, which says *name*: it is negative, infinite, or not a number."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise ValueError(f"{name} must be seconds or a timedelta, not {value!r}")
    if not seconds >= 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")
    if seconds > MAX_SECONDS:
        raise ValueError(f"{name} must be at most {MAX_SECONDS:.0f} seconds (a century), got {value!r}")
    return float(seconds)


class Scope(enum.Enum):
    """Who shares a checkpoint."""

    GLOBAL = "global"
    """Every run that calls the step with equal inputs: a cache."""
    WORKFLOW = "workflow"
    """The one run that made it, through every retry and redelivery."""


class Backoff(Protocol):
    """How long to wait before the next attempt."""

    def delay_s(self, attempt: int, uniform: Uniform = random.uniform) -> float:
        """Return the seconds to wait after *attempt* (from 1) failed; *uniform* draws the jitter."""
        ...


@dataclass(frozen=True, slots=True)
class ExponentialBackoff:
    """Wait ``initial``, ``initial * factor``, ... seconds, at most ``maximum``.

    Args:
        initial: Seconds (or timedelta) after the first failure.
        factor: What each further wait is multiplied by; at least 1.
        maximum: Upper bound in seconds.
        jitter: Draw each wait evenly from 0 to its full length, so that failures do not return in step.
    """

    initial: Seconds = 0.1
    factor: float = 2.0
    maximum: Seconds = 10.0
    jitter: bool = True

    def __post_init__(self) -> None:
        to_seconds(self.initial, "ExponentialBackoff.initial")
        to_seconds(self.maximum, "ExponentialBackoff.maximum")
        if not self.factor >= 1:
            raise ValueError(f"ExponentialBackoff.factor must be at least 1, got {self.factor!r}")

    def delay_s(self, attempt: int, uniform: Uniform = random.uniform) -> float:
        initial, maximum = to_seconds(self.initial, "initial"), to_seconds(self.maximum, "maximum")
        try:
            full = min(maximum, initial * self.factor ** (attempt - 1))
        except OverflowError:
            full = maximum
        return uniform(0.0, full) if self.jitter else full


@dataclass(frozen=True, slots=True)
class FixedBackoff:
    """Wait *delay* seconds (or a timedelta) after every failure."""

    delay: Seconds

    def __post_init__(self) -> None:
        to_seconds(self.delay, "FixedBackoff.delay")

    def delay_s(self, attempt: int, uniform: Uniform = random.uniform) -> float:  # noqa: ARG002 -- always the same
        return to_seconds(self.delay, "delay")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a step is called and how long to wait in between.

    Args:
        max_attempts: Calls in one delivery, the first included; at least 1.
        backoff: The wait before each further call.
        redeliver: When the attempts are used up, let Celery deliver the run again later instead of failing it.

    Raises:
        TypeError: An argument does not exist.
        ValueError: A value cannot be used.
    """

    max_attempts: int = 3
    backoff: Backoff = ExponentialBackoff()
    redeliver: bool = False

    if not TYPE_CHECKING:

        def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: ARG004 -- __init__ takes them
            unknown = sorted(set(kwargs) - {"max_attempts", "backoff", "redeliver"})
            if unknown:
                raise TypeError(
                    f"RetryPolicy has no {', '.join(unknown)}; it takes max_attempts, which counts the first call "
                    "(max_retries elsewhere does not), backoff and redeliver"
                )
            return object.__new__(cls)

    def __post_init__(self) -> None:
        if not is_count(self.max_attempts):
            raise ValueError(
                f"RetryPolicy.max_attempts counts the first call, so at least 1; got {self.max_attempts!r}"
            )
        if not callable(getattr(self.backoff, "delay_s", None)):
            raise ValueError(
                f"RetryPolicy.backoff must be FixedBackoff(...), ExponentialBackoff(...) or have delay_s(), "
                f"got {self.backoff!r}"
            )


ErrorClassifier = Callable[[BaseException], bool] | type[BaseException] | tuple[type[BaseException], ...]
"""What may be retried: a predicate over the error, or the exception types."""


if TYPE_CHECKING:
    KeyFunction = (
        Callable[[Any], Message | str | bytes]
        | Callable[[Any, Any], Message | str | bytes]
        | Callable[[Any, Any, Any], Message | str | bytes]
        | Callable[[Any, Any, Any, Any], Message | str | bytes]
        | Callable[[Any, Any, Any, Any, Any], Message | str | bytes]
    )
else:
    KeyFunction = Callable[..., Any]
"""From a step's inputs, the message, str or bytes to hash.

By arity, since strict checkers refuse a lambda for ``...``.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """A preset of step options; ``graph.step(PRESET, timeout=5)`` overrides single ones.

    Args:
        name: The step's name; default: the function's or class's own.
        persist: Keep the output: `Scope.GLOBAL` or `Scope.WORKFLOW`.
        ttl: Seconds or timedelta a kept output lives: from saving (GLOBAL) or from the run's end (WORKFLOW).
        version: Part of a GLOBAL key: change it when the code's result changes. Recorded for WORKFLOW.
        key: GLOBAL only: from the inputs, the message, str or bytes to hash instead of them.
        cache: GLOBAL only: name of the cache that keeps the outputs; default: one of the step's own. Steps of any
            graphs share entries if cache name, version, inputs in their order, and output type are the same.
        retry: Attempts and waits; default: one attempt.
        timeout: Seconds or timedelta for one attempt.
        retriable: Which errors another attempt may cure.
        on_input_change: WORKFLOW only: what a checkpoint made from other inputs means.
        renamed_from: Earlier names of the step, oldest first; keeps checkpoints and idempotency keys.
        max_concurrent: Most calls of this step's code at once in the process, over all runs. Further ones wait in
            the order of asking, without a thread; backoffs and saves need no slot. A thread that was abandoned at
            its timeout keeps its slot until the code really returns. A run that a call starts and waits for shares
            its slot; two limited steps that each wait for a run of the other one need timeouts.
    """

    name: str | None = None
    persist: Scope | None = None
    ttl: Seconds | None = None
    version: str = ""
    key: KeyFunction | None = None
    cache: str | None = None
    retry: RetryPolicy | None = None
    timeout: Seconds | None = None
    retriable: ErrorClassifier | None = None
    on_input_change: Literal["reuse", "error"] = "reuse"
    renamed_from: tuple[str, ...] = ()
    max_concurrent: int | None = None

    def over(self, defaults: StepOptions) -> StepOptions:
        """Return these options, where they are unset those of *defaults*."""
        return replace(defaults, **_given(self))

    def override(self, **changes: Any) -> StepOptions:
        """Return these options with *changes*.

        Raises:
            TypeError: An option does not exist; the nearest names are listed.
        """
        unknown = sorted(changes.keys() - self.__dataclass_fields__)
        if unknown:
            known = ", ".join(sorted(self.__dataclass_fields__))
            raise TypeError(f"unknown step option {', '.join(unknown)}; known: {known}")
        return replace(self, **changes)


_UNSET = [(field.name, field.default) for field in fields(StepOptions)]


def _given(options: StepOptions) -> dict[str, Any]:
    return {name: value for name, unset in _UNSET if (value := getattr(options, name)) != unset}


_ATTEMPTS = "retry=RetryPolicy(max_attempts=...)"
# What Celery and others call it: spelling alone would lead from retries to retriable.
_ELSEWHERE = {
    **dict.fromkeys(("retries", "max_retries", "attempts", "max_attempts"), _ATTEMPTS),
    **dict.fromkeys(("backoff", "retry_backoff", "retry_policy"), "retry=RetryPolicy(backoff=...)"),
    **dict.fromkeys(("autoretry_for", "retry_on", "retry_for"), "retriable="),
    **dict.fromkeys(("time_limit", "soft_time_limit", "deadline"), "timeout="),
    **dict.fromkeys(("cached", "checkpoint", "persistence", "scope"), "persist=Scope.WORKFLOW or GLOBAL"),
    **dict.fromkeys(("concurrency", "max_concurrency", "rate_limit"), "max_concurrent="),
    "expires": "ttl=",
}


class StepOptionFields(TypedDict, total=False):
    """The fields of `StepOptions` as keywords, for type checkers."""

    name: str | None
    persist: Scope | None
    ttl: Seconds | None
    version: str
    key: KeyFunction | None
    cache: str | None
    retry: RetryPolicy | None
    timeout: Seconds | None
    retriable: ErrorClassifier | None
    on_input_change: Literal["reuse", "error"]
    renamed_from: tuple[str, ...]
    max_concurrent: int | None


def nearest_option(name: str) -> str:
    """Return the option that *name* stands for in other libraries, or the one spelled most like it, or ''."""
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    close = difflib.get_close_matches(name, StepOptions.__dataclass_fields__, n=1)
    return f"{close[0]}=" if close else ""


def _is_classifier(value: object) -> bool:
    if not isinstance(value, (type, tuple)):
        return callable(value)
    kinds = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
    return all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds)


def is_name(value: object) -> bool:
    """Tell whether *value* can name something: 1 to 200 printable characters."""
    return isinstance(value, str) and 1 <= len(value) <= 200 and value.isprintable()


def is_count(value: object) -> bool:
    """Tell whether *value* is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_names(value: object) -> bool:
    return isinstance(value, tuple) and all(map(is_name, cast("tuple[object, ...]", value)))


_FORMS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("persist", lambda value: isinstance(value, Scope), "Scope.GLOBAL or Scope.WORKFLOW"),
    ("retry", lambda value: isinstance(value, RetryPolicy), "a RetryPolicy(...)"),
    ("version", lambda value: isinstance(value, str) and value.isprintable(), "text of printable characters"),
    ("key", callable, "a function of the step's inputs"),
    ("cache", is_name, "a name of 1 to 200 printable characters"),
    ("retriable", _is_classifier, "a predicate or exception types"),
    ("max_concurrent", is_count, "a whole number from 1"),
    ("renamed_from", _are_names, "a tuple of names, oldest first, as in ('old',)"),
    ("on_input_change", lambda value: value == "error", '"reuse" or "error"'),
)
"""What each option other than its default is: callers may have no type checker."""
_NEEDS = (
    ("key", (Scope.GLOBAL,), "key= names GLOBAL checkpoints; add persist=Scope.GLOBAL or drop it"),
    (
        "cache",
        (Scope.GLOBAL,),
        "cache= names where GLOBAL checkpoints are; add persist=Scope.GLOBAL or drop it",
    ),
    ("ttl", tuple(Scope), "ttl= without persist= keeps nothing; add persist= or drop it"),
    (
        "on_input_change",
        (Scope.WORKFLOW,),
        "on_input_change= concerns WORKFLOW checkpoints; add persist=Scope.WORKFLOW or drop it",
    ),
)
"""What each option needs ``persist=`` to be."""


def option_faults(options: StepOptions) -> Iterator[str]:
    """Yield what in *options* would be misread later or contradicts itself, each with its fix."""
    given = _given(options)
    for name, is_right, wanted in _FORMS:
        if name in given and not is_right(given[name]):
            yield f"{name}= is {wanted}, not {given.pop(name)!r}"
    for name in ("timeout", "ttl"):
        try:
            to_seconds(given.get(name, 0), name)
        except ValueError as error:
            yield str(error)
    for name, scopes, problem in _NEEDS:
        if name in given and options.persist not in scopes:
            yield problem
