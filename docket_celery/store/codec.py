"""The hook for encryption or compression of what is stored: the `Codec` protocol, and how a setting becomes one."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol, runtime_checkable

_LEAST_HASH_KEY_BYTES = 16


@runtime_checkable
class Codec(Protocol):
    """Turns what is stored into other bytes and back. Called on many threads, at times for one value twice.

    It may have an attribute ``hash_key``: at least 16 secret bytes. Every hash over user bytes is an HMAC with them
    then. They must stay the same for as long as what is stored: other ones make other cache keys, and another digest
    of the same job. Its ``repr`` must not show keys: Celery shows settings.

    An error that trying again may cure is to be raised as `StoreUnavailable`.
    """

    def encode(self, data: bytes, identity: bytes) -> bytes:
        """Return what to store for *data*.

        Args:
            data: A message's bytes, with a few in front by which a wrong decoding is noticed.
            identity: Names the one place where the value belongs; as an AEAD's associated data it keeps rows from
                being swapped.
        """
        ...

    def decode(self, data: bytes, identity: bytes) -> bytes:
        """Return what `encode` was given for *data* and *identity*, or raise."""
        ...


def find_fault(value: object) -> str | None:
    """Return why *value* cannot be a codec, or None; never its text, which might hold a key."""
    if isinstance(value, type):
        return f"{value.__name__} is a class; pass an instance of it"
    if not isinstance(value, Codec) or not (callable(value.encode) and callable(value.decode)):
        return f"a {type(value).__name__} has no encode(data, identity) and decode(data, identity)"
    key: object = getattr(value, "hash_key", None)
    if key is not None and not (isinstance(key, bytes) and len(key) >= _LEAST_HASH_KEY_BYTES):
        return f"the hash_key of a codec must be at least {_LEAST_HASH_KEY_BYTES} bytes, or None"
    return None


@functools.cache
def import_codec(path: str) -> Any:
    """Return what the path ``package.module:name`` names; raise `ValueError` if it has no such form or nothing."""
    module, colon, name = path.partition(":")
    if not (module and colon and name.isidentifier()):
        raise ValueError("must be a codec, or an import path such as 'package.module:name'")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {type(error).__name__}: {error}") from error
    except Exception as error:  # noqa: BLE001 -- user code; any fault of it is the setting's
        # Raised by the module's own code; its text might hold what the codec is to hide.
        raise ValueError(f"{path!r} cannot be imported: it raised {type(error).__name__}") from None
