"""Errors as JSON, for the run's row: what `docket_celery.errors` raises is built again from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from docket_celery.errors import DocketError


def to_record(error: DocketError) -> dict[str, Any]:
    """Return *error* as a JSON object from which `from_record` builds it again."""
    return {"code": error.code, "args": list(error.args)}


def from_record(record: dict[str, Any]) -> DocketError:
    """Build the error that `to_record` described; an unknown code gives a plain `DocketError`."""
    code, args = record.get("code"), record.get("args", [])
    for kind in _family(DocketError):
        if kind.code == code and kind.__module__ == DocketError.__module__:
            try:
                return kind(*args)
            except TypeError:
                # Written by a user's subclass with fields of its own, or by another release.
                break
    return DocketError(str(code), *args)


def _family(kind: type[DocketError]) -> Iterator[type[DocketError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)
