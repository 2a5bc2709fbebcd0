from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from docket_celery import errors
from docket_celery.errors import AbortError, DocketError, StepFailed, StepTimedOut, from_record, to_record

WITH_FIELDS: list[DocketError] = [
    errors.DocketError("something", 7),
    errors.GraphError("shop", ["DC112 duplicate name", "DC115 cycle"]),
    errors.InvalidArguments("execute", "no message"),
    errors.InvalidSettings("docket_threads", "must be a whole number"),
    errors.BatchFailed(3, 100, 2, ["[DC201] step 'charge' of item 7 failed"]),
    errors.InvalidDeclaration("shop.process", "has a body"),
    errors.IncompatibleCelery("6.0", "celery.backends.base.Backend.always_retry", "results would be lost"),
    errors.AbortError("fraud"),
    errors.AbortError("fraud", KeyError("card")),
    errors.StepFailed(
        "charge", 3, True, ["builtins.KeyError", "builtins.Exception"], "'card'", ["step 'x' failed"]
    ),
    errors.StepTimedOut("charge", 2, 0.5, True, ["step 'x' failed"]),
    errors.WrongResult("charge", 1, "shop.Charge", "None"),
    errors.InputMutated("charge", 1, ["shop.Order"]),
    errors.RunCancelled("o-1", "by the operator"),
    errors.RunTimedOut("o-1", 2.5),
    errors.RunConflict("shop", "o-1", "job"),
    errors.RunNotFound("shop", "o-1"),
    errors.RunQuarantined("shop", "o-1", 10),
    errors.GraphChanged("shop", "o-1", ["charge", "ship"]),
    errors.LeaseLost("shop", "o-1", 4),
    errors.InputsChanged("o-1", "charge"),
    errors.TooManyAbandoned(4, 4, ["charge"]),
    errors.StoreMissing("shop", "charge"),
    errors.StoreRefused("the database", "permission denied; grant the right"),
    errors.StoreUnavailable("answer", "timeout"),
    errors.SchemaMismatch(None, 1),
    errors.SchemaMismatch(2, 1),
    errors.CacheMismatch("shop", "charge", "rates", "shop.Rate", "shop.Charge"),
    errors.CorruptCheckpoint("docket_cache", "cache_key=00", "checksum mismatch"),
    errors.CodecFailed("the job of run 'o-1'", "decode of Keys raised KeyError"),
    errors.PayloadTooLarge("shop.Order", 2048, 1024),
    errors.PayloadTooLarge("the job of run 'o-1'", 2048, 1024, "docket_max_stored_bytes"),
    errors.PayloadUnavailable("the job of run 'o-1'", "its row is gone"),
    errors.UnknownMessageType("shop.Order"),
    errors.DecodeFailed("shop.Order", "truncated"),
    errors.ServersUnavailable("Postgres", "not found"),
]
IDS = [f"{type(error).__name__} {index}" for index, error in enumerate(WITH_FIELDS)]


def family(kind: type[DocketError]) -> Iterator[type[DocketError]]:
    """Yield *kind* and its descendants of the errors module, as the tree's docstring draws them."""
    if not kind.__name__.startswith("_"):
        yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from family(child)


def fields(error: BaseException) -> dict[str, Any]:
    """Return what the error tells programs, with sequences in one form."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(error).items()}


def through_json_backend(error: DocketError) -> BaseException:
    """Return the error as a caller gets it from a result backend with the JSON serializer."""
    backend = Celery("errors", broker="memory://", backend="cache+memory://").backend
    stored = json.loads(json.dumps(backend.prepare_exception(error, serializer="json")))
    found = backend.exception_to_python(stored)
    assert isinstance(found, BaseException)
    return found


def test_every_class_stands_in_the_list() -> None:
    """A new error joins the round trips below, or this fails."""
    assert {type(error) for error in WITH_FIELDS} == set(family(DocketError))


def test_codes_are_unique_and_drawn_in_the_tree() -> None:
    """Each class has a code of its own, which stands beside its name in the module's docstring."""
    kinds = list(family(DocketError))
    assert len({kind.code for kind in kinds}) == len(kinds)
    drawn = [line.split() for line in (errors.__doc__ or "").splitlines() if " DC" in line]
    named = {
        (words[index - 1], word)
        for words in drawn
        for index, word in enumerate(words)
        if word.startswith("DC")
    }
    assert named == {(kind.__name__, kind.code) for kind in kinds}


@pytest.mark.parametrize("error", WITH_FIELDS, ids=IDS)
@pytest.mark.parametrize("transport", ["pickle", "json backend", "record"])
def test_type_fields_and_text_survive(error: DocketError, transport: str) -> None:
    """Pickle, Celery's JSON result backend and the run's row each give the same error back."""
    if transport == "pickle":
        found: BaseException = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    elif transport == "record":
        found = from_record(json.loads(json.dumps(to_record(error))))
    else:
        found = through_json_backend(error)
    assert type(found) is type(error)
    assert fields(found) == fields(error)
    assert str(found) == str(error)


@pytest.mark.parametrize("error", WITH_FIELDS, ids=IDS)
def test_messages_begin_with_their_code(error: DocketError) -> None:
    """The code leads to the explanation; a text follows it."""
    assert str(error).startswith(f"[{error.code}] ")
    assert len(error.describe()) > 3


def test_fields_may_be_given_by_keyword_and_several_texts_as_any_sequence() -> None:
    """The constructor is the one of a dataclass; ``args`` are JSON values all the same."""
    error = errors.GraphChanged(execution_id="o-1", graph="shop", steps=("charge", "ship"))
    assert error.args == ("shop", "o-1", ["charge", "ship"])
    assert error.steps == ("charge", "ship")
    assert errors.PayloadTooLarge("a job", 2, 1).args == ("a job", 2, 1, "docket_max_message_bytes")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'execution_id'"):
        errors.RunNotFound("shop")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


class OverBudget(errors.RunCancelled, code="SHOP1"):
    """A user's own subclass, with a code, and a constructor that fills in fields of its base."""

    spent_cents: int

    def __init__(self, execution_id: str, spent_cents: int) -> None:
        super().__init__(execution_id, f"{spent_cents} cents are spent")
        self.spent_cents = spent_cents


def test_users_may_derive_from_declared_errors() -> None:
    """Their annotations are no fields, and their constructor is their own."""
    error = OverBudget("o-1", 7)
    assert str(error) == "[SHOP1] run 'o-1' was cancelled: 7 cents are spent"
    assert (error.spent_cents, error.args) == (7, ("o-1", "7 cents are spent"))


def test_a_failure_knows_its_cause_before_and_after_transport() -> None:
    """`caused_by` answers for the class and its bases, by name where the exception itself stayed behind."""
    error = StepFailed.from_cause("charge", 1, False, ConnectionResetError("gone"))
    found = through_json_backend(error)
    assert isinstance(found, StepFailed)
    for one in (error, found):
        assert one.caused_by(ConnectionResetError)
        assert one.caused_by(OSError)
        assert not one.caused_by(KeyError)
    assert isinstance(error.__cause__, ConnectionResetError)


def raised(error: Exception) -> Exception:
    """Return *error* with a traceback."""
    try:
        raise error
    except Exception as caught:  # noqa: BLE001 -- whatever it is
        return caught


def test_other_failures_travel_along() -> None:
    """What is added after the fact is part of the fields."""
    error = StepTimedOut("charge", 1, 0.5)
    other = StepFailed.from_cause("reserve", 1, False, raised(KeyError("shelf")))
    error.add_others([other, StepTimedOut("ship", 1, 0.5)])
    shown = str(through_json_backend(error))
    assert "also failed:\n  - [DC201] step 'reserve' failed after 1 attempt" in shown
    assert "  - [DC202] step 'ship' passed timeout" in shown
    (note,) = error.__notes__
    assert note.startswith("step 'reserve' failed too:\nTraceback (most recent call last):")
    assert note.endswith("KeyError: 'shelf'")


def test_an_abort_keeps_its_cause() -> None:
    """As ``__cause__`` here, as text everywhere."""
    cause = KeyError("card")
    error = AbortError("fraud", cause)
    assert error.__cause__ is cause
    assert str(error) == "[DC200] fraud (KeyError: 'card')"


class Unprintable(Exception):
    """An exception of somebody who did not test it."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_causes_without_a_text_and_with_a_huge_one_can_be_told() -> None:
    """Neither may keep a failure from being reported, or fill a broker."""
    assert "<Unprintable whose text raised RuntimeError>" in str(
        StepFailed.from_cause("charge", 1, True, Unprintable())
    )
    assert "<Unprintable whose text raised RuntimeError>" in str(AbortError("stop", Unprintable()))
    huge = StepFailed.from_cause("charge", 1, True, ValueError("x" * 1_000_000))
    assert len(huge.cause_text) == errors.MAX_CAUSE_CHARS


class TooPoor(AbortError):
    """A user's own abort, with a field."""

    def __init__(self, missing_cents: int, currency: str, account: str) -> None:
        super().__init__("too poor")
        self.args = (missing_cents, currency, account)


def test_records_of_other_releases_and_of_users_classes_are_readable() -> None:
    """An unknown code, or fields that the class does not take, give a plain `DocketError`."""
    assert str(from_record({"code": "DC999", "args": ["new", 1]})) == "[DC000] DC999 new 1"
    found = from_record(to_record(TooPoor(5, "EUR", "x")))
    assert isinstance(found, DocketError)
    assert "EUR" in str(found)
