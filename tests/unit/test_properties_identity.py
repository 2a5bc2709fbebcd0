"""Whatever names and values there are: different things have different identities, equal ones the same."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from docket_celery.graph import Graph
from docket_celery.plan.messages import to_bytes, type_name
from docket_celery.plan.options import Scope
from docket_celery.store import MemoryStore
from docket_celery.store.identity import (
    cache_key,
    digest,
    global_key,
    idempotency_key,
    input_digest,
    job_digest,
    workflow_key,
)
from docket_celery.store.records import Checkpoint
from tests.unit.graphs import within
from tests.unit.protos.shop_pb2 import Address, Charge, Order, Payment
from tests.unit.test_identity import CHECKPOINT

Inputs = list[tuple[str, bytes]]
# Few letters, so that texts collide: with what separators, escapes, NULs and composed letters are made of.
TEXT = st.text("a\0\x01\x08/:|é\u0301\U0001f600", max_size=8)
BYTES = st.binary(max_size=6)
PARTS = st.lists(BYTES, max_size=5)
INPUTS = st.lists(st.tuples(TEXT, BYTES), max_size=3)
NAMES = st.tuples(TEXT, TEXT, TEXT, TEXT)
STOCK = st.dictionaries(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1), max_size=8)


@st.composite
def cuts(draw: st.DrawFn, parts: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw one text, cut into so many parts in two ways: what a hash without lengths cannot tell apart."""
    whole = draw(st.text("ab\0é", max_size=12))
    places = st.lists(st.integers(0, len(whole)), min_size=parts - 1, max_size=parts - 1).map(sorted)
    first, second = ([0, *draw(places), len(whole)] for _ in range(2))
    return tuple(whole[a:b] for a, b in pairwise(first)), tuple(whole[a:b] for a, b in pairwise(second))


@given(PARTS, PARTS)
def test_different_parts_have_different_digests(first: list[bytes], second: list[bytes]) -> None:
    """No cut between parts can be moved: each is prefixed with its length."""
    assert (digest(b"t", *first) == digest(b"t", *second)) == (first == second)


@given(BYTES, BYTES, PARTS)
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


@given(st.tuples(TEXT, TEXT, INPUTS), st.tuples(TEXT, TEXT, INPUTS))
def test_different_caches_have_different_keys(
    first: tuple[str, str, Inputs], second: tuple[str, str, Inputs]
) -> None:
    """Name, version, each input's type and bytes, and their order all count; a step's own entries lie apart."""
    assert (cache_key(*first) == cache_key(*second)) == (first == second)
    assert cache_key(*first) not in {global_key("", *second), global_key(first[0], *second)}


@given(cuts(4))
def test_names_cut_elsewhere_are_other_names(cut: tuple[tuple[Any, ...], tuple[Any, ...]]) -> None:
    """Graph, run, step and item that read alike when put together are different checkpoints."""
    first, second = cut
    assert (workflow_key(*first) == workflow_key(*second)) == (first == second)
    assert (idempotency_key(*first) == idempotency_key(*second)) == (first == second)


@given(st.tuples(TEXT, TEXT, TEXT, INPUTS), st.tuples(TEXT, TEXT, TEXT, INPUTS))
def test_different_inputs_have_different_global_keys(
    first: tuple[str, str, str, Inputs], second: tuple[str, str, str, Inputs]
) -> None:
    """Graph, step, version, each input's type and bytes, and their order all count."""
    assert (global_key(*first) == global_key(*second)) == (first == second)
    assert (input_digest(first[3]) == input_digest(second[3])) == (first[3] == second[3])


@given(cuts(7))
def test_versions_and_inputs_cut_elsewhere_are_other_inputs(
    cut: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    """Nothing moves from step to version, from version to inputs, or from one input to the next."""
    first, second = (
        (graph, step, version, [(one, two.encode()), (three, four.encode())])
        for graph, step, version, one, two, three, four in cut
    )
    assert (global_key(*first) == global_key(*second)) == (first == second)
    assert (input_digest(first[3]) == input_digest(second[3])) == (first[3] == second[3])
    assert (job_digest(first[3]) == job_digest(second[3])) == (sorted(first[3]) == sorted(second[3]))


@given(NAMES, INPUTS)
def test_a_run_and_the_world_never_share_a_key(names: tuple[str, str, str, str], inputs: Inputs) -> None:
    """A WORKFLOW key is no GLOBAL key, even of the same parts."""
    assert workflow_key(*names) != global_key(*names[:3], inputs)
    assert input_digest(inputs) != job_digest(inputs)


@given(INPUTS, st.randoms(use_true_random=False))
def test_a_job_is_the_same_in_any_order_of_its_inputs(inputs: Inputs, random: Random) -> None:
    """Arguments by position and by keyword submit the same job."""
    shuffled = list(inputs)
    random.shuffle(shuffled)
    assert job_digest(shuffled) == job_digest(inputs)


@given(st.sampled_from([field.name for field in fields(Checkpoint)]), TEXT)
def test_a_checksum_covers_what_gives_a_row_its_meaning(name: str, text: str) -> None:
    """Another text in any field is another checksum; the view for people and the time to live are left out."""
    value: Any = (
        text.encode() if name in {"key", "output_data"} else len(text) if name == "item_index" else text
    )
    changed = replace(CHECKPOINT, **{name: value})
    covered = name not in {"output_json", "ttl_s"}
    assert (changed.checksum() == CHECKPOINT.checksum()) is (not covered or changed == CHECKPOINT)


def test_a_run_without_a_name_is_not_a_run_with_an_empty_one() -> None:
    """GLOBAL rows have no run; no text stands for that. An item has a number or none."""
    for name, value in (("execution_id", ""), ("item_index", 0)):
        nothing: dict[str, Any] = {name: None}
        empty: dict[str, Any] = {name: value}
        assert replace(CHECKPOINT, **nothing).checksum() != replace(CHECKPOINT, **empty).checksum()


@given(stock=STOCK, random=st.randoms(use_true_random=False))
def test_map_fields_in_any_order_are_one_value(stock: dict[str, int], random: Random) -> None:
    """Set in any order, or read from bytes in any order, maps give one input hash, job digest and key."""
    made = [Order(stock=stock)]
    for _ in range(2):
        entries = list(stock.items())
        random.shuffle(entries)
        made.append(Order(stock=dict(entries)))
        # Entries stand one after the other on the wire, in the order of whoever wrote them.
        made.append(Order.FromString(b"".join(Order(stock={k: v}).SerializeToString() for k, v in entries)))
    inputs = [[(type_name(order), to_bytes(order))] for order in made]
    assert len({input_digest(one) for one in inputs}) == 1
    assert len({job_digest(one) for one in inputs}) == 1
    assert len({global_key("g", "s", "", one) for one in inputs}) == 1


@given(known=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=5))
def test_maps_of_messages_in_any_order_are_one_value(known: dict[str, str]) -> None:
    """The order is settled at every depth."""
    forward, backward = (
        Payment(known={name: Address(street=street) for name, street in entries})
        for entries in (list(known.items()), list(reversed(known.items())))
    )
    assert to_bytes(forward) == to_bytes(backward)


@settings(deadline=None)
@given(stock=STOCK)
def test_the_order_of_a_map_changes_nothing_for_a_run(stock: dict[str, int]) -> None:
    """The same job in another order attaches to its run, hits the shared cache, and has the same key outside."""
    graph, calls, keys = Graph("shop", store=MemoryStore()), list[str](), set[str]()

    def charge(order: Order) -> Charge:
        calls.append("charge")
        return Charge(amount_cents=sum(order.stock.values()) % 1000)

    graph.register(charge, persist=Scope.GLOBAL)
    backward = dict(reversed(stock.items()))
    for name, entries in (("one", stock), ("one", backward), ("two", backward)):
        within(partial(graph.execute, Charge, Order(stock=entries), execution_id=name))
        keys.add(idempotency_key("shop", name, "charge"))
    assert calls == ["charge"]
    assert len(keys) == 2
