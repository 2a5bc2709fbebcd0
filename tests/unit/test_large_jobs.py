"""References to stored jobs and results: on the wire, in eager tasks, and damaged."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
from collections.abc import Generator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import pytest
from celery import Celery
from google.protobuf.message import Message
from kombu.utils.json import dumps, loads

from docket_celery import (
    DecodeFailed,
    Graph,
    GraphTask,
    InvalidArguments,
    MemoryStore,
    Named,
    PayloadTooLarge,
    PayloadUnavailable,
    RunConflict,
    Scope,
    SQLStore,
    StoredResult,
    graph_task,
    settings,
)
from docket_celery.engine.process.inline import InlineRuntime
from docket_celery.engine.run_context import RunContext, Submission
from docket_celery.engine.run_row import job_parts, run_request
from docket_celery.errors import UnknownMessageType
from docket_celery.plan.messages import to_bytes, type_name
from docket_celery.plan.options import MAX_SECONDS
from docket_celery.store.contract import Store
from docket_celery.store.identity import job_digest
from docket_celery.store.records import Lease, Purged, RunEnd, RunRequest, RunState
from docket_celery.task.envelope import Undecodable
from docket_celery.task.large_jobs import ask, give_up, receive, refer, send, wait_s, wrap
from docket_celery.task.references import RESULT, Stored
from tests.unit.protos.shop_pb2 import Label, Money, Order, Payment

SIZE = 2 * 1024 * 1024
BIG = Label(text="x" * SIZE)
app = Celery("payloads", broker="memory://", backend="cache+memory://")

keeping = Graph("keeping")


@keeping.step(persist=Scope.WORKFLOW)
def measure(label: Label) -> Money:
    """Tell a text's length."""
    return Money(cents=len(label.text))


@keeping.step
def repeat(label: Label, money: Money) -> Order:
    """Make something as long."""
    return Order(order_id=label.text * 2, amount_cents=money.cents)


@graph_task(app, keeping, name="payloads.repeat")
def repeat_label(label: Label) -> Order:
    """Large in, large out."""
    raise NotImplementedError


passing = Graph("passing")


@passing.step
def weigh(label: Label) -> Money:
    """Tell a text's length."""
    return Money(cents=len(label.text))


@graph_task(app, passing, name="payloads.weigh")
def weigh_label(label: Label) -> Money:
    """Persist nothing."""
    raise NotImplementedError


@pytest.fixture
def database(tmp_path: Path) -> Generator[str]:
    """A SQLite database that this process's graphs use."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    store = SQLStore(url)
    store.migrate()
    store.close()
    settings(database_url=url)
    yield url
    settings(database_url=None)


@pytest.fixture
def small_messages() -> Generator[None]:
    """Let few bytes be a large message."""
    settings(max_message_bytes=100)
    yield
    settings(max_message_bytes=None)


def result_reference(message: Message, graph: str, execution_id: str) -> Stored:
    """Return the reference to the result of a run."""
    data = to_bytes(message)
    digest = hashlib.sha256(data).digest()
    return Stored(RESULT, graph, execution_id, type_name(message), len(data), digest, message)


def asked(task: GraphTask[Any, Any], execution_id: str, digest: bytes) -> RunRequest:
    """Return what a task asks of the row of a run with that job digest."""
    headers = {
        "docket_execution_id": execution_id,
        "docket_job_digest": base64.b64encode(digest).decode(),
    }
    return ask(task, headers, "t-1", settings())


def reference(**changes: Any) -> StoredResult:
    """Return the reference to a result, as it comes back from JSON."""
    made = result_reference(Money(cents=7), "passing", "o-1")
    envelope = json.loads(dumps(made))
    envelope["__value__"] |= changes
    found = loads(json.dumps(envelope))
    assert isinstance(found, StoredResult)
    return found


# --- jobs of messages that `Named` tells apart --------------------------------------------------------------------

Text: TypeAlias = Annotated[Label, Named("text")]
Title: TypeAlias = Annotated[Label, Named("title")]
printing = Graph("printing")


@printing.step(persist=Scope.WORKFLOW)
def print_page(text: Text, title: Title) -> Order:
    """Show which is which by their ends."""
    return Order(order_id=f"{title.text[-1]}: {text.text[-1]}")


@graph_task(app, printing, name="payloads.print_page")
def print_text(text: Text, title: Title) -> Order:
    """Two messages of one type."""
    raise NotImplementedError


@graph_task(app, printing, name="payloads.print_page_turned")
def print_title(title: Title, text: Text) -> Order:
    """The same run after a deploy that turned the parameters round."""
    raise NotImplementedError


@pytest.mark.parametrize("size", [1, SIZE])
def test_named_messages_changed_about_are_another_job(database: str, size: int) -> None:
    """What was made of other values is not handed out as the outcome of these."""
    one, other = Label(text="1" * size), Label(text="2" * size)
    app.conf.task_always_eager = True
    try:
        assert print_text.apply_async((one, other), execution_id="page").get().order_id == "2: 1"
        assert print_title.apply_async((other, one), execution_id="page").get().order_id == "2: 1"
        with pytest.raises(RunConflict, match="another job"):
            print_text.apply_async((other, one), execution_id="page").get()
    finally:
        app.conf.task_always_eager = False


def test_a_stored_job_is_read_by_name(database: str) -> None:
    """The receiver's parameters may stand in another order than the sender's."""
    text, title = Label(text="x" * SIZE + "a"), Label(text="b")
    job = job_parts(print_text.declaration.given, (text, title))
    run = asked(print_text, "read", job_digest(job))
    args, kwargs = send(print_text, (), {"text": text, "title": title}, run, 60.0, settings())
    assert receive(print_title, args, kwargs, run, settings(), travelled=True) == (title, text)


# --- eager -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("always", [False, True])
def test_an_eager_task_takes_and_gives_what_is_large(database: str, always: bool) -> None:
    """Nothing travels: no reference, and no limit where the store would take over."""
    app.conf.task_always_eager = always
    try:
        result = repeat_label.delay(BIG) if always else repeat_label.apply((BIG,))
        assert result.get() == Order(order_id=BIG.text * 2, amount_cents=SIZE)
    finally:
        app.conf.task_always_eager = False


def test_an_eager_task_needs_no_database_for_what_is_large() -> None:
    """A store in memory serves: sender and receiver are one process."""
    graph = Graph("remembering", store=MemoryStore())
    graph.register(measure)

    @graph.step(persist=Scope.WORKFLOW)
    def scale(money: Money) -> Order:
        return Order(amount_cents=money.cents)

    @graph_task(app, graph, name="payloads.remember")
    def remember(label: Label) -> Order:
        raise NotImplementedError

    app.conf.task_always_eager = True
    try:
        assert remember.delay(BIG).get() == Order(amount_cents=SIZE)
    finally:
        app.conf.task_always_eager = False


@pytest.mark.parametrize("always", [False, True])
def test_an_eager_task_refuses_what_could_not_be_sent(always: bool) -> None:
    """A graph that persists nothing: the test fails as production would."""
    app.conf.task_always_eager = always
    try:
        with pytest.raises(PayloadTooLarge, match="docket_max_message_bytes"):
            (weigh_label.delay if always else weigh_label.apply)(*([BIG] if always else [(BIG,)]))
    finally:
        app.conf.task_always_eager = False


def test_a_job_too_large_for_the_store_is_refused_in_process(database: str) -> None:
    """The second limit holds for every run that is stored, and for its result."""
    settings(max_stored_bytes=SIZE)
    try:
        with pytest.raises(PayloadTooLarge, match=r"the job of run 'o-1'.*raise docket_max_stored_bytes"):
            keeping.execute(Money, BIG, execution_id="o-1")
        settings(max_stored_bytes=1100)
        with pytest.raises(PayloadTooLarge, match=r"the result of run 'o-2'"):
            keeping.execute(Order, Label(text="x" * 1000), execution_id="o-2", timeout=20)
    finally:
        settings(max_stored_bytes=None)


def test_a_task_called_directly_reads_a_reference(database: str) -> None:
    """Here and now, as anywhere else."""
    keeping.execute(Order, Label(text="abc"), execution_id="o-1")
    made = result_reference(Order(order_id="abcabc", amount_cents=3), "keeping", "o-1")
    copied: Any = pickle.loads(pickle.dumps(made))  # noqa: S301 -- our own bytes
    assert repr(made) == "Order(order_id='abcabc', amount_cents=3)"
    assert repr(copied).startswith("<Stored result docket.tests.unit.Order of run 'o-1'")
    assert copied.read(app) == Order(order_id="abcabc", amount_cents=3)
    lost: Any = reference()
    with pytest.raises(PayloadUnavailable, match="its row is gone"):
        weigh_label(lost)


def test_a_stored_result_does_not_let_other_arguments_pass(database: str, small_messages: None) -> None:
    """What travelled beside it is checked; what lies in the store may be large."""
    graph = Graph("adding")

    @graph.step
    def add(label: Label, order: Order) -> Money:
        return Money(cents=len(label.text) + order.amount_cents)

    @graph_task(app, graph, name="payloads.add")
    def add_both(label: Label, order: Order) -> Money:
        raise NotImplementedError

    keeping.execute(Order, Label(text="x" * 200), execution_id="o-1")
    lies = result_reference(Order(order_id="x" * 400, amount_cents=200), "keeping", "o-1")
    receive(add_both, [Label(text="a")], {"order": lies}, None, settings(), travelled=True)
    with pytest.raises(PayloadTooLarge, match=r"Label of task payloads\.add"):
        receive(add_both, [Label(text="x" * 200)], {"order": lies}, None, settings(), travelled=True)


def make_request(job: Label, store: Store) -> RunRequest:
    """Return what a worker asks *store* for that begins run o-1 with *job*."""
    context = RunContext(
        graph=keeping.name,
        submission=Submission(execution_id="o-1"),
        settings=settings(),
        runtime=InlineRuntime(),
        owner="w",
    )
    return run_request(repeat_label.plan(), [job], context, store, waits_for_other=False)


def test_a_begun_run_does_not_need_the_result_that_it_was_given(database: str) -> None:
    """Its own row has the job, once the run that made the argument is purged; no other job is taken for it."""
    gone: Any = result_reference(Label(text="abc"), "purged", "o-9")
    lost = loads(dumps(gone))
    job = Label(text="abc")
    digest = job_digest(job_parts(repeat_label.declaration.given, [job]))
    run = asked(repeat_label, "o-1", digest)
    with pytest.raises(PayloadUnavailable, match="'purged'"):
        receive(repeat_label, [lost], {}, run, settings(), travelled=True)
    store = SQLStore(database)
    store.acquire(make_request(job, store))
    store.close()
    assert receive(repeat_label, [lost], {}, run, settings(), travelled=True) == (job,)
    with pytest.raises(PayloadUnavailable, match="'purged'"):
        receive(repeat_label, [lost], {}, replace(run, job_digest=b"other"), settings(), travelled=True)


# --- on commit --------------------------------------------------------------------------------------------------


@pytest.fixture
def callbacks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what waits for a commit that never comes."""
    waiting: list[Any] = []
    monkeypatch.setattr("django.db.transaction.on_commit", waiting.append)
    return waiting


def test_a_job_too_large_for_the_store_is_refused_before_the_commit(
    database: str, small_messages: None, callbacks: list[Any]
) -> None:
    """To the byte of what would lie in the row."""
    job = Label(text="x" * 200)
    stored = keeping_job_bytes(job)
    try:
        settings(max_stored_bytes=stored)
        repeat_label.delay_on_commit(job)
        assert len(callbacks) == 1
        settings(max_stored_bytes=stored - 1)
        with pytest.raises(PayloadTooLarge, match="docket_max_stored_bytes"):
            repeat_label.delay_on_commit(job)
    finally:
        settings(max_stored_bytes=None)
    assert len(callbacks) == 1


def test_a_large_job_without_a_database_is_refused_before_the_commit(
    small_messages: None, callbacks: list[Any]
) -> None:
    """As `delay` does."""
    with pytest.raises(PayloadTooLarge, match="docket_max_message_bytes"):
        repeat_label.delay_on_commit(Label(text="x" * 200))
    assert callbacks == []


def keeping_job_bytes(job: Label) -> int:
    """Return how many bytes the row of a run has for *job*."""
    return len(make_request(job, MemoryStore()).job)


# --- references --------------------------------------------------------------------------------------------------


def test_a_reference_holds_no_message() -> None:
    """Neither as JSON nor pickled, however large the message at hand."""
    made = result_reference(BIG, "g", "o-1")
    assert len(dumps(made)) < 1000
    assert len(pickle.dumps(made)) < 1000


def test_a_replayed_result_is_referred_to_as_its_row_has_it(database: str, small_messages: None) -> None:
    """Written with another version of its type, a message need not be encoded here as it was there."""
    job, made = Label(text="abc" * 25), Order(order_id="abc" * 50, amount_cents=75)
    as_written = Order(amount_cents=75).SerializeToString() + Order(order_id="abc" * 50).SerializeToString()
    assert as_written != to_bytes(made)
    task, submission = repeat_label, Submission(execution_id="o-1")
    store = SQLStore(database)
    lease = store.acquire(make_request(job, store))
    assert isinstance(lease, Lease)
    store.end(lease, RunEnd(state=RunState.SUCCEEDED, result=as_written))
    store.close()
    found = keeping.deliver(task.plan(), [job], submission, settings())
    assert (found.value, found.replayed) == (made, True)
    reference = loads(dumps(wrap(task, found.value, "o-1", found.stored, settings())))
    assert reference.read(app) == made


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"type_name": "docket.tests.unit.Reservation2"}, UnknownMessageType),
        ({"size": 10**12}, PayloadTooLarge),
        ({}, PayloadUnavailable),
    ],
)
def test_a_reference_is_not_believed(changes: dict[str, Any], error: type[Exception]) -> None:
    """Only declared types, only within the limit, and only what the store really has."""
    with pytest.raises(error):
        reference(**changes).read(app)


FIELDS = {"kind": "result", "graph": "g", "execution_id": "e", "type_name": "T", "size": 7, "digest": "c2hh"}


@pytest.mark.parametrize(
    "content",
    [
        *[None, 7, "x", [], {}, {"kind": "result"}],
        *[FIELDS | {"size": size} for size in ("many", "7", float("inf"), 7.0, -1, 10**100, True, None)],
        *[FIELDS | {name: "x" * 501} for name in FIELDS if name != "size"],
        *[FIELDS | {"kind": kind} for kind in ("message", "", None, ["job"])],
        *[FIELDS | {"digest": digest} for digest in ("not base64", "ä", 17, None)],
        FIELDS | {"graph": ["g"]},
    ],
)
def test_a_damaged_reference_is_a_placeholder(content: object) -> None:
    """Decoding never raises; whoever needs the value gets the typed error, and it is passed on as it came."""
    found = loads(json.dumps({"__type__": "docket.stored", "__value__": content}))
    assert isinstance(found, Undecodable)
    assert isinstance(found.error, DecodeFailed)
    assert json.loads(dumps(found)) == {"__type__": "docket.stored", "__value__": content}
    with pytest.raises(DecodeFailed):
        weigh_label.apply((found,))


@pytest.mark.parametrize("marker", ["docket.job", "docket.result", "docket.batch"])
def test_a_reference_of_the_first_version_is_refused(marker: str) -> None:
    """With what to do, by the task that needs it; kombu alone would lose the message and leave its caller waiting."""
    sent = {"__type__": marker, "__value__": {"shown": "Label()"}}
    found = loads(json.dumps(sent))
    assert json.loads(dumps(found)) == sent
    with pytest.raises(DecodeFailed, match=r"docket_celery 0\.1\.0 wrote it.*submit the job again"):
        weigh_label.apply((found,))


def test_a_job_reference_is_no_argument() -> None:
    """Whoever hands one on by hand is told so."""
    stray: Any = refer(asked(weigh_label, "o-1", b"d" * 32), Label())
    with pytest.raises(InvalidArguments, match="not a Stored"):
        weigh_label.delay(stray)


def test_a_job_reference_is_not_read_as_a_result(database: str) -> None:
    """An ordinary task that was sent one by mistake gets no message of another kind in its place."""
    keeping.execute(Order, Label(text="abc"), execution_id="o-1")
    stray = loads(dumps(refer(asked(repeat_label, "o-1", b"d" * 32), Label(text="abc"))))
    with pytest.raises(PayloadUnavailable, match="another result than the one referred to"):
        stray.read(app)


def test_a_reference_shows_no_content_where_it_arrives() -> None:
    """What it stands for, and where; the message itself is shown where it was at hand, without its secrets."""
    made = refer(asked(repeat_label, "o-1", b"d" * 32), Label(text="abc"))
    assert repr(made) == "Label(text='abc')"
    assert repr(loads(dumps(made))) == "<Stored job docket.tests.unit.Label of run 'o-1', 5 bytes>"
    secret = refer(asked(repeat_label, "o-1", b"d" * 32), Payment(card_number="4111", note="n" * 5000))
    for text in (repr(secret), dumps(secret), repr(loads(dumps(secret)))):
        assert "4111" not in text
        assert len(text) < 300


def test_a_delay_is_known_from_the_options() -> None:
    """Countdown, eta with and without a time zone, and none."""
    soon = datetime.now(UTC) + timedelta(seconds=60)
    assert wait_s({}) == 0
    assert wait_s({"countdown": 5}) == 5
    assert wait_s({"countdown": -5}) == 0
    assert wait_s({"eta": soon}) == pytest.approx(60, abs=5)
    assert wait_s({"eta": soon.replace(tzinfo=None)}) == pytest.approx(60, abs=5)
    assert wait_s({"eta": soon - timedelta(hours=1)}) == 0


# --- how long a stored job is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retention", "options", "days"),
    [
        (0, {}, 30),
        (0, {"countdown": 86400}, 31),
        (60 * 86400, {}, 60),
        (MAX_SECONDS, {"countdown": MAX_SECONDS}, 36600),
    ],
)
def test_a_job_outlasts_any_purge_until_a_worker_takes_it(
    database: str, retention: float, options: dict[str, Any], days: int
) -> None:
    """It lies in the run's row and nowhere else; the retention is for what has ended."""
    settings(retention=retention)
    store = SQLStore(database)
    try:
        sent = repeat_label.apply_async((BIG,), **options)
        assert store.purge(10) == Purged()
        assert store.find_job("keeping", sent.id) is not None
        with store.engine.connect() as connection:
            left = "SELECT julianday(expires_at) - julianday('now') FROM docket_runs"
            assert connection.exec_driver_sql(left).scalar_one() == pytest.approx(days, abs=0.1)
    finally:
        settings(retention=None)
        store.close()


@pytest.mark.parametrize("countdown", [1e13, float("inf"), float("nan")])
def test_a_countdown_over_a_century_is_refused_before_anything_is_stored(
    database: str, countdown: float
) -> None:
    """By the library, not by the database's calendar; and Celery could not send it afterwards."""
    with pytest.raises(InvalidArguments, match=r"countdown=.*a century"):
        repeat_label.apply_async((BIG,), countdown=countdown, execution_id="o-1")
    store = SQLStore(database)
    assert store.find_run("keeping", "o-1") is None
    store.close()


def test_a_run_whose_job_cannot_be_read_fails_with_its_task(database: str) -> None:
    """Else it would stay QUEUED, with nobody to go on; submitting it again resumes it. Others stay what they are."""
    plan, problem = repeat_label.plan(), DecodeFailed("shop.Label", "the bytes are damaged")
    store = SQLStore(database)
    run = asked(repeat_label, "o-1", b"d" * 32)
    give_up(repeat_label, run, problem, settings())
    assert store.find_run(plan.graph, "o-1") is None
    request = RunRequest(
        graph=plan.graph,
        execution_id="o-1",
        target=str(plan.target),
        job=b"damaged",
        job_digest=b"d" * 32,
        owner="",
        lease_s=30.0,
        max_deliveries=3,
    )
    store.enqueue(request, 60.0)
    give_up(repeat_label, replace(run, job_digest=b"o" * 32), problem, settings())
    assert [row.state for row in [store.find_run(plan.graph, "o-1")] if row] == [RunState.QUEUED]
    give_up(repeat_label, run, problem, settings())
    row = store.find_run(plan.graph, "o-1")
    assert row is not None
    assert (row.state, (row.error or {})["code"]) == (RunState.FAILED, "DC502")
    lease = store.acquire(replace(request, owner="again", task_id="t-2"))
    assert isinstance(lease, Lease)
    give_up(repeat_label, run, problem, settings())
    assert [row.state for row in [store.find_run(plan.graph, "o-1")] if row] == [RunState.RUNNING]
    store.close()


def test_references_can_be_kept_in_a_set() -> None:
    """Those of one result are one, whether or not its message has been read."""
    assert len({reference(), reference(), reference(size=7)}) == 2
