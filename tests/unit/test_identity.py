from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from docket_celery.checkpoint import (
    check_execution_id,
    digest,
    global_key,
    idempotency_key,
    input_digest,
    job_digest,
    workflow_key,
)
from docket_celery.errors import InvalidArguments

TEXT = st.text(max_size=8)
PARTS = st.lists(st.binary(max_size=6), max_size=5)
INPUTS = st.lists(st.tuples(TEXT, st.binary(max_size=6)), max_size=3)
NAMES = st.tuples(TEXT, TEXT, TEXT, TEXT)

# Changing one of these loses every checkpoint and renames every payment: raise the tag's number instead.
GOLDEN = {
    "digest": "53f99d734d79566a3a8629f06f7934b10347ee37e9beab1fb25478f92c7a7e02",
    "workflow": "4f6b8c1b8ae14a0a473898263b00cfa314fa3aeb55a6d43bedf9044f1afa7502",
    "item": "8b937b0b14fe612fbfbf26d8b20ee7ccefbc7590d013ef673f2ac9ff4ddc0ae2",
    "global": "0e821197388b209f51a4887e11ffbc52c3b56d6430a4fb1f4758ec1b73ca3840",
    "inputs": "eca064456fda5884fa7943525b8eb823bb0b785886bf84e67a8cea7a53c055e9",
    "job": "3ae62ff095ea34110b1af8f4fa298091844eb9929114e335a6333cedd0fa9ede",
    "idempotency": "6d0041ba-bf0d-5890-9541-879235f97a9a",
}


@given(PARTS, PARTS)
def test_different_parts_have_different_digests(first: list[bytes], second: list[bytes]) -> None:
    """No cut between parts can be moved: each is prefixed with its length."""
    assert (digest(b"t", *first) == digest(b"t", *second)) == (first == second)


@given(st.binary(max_size=6), st.binary(max_size=6), PARTS)
def test_different_tags_have_different_digests(first: bytes, second: bytes, parts: list[bytes]) -> None:
    """A key of one kind is never a key of another."""
    assert (digest(first, *parts) == digest(second, *parts)) == (first == second)


@given(NAMES, NAMES)
def test_different_steps_have_different_workflow_keys(
    first: tuple[str, str, str, str], second: tuple[str, str, str, str]
) -> None:
    """Two graphs, runs, steps or items never meet, whatever their names."""
    assert (workflow_key(*first) == workflow_key(*second)) == (first == second)
    assert (idempotency_key(*first) == idempotency_key(*second)) == (first == second)


@given(st.tuples(TEXT, TEXT, TEXT, INPUTS), st.tuples(TEXT, TEXT, TEXT, INPUTS))
def test_different_inputs_have_different_global_keys(
    first: tuple[str, str, str, list[tuple[str, bytes]]],
    second: tuple[str, str, str, list[tuple[str, bytes]]],
) -> None:
    """Graph, step, version, each input's type and bytes, and their order all count."""
    assert (global_key(*first) == global_key(*second)) == (first == second)


@given(NAMES, INPUTS)
def test_a_run_and_the_world_never_share_a_key(
    names: tuple[str, str, str, str], inputs: list[tuple[str, bytes]]
) -> None:
    """A WORKFLOW key is no GLOBAL key, even of the same parts."""
    assert workflow_key(*names) != global_key(*names[:3], inputs)
    assert input_digest(inputs) != job_digest(inputs).hex()


@given(INPUTS, st.randoms(use_true_random=False))
def test_a_job_is_the_same_in_any_order_of_its_inputs(
    inputs: list[tuple[str, bytes]], random: Random
) -> None:
    """Arguments by position and by keyword submit the same job."""
    shuffled = list(inputs)
    random.shuffle(shuffled)
    assert job_digest(shuffled) == job_digest(inputs)


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
        "inputs": input_digest([("shop.Order", b"\x08\x11")]),
        "job": job_digest([("shop.Order", b"\x08\x11")]).hex(),
        "idempotency": idempotency_key("checkout", "order-17", "charge_card"),
    } == GOLDEN


@pytest.mark.parametrize("value", ["", "a" * 256, "a\0b", "a\nb", "\ud800", 17, None, b"order-17"])
def test_a_bad_execution_id_is_refused(value: object) -> None:
    """Empty, too long, not printable, or no text."""
    with pytest.raises(InvalidArguments, match="execution_id"):
        check_execution_id(value)


@pytest.mark.parametrize("value", ["a", "order-17", "Größe 17", "a" * 255])
def test_a_good_execution_id_is_kept(value: str) -> None:
    """1 to 255 printable characters."""
    assert check_execution_id(value) == value
