"""What names a checkpoint, a job and a run: digests over length-prefixed parts."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator

from docket_celery.errors import InvalidArguments

MAX_EXECUTION_ID = 255
_MOST_COPIED = 64 * 1024
"""Parts with at most that many bytes are hashed in one call, which takes less time than a call for each."""
_KEY_NAMESPACE = uuid.UUID("5f0c1f2e-6f5d-5b0a-9a53-6d1c0d0b6c11")


def digest(tag: bytes, *parts: bytes) -> bytes:
    """Return SHA-256 over *tag* and *parts*, each prefixed with its length as 8 bytes."""
    framed = [each for part in (tag, *parts) for each in (len(part).to_bytes(8, "big"), part)]
    if sum(map(len, parts)) <= _MOST_COPIED:
        return hashlib.sha256(b"".join(framed)).digest()
    sha = hashlib.sha256()
    for each in framed:
        sha.update(each)
    return sha.digest()


def workflow_key(graph: str, execution_id: str, step: str, item: str = "") -> bytes:
    """Name the checkpoint of *step* in one run. No input bytes: changed inputs must not repeat an effect."""
    return digest(b"docket.workflow.1", graph.encode(), execution_id.encode(), step.encode(), item.encode())


def item_key(graph: str, execution_id: str, fan_out: str, item: str) -> bytes:
    """Name what is stored of a run's items: of the fan-out of step *fan_out*, '' for the batch itself."""
    return digest(b"docket.item.1", graph.encode(), execution_id.encode(), fan_out.encode(), item.encode())


def global_key(graph: str, step: str, version: str, inputs: Iterable[tuple[str, bytes]]) -> bytes:
    """Name the checkpoint of *step* for these inputs, each a type name with its deterministic bytes."""
    return digest(b"docket.global.1", graph.encode(), step.encode(), version.encode(), *_parts(inputs))


def cache_key(cache: str, version: str, inputs: Iterable[tuple[str, bytes]]) -> bytes:
    """Name an entry of the cache called *cache*, which steps of several graphs may share; else as `global_key`."""
    return digest(b"docket.cache.1", cache.encode(), version.encode(), *_parts(inputs))


def input_digest(inputs: Iterable[tuple[str, bytes]]) -> bytes:
    """Return the digest of a step's inputs, kept beside its checkpoint as a check."""
    return digest(b"docket.inputs.1", *_parts(inputs))


def job_digest(inputs: Iterable[tuple[str, bytes]]) -> bytes:
    """Return the digest of a run's job, taken once over the submitted bytes; inputs in any order, `Named` in name."""
    return digest(b"docket.job.1", *_parts(sorted(inputs)))


def _parts(inputs: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    return (part for name, data in inputs for part in (name.encode(), data))


def idempotency_key(graph: str, execution_id: str, step: str, item: str = "") -> str:
    """Return the UUID that names this step of this run to the outside world, the same on every attempt."""
    return str(uuid.uuid5(_KEY_NAMESPACE, workflow_key(graph, execution_id, step, item).hex()))


def new_name() -> str:
    """Return a name that nothing else has: 128 random bits in hexadecimal digits."""
    return os.urandom(16).hex()


def check_execution_id(value: object) -> str:
    """Return *value* if it can name a run; raise `InvalidArguments` if it is not 1 to 255 printable characters."""
    if not isinstance(value, str):
        raise InvalidArguments("execution_id", f"must be a str, not {type(value).__name__}")
    if not 1 <= len(value) <= MAX_EXECUTION_ID:
        raise InvalidArguments(
            "execution_id", f"must have 1 to {MAX_EXECUTION_ID} characters, has {len(value)}"
        )
    if not value.isprintable():
        raise InvalidArguments("execution_id", f"must be printable, got {value!r}")
    return value
