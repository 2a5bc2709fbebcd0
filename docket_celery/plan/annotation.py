"""What an annotation of a step, a task or a call stands for: a message type, perhaps named, perhaps many of it."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from google.protobuf.message import Message

from docket_celery.plan.context import StepContext
from docket_celery.plan.messages import is_message_type, type_name
from docket_celery.plan.options import is_name

_LIKE_LISTS = (Iterable, Iterator, Sequence, Collection, tuple, set)
_PLAIN_MODULES = frozenset({"builtins", "datetime", "decimal", "enum", "typing", "uuid"})
"""Their types are data, which belongs in a message."""
_MOST_ALIASES = 32
"""Longer chains of aliases are taken for endless ones."""


@dataclass(frozen=True, slots=True)
class Named:
    """Tells two values of one message type apart: ``Annotated[Money, Named("tax")]``.

    Raises:
        ValueError: The name is empty, over 200 characters, or not printable.
    """

    name: str

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ValueError(f"Named takes 1 to 200 printable characters, not {self.name!r}")


class ValueKey(NamedTuple):
    """What identifies a value within a run: its message type and, where given, its `Named` name."""

    kind: type[Message]
    name: str = ""

    def __str__(self) -> str:
        return self.label(type_name(self.kind))

    def label(self, kind: str) -> str:
        """Return *kind* with the `Named` name, where there is one; stored jobs call their values so."""
        return f'{kind} named "{self.name}"' if self.name else kind


class SignatureFault(Exception):
    """Something cannot be read as a step; each of *texts* says which part and how to mend it.

    *output* is what the step returns, if that much could be read.
    """

    def __init__(self, *texts: str, output: ValueKey | None = None) -> None:
        super().__init__("; ".join(texts))
        self.texts, self.output = texts, output


def resolve(annotation: Any) -> tuple[Any, list[Any]]:
    """Return the type that an annotation stands for, behind aliases and ``Annotated``, and what ``Annotated`` adds.

    An alias is ``type X = ...`` or a ``TypeAliasType``, also with parameters; one that leads to itself, or to a name
    that is not defined, is a SignatureFault.
    """
    extras: list[Any] = []
    for _ in range(_MOST_ALIASES):
        if isinstance(annotation, type):
            return annotation, extras
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is Annotated:
            annotation, extras = arguments[0], [*arguments[1:], *extras]
            continue
        alias = origin or annotation
        if type(alias).__name__ != "TypeAliasType":
            return annotation, extras
        try:
            annotation = alias.__value__[arguments] if arguments else alias.__value__
        except (NameError, AttributeError, TypeError) as error:
            raise SignatureFault(f"the type alias {alias} cannot be read: {error}") from error
        if isinstance(annotation, str):
            raise SignatureFault(
                f"the type alias {alias} holds the text {annotation!r}; write the type itself in it"
            )
    raise SignatureFault(f"the type alias {annotation} leads to itself; name a message type in it")


def read_annotation(annotation: Any, what: str) -> ValueKey:
    """Return the value an annotation stands for.

    SignatureFault: it is not a message type with at most one `Named`; *what* says whose annotation it is.
    """
    kind, extras = resolve(annotation)
    names = [extra.name for extra in extras if isinstance(extra, Named)]
    if len(names) > 1:
        raise SignatureFault(f"{what} has {len(names)} Named(...); keep one")
    if is_message_type(kind):
        return ValueKey(kind, *names)
    shown = _show(kind)
    if _is_union(kind):
        raise SignatureFault(f"{what} is {shown}; {_mend_union(kind, what)}")
    if typing.get_origin(kind) in (list, *_LIKE_LISTS) or kind in (list, *_LIKE_LISTS):
        raise SignatureFault(
            f"{what} is {shown}; of many messages take list[...] or Iterable[...], return list[...]"
        )
    raise SignatureFault(
        f"{what} is {shown}, not a Protocol Buffers message; {_mend_kind(kind, shown, what)}"
    )


def read_many(annotation: Any) -> tuple[Any, str] | None:
    """Return what a ``list[...]`` or ``Iterable[...]`` holds, and which of them it is; None for anything else.

    ``Annotated[list[T], Named("x")]`` reads like ``list[Annotated[T, Named("x")]]``.
    """
    kind, extras = resolve(annotation)
    if isinstance(kind, type):
        return None
    origin, held = typing.get_origin(kind), typing.get_args(kind)
    if origin not in (list, Iterable) or len(held) != 1:
        return None
    return (Annotated[(*held, *extras)] if extras else held[0]), "list" if origin is list else "Iterable"


def is_context(annotation: Any) -> bool:
    """Tell whether it is `StepContext`, with or without ``Annotated``."""
    return resolve(annotation)[0] is StepContext


def _is_union(annotation: Any) -> bool:
    """Tell whether it is ``A | B``, ``Optional[A]`` or ``Union[A, B]``."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def mentions_values(annotation: Any) -> bool:
    """Tell whether a message type or `StepContext` is part of it: then it is meant to be given one."""
    kind, _ = resolve(annotation)
    if is_message_type(kind) or kind is StepContext:
        return True
    return any(mentions_values(part) for part in typing.get_args(kind))


def _show(annotation: Any) -> str:
    """Return it as its author would have written it, without modules."""
    if annotation is type(None):
        return "None"
    if _is_union(annotation):
        return " | ".join(map(_show, typing.get_args(annotation)))
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(origin, type) and parts:
        return f"{origin.__name__}[{', '.join(map(_show, parts))}]"
    return str(annotation)


def _mend_kind(kind: Any, shown: str, what: str) -> str:
    if isinstance(kind, typing.NewType):
        base = _show(kind.__supertype__)
        named = f'Annotated[{base}, Named("{kind.__name__.lower()}")]'
        return (
            f"a NewType is {base} when the program runs; to tell two values of one type apart, write {named}"
        )
    if what.startswith("parameter") and isinstance(kind, type) and kind.__module__ not in _PLAIN_MODULES:
        return (
            f"a step takes messages alone; to give it a {shown}, make the step a class that holds one, with the "
            "messages as parameters of its compute method, and register an instance (or the class with factory=)"
        )
    return "annotate it with a message type"


def _mend_union(union: Any, what: str) -> str:
    parts = [part for part in typing.get_args(union) if part is not type(None)]
    if len(parts) > 1:
        return "a value has one type: use a message that holds one or the other, such as one with a oneof"
    shown = _show(parts[0])
    if parts[0] is StepContext:
        return f"a step always gets one: annotate it with {shown}"
    if what == "its result":
        return f"a step returns a value or raises: annotate it with {shown}, an empty one says that there is none"
    return f"a step runs when all its inputs are there: annotate it with {shown}"
