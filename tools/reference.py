"""Write docs/reference.md, the reference of the public API, from signatures and docstrings.

``make docs`` writes it; `tests/unit/test_reference.py` compares.
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docket_celery

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
_HEAD = """\
# Reference

Every public name of `docket_celery`, in the order of `docket_celery.__all__`. Written by `make docs` from the
docstrings; errors are explained in [errors](errors.md).
"""


def render() -> str:
    """Return the page."""
    return "\n".join([_HEAD, *(part for name in docket_celery.__all__ for part in _entry(name))])


def _entry(name: str) -> Iterator[str]:
    value = getattr(docket_celery, name)
    yield f"## {name}\n"
    yield f"```python\n{'class ' if inspect.isclass(value) else ''}{name}{_signature(value)}\n```\n"
    yield _prose(value)
    if inspect.isclass(value) and not issubclass(value, Exception):
        for member, part in _members(value):
            call = "" if isinstance(part, property) else _signature(part)
            yield f"### {name}.{member}\n"
            yield f"```python\n{member}{call}\n```\n"
            yield _prose(part)


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the documented public methods and properties that this library defines for *kind*."""
    if issubclass(kind, enum.Enum):
        return
    owners = [base for base in kind.__mro__ if base.__module__.startswith("docket_celery")]
    seen: set[str] = set()
    for owner in owners:
        for name, found in vars(owner).items():
            part = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
            if (
                name.startswith("_")
                or name in seen
                or not (inspect.isfunction(part) or isinstance(part, property))
            ):
                continue
            seen.add(name)
            if part.__doc__:
                yield name, part


class _Bare(str):
    """An annotation that shows itself without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _signature(value: Any) -> str:
    if isinstance(value, type) and issubclass(value, enum.Enum):
        return ""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    parameters = [one.replace(annotation=_bare(one.annotation)) for one in found.parameters.values()]
    text = str(found.replace(parameters=parameters, return_annotation=_bare(found.return_annotation)))
    # A default without a value of its own shows an address, which differs from process to process.
    return re.sub(r"<([\w.]+)[^<>]* at 0x[0-9a-f]+>", r"<\1>", text)


def _bare(annotation: Any) -> Any:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


def _prose(value: Any) -> str:
    """Return the docstring as Markdown: its sections as lists of their own lines, fences kept out of the way."""
    text = inspect.getdoc(value) or ""
    out: list[str] = []
    in_section = False
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields|Example|Note):", line):
            in_section = True
            out.append(f"**{line.removesuffix(':')}**\n")
        elif in_section and re.match(r" {4}\S", line):
            out.append(f"- {line.strip()}")
        elif in_section and line.strip():
            out.append(f"  {line.strip()}")
        else:
            out.append(line)
    return "\n".join(out).replace("``", "`") + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
