"""Context managers that are entered around each call of a step: the form of ``docket_step_hooks``."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, cast

from docket_celery.errors import InvalidSettings

_PATH: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_FORM: Final = (
    "an entry is a callable that returns a context manager, or its import path 'package.module:name'"
)

MakeContext = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHook:
    """A hook by name; each `entered` is one use of it.

    Attributes:
        name: What errors call it: its import path.
        make: Returns a context manager.
    """

    name: str
    make: MakeContext

    def entered(self) -> AbstractContextManager[None]:
        """Return a context manager that enters and exits what `make` returns and puts `name` on what that raises."""
        return _Entered(self)


class _Entered:
    def __init__(self, hook: StepHook) -> None:
        self._hook = hook

    def __enter__(self) -> None:
        try:
            made: Any = self._hook.make()
            if not hasattr(made, "__enter__") or not hasattr(made, "__exit__"):
                raise InvalidSettings(
                    "docket_step_hooks",
                    f"{self._hook.name} returned {made!r}, which is no context manager; "
                    "decorate a generator function with @contextlib.contextmanager",
                )
            made.__enter__()
        except BaseException as error:
            error.add_note(f"raised by step hook {self._hook.name} when it was entered")
            raise
        self._made = made

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What it returns is not passed on: a hook cannot turn a failure into a result, as it has none to give.
        try:
            self._made.__exit__(kind, error, trace)
        except BaseException as raised:
            if raised is not error:
                raised.add_note(f"raised by step hook {self._hook.name} when it was exited")
            raise


def read_hooks(key: str, value: Any) -> tuple[MakeContext | str, ...]:
    """Return the entries of *value*, whose form is checked; nothing is imported yet.

    Args:
        key: The setting, for errors.
        value: A list or tuple of callables and import paths, or paths in one text, separated by commas.

    Raises:
        InvalidSettings: *value* or one of its entries has another form.
    """
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise InvalidSettings(key, f"must be a list, got {value!r}; {_FORM}")
    entries = tuple(cast("Sequence[Any]", value))
    for entry in entries:
        if isinstance(entry, str):
            if _PATH.fullmatch(entry) is None:
                raise InvalidSettings(key, f"entry {entry!r} is no import path; {_FORM}")
        elif not callable(entry) or (hasattr(entry, "__enter__") and not isinstance(entry, type)):
            raise InvalidSettings(key, f"entry {entry!r} cannot be called for a context manager; {_FORM}")
    return entries


def load_hooks(entries: Sequence[MakeContext | str]) -> tuple[StepHook, ...]:
    """Return the hooks behind *entries*; import paths are imported.

    Raises:
        InvalidSettings: A path leads to nothing, or to something that cannot be called.
    """
    return tuple(_load(entry) for entry in entries)


def _load(entry: MakeContext | str) -> StepHook:
    if not isinstance(entry, str):
        module, name = getattr(entry, "__module__", None), getattr(entry, "__qualname__", None)
        return StepHook(name=f"{module}:{name}" if module and name else repr(entry), make=entry)
    try:
        found: Any = pkgutil.resolve_name(entry)
    except Exception as error:
        problem = f"entry {entry!r} cannot be imported: {type(error).__name__}: {error}"
        raise InvalidSettings("docket_step_hooks", problem) from error
    if not callable(found):
        raise InvalidSettings("docket_step_hooks", f"entry {entry!r} is {found!r}; {_FORM}")
    return StepHook(name=entry, make=cast("MakeContext", found))
