"""Codecs of the tests: authenticated encryption from the standard library, with keys that can be rotated.

The cipher is built of HMAC-SHA256 alone, which is slow and good enough for tests; its methods are those of
`cryptography`'s AEAD classes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping


class DamagedError(Exception):
    """The tag does not match: another key, another place, or damage."""


class Cipher:
    """Encrypt-then-MAC: a keystream and a tag, both HMACs."""

    def __init__(self, key: bytes) -> None:
        self._stream_key, self._tag_key = (hmac.digest(key, use, "sha256") for use in (b"stream", b"tag"))

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes) -> bytes:
        """Return *data* encrypted, with the tag over all three behind it."""
        hidden = self._mix(nonce, data)
        return hidden + self._tag(nonce, hidden, associated_data)

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes) -> bytes:
        """Return what `encrypt` was given, or raise."""
        hidden, tag = data[:-32], data[-32:]
        if not hmac.compare_digest(tag, self._tag(nonce, hidden, associated_data)):
            raise DamagedError
        return self._mix(nonce, hidden)

    def _mix(self, nonce: bytes, data: bytes) -> bytes:
        stream = hashlib.shake_256(self._stream_key + nonce).digest(len(data))
        return (int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(data), "big")

    def _tag(self, nonce: bytes, hidden: bytes, associated_data: bytes) -> bytes:
        size = len(associated_data).to_bytes(8, "big")
        return hmac.digest(self._tag_key, nonce + size + associated_data + hidden, "sha256")


class Encryption:
    """A codec that encrypts with one of its keys and decrypts with all."""

    def __init__(self, keys: Mapping[int, bytes], current: int, hash_key: bytes | None = b"h" * 32) -> None:
        self._ciphers = {number: Cipher(key) for number, key in keys.items()}
        self._current, self.hash_key = current, hash_key

    def encode(self, data: bytes, identity: bytes) -> bytes:
        """Encrypt under the current key; its number goes in front."""
        nonce = os.urandom(12)
        return bytes([self._current]) + nonce + self._ciphers[self._current].encrypt(nonce, data, identity)

    def decode(self, data: bytes, identity: bytes) -> bytes:
        """Decrypt with the key that is named in front."""
        return self._ciphers[data[0]].decrypt(data[1:13], data[13:], identity)


CODEC = Encryption({1: b"first key"}, 1)
ROTATED = Encryption({1: b"first key", 2: b"second key"}, 2)
STRANGER = Encryption({1: b"another key"}, 1)
