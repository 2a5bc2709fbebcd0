from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from docket_celery.errors import CorruptCheckpoint, LeaseLost
from docket_celery.store.identity import workflow_key
from docket_celery.store.records import Checkpoint, RunRow, RunState
from docket_celery.store.rows import SCHEMA_VERSION
from tests.conformance.samples import GRAPH, RUN, Bench, ending, execution, output, request, shared

pytestmark = pytest.mark.leaves_lease


def without_view(checkpoint: Checkpoint) -> Checkpoint:
    """Return *checkpoint* as stores give it back."""
    return replace(checkpoint, output_json=None)


def _unasked() -> list[bytes]:
    raise AssertionError("nothing of this run is restored")


def test_what_was_saved_is_restored(bench: Bench) -> None:
    """Every field but the view for people comes back."""
    lease = bench.take()
    saved = output(item_index=3, ttl_s=60.0)
    assert bench.store.save(lease, saved, execution()) is saved
    assert bench.store.restore(lease, []) == [without_view(saved)]
    assert bench.executions() == [("charge", 1)]


def test_the_last_checkpoint_is_saved_with_the_end(bench: Bench) -> None:
    """It comes back like one that was saved before; repeating the end after a lost answer adds nothing."""
    lease, last = bench.take(), output(item_index=3, ttl_s=60.0)
    end = ending(executions=[execution()], checkpoint=last, retention_s=3600.0)
    for _ in range(2):
        bench.store.end(lease, end)
    assert bench.state() is RunState.SUCCEEDED
    assert bench.store.restore(lease, []) == [without_view(last)]
    assert bench.executions() == [("charge", 1)]
    bench.pass_time(61)
    bench.store.purge(10)
    assert bench.store.restore(lease, []) == []


def test_a_stale_owner_saves_nothing_with_its_end(bench: Bench) -> None:
    """After a takeover neither the state nor the checkpoint is written."""
    stale = bench.take()
    bench.pass_time(31)
    lease = bench.take(owner="second")
    with pytest.raises(LeaseLost):
        bench.store.end(stale, ending(checkpoint=output(), executions=[execution()]))
    assert bench.state() is RunState.RUNNING
    assert (bench.store.restore(lease, []), bench.executions()) == ([], [])


def test_acquiring_restores_what_earlier_deliveries_saved(bench: Bench) -> None:
    """With rows that are only found under their keys; there is nothing of a run that none has advanced."""
    first = bench.store.acquire_and_restore(request(), _unasked)
    assert isinstance(first, tuple)
    assert (first[0].epoch, first[1]()) == (1, [])
    item = output("pack", item="7/3", item_index=7)
    bench.store.save(first[0], output(ttl_s=60.0), None)
    bench.store.save(first[0], item, None)
    bench.store.end(first[0], ending(RunState.FAILED, retention_s=3600.0))
    second = bench.store.acquire_and_restore(request("second", task_id="t2"), lambda: [item.key])
    assert isinstance(second, tuple)
    lease, restore = second
    assert (lease.epoch, {each.item for each in restore()}) == (2, {"", "7/3"})
    assert isinstance(bench.store.acquire_and_restore(request("third"), _unasked), RunRow)
    bench.pass_time(61)
    bench.store.purge(10)
    assert {each.item for each in bench.store.restore(lease, [item.key])} == {"", "7/3"}


def test_a_second_saver_gets_the_first_ones_checkpoint(bench: Bench) -> None:
    """Whoever saved first wins; the loser's execution is not counted."""
    lease = bench.take()
    first = bench.store.save(lease, output(data=b"first"), execution())
    assert bench.store.save(lease, output(data=b"second"), execution()) == without_view(first)
    assert bench.store.restore(lease, [])[0].output_data == b"first"
    assert bench.executions() == [("charge", 1)]


def test_a_stale_owner_saves_nothing(bench: Bench) -> None:
    """After a takeover the old epoch is refused, with its execution row."""
    stale = bench.take()
    bench.pass_time(31)
    lease = bench.take(owner="second")
    with pytest.raises(LeaseLost) as lost:
        bench.store.save(stale, output(), execution())
    assert lost.value.args == (GRAPH, RUN, 1)
    assert (bench.store.restore(lease, []), bench.executions()) == ([], [])


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED, RunState.WAITING])
def test_nothing_is_saved_after_the_end(bench: Bench, state: RunState) -> None:
    """A late step of a run that ended or was parked is refused."""
    lease = bench.take()
    bench.store.end(lease, ending(state))
    with pytest.raises(LeaseLost):
        bench.store.save(lease, output(), execution())


def test_a_run_that_was_never_acquired_saves_nothing(bench: Bench) -> None:
    """A lease without a row is no lease."""
    lease = replace(bench.take(), execution_id="order-18")
    with pytest.raises(LeaseLost):
        bench.store.save(lease, output(execution_id="order-18"), None)


def test_an_owner_with_the_same_epoch_is_refused(bench: Bench) -> None:
    """A run that was purged and started again counts from 1 again; the owner tells the two lives apart."""
    stale = replace(bench.take(), owner="of a purged run")
    with pytest.raises(LeaseLost):
        bench.store.save(stale, output(), None)
    with pytest.raises(LeaseLost):
        bench.store.end(stale, ending())
    assert bench.store.extend([stale]) == {}


def test_items_are_restored_by_key_only(bench: Bench) -> None:
    """A batch's items may be many: only those asked for come back, beside all of the run's own steps."""
    lease = bench.take()
    for item in ("", "7", "7/3"):
        bench.store.save(lease, output(item=item, data=item.encode()), None)
    assert [found.item for found in bench.store.restore(lease, [])] == [""]
    keys = [workflow_key(GRAPH, RUN, "charge", "7/3"), workflow_key(GRAPH, RUN, "charge"), b"\0" * 32]
    assert {found.item for found in bench.store.restore(lease, keys)} == {"", "7/3"}


def test_many_keys_are_restored_at_once(bench: Bench) -> None:
    """More keys than a database binds in one statement are no problem."""
    lease = bench.take()
    bench.store.save(lease, output(item="1999"), None)
    keys = [workflow_key(GRAPH, RUN, "charge", str(index)) for index in range(2000)]
    assert [found.item for found in bench.store.restore(lease, keys)] == ["1999"]


def test_another_runs_checkpoints_are_not_restored(bench: Bench) -> None:
    """Neither another run's of this graph, nor this run's of another graph."""
    bench.store.save(bench.take(execution_id="order-18"), output(execution_id="order-18"), None)
    bench.store.save(bench.take(graph="refunds"), output(graph="refunds"), None)
    assert bench.store.restore(bench.take(), []) == []


def test_a_key_that_holds_another_runs_checkpoint_is_refused(bench: Bench) -> None:
    """Such a row cannot be right under that key, however sound its checksum."""
    foreign = bench.take(execution_id="order-18")
    bench.store.save(foreign, output(execution_id="order-18", key=output().key), None)
    lease = bench.take()
    with pytest.raises(CorruptCheckpoint, match="order-18"):
        bench.store.restore(lease, [output().key])
    with pytest.raises(CorruptCheckpoint, match="order-18"):
        bench.store.save(lease, output(), None)


def test_a_checkpoint_with_a_ttl_counts_while_its_run_lives(bench: Bench) -> None:
    """The ttl starts at the run's end: a crash in a long run must not charge the card again."""
    bench.store.save(bench.take(), output(ttl_s=1.0), None)
    bench.pass_time(3600)
    assert len(bench.store.restore(bench.take(owner="second"), [])) == 1


def test_a_resumed_run_gets_its_dated_checkpoints_back(bench: Bench) -> None:
    """Ending dates the rows, resuming takes the date back, whatever time has passed."""
    lease = bench.take()
    bench.store.save(lease, output(ttl_s=1.0), None)
    bench.store.save(lease, output("ship"), None)
    bench.store.end(lease, ending(RunState.FAILED))
    bench.pass_time(60)
    lease = bench.take(owner="second")
    assert len(bench.store.restore(lease, [])) == 2


def test_a_missing_global_checkpoint_is_claimed_by_one(bench: Bench) -> None:
    """The first owner may compute, a second waits; the first may ask again."""
    key = shared().key
    assert bench.store.lookup(key, "a", 30.0) is True
    assert bench.store.lookup(key, "b", 30.0) is False
    assert bench.store.lookup(key, "a", 30.0) is True


def test_a_published_checkpoint_is_found_by_all(bench: Bench) -> None:
    """No claim is needed any more, and none is left in the way."""
    bench.store.lookup(shared().key, "a", 30.0)
    assert bench.store.publish(shared(), "a", execution("infer")) == shared()
    assert bench.store.lookup(shared().key, "b", 30.0) == shared()
    assert bench.executions() == [("infer", 1)]


def test_a_hit_writes_the_row_of_the_step_and_a_miss_does_not(bench: Bench) -> None:
    """The row is of the run that reads the entry; asked again after a lost answer, it is still one row."""
    hit = execution("infer", execution_id="order-18", attempts=0, cached=True)
    assert bench.store.lookup(shared().key, "a", 30.0, hit) is True
    assert bench.store.lookup(shared().key, "b", 30.0, hit) is False
    bench.store.publish(shared(), "a", None)
    assert bench.executions() == []
    assert bench.store.lookup(shared().key, "b", 30.0, hit) == shared()
    assert bench.executions() == [("infer", 1)]


def test_a_live_global_checkpoint_is_not_replaced(bench: Bench) -> None:
    """The first one counts for everyone; the second computation is recorded all the same, once."""
    bench.store.publish(shared(data=b"first", ttl_s=60.0), "a", execution("infer"))
    late = execution("infer", delivery=2)
    for _ in range(2):
        assert bench.store.publish(shared(data=b"second"), "b", late).output_data == b"first"
    assert bench.executions() == [("infer", 1), ("infer", 2)]


def test_an_expired_global_checkpoint_is_computed_again(bench: Bench) -> None:
    """After its ttl it is claimed like a missing one, and replaced whole."""
    bench.store.publish(shared(data=b"first", ttl_s=60.0), "a", None)
    assert isinstance(bench.store.lookup(shared().key, "b", 30.0), Checkpoint)
    bench.pass_time(61)
    assert bench.store.lookup(shared().key, "b", 30.0) is True
    assert bench.store.lookup(shared().key, "c", 30.0) is False
    new = shared(data=b"second", output_type="shop.Other", step_version="3", ttl_s=120.0)
    assert bench.store.publish(new, "b", None) == new
    bench.pass_time(61)
    assert bench.store.lookup(shared().key, "c", 30.0) == new


def test_a_live_entry_is_replaced_on_demand(bench: Bench) -> None:
    """Until then everybody reads the old one; afterwards the new one, with its own ttl."""
    key = shared().key
    bench.store.publish(shared(data=b"old", ttl_s=60.0), "a", None)
    assert bench.store.lookup(key, "c", 30.0) == shared(data=b"old", ttl_s=60.0)
    new = shared(data=b"new", ttl_s=600.0)
    for _ in range(2):
        assert bench.store.publish(new, "b", execution("infer"), replace=True) == new
    bench.pass_time(100)
    assert bench.store.lookup(key, "c", 30.0) == new
    assert bench.executions() == [("infer", 1)]


def test_a_forgotten_entry_is_computed_again(bench: Bench) -> None:
    """It is gone for everybody, and there is nothing to forget a second time."""
    key = shared().key
    assert bench.store.forget(key) is False
    bench.store.publish(shared(data=b"old"), "a", None)
    assert bench.store.forget(key) is True
    assert bench.store.forget(key) is False
    assert bench.store.lookup(key, "b", 30.0) is True
    assert bench.store.forget(key) is False
    bench.store.publish(shared(data=b"new"), "b", None)
    assert bench.store.lookup(key, "c", 30.0) == shared(data=b"new")


def test_an_expired_entry_is_not_there_to_forget(bench: Bench) -> None:
    """It counted no more."""
    bench.store.publish(shared(ttl_s=60.0), "a", None)
    bench.pass_time(61)
    assert bench.store.forget(shared().key) is False
    assert bench.store.lookup(shared().key, "b", 30.0) is True


def test_a_runs_own_checkpoint_is_not_forgotten(bench: Bench) -> None:
    """Whoever names its key by mistake would have an effect repeated."""
    lease = bench.take()
    bench.store.save(lease, output(), None)
    assert bench.store.forget(output().key) is False
    assert len(bench.store.restore(lease, [])) == 1


def test_an_expired_claim_is_taken(bench: Bench) -> None:
    """A worker that died while computing blocks nobody for longer than its lease."""
    bench.store.lookup(shared().key, "a", 30.0)
    bench.pass_time(31)
    assert bench.store.lookup(shared().key, "b", 30.0) is True
    assert bench.store.lookup(shared().key, "a", 30.0) is False


def test_a_claim_is_extended_and_given_up_only_by_its_owner(bench: Bench) -> None:
    """Others can do neither."""
    key = shared().key
    bench.store.lookup(key, "a", 30.0)
    bench.store.release_claim(key, "b")
    bench.store.extend([], [(key, "b", 300.0)])
    bench.pass_time(20)
    bench.store.extend([], [(key, "a", 30.0)])
    bench.pass_time(20)
    assert bench.store.lookup(key, "b", 30.0) is False
    bench.store.release_claim(key, "a")
    assert bench.store.lookup(key, "b", 30.0) is True


def test_leases_and_claims_are_extended_together(bench: Bench) -> None:
    """One heartbeat keeps both."""
    lease = bench.take()
    bench.store.lookup(shared().key, "a", 30.0)
    bench.pass_time(20)
    assert bench.store.extend([lease], [(shared().key, "a", 30.0)]) == {(GRAPH, RUN): None}
    bench.pass_time(20)
    assert bench.refused(owner="second").epoch == 1
    assert bench.store.lookup(shared().key, "b", 30.0) is False


def test_of_many_threads_one_computes(bench: Bench) -> None:
    """All look up one missing key at once, and go on until they have it: one is told to compute."""
    start, told = threading.Barrier(8), list[bool]()
    found = list[bytes]()

    def want(owner: str) -> None:
        start.wait()
        while not isinstance(answer := bench.store.lookup(shared().key, owner, 30.0), Checkpoint):
            if answer:
                told.append(answer)
                answer = bench.store.publish(shared(data=owner.encode()), owner, None)
                break
            # As those who wait do: without a pause they would take every connection from the one who computes.
            time.sleep(0.01)
        found.append(answer.output_data)

    threads = [threading.Thread(target=want, args=(f"owner-{index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (told, len(found), len(set(found))) == ([True], 8, 1)


def test_of_many_threads_one_acquires(bench: Bench) -> None:
    """Deliveries that meet at a new run: one gets epoch 1, the others its row."""
    start, epochs = threading.Barrier(8), list[int]()
    held = list[bool]()

    def want(owner: str) -> None:
        start.wait()
        answer = bench.store.acquire(request(owner))
        held.append(hasattr(answer, "owner"))
        epochs.append(answer.epoch)

    threads = [threading.Thread(target=want, args=(f"owner-{index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sorted(held), set(epochs)) == ([False] * 7 + [True], {1})


def test_of_many_savers_one_counts(bench: Bench) -> None:
    """Threads that save one key at once all get the same checkpoint back."""
    lease, start, kept = bench.take(), threading.Barrier(8), list[bytes]()

    def want(data: bytes) -> None:
        start.wait()
        kept.append(bench.store.save(lease, output(data=data), execution()).output_data)

    threads = [threading.Thread(target=want, args=(b"%d" % index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(kept), len(set(kept)), bench.executions()) == (8, 1, [("charge", 1)])


def test_the_schema_is_of_this_release(bench: Bench) -> None:
    """Migrating again changes nothing, and what is stored stays."""
    lease = bench.take()
    bench.store.save(lease, output(), None)
    assert bench.store.migrate() == SCHEMA_VERSION
    bench.store.check_schema()
    assert len(bench.store.restore(lease, [])) == 1


def test_a_closed_store_can_be_used_again(bench: Bench) -> None:
    """Closing gives connections back; it is no end."""
    bench.take()
    bench.store.close()
    assert bench.state() is RunState.RUNNING
