"""The codec hook in process: how it is set, what it protects, and what becomes of a codec that fails."""

from __future__ import annotations

import functools
import itertools
import re
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from docket_celery import (
    CodecFailed,
    Graph,
    InputsChanged,
    InvalidArguments,
    InvalidSettings,
    MemoryStore,
    RunConflict,
    Scope,
    SQLStore,
    StepFailed,
    StoreUnavailable,
    settings,
)
from docket_celery.engine.process.settings import Settings
from docket_celery.store.records import RunState
from docket_celery.store.rows import result_checksum
from docket_celery.store.sealing import MARK, Seal
from tests import codecs
from tests.conformance.samples import execution
from tests.unit.graphs import execute
from tests.unit.protos.shop_pb2 import Label, Order, Shipment

DOC = Path(__file__).resolve().parents[2] / "docs" / "encryption.md"
SECRET = "Jane Doe, 4111-1111-1111-1111"
OpenStore = Callable[..., SQLStore]


@pytest.fixture
def open_store(tmp_path: Path) -> Generator[OpenStore]:
    """A function that opens the test's one database with a codec."""
    opened: list[SQLStore] = []

    def open_(codec: Any) -> SQLStore:
        store = SQLStore(f"sqlite:///{tmp_path / 'store.db'}", codec=codec)
        store.migrate()
        opened.append(store)
        return store

    yield open_
    for store in opened:
        store.close()


class Double:
    """A codec that does as it is told; what it was given is kept."""

    def __init__(
        self, encode: Callable[[bytes], Any] = bytes, decode: Callable[[bytes], Any] = bytes
    ) -> None:
        self._encode, self._decode = encode, decode
        self.identities: list[bytes] = []

    def encode(self, data: bytes, identity: bytes) -> bytes:
        """Note the identity and do as told."""
        self.identities.append(identity)
        found: bytes = self._encode(data)
        return found

    def decode(self, data: bytes, identity: bytes) -> bytes:
        """Do as told."""
        assert identity in self.identities
        found: bytes = self._decode(data)
        return found


class Forgetful(codecs.Encryption):
    """Encrypts without binding the value to its place."""

    def __init__(self) -> None:
        super().__init__({1: b"first key"}, 1)

    def encode(self, data: bytes, identity: bytes) -> bytes:  # noqa: ARG002 -- forgotten
        """Leave the identity out."""
        return super().encode(data, b"")

    def decode(self, data: bytes, identity: bytes) -> bytes:  # noqa: ARG002 -- forgotten
        """Leave it out here too."""
        return super().decode(data, b"")


def one_step(scope: Scope = Scope.WORKFLOW, **options: Any) -> tuple[Graph, list[str]]:
    """Return a graph of one step that persists, and the names of the orders that it was called with."""
    graph, calls = Graph("secretive"), list[str]()

    @graph.step(persist=scope, **options)
    def write(order: Order) -> Label:
        calls.append(order.order_id)
        if order.amount_cents < 0:
            raise ValueError(f"no label for {order.order_id}")
        return Label(text=f"label of {order.order_id}")

    return graph, calls


def run(graph: Graph, store: SQLStore, order_id: str = SECRET, cents: int = 1) -> str:
    """Return the text that run 'o-1' makes."""
    order = Order(order_id=order_id, amount_cents=cents)
    return graph.execute(Label, order, execution_id="o-1", store=store, timeout=20).text


def dump(store: SQLStore) -> str:
    """Return all that the tables hold, bytes as they are."""
    with store.engine.connect() as connection:
        tables = ("docket_runs", "docket_cache", "docket_executions", "docket_claims")
        rows = [connection.execute(text(f"SELECT * FROM {table}")).all() for table in tables]  # noqa: S608 -- ours
    return repr(rows)


# --- settings ----------------------------------------------------------------------------------------------------


def test_the_setting_takes_an_object_and_a_path() -> None:
    """The path also from the environment; neither shows in the settings' text."""
    for found in (
        Settings.read({"docket_codec": codecs.CODEC}, {}),
        Settings.read({"docket_codec": "tests.codecs:CODEC"}, {}),
        Settings.read({}, {"DOCKET_CELERY_CODEC": "tests.codecs:CODEC"}),
    ):
        assert found.codec is codecs.CODEC
        assert "codec" not in repr(found)


class ShortKey(Double):
    """Its hashes could be guessed."""

    hash_key = b"short key!"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("tests.codecs", "an import path such as"),
        ("tests.codecs:", "an import path such as"),
        ("tests.nowhere:CODEC", "cannot be imported: ModuleNotFoundError"),
        ("tests.codecs:NOTHING", "cannot be imported: AttributeError"),
        ("tests.codecs:os", "a module has no encode"),
        (codecs.Encryption, "is a class"),
        (b"secret key", "a bytes has no encode"),
        (ShortKey(), "at least 16 bytes"),
    ],
)
def test_what_is_no_codec_is_refused(value: Any, problem: str) -> None:
    """As a setting and as an argument, without showing it."""
    with pytest.raises(InvalidSettings, match=problem) as refused:
        Settings.read({"docket_codec": value}, {})
    assert "secret" not in str(refused.value)
    if not isinstance(value, str):
        with pytest.raises(InvalidArguments, match=problem):
            SQLStore("sqlite://", codec=value)


def test_a_codecs_module_that_breaks_is_named_without_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is missing from the environment, say: the setting is at fault, whatever was raised."""
    (tmp_path / "broken_codec.py").write_text("CODEC = {}['secret']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InvalidSettings, match=r"'broken_codec:CODEC' cannot be imported: it raised KeyError"
    ) as e:
        Settings.read({"docket_codec": "broken_codec:CODEC"}, {})
    assert "secret" not in "".join(traceback.format_exception(e.value))


def test_a_codec_may_be_made_of_partials(open_store: OpenStore) -> None:
    """What has no name of its own works, and is named by its method where it fails."""

    class Bound:
        def __init__(self) -> None:
            self.encode: Any = functools.partial(codecs.CODEC.encode)
            self.decode: Any = functools.partial(codecs.CODEC.decode)

    graph, calls = one_step()
    codec = Bound()
    store = open_store(codec)
    assert run(graph, store) == run(graph, store) == f"label of {SECRET}"
    assert calls == [SECRET]
    codec.decode = functools.partial(dict[bytes, bytes]().__getitem__)
    with pytest.raises(CodecFailed, match="decode of Bound raised TypeError"):
        run(graph, store)


def test_a_plain_store_beside_the_setting_is_refused(open_store: OpenStore) -> None:
    """Nothing is stored in plain text by oversight; memory is not storing."""
    graph, calls = one_step()
    plain = open_store(None)
    settings(codec="tests.codecs:CODEC")
    try:
        with pytest.raises(InvalidSettings, match=r"'secretive' was given a store without a codec"):
            run(graph, plain)
        assert calls == []
        assert run(graph, open_store(codecs.ROTATED))
        assert graph.execute(Label, Order(), store=MemoryStore()).text
    finally:
        settings(codec=None)


def test_the_setting_encodes_what_the_database_url_opens(tmp_path: Path, open_store: OpenStore) -> None:
    """Both settings together; changing the codec opens another store."""
    graph, _ = one_step()
    store = open_store(codecs.CODEC)
    settings(database_url=f"sqlite:///{tmp_path / 'store.db'}", codec="tests.codecs:CODEC")
    try:
        graph.execute(Label, Order(order_id=SECRET), execution_id="o-1")
        settings(codec="tests.codecs:STRANGER")
        with pytest.raises(CodecFailed, match="another key"):
            graph.execute(Label, Order(order_id=SECRET), execution_id="o-1")
    finally:
        settings(database_url=None, codec=None)
    assert SECRET not in dump(store)


# --- what is stored ----------------------------------------------------------------------------------------------


def test_no_plain_text_is_stored(open_store: OpenStore) -> None:
    """Job, output, result, both error texts; the same values without a codec are all there."""
    for codec in (codecs.CODEC, None):
        graph, _ = one_step()
        store = open_store(codec) if codec else SQLStore("sqlite://")
        store.migrate()
        label = graph.execute(Label, Order(order_id=SECRET), execution_id="good", store=store)
        with pytest.raises(StepFailed, match="no label for Jane Doe"):
            run(graph, store, cents=-1)
        found = dump(store)
        assert found.count("Jane Doe") == (0 if codec else 7), found
        assert (label.text in found) is (codec is None)
        store.engine.dispose()


@pytest.mark.parametrize("scope", [Scope.WORKFLOW, Scope.GLOBAL])
def test_what_was_stored_is_read_again(open_store: OpenStore, scope: Scope) -> None:
    """By another store with the same codec: the result, the checkpoint, the error."""
    graph, calls = one_step(scope)
    made = run(graph, open_store(codecs.CODEC))
    assert run(graph, open_store(codecs.CODEC)) == made
    again = graph.execute(Label, Order(order_id=SECRET, amount_cents=1), store=open_store(codecs.CODEC))
    assert (again.text, len(calls)) == (made, 1 if scope is Scope.GLOBAL else 2)


def test_an_error_is_told_again_in_full(open_store: OpenStore) -> None:
    """Type, fields and text of a failed run, from its row."""
    graph, _ = one_step()
    store = open_store(codecs.CODEC)
    with pytest.raises(StepFailed) as failed:
        run(graph, store, cents=-1)
    row = store.find_run("secretive", "o-1")
    assert row is not None
    assert row.error == {"code": "DC201", "args": list(failed.value.args)}


def test_the_code_of_an_error_stays_readable(open_store: OpenStore) -> None:
    """People count failures by it."""
    graph, _ = one_step()
    store = open_store(codecs.CODEC)
    with pytest.raises(StepFailed):
        run(graph, store, cents=-1)
    with store.engine.connect() as connection:
        query = "SELECT json_extract(error, '$.code'), (SELECT error_code FROM docket_executions) FROM docket_runs"
        assert connection.exec_driver_sql(query).one() == ("DC201", "DC201")


def test_hashes_over_user_bytes_depend_on_the_hash_key(open_store: OpenStore, tmp_path: Path) -> None:
    """Without the key nobody can tell by trying which order it was; WORKFLOW keys hold no bytes and stay."""
    found: list[tuple[bytes, ...]] = []
    for number, hash_key in enumerate((None, b"a" * 32, b"b" * 32)):
        store = SQLStore(
            f"sqlite:///{tmp_path / str(number)}.db", codec=codecs.Encryption({1: b""}, 1, hash_key)
        )
        store.migrate()
        for scope in Scope:
            one_step(scope)[0].execute(Label, Order(), execution_id=scope.value, store=store)
        with store.engine.connect() as connection:
            query = "SELECT cache_key, input_hash, job_digest FROM docket_runs JOIN docket_cache USING (execution_id)"
            shared = connection.exec_driver_sql(
                "SELECT cache_key, input_hash FROM docket_cache WHERE execution_id IS NULL"
            )
            own = connection.exec_driver_sql(query)
            found.append((*shared.one(), *own.one()))
        store.close()
    columns = [len(set(values)) for values in zip(*found, strict=True)]
    # Shared key and input hash, then the run's own key (the same for all), input hash and job's digest.
    assert columns == [3, 3, 1, 3, 3]


@pytest.mark.parametrize("same", [True, False])
def test_changed_inputs_are_noticed_through_the_hash_key(open_store: OpenStore, same: bool) -> None:
    """What the engine compares is hashed alike on both sides: no false alarm, and no missed change."""
    graph, calls = one_step(on_input_change="error")

    @graph.step
    def ship(label: Label) -> Shipment:
        if len(calls) == 1:
            calls.append("failed")
            raise ValueError("not yet")
        return Shipment(tracking_id=label.text)

    store, digest = open_store(codecs.CODEC), b"d" * 32
    with pytest.raises(StepFailed):
        execute(graph, Shipment, Order(order_id="7"), store=store, job_digest=digest)
    again = Order(order_id="7" if same else "8")
    if same:
        assert execute(graph, Shipment, again, store=store, job_digest=digest).tracking_id == "label of 7"
        return
    with pytest.raises(InputsChanged):
        execute(graph, Shipment, again, store=store, job_digest=digest)


def test_another_job_is_still_a_conflict(open_store: OpenStore) -> None:
    """The digest in the row is an HMAC; the same job gives the same one."""
    graph, _ = one_step()
    run(graph, open_store(codecs.CODEC))
    with pytest.raises(RunConflict, match="another job"):
        run(graph, open_store(codecs.CODEC), "another")


def test_each_value_has_an_identity_of_its_own(open_store: OpenStore) -> None:
    """What an AEAD cipher binds the value to: no two places are alike."""
    graph, _ = one_step()
    codec = Double()
    run(graph, open_store(codec))
    with pytest.raises(StepFailed):
        graph.execute(Label, Order(amount_cents=-1), execution_id="o-2", store=open_store(codec))
    assert len(set(codec.identities)) == len(codec.identities) == 3 + 3


def test_a_value_in_another_place_is_refused(open_store: OpenStore) -> None:
    """Whoever may write the tables still cannot give one run the result of another, checksums and all."""
    graph, _ = one_step()
    stores = [open_store(Forgetful()), open_store(codecs.CODEC)]
    for store in stores:
        ids = f"{type(store.codec).__name__}-1", f"{type(store.codec).__name__}-2"
        for number, name in enumerate(ids):
            graph.execute(Label, Order(order_id=str(number)), execution_id=name, store=store)
        with store.engine.connect() as connection:
            look = text("SELECT result, graph, target FROM docket_runs WHERE execution_id = :e")
            row = connection.execute(look, {"e": ids[0]}).one()
            checksum = result_checksum(row.graph, ids[1], row.target, row.result)
            change = text("UPDATE docket_runs SET result = :r, result_checksum = :c WHERE execution_id = :e")
            connection.execute(change, {"r": row.result, "c": checksum, "e": ids[1]})
        with pytest.raises(CodecFailed, match=f"the result of run '{ids[1]}'.*damaged or moved"):
            store.find_run("secretive", ids[1])


def test_an_errors_text_belongs_to_its_step() -> None:
    """Read back where it was written; refused anywhere else."""
    seal = Seal(codecs.CODEC)
    written = seal.seal(execution(error_message=SECRET))
    assert written is not None
    assert SECRET not in repr(written)
    assert seal.unseal(written).error_message == SECRET
    with pytest.raises(CodecFailed, match="the error of step 'ship'"):
        seal.unseal(execution("ship", error_message=written.error_message))


# --- keys --------------------------------------------------------------------------------------------------------


def test_a_rotated_key_reads_what_the_old_one_wrote(open_store: OpenStore) -> None:
    """And writes what the old one alone cannot read."""
    graph, calls = one_step()
    made = run(graph, open_store(codecs.CODEC))
    assert run(graph, open_store(codecs.ROTATED)) == made
    graph.execute(Label, Order(), execution_id="o-2", store=open_store(codecs.ROTATED))
    with pytest.raises(CodecFailed, match=r"the result of run 'o-2'.* raised KeyError at codecs.py:\d+"):
        graph.execute(Label, Order(), execution_id="o-2", store=open_store(codecs.CODEC))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("wrote", "reads", "problem"),
    [
        (codecs.CODEC, codecs.STRANGER, "raised DamagedError at codecs.py"),
        (codecs.CODEC, None, "this process has none; set docket_codec"),
        (None, codecs.CODEC, "stored without a codec, and this process has one"),
        (Double(), Double(decode=lambda data: data[::-1]), "returned other bytes"),
    ],
)
@pytest.mark.parametrize("scope", [Scope.WORKFLOW, Scope.GLOBAL])
def test_what_does_not_fit_is_told_apart(
    open_store: OpenStore, wrote: Any, reads: Any, problem: str, scope: Scope
) -> None:
    """Another key, no codec, a codec that came later, a wrong decoding: for a run's rows and for shared ones."""
    graph, calls = one_step(scope)
    run(graph, open_store(wrote))
    if isinstance(reads, Double):
        reads.identities = wrote.identities
    if scope is Scope.GLOBAL and getattr(wrote, "hash_key", None) != getattr(reads, "hash_key", None):
        # Under another hash key the entry has another name.
        run(graph, open_store(reads))
        assert len(calls) == 2
        return
    with pytest.raises(CodecFailed, match=problem):
        run(graph, open_store(reads))
    if scope is Scope.GLOBAL:
        with pytest.raises(CodecFailed, match=problem):
            graph.execute(Label, Order(order_id=SECRET, amount_cents=1), store=open_store(reads))
    assert len(calls) == 1


@pytest.mark.parametrize("codec", [codecs.STRANGER, None])
def test_a_checkpoint_that_cannot_be_decoded_fails_the_run(open_store: OpenStore, codec: Any) -> None:
    """The row is named and stays; the step is not called again in its place, and the right key goes on."""
    graph, calls = one_step()

    @graph.step
    def ship(label: Label) -> Shipment:
        if len(calls) == 1:
            calls.append("failed")
            raise ValueError("not yet")
        return Shipment(tracking_id=label.text)

    def go(codec: Any) -> str:
        # The same digest with each codec, so that the job itself is no conflict.
        store = open_store(codec)
        return execute(graph, Shipment, Order(order_id="7"), store=store, job_digest=b"d" * 32).tracking_id

    keyless = codecs.Encryption({1: b"first key"}, 1, None)
    with pytest.raises(StepFailed):
        go(keyless)
    if codec is not None:
        codec = codecs.Encryption({1: b"another key"}, 1, None)
    with pytest.raises(CodecFailed, match=r"row cache_key=[0-9a-f]{64} of docket_cache \(step 'write'\)"):
        go(codec)
    row = open_store(keyless).find_run("secretive", "run")
    assert row is not None
    assert (row.state, row.error and row.error["code"]) == (RunState.FAILED, "DC404")
    assert go(keyless) == "label of 7"
    assert calls == ["7", "failed"]


# --- codecs that fail --------------------------------------------------------------------------------------------


def failing(*fails: int, error: Exception | None = None) -> Double:
    """Return a codec whose calls of encode with these numbers (from 1) raise, with the data in their text."""
    count = itertools.count(1)

    def encode(data: bytes) -> bytes:
        if next(count) in fails:
            raise error or KeyError(data)
        return data[::-1]

    return Double(encode, lambda data: data[::-1])


@pytest.mark.parametrize(
    ("number", "what", "state"),
    [
        (1, "the job of run 'o-1'", None),
        (2, "the result of run 'o-1'", RunState.FAILED),
        (3, "row cache_key=", RunState.FAILED),
    ],
)
def test_an_encode_that_raises_fails_the_run(
    open_store: OpenStore, number: int, what: str, state: RunState | None
) -> None:
    """Told at once to whoever waits, without the data; nothing is stored in plain text, and the lease is free."""
    graph, _ = one_step()
    store = open_store(failing(number))
    with pytest.raises(CodecFailed, match=rf"{what}.* raised KeyError at .*; nothing was stored") as failed:
        run(graph, store)
    assert SECRET not in "".join(traceback.format_exception(failed.value))
    assert SECRET not in dump(store)
    row = store.find_run("secretive", "o-1")
    assert (None if row is None else row.state) == state
    assert run(graph, store) == f"label of {SECRET}"


def test_an_error_that_cannot_be_encoded_is_replaced(open_store: OpenStore) -> None:
    """A run must be able to end; its row says what went wrong with the text."""
    graph, _ = one_step()
    store = open_store(failing(*range(2, 9)))
    with pytest.raises(StepFailed, match="no label for Jane Doe"):
        run(graph, store, cents=-1)
    row = store.find_run("secretive", "o-1")
    assert row is not None
    assert (row.state, row.error and row.error["code"]) == (RunState.FAILED, "DC404")
    assert SECRET not in dump(store)
    assert dump(store).count("raised KeyError at") == 2


def test_a_key_service_that_is_away_is_an_outage(open_store: OpenStore) -> None:
    """What a codec says of itself is believed: the save is tried again, as when the database is away."""
    graph, calls = one_step()
    outage = StoreUnavailable("answer", "the key service is away")
    assert run(graph, open_store(failing(2, 3, error=outage))) == f"label of {SECRET}"
    assert len(calls) == 1
    with pytest.raises(StoreUnavailable, match="key service"):
        graph.execute(Label, Order(), execution_id="o-2", store=open_store(failing(1, error=outage)))


@pytest.mark.parametrize("wrong", [None, "text", bytearray(b"x")])
def test_what_is_not_bytes_is_refused(open_store: OpenStore, wrong: Any) -> None:
    """Of encode and of decode."""
    graph, _ = one_step()
    with pytest.raises(CodecFailed, match=f"encode of Double returned a {type(wrong).__name__}, not bytes"):
        run(graph, open_store(Double(encode=lambda _: wrong)))
    codec = Double()
    run(graph, open_store(codec))
    codec._decode = lambda _: wrong
    with pytest.raises(CodecFailed, match=f"decode of Double returned a {type(wrong).__name__}, not bytes"):
        run(graph, open_store(codec))


@pytest.mark.parametrize("damaged", [b"", b"x", b"short"])
def test_a_decode_that_returns_too_little_is_noticed(open_store: OpenStore, damaged: bytes) -> None:
    """Shorter than the hash that stands in front of each value."""
    graph, _ = one_step()
    codec = Double()
    run(graph, open_store(codec))
    codec._decode = lambda _: damaged
    with pytest.raises(CodecFailed, match="returned other bytes"):
        run(graph, open_store(codec))


def test_a_damaged_text_is_a_failed_decoding() -> None:
    """Not even base64 any more."""
    seal = Seal(codecs.CODEC)
    with pytest.raises(CodecFailed):
        seal.unseal(execution(error_message="docket-codec:***"))
    assert seal.unseal(execution(error_message="plain")).error_message == "plain"


def test_no_plain_value_begins_like_an_encoded_one() -> None:
    """No field has the number 0, and a framed job begins with the length of a type's name."""
    for kind in (Order, Label, Shipment):
        with pytest.raises(Exception, match="parsing"):
            kind.FromString(MARK)
    assert int.from_bytes(MARK[:8], "big") > 2**48


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_codec_of_the_page_works(open_store: OpenStore) -> None:
    """It is run as it stands there, over an AEAD cipher with the methods of `cryptography`'s."""
    source = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(source, "encryption.md", "exec"), names)  # noqa: S102 -- our own page
    old, new = codecs.Cipher(b"old"), codecs.Cipher(b"new")
    first = names["Encryption"]({1: old}, current=1, hash_key=b"k" * 32)
    graph, calls = one_step()
    made = run(graph, open_store(first))
    assert SECRET not in dump(open_store(first))
    rotated = names["Encryption"]({1: old, 2: new}, current=2, hash_key=b"k" * 32)
    assert run(graph, open_store(rotated)) == made
    with pytest.raises(CodecFailed, match="another key"):
        run(graph, open_store(names["Encryption"]({1: new}, current=1, hash_key=b"k" * 32)))
    assert len(calls) == 1
