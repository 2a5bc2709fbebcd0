from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, make_url
from sqlalchemy.pool import QueuePool

from docket_celery.errors import LeaseLost, StoreRefused
from docket_celery.store import SQLStore
from docket_celery.store.records import Checkpoint, Lease, RunState
from docket_celery.store.sql import checkpoints, heartbeat, runs
from tests.conformance.blocking import blocked
from tests.conformance.samples import GRAPH, RUN, SQLBench, ending, execution, output, request, shared

pytestmark = [pytest.mark.integration, pytest.mark.leaves_lease]


@pytest.fixture
def bench(database_url: str) -> Generator[SQLBench]:
    """A store on real Postgres, empty."""
    store = SQLStore(database_url)
    yield SQLBench(store)
    store.close()


@pytest.fixture
def rival(database_url: str) -> Generator[Connection]:
    """Another worker's connection, which commits when the test says so."""
    engine = create_engine(make_url(database_url), isolation_level="READ COMMITTED")
    with engine.connect() as connection:
        yield connection
        connection.rollback()
    engine.dispose()


class TestInterleaving:
    """Two real connections, held in the middle by row locks."""

    def stale(self, bench: SQLBench) -> Lease:
        """Return a lease that expired and that nobody has taken yet."""
        lease = bench.take()
        bench.pass_time(31)
        return lease

    def test_a_save_that_waits_for_a_takeover_is_refused(self, bench: SQLBench, rival: Connection) -> None:
        """The fence sees what it waited for: the takeover that committed meanwhile."""
        stale = self.stale(bench)
        runs.acquire(rival, request("second"))
        with blocked(bench, lambda: bench.store.save(stale, output(), execution())) as save:
            rival.commit()
        assert isinstance(save.exception(), LeaseLost)
        assert (bench.sql("SELECT 1 FROM docket_cache"), bench.executions()) == ([], [])

    def test_a_save_that_waits_for_a_takeover_that_fails_is_kept(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """A takeover that never committed took nothing."""
        stale = self.stale(bench)
        runs.acquire(rival, request("second"))
        with blocked(bench, lambda: bench.store.save(stale, output(), None)) as save:
            rival.rollback()
        assert save.result().output_data == output().output_data

    def test_a_takeover_waits_for_a_save_and_restores_it(self, bench: SQLBench, rival: Connection) -> None:
        """What the old holder saved at the last moment is there when the new one looks."""
        stale = self.stale(bench)
        checkpoints.save(rival, stale, output(), None)
        with blocked(bench, lambda: bench.take(owner="second")) as take:
            rival.commit()
        assert [found.key for found in bench.store.restore(take.result(), [])] == [output().key]

    def test_an_end_that_waits_for_a_takeover_writes_nothing(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """Neither state nor result, executions or dates."""
        stale = bench.take()
        bench.store.save(stale, output(ttl_s=1.0), None)
        bench.pass_time(31)
        runs.acquire(rival, request("second"))
        with blocked(bench, lambda: bench.store.end(stale, ending(executions=[execution("x")]))) as end:
            rival.commit()
        assert isinstance(end.exception(), LeaseLost)
        assert (bench.state(), bench.executions()) == (RunState.RUNNING, [])
        assert bench.sql("SELECT expires_at FROM docket_cache")[0][0] is None

    def test_an_end_that_waits_for_a_heartbeat_is_written_with_its_checkpoint(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """The row that it waited for is a newer version of the same; the holder is still its own."""
        lease = bench.take()
        heartbeat.extend(rival, [lease], [])
        last = ending(executions=[execution("x")], checkpoint=output())
        with blocked(bench, lambda: bench.store.end(lease, last)) as end:
            rival.commit()
        assert end.exception() is None
        assert (bench.state(), bench.executions()) == (RunState.SUCCEEDED, [("x", 1)])
        assert [found.key for found in bench.store.restore(lease, [])] == [output().key]

    def test_an_end_whose_checkpoint_is_there_already_writes_nothing(self, bench: SQLBench) -> None:
        """The holder has restored what there was: this is a defect, and two values may not both count."""
        lease = bench.take()
        bench.store.save(lease, output(data=b"first"), None)
        with pytest.raises(StoreRefused, match="delete that, too"):
            bench.store.end(lease, ending(checkpoint=output(data=b"second")))
        assert bench.state() is RunState.RUNNING

    def test_a_heartbeat_that_waits_for_a_takeover_extends_nothing(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """The new holder's lease is not the old one's to extend."""
        stale = self.stale(bench)
        runs.acquire(rival, request("second"))
        with blocked(bench, lambda: bench.store.extend([stale])) as extend:
            rival.commit()
        assert extend.result() == {}

    def test_dates_of_a_run_that_is_being_resumed_are_not_written(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """The rest of an end waits for the takeover; a date would have a purge delete what the new holder needs."""
        lease, failed = bench.take(task_id="t1"), ending(RunState.FAILED)
        bench.store.save(lease, output(ttl_s=1.0), None)
        bench.store.end(lease, failed)
        bench.sql("UPDATE docket_cache SET expires_at = NULL")
        assert isinstance(runs.acquire(rival, request("second", task_id="t2")), Lease)
        with blocked(bench, lambda: bench.store.end(lease, failed)) as end:
            rival.commit()
        assert end.exception() is None
        assert bench.state() is RunState.RUNNING
        assert bench.sql("SELECT expires_at FROM docket_cache")[0][0] is None

    def test_forgetting_tells_of_what_it_deletes(self, bench: SQLBench, rival: Connection) -> None:
        """An entry that replaces an expired one while it waits is live."""
        bench.store.publish(shared(ttl_s=1.0), "a", None)
        bench.pass_time(2)
        checkpoints.publish(rival, shared(data=b"fresh"), "b", None)
        with blocked(bench, lambda: bench.store.forget(shared().key)) as forget:
            rival.commit()
        assert forget.result() is True
        assert bench.sql("SELECT 1 FROM docket_cache") == []

    def test_two_takeovers_give_one_lease(self, bench: SQLBench, rival: Connection) -> None:
        """The second finds the lease alive again and gets the row; one crash is counted."""
        self.stale(bench)
        runs.acquire(rival, request("second"))
        with blocked(bench, lambda: bench.refused(owner="third")) as refused:
            rival.commit()
        assert (refused.result().epoch, refused.result().lost) == (2, 1)

    def test_a_takeover_that_waits_for_the_end_gets_the_outcome(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """The row is read in a statement of its own, after what it waited for."""
        runs.end(rival, self.stale(bench), ending())
        with blocked(bench, lambda: bench.refused(owner="second")) as refused:
            rival.commit()
        assert (refused.result().state, refused.result().result) == (RunState.SUCCEEDED, ending().result)

    def test_the_slower_of_two_savers_reads_the_winner(self, bench: SQLBench, rival: Connection) -> None:
        """Its own snapshot cannot see the winner's row: a new statement does."""
        lease = bench.take()
        checkpoints.save(rival, lease, output(data=b"first"), None)
        with blocked(bench, lambda: bench.store.save(lease, output(data=b"second"), execution())) as save:
            rival.commit()
        assert save.result().output_data == b"first"
        assert bench.executions() == []

    def test_the_slower_of_two_publishers_reads_the_winner(self, bench: SQLBench, rival: Connection) -> None:
        """Both computed; one result counts."""
        checkpoints.publish(rival, shared(data=b"first"), "a", None)
        with blocked(bench, lambda: bench.store.publish(shared(data=b"second"), "b", None)) as publish:
            rival.commit()
        assert publish.result().output_data == b"first"

    def test_a_lookup_that_waits_for_a_publisher_claims_nothing(
        self, bench: SQLBench, rival: Connection
    ) -> None:
        """Its snapshot is from before the result; claiming now would compute a second time."""
        bench.store.lookup(shared().key, "a", 30.0)
        checkpoints.publish(rival, shared(), "a", None)
        with blocked(bench, lambda: bench.store.lookup(shared().key, "b", 30.0)) as lookup:
            rival.commit()
        assert lookup.result() is False
        assert isinstance(bench.store.lookup(shared().key, "b", 30.0), Checkpoint)

    def test_one_of_two_that_meet_a_dead_claim_gets_it(self, bench: SQLBench, rival: Connection) -> None:
        """The one that waited sees a claim that its snapshot does not show."""
        bench.store.lookup(shared().key, "a", 30.0)
        bench.pass_time(31)
        assert checkpoints.lookup(rival, shared().key, "b", 30.0) is True
        with blocked(bench, lambda: bench.store.lookup(shared().key, "c", 30.0)) as lookup:
            rival.commit()
        assert lookup.result() is False


class TestStatements:
    """How many statements each call costs, counted where they leave for the server."""

    @pytest.fixture
    def count(self, bench: SQLBench) -> Callable[[Callable[[], Any]], int]:
        """Return a function that counts what another one sends."""
        sent: list[str] = []
        assert isinstance(bench.store, SQLStore)
        event.listen(
            bench.store.engine, "before_cursor_execute", lambda *arguments: sent.append(str(arguments[2]))
        )

        def counted(work: Callable[[], Any]) -> int:
            sent.clear()
            work()
            return len(sent)

        return counted

    def test_a_happy_run_costs_one_statement_a_call(
        self, bench: SQLBench, count: Callable[[Callable[[], Any]], int]
    ) -> None:
        """acquire, restore, each save, each heartbeat and the end, the last checkpoint with it: one each."""
        store, lease = bench.store, bench.take(owner="first")
        assert count(lambda: bench.take(execution_id="order-18")) == 1
        assert count(lambda: store.restore(lease, [output().key])) == 1
        assert count(lambda: store.save(lease, output(), execution())) == 1
        assert count(lambda: store.save(lease, output("ship"), None)) == 1
        assert count(lambda: store.extend([lease, lease], [(shared().key, "a", 1.0)])) == 1
        assert count(lambda: store.extend([lease])) == 1
        end = ending(executions=[execution("a"), execution("b")], checkpoint=output("pack"))
        assert count(lambda: store.end(lease, end)) == 1
        assert count(lambda: store.find_run(GRAPH, RUN)) == 1

    def test_a_global_hit_costs_one_statement_and_a_miss_two(
        self, bench: SQLBench, count: Callable[[Callable[[], Any]], int]
    ) -> None:
        """Looking up claims in the same statement; publishing gives the claim up in the same statement."""
        store = bench.store
        assert count(lambda: store.lookup(shared().key, "a", 30.0)) == 1
        assert count(lambda: store.lookup(shared().key, "b", 30.0)) == 1
        assert count(lambda: store.publish(shared(), "a", execution("infer"))) == 1
        assert count(lambda: store.lookup(shared().key, "b", 30.0, execution("infer", delivery=2))) == 1
        assert count(lambda: store.release_claim(shared().key, "b")) == 1

    def test_the_unhappy_ways_cost_one_more(
        self, bench: SQLBench, count: Callable[[Callable[[], Any]], int]
    ) -> None:
        """A refused run, a winner and a repeated end are read in a second statement; the end dates in a third."""
        store, lease = bench.store, bench.take()
        store.save(lease, output(), None)
        store.publish(shared(), "a", None)
        assert count(lambda: bench.refused(owner="second")) == 1
        assert count(lambda: bench.take(owner="first")) == 2
        assert count(lambda: store.save(lease, output(), None)) == 2
        assert count(lambda: store.publish(shared(), "b", None)) == 2
        store.end(lease, ending())
        assert count(lambda: store.end(lease, ending())) == 3

    def test_an_upload_that_deletes_very_many_items_is_told_of_one_row(self, bench: SQLBench) -> None:
        """The surplus of an upload that was larger before may be a million items."""
        assert isinstance(bench.store, SQLStore)
        lease = bench.store.begin_upload(request(), 60.0)
        assert isinstance(lease, Lease)
        rows = [output("items", item=str(number), item_index=number) for number in range(9)]
        bench.store.put_items(lease, rows)
        told = list[int]()

        def note(_connection: Any, cursor: Any, *_: Any) -> None:
            told.append(cursor.rowcount)

        event.listen(bench.store.engine, "after_cursor_execute", note)
        bench.store.close_items(lease, "items", 2, [])
        assert told == [1]
        assert bench.sql("SELECT count(*) FROM docket_cache") == [(2,)]

    def test_very_many_checkpoints_are_dated_in_pages(
        self, bench: SQLBench, count: Callable[[Callable[[], Any]], int]
    ) -> None:
        """One statement has 15 seconds, and a batch may have a million items with a time to live."""
        store = bench.store
        bench.sql(
            "INSERT INTO docket_cache (cache_key, graph, execution_id, step_name, step_version, item, item_index,"
            " input_hash, output_type, output_data, checksum, ttl, created_at)"
            " SELECT sha256(CAST(i::text AS bytea)), :graph, :run, 'rate', '', i::text, i, '', 'x', '', sha256(''),"
            " 60, now() FROM generate_series(1, 45000) AS i",
            graph=GRAPH,
            run=RUN,
        )

        def dates() -> list[tuple[float | None, int]]:
            """Return until when after the end of the run the checkpoints are kept, and how many."""
            rows = bench.sql(
                "SELECT CAST(EXTRACT(EPOCH FROM c.expires_at - r.ended_at) AS float), count(*)"
                " FROM docket_cache AS c JOIN docket_runs AS r USING (graph, execution_id) GROUP BY 1"
            )
            return [tuple(row) for row in rows]

        lease = bench.take()
        store.save(lease, output(ttl_s=60.0), None)
        assert count(lambda: store.end(lease, ending(RunState.FAILED))) == 3
        assert dates() == [(60.0, 45001)]
        again = bench.take(owner="again", task_id="t2")
        assert count(lambda: store.restore(again, [])) == 4
        assert dates() == [(None, 45001)]
        assert count(lambda: store.cancel(GRAPH, RUN, {"code": "DC204", "args": [RUN, ""]}, 60.0)) == 8
        assert dates() == [(60.0, 45001)]

    def test_the_date_of_an_earlier_end_is_none(self, bench: SQLBench) -> None:
        """While the checkpoints of a run that ended once more are dated anew, a purge takes none by its old date."""
        lease = bench.take()
        bench.store.save(lease, output(ttl_s=60.0), None)
        bench.store.end(lease, ending(RunState.FAILED))
        bench.pass_time(61)
        bench.sql("UPDATE docket_runs SET ended_at = now()")
        assert bench.store.purge(10).checkpoints == 0
        bench.sql("UPDATE docket_cache SET expires_at = now() + interval '1 minute'")
        bench.pass_time(61)
        assert bench.store.purge(10).checkpoints == 1

    def test_a_quarantine_costs_what_a_lease_would_have(
        self, bench: SQLBench, count: Callable[[Callable[[], Any]], int]
    ) -> None:
        """It is decided and committed where the lease would have been."""
        bench.take(max_deliveries=1)
        bench.pass_time(31)
        assert count(lambda: bench.refused(owner="second", max_deliveries=1)) == 2

    def test_no_connection_is_held_between_calls(self, bench: SQLBench) -> None:
        """User code never runs with a connection of ours checked out."""
        bench.take()
        assert isinstance(bench.store, SQLStore)
        pool = bench.store.engine.pool
        assert isinstance(pool, QueuePool)
        assert (pool.checkedout(), pool.size()) == (0, 8)
        held = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%' AND datname = current_database()"
        assert bench.sql(held)[0][0] == 0

    def test_spent_claims_are_swept_by_later_publishers(self, bench: SQLBench) -> None:
        """A published claim stays a minute for late readers, then goes: the table does not grow for ever."""
        for index in range(6):
            key = shared(key=bytes([index]) * 32)
            bench.store.lookup(key.key, "a", 30.0)
            bench.store.publish(key, "a", None)
            bench.pass_time(120)
        assert bench.sql("SELECT count(*) FROM docket_claims")[0][0] <= 2
