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

_LIKE_LISTS = (Iterable, Iterator, Sequence, Collection, tuple, set)


@dataclass(frozen=True, slots=True)
class Named:
    """Tells two values of one message type apart: ``Annotated[Money, Named("tax")]``.

    Raises:
        ValueError: The name is empty, over 200 characters, or not printable.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 1 <= len(self.name) <= 200 or not self.name.isprintable():
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
    """Something cannot be read as a step; each text says which part and how to mend it.

    Args:
        *texts: What is wrong with the signature.
        options: What is wrong with the options.
        output: What the step returns, if that much could be read.
    """

    def __init__(self, *texts: str, options: Sequence[str] = (), output: ValueKey | None = None) -> None:
        super().__init__("; ".join([*texts, *options]))
        self.texts, self.options, self.output = texts, tuple(options), output


def read_annotation(annotation: Any, what: str) -> ValueKey:
    """Return the value an annotation stands for.

    Raises:
        SignatureFault: It is not a message type (with at most one `Named`); *what* says whose annotation it is.
    """
    name, kind = "", annotation
    if typing.get_origin(annotation) is Annotated:
        kind, *extras = typing.get_args(annotation)
        names = [extra.name for extra in extras if isinstance(extra, Named)]
        if len(names) > 1:
            raise SignatureFault(f"{what} has {len(names)} Named(...); keep one")
        name = names[0] if names else ""
    if is_message_type(kind):
        return ValueKey(kind, name)
    shown = show_annotation(kind)
    if is_union(kind):
        raise SignatureFault(f"{what} is {shown}; {_mend_union(kind, what)}")
    if typing.get_origin(kind) in (list, *_LIKE_LISTS) or kind in (list, *_LIKE_LISTS):
        raise SignatureFault(
            f"{what} is {shown}; of many messages take list[...] or Iterable[...], return list[...]"
        )
    raise SignatureFault(
        f"{what} is {shown}, not a Protocol Buffers message; annotate it with a message type"
    )


def read_many(annotation: Any) -> tuple[Any, str] | None:
    """Return what a ``list[...]`` or ``Iterable[...]`` holds, and which of them it is; None for anything else.

    ``Annotated[list[T], Named("x")]`` reads like ``list[Annotated[T, Named("x")]]``.
    """
    extras: tuple[Any, ...] = ()
    if typing.get_origin(annotation) is Annotated:
        annotation, *rest = typing.get_args(annotation)
        extras = tuple(rest)
    origin = typing.get_origin(annotation)
    if origin not in (list, Iterable) or len(typing.get_args(annotation)) != 1:
        return None
    (item,) = typing.get_args(annotation)
    return (Annotated[(item, *extras)] if extras else item), "list" if origin is list else "Iterable"


def is_context(annotation: Any) -> bool:
    """Tell whether it is `StepContext`, with or without ``Annotated``."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation is StepContext


def is_union(annotation: Any) -> bool:
    """Tell whether it is ``A | B``, ``Optional[A]`` or ``Union[A, B]``."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def mentions_values(annotation: Any) -> bool:
    """Tell whether a message type or `StepContext` stands anywhere in it: then it is meant to be given one."""
    if is_message_type(annotation) or annotation is StepContext:
        return True
    return any(mentions_values(part) for part in typing.get_args(annotation))


def show_annotation(annotation: Any) -> str:
    """Return it as its author would have written it, without modules."""
    if annotation is type(None):
        return "None"
    if is_union(annotation):
        return " | ".join(map(show_annotation, typing.get_args(annotation)))
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(origin, type) and parts:
        return f"{origin.__name__}[{', '.join(map(show_annotation, parts))}]"
    return str(annotation)


def _mend_union(union: Any, what: str) -> str:
    parts = [part for part in typing.get_args(union) if part is not type(None)]
    if len(parts) > 1:
        return "a value has one type: use a message that holds one or the other, such as one with a oneof"
    shown = show_annotation(parts[0])
    if parts[0] is StepContext:
        return f"a step always gets one: annotate it with {shown}"
    if what == "its result":
        return f"a step returns a value or raises: annotate it with {shown}, an empty one says that there is none"
    return f"a step runs when all its inputs are there: annotate it with {shown}"
