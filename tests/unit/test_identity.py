from __future__ import annotations

import hashlib
import tracemalloc
from dataclasses import replace

import pytest

from docket_celery.errors import CorruptCheckpoint, InvalidArguments
from docket_celery.store.identity import (
    cache_key,
    check_execution_id,
    digest,
    global_key,
    idempotency_key,
    input_digest,
    job_digest,
    workflow_key,
)
from docket_celery.store.records import Checkpoint

# Changing one of these loses every checkpoint and renames every payment: raise the tag's number instead.
GOLDEN = {
    "digest": "53f99d734d79566a3a8629f06f7934b10347ee37e9beab1fb25478f92c7a7e02",
    "workflow": "4f6b8c1b8ae14a0a473898263b00cfa314fa3aeb55a6d43bedf9044f1afa7502",
    "item": "8b937b0b14fe612fbfbf26d8b20ee7ccefbc7590d013ef673f2ac9ff4ddc0ae2",
    "global": "0e821197388b209f51a4887e11ffbc52c3b56d6430a4fb1f4758ec1b73ca3840",
    "cache": "cd91378fdbb6991791d8b7eb3be074c420e537877c1a9d8bae2a17ce6b8eced3",
    "inputs": "eca064456fda5884fa7943525b8eb823bb0b785886bf84e67a8cea7a53c055e9",
    "job": "3ae62ff095ea34110b1af8f4fa298091844eb9929114e335a6333cedd0fa9ede",
    "idempotency": "6d0041ba-bf0d-5890-9541-879235f97a9a",
}


def test_moving_bytes_between_inputs_changes_the_key() -> None:
    """The collision of unprefixed hashes: F(A{x}, B{}) against F(A{}, B{x})."""
    one = global_key("g", "s", "", [("A", b"x"), ("B", b"")])
    other = global_key("g", "s", "", [("A", b""), ("B", b"x")])
    assert one != other


def test_keys_stay_what_they_are() -> None:
    """Stored keys outlive releases."""
    assert {
        "digest": digest(b"tag", b"a", b"").hex(),
        "workflow": workflow_key("checkout", "order-17", "charge_card").hex(),
        "item": workflow_key("checkout", "order-17", "charge_card", "7/3").hex(),
        "global": global_key("ml", "infer", "2", [("shop.Order", b"\x08\x11")]).hex(),
        "cache": cache_key("rates", "2", [("shop.Order", b"\x08\x11")]).hex(),
        "inputs": input_digest([("shop.Order", b"\x08\x11")]).hex(),
        "job": job_digest([("shop.Order", b"\x08\x11")]).hex(),
        "idempotency": idempotency_key("checkout", "order-17", "charge_card"),
    } == GOLDEN


def test_large_parts_have_the_digest_that_small_ones_have() -> None:
    """They are hashed one by one: nothing is copied."""
    large = b"x" * 2_000_000
    framed = b"".join(len(part).to_bytes(8, "big") + part for part in (b"tag", large, b""))
    tracemalloc.start()
    try:
        found = digest(b"tag", large, b"")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == hashlib.sha256(framed).digest()
    assert most < len(large) / 10


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "must have 1 to 255 characters, has 0"),
        ("a" * 256, "must have 1 to 255 characters, has 256"),
        ("a\0b", "must be printable, got 'a\\x00b'"),
        ("a\nb", "must be printable, got 'a\\nb'"),
        ("\ud800", "must be printable, got '\\ud800'"),
        (17, "must be a str, not int"),
        (None, "must be a str, not NoneType"),
        (b"order-17", "must be a str, not bytes"),
    ],
)
def test_a_bad_execution_id_is_refused(value: object, problem: str) -> None:
    """Empty, too long, not printable, or no text: the error says which."""
    with pytest.raises(InvalidArguments) as caught:
        check_execution_id(value)
    assert (caught.value.what, caught.value.problem) == ("execution_id", problem)


@pytest.mark.parametrize("value", ["a", "order-17", "Größe 17", "a" * 255])
def test_a_good_execution_id_is_kept(value: str) -> None:
    """1 to 255 printable characters."""
    assert check_execution_id(value) == value


CHECKPOINT = Checkpoint(
    key=b"k", graph="g", execution_id="e", step_name="s", step_version="v", item="7", item_index=7,
    input_hash="h", output_type="t", output_data=b"d",
)  # fmt: skip


@pytest.mark.parametrize(
    ("execution_id", "checksum"),
    [
        ("e", "f32613292d2b797c59e58f011b30d0a0bc99ddbb5bf9ef7d51b4935c4e648c6b"),
        (None, "c3cbb21cc492118b94f0c9ad887d42a40a0e129547470051e8422156ddc4a95d"),
    ],
)
def test_checksums_stay_what_they_are(execution_id: str | None, checksum: str) -> None:
    """A release that computed them otherwise would call every stored row damaged."""
    assert replace(CHECKPOINT, execution_id=execution_id).checksum().hex() == checksum


def test_a_damaged_row_is_named() -> None:
    """An operator finds it by table and key."""
    assert CHECKPOINT.verify(CHECKPOINT.checksum()) is CHECKPOINT
    with pytest.raises(CorruptCheckpoint) as caught:
        CHECKPOINT.verify(b"other")
    assert caught.value.args == ("docket_cache", "cache_key=6b", "checksum mismatch")
