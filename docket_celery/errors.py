"""Every error this library raises, as one tree.

::

    DocketError DC000
    ├── graphs, tasks, calls:  GraphError DC100  InvalidArguments DC101  InvalidSettings DC102
    │                          InvalidDeclaration DC103  IncompatibleCelery DC104
    ├── steps:                 AbortError DC200  StepFailed DC201
    │                          └── StepTimedOut DC202  WrongResult DC203  InputMutated DC204
    ├── batches:               BatchFailed DC205
    ├── runs:                  RunCancelled DC300  RunTimedOut DC301  RunConflict DC302  RunNotFound DC303
    │                          RunQuarantined DC304  GraphChanged DC305  LeaseLost DC306  InputsChanged DC307
    │                          TooManyAbandoned DC308
    ├── the store:             StoreMissing DC400  StoreUnavailable DC401  SchemaMismatch DC402
    │                          CorruptCheckpoint DC403  CodecFailed DC404  CacheMismatch DC405
    │                          StoreRefused DC406
    ├── messages:              PayloadTooLarge DC500  UnknownMessageType DC501  DecodeFailed DC502
    │                          PayloadUnavailable DC503
    └── development:           ServersUnavailable DC600

The fields of a class are the parameters of its constructor, JSON values, and ``args``: so type, fields and text
survive pickle and Celery's JSON result backend. A cause travels as type names and text.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar, cast, dataclass_transform

E = TypeVar("E", bound=BaseException)

MAX_CAUSE_CHARS = 4000
"""Most characters of a cause's text or traceback that a `StepFailed` or `AbortError` carries."""
MAX_OTHER_TRACES = 5
"""Most tracebacks of further steps that failed in the same run which a `StepFailed` shows."""
_KINDS: Final[dict[str, type[DocketError]]] = {}
"""The classes of this module by their codes."""
_PACKAGE: Final = os.path.dirname(__file__) + os.sep


class DocketError(Exception):
    """Base of all errors of this library.

    Attributes:
        code: Stable code, explained in docs/errors.md; part of every message.
    """

    code: ClassVar[str] = "DC000"

    def __init_subclass__(cls, code: str | None = None) -> None:
        if code is not None:
            cls.code = code
            if cls.__module__ == __name__:
                _KINDS[code] = cls

    def describe(self) -> str:
        """Return what happened, which thing it concerns and what to do, without the code."""
        return " ".join(str(part) for part in self.args)

    def __str__(self) -> str:
        return f"[{self.code}] {self.describe()}"

    def __repr__(self) -> str:
        # Celery's log, its events and so Flower show an error's repr, not its text.
        return f"<{type(self).__name__} {self}>"


_KINDS[DocketError.code] = DocketError


@dataclass_transform(eq_default=False)
class _Declared(DocketError):
    """An error whose class declares its fields, as a dataclass does, and the template of its text.

    A field that holds several texts is a tuple in the error and a list in ``args``, as JSON has no tuples.
    """

    template: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, code: str | None = None) -> None:
        super().__init_subclass__(code)
        # Subclasses of users are ordinary classes.
        if cls.__module__ == __name__ and "__init__" not in vars(cls):
            dataclass(eq=False, repr=False)(cls)

    def __post_init__(self) -> None:
        values: dict[str, Any] = {name: vars(self)[name] for name in self.__dataclass_fields__}
        many: dict[str, list[Any]] = {n: [*v] for n, v in values.items() if isinstance(v, (list, tuple))}
        vars(self).update({name: tuple(value) for name, value in many.items()})
        self.args = tuple({**values, **many}.values())

    def describe(self) -> str:
        return self._fill()

    def _fill(self, **more: object) -> str:
        fields: dict[str, Any] = vars(self)
        shown = {
            n: ", ".join(cast("tuple[str, ...]", v)) if isinstance(v, tuple) else v for n, v in fields.items()
        }
        return self.template.format(**shown, **more)


class _About(_Declared):
    """Says of one thing what is wrong with it and what to do."""

    template = "{what}: {problem}"
    what: str
    problem: str


class _OfRun(_Declared):
    """Is about one run of a graph."""

    graph: str
    execution_id: str


class GraphError(_Declared, code="DC100"):
    """A graph is wired wrongly, or a registration is refused. *faults* lists everything found."""

    template = "graph {graph!r} has {count}:"
    graph: str
    faults: Sequence[str]

    def describe(self) -> str:
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        return _with_lines(self._fill(count=count), self.faults)


class InvalidArguments(_About, TypeError, code="DC101"):
    """A call's arguments do not fit what it declares; nothing was sent and nothing ran."""


class InvalidSettings(_Declared, ValueError, code="DC102"):
    """A ``docket_*`` setting is unknown, or its value cannot be used."""

    template = "setting {key}: {problem}"
    key: str
    problem: str


class InvalidDeclaration(_Declared, TypeError, code="DC103"):
    """A GraphTask is declared in a way that cannot work."""

    template = "task {task}: {problem}"
    task: str
    problem: str


class IncompatibleCelery(_Declared, code="DC104"):
    """The installed Celery no longer has a private part that runs depend on; a worker does not start with it."""

    template = (
        "Celery {version} has changed {name}: {effect}; install a Celery that docket-celery asks for, or upgrade "
        "docket-celery"
    )
    version: str
    name: str
    effect: str


class AbortError(DocketError, code="DC200"):
    """Raised by a step to stop the whole graph at once; nobody retries it.

    Args:
        message: Why the graph must not continue.
        cause: What led to it; kept as ``__cause__`` here, as text after transport.
    """

    def __init__(self, message: str, cause: BaseException | str | None = None) -> None:
        text = f"{type(cause).__name__}: {safe_text(cause)}" if isinstance(cause, BaseException) else cause
        super().__init__(message, text)
        self.message, self.cause = message, text
        if isinstance(cause, BaseException):
            self.__cause__ = cause

    def describe(self) -> str:
        return self.message if self.cause is None else f"{self.message} ({self.cause})"


class StepFailed(_Declared, code="DC201"):
    """A step failed for good; the run failed with it.

    Attributes:
        step: Name of the step.
        attempts: Calls made in this delivery, the first included.
        retriable: Whether the last error was one that another attempt may cure.
        cause_types: Importable names of the cause's class and its bases, nearest first.
        cause_text: The cause's own text, with its notes.
        others: One line for each other step that failed in the same run.
        item: Path of the item it worked on, in a batch or fan-out; else ''.
    """

    template = "{where} failed after {tries} ({why}): {cause}: {cause_text}"
    step: str
    attempts: int
    retriable: bool
    cause_types: Sequence[str]
    cause_text: str
    others: Sequence[str] = ()
    item: str = ""

    @classmethod
    def from_cause(cls, step: str, attempts: int, retriable: bool, cause: BaseException) -> StepFailed:
        """Build the error for *cause* and chain it; its traceback starts in the user's code."""
        names = [type_path(kind) for kind in type(cause).__mro__ if kind is not object]
        error = StepFailed(step, attempts, retriable, names, safe_text(cause, notes=True))
        error.__cause__ = trim_traceback(cause)
        return error

    def caused_by(self, kind: type[BaseException]) -> bool:
        """Tell whether the cause is a *kind*, also after transport, by importable name."""
        return isinstance(self.__cause__, kind) or type_path(kind) in self.cause_types

    def add_others(self, failures: Sequence[StepFailed]) -> None:
        """Mention the other steps that failed in the same run.

        Their texts are part of the transported fields. The tracebacks of some of their causes are notes, so that
        logs and Celery's ``result.traceback`` show them below the first one's.
        """
        self.others = (*self.others, *map(str, failures))
        self.args = (*self.args[:-2], list(self.others), self.item)
        for failure in failures[:MAX_OTHER_TRACES]:
            if failure.__cause__ is not None:
                self.add_note(f"step {failure.step!r} failed too:\n{_show_traceback(failure.__cause__)}")

    def place(self, item: str) -> None:
        """Say on which item the step worked; part of the transported fields."""
        self.item = item
        self.args = (*self.args[:-1], item)

    def describe(self) -> str:
        text = self._fill(
            where=f"step {self.step!r} of item {self.item}" if self.item else f"step {self.step!r}",
            tries="1 attempt" if self.attempts == 1 else f"{self.attempts} attempts",
            why="attempts used up" if self.retriable else "not retriable",
            cause=self.cause_types[0].rpartition(".")[2] if self.cause_types else "error",
        )
        return _with_lines(f"{text}\nalso failed:", self.others) if self.others else text


class StepTimedOut(StepFailed, code="DC202"):
    """A step's last attempt passed its ``timeout``; its late result, if any, is discarded."""

    template = (
        "{where} passed timeout={timeout_s:g} s (attempt {attempts}); raise the timeout, split the step, or watch "
        "ctx.cancelled in it"
    )

    def __init__(
        self,
        step: str,
        attempts: int,
        timeout_s: float,
        retriable: bool = True,
        others: Sequence[str] = (),
        item: str = "",
    ) -> None:
        super().__init__(step, attempts, retriable, [type_path(StepTimedOut)], "", others, item)
        self.timeout_s = timeout_s
        self.args = (step, attempts, timeout_s, retriable, list(others), item)


class WrongResult(StepFailed, code="DC203"):
    """A step returned None or another type than it declares. Never retried."""

    template = "{where} returned {actual}, but declares {expected}; return a {expected}"

    def __init__(
        self,
        step: str,
        attempts: int,
        expected: str,
        actual: str,
        others: Sequence[str] = (),
        item: str = "",
    ) -> None:
        super().__init__(step, attempts, False, [type_path(WrongResult)], "", others, item)
        self.expected, self.actual = expected, actual
        self.args = (step, attempts, expected, actual, list(others), item)


class InputMutated(StepFailed, code="DC204"):
    """A step changed messages that it was given and that other steps share (``docket_check_mutation``)."""

    template = (
        "{where} changed its input {inputs}, which other steps share; copy it first: mine = type(message)(); "
        "mine.CopyFrom(message)"
    )

    def __init__(
        self, step: str, attempts: int, inputs: Sequence[str], others: Sequence[str] = (), item: str = ""
    ) -> None:
        super().__init__(step, attempts, False, [type_path(InputMutated)], "", others, item)
        self.inputs = tuple(inputs)
        self.args = (step, attempts, list(inputs), list(others), item)


class BatchFailed(_Declared, code="DC205"):
    """More items of a batch failed than ``max_failed`` allows.

    Attributes:
        failed: How many failed.
        total: How many items there are.
        allowed: How many might have failed.
        lines: What the first of them failed with.
    """

    template = (
        "{failed} of {total} items failed, max_failed allows {allowed}; mend the cause and submit the batch again "
        "under its execution id: only what is missing runs"
    )
    failed: int
    total: int
    allowed: int
    lines: Sequence[str] = ()

    def describe(self) -> str:
        return _with_lines(self._fill(), self.lines)


class RunCancelled(_Declared, code="DC300"):
    """Someone outside stopped the run."""

    template = "run {execution_id!r} was cancelled: {reason}"
    execution_id: str
    reason: str


class RunTimedOut(_Declared, code="DC301"):
    """The run's own deadline passed before its target was there."""

    template = (
        "run {execution_id!r} passed its timeout of {timeout_s:g} s; finished steps that persist are kept"
    )
    execution_id: str
    timeout_s: float


class RunConflict(_OfRun, code="DC302"):
    """The execution id names a run of another job or target (*what*), or one whose submission is `UNDER_WAY`."""

    template = "run {execution_id!r} of graph {graph!r} {found}"
    what: str
    UNDER_WAY = "submission under way"

    def describe(self) -> str:
        found = f"exists with another {self.what}; use another execution_id, or submit the same job again"
        if self.what == self.UNDER_WAY:
            found = "has a submission under way; wait for it, or for docket_lease_seconds if it broke off"
        return self._fill(found=found)


class RunNotFound(_OfRun, code="DC303"):
    """No run has that name."""

    template = "graph {graph!r} has no run {execution_id!r}: no worker has begun it yet, or it is purged"


class RunQuarantined(_OfRun, code="DC304"):
    """The run lost its worker too often; its code is not started again until an operator says so."""

    template = (
        "run {execution_id!r} of graph {graph!r} is quarantined: its worker was lost {lost} times; find what kills "
        "it (memory, a crash in C code) first"
    )
    lost: int


class GraphChanged(_OfRun, code="DC305"):
    """A resumed run holds checkpoints of steps that are gone or have changed (in parentheses: how). Nothing ran."""

    template = (
        "run {execution_id!r} of graph {graph!r} holds checkpoints of {what}, or use a new execution_id"
    )
    steps: Sequence[str]

    def describe(self) -> str:
        what = f"{', '.join(self.steps)}; make the step what it was"
        if gone := ", ".join(repr(step) for step in self.steps if "(" not in step):
            what = f"{gone}, which the graph no longer has; put the step back, name the old one in renamed_from=(...)"
        return self._fill(what=what)


class LeaseLost(_OfRun, code="DC306"):
    """Another worker took the run over, so this one may not save anything more."""

    template = (
        "run {execution_id!r} of graph {graph!r}: the lease of epoch {epoch} is gone; another worker continues the "
        "run"
    )
    epoch: int


class InputsChanged(_Declared, code="DC307"):
    """A step's checkpoint was made from other inputs than it would get now (``on_input_change="error"``)."""

    template = (
        "run {execution_id!r}: the checkpoint of step {step!r} was made from other inputs; persist the step above "
        'it, use on_input_change="reuse", or submit under a new execution_id'
    )
    execution_id: str
    step: str


class TooManyAbandoned(_Declared, code="DC308"):
    """Steps that ignored their timeout hold so many threads that no run and no step with a timeout may start here."""

    template = (
        "{abandoned} threads are held by steps past their timeout (limit {limit}): {steps}; let those steps watch "
        "ctx.cancelled, then restart the worker"
    )
    abandoned: int
    limit: int
    steps: Sequence[str]


class StoreMissing(_Declared, code="DC400"):
    """A step persists its output, but there is no store to keep it in."""

    template = (
        "step {step!r} of graph {graph!r} persists its output, but no store is configured; set docket_database_url "
        "(or DOCKET_CELERY_DATABASE_URL), or pass store= to the graph or the call"
    )
    graph: str
    step: str


class StoreUnavailable(_Declared, code="DC401"):
    """The database did not answer or refused for a passing reason; trying again is safe."""

    template = "the database did not {action}: {problem}"
    action: str
    problem: str


class SchemaMismatch(_Declared, code="DC402"):
    """The database's tables are missing or of a version that this release does not know."""

    template = "the database {state}, this release needs version {expected}; {fix}"
    found: int | None
    expected: int

    def describe(self) -> str:
        state = "has no docket tables" if self.found is None else f"has docket tables of version {self.found}"
        newer = (self.found or 0) > self.expected
        fix = "upgrade docket-celery" if newer else "run 'celery -A APP docket migrate', or store.migrate()"
        return self._fill(state=state, fix=fix)


class CorruptCheckpoint(_Declared, code="DC403"):
    """A stored row does not match its checksum, its type or its key. It is never used and never overwritten."""

    template = "row {row} of {table} is damaged ({problem}); restore it from a backup or delete it"
    table: str
    row: str
    problem: str


class CodecFailed(_About, code="DC404"):
    """A value cannot be encoded, or a stored one not decoded; such a row is never used and never overwritten."""


class CacheMismatch(_Declared, code="DC405"):
    """A GLOBAL entry is of another type than the step returns: another step's, or of an earlier release."""

    template = (
        "step {step!r} of graph {graph!r} returns {expected}, but {whose} for these inputs is a {found}; give the "
        "step another {fix}, or drop the entry with graph.forget({step!r}, ...)"
    )
    graph: str
    step: str
    cache: str | None
    found: str
    expected: str

    def describe(self) -> str:
        if self.cache is None:
            return self._fill(whose="its entry", fix="version=")
        return self._fill(whose=f"the entry of cache {self.cache!r}", fix="cache= or version=")


class StoreRefused(_About, code="DC406"):
    """The database refused for a reason that trying again does not cure: a missing right, its encoding, a table."""


class PayloadTooLarge(_Declared, code="DC500"):
    """A message is larger than ``docket_max_message_bytes``, or a job or result than ``docket_max_stored_bytes``.

    Attributes:
        setting: The limit's name.
    """

    template = (
        "{what} has {size_bytes} bytes, over the limit of {limit_bytes}; raise {setting}, or store the data "
        "elsewhere and send its key{advice}"
    )
    what: str
    size_bytes: int
    limit_bytes: int
    setting: str = "docket_max_message_bytes"

    def describe(self) -> str:
        advice = "; or let the store take it: a step that persists, and docket_database_url where it is sent"
        return self._fill(advice=advice if self.setting == "docket_max_message_bytes" else "")


class UnknownMessageType(_Declared, code="DC501"):
    """A message names a type that no declared task uses in this process."""

    template = (
        "message type {type_name!r} belongs to no declared GraphTask of this process; import the module that "
        "declares the task, on the worker and where you call .get()"
    )
    type_name: str


class DecodeFailed(_Declared, code="DC502"):
    """The bytes of a message cannot be read as its type."""

    template = "a message of type {type_name!r} cannot be read: {problem}"
    type_name: str
    problem: str


class PayloadUnavailable(_About, code="DC503"):
    """A job or result that was too large for a message is in the store, and cannot be read from there here."""

    template = "{what} is in the store: {problem}"


class ServersUnavailable(_About, code="DC600"):
    """The development servers cannot be found or started."""


def to_record(error: DocketError) -> dict[str, Any]:
    """Return *error* as a JSON object, for the run's row; `from_record` builds the error from it."""
    return {"code": error.code, "args": list(error.args)}


def from_record(record: dict[str, Any]) -> DocketError:
    """Build the error that `to_record` described; an unknown code gives a plain `DocketError`."""
    code, args = str(record.get("code")), record.get("args", [])
    # A user's subclass may have its code or other fields, and so may another release.
    with contextlib.suppress(KeyError, TypeError):
        return _KINDS[code](*args)
    return DocketError(code, *args)


def type_path(kind: type) -> str:
    """Return the importable name of *kind*, as ``module.QualName``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def safe_text(error: BaseException, *, notes: bool = False) -> str:
    """Return the text of *error*, with its *notes* if asked for, bounded: it travels through brokers and backends.

    An exception whose ``__str__`` raises must not hide what happened.
    """
    try:
        text = str(error)
        if notes and hasattr(error, "__notes__"):
            text = "; ".join([text, *map(str, error.__notes__)])
    except Exception as broken:  # noqa: BLE001 -- user code; its failure must not hide the first one
        return f"<{type(error).__name__} whose text raised {type(broken).__name__}>"
    return text if len(text) <= MAX_CAUSE_CHARS else text[: MAX_CAUSE_CHARS - 1] + "…"


def trim_traceback(error: E) -> E:
    """Make the traceback of *error* begin in the users' code: the engine's frames before it are always the same.

    A traceback of the engine's frames alone is left as it is.
    """
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        # Hooks that are generators are entered through contextlib.
        if not file.startswith(_PACKAGE) and file != contextlib.__file__:
            error.__traceback__ = trace
            break
        trace = trace.tb_next
    return error


def _show_traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error)).rstrip()
    return text if len(text) <= MAX_CAUSE_CHARS else "…" + text[-MAX_CAUSE_CHARS:]


def _with_lines(text: str, lines: Sequence[str]) -> str:
    return "\n".join([text, *(f"  - {line}" for line in lines)])
